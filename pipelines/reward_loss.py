"""What the reward stage minimises: the ranking loss that the recipe chooses, and what is added."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.base_check import own_logprobs, probe_texts
from align.errors import InputError
from align.logprobs import head_logprobs
from align.recipe_reward import MARGINS, STRENGTHS, Reward
from data.records import Ranking
from pipelines.ranked_tokens import Batch, RankedTokens
from reward.model import RewardModel
from reward.ranking import (
    centering_penalty,
    listwise_loss,
    mean_by_prompt,
    ranking_loss,
    strict_pairs,
)


def reward_loss(
    section: Reward,
    model: nn.Module,
    batch: Batch,
    *,
    lm_head: nn.Module | None,
    num_rankings: int | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return a batch's loss and scores.

        L = L_rank + centering_coef * L_center + aux_lm_coef * L_lm

    Each part is a mean over rankings, so that the losses of micro-batches add up to that of their
    step. L_lm is the mean negative log-likelihood, in nats per token, of the best response (GPT-1:
    Radford et al. 2018, eq. 5).

    Args:
        model: a ``RewardModel``; where none of its parts is asked for, also one that is wrapped
            for training in several processes.
        batch: see ``pipelines.ranked_tokens.collate``.
        lm_head: the output embeddings; only for ``aux_lm_coef``.
        num_rankings: of the whole optimiser step; None: of this batch.

    Returns:
        A scalar, and the scores ``[N]``.
    """
    states: Tensor | None = None
    rows = [batch[name] for name in ("input_ids", "attention_mask", "repeated") if name in batch]
    if section.aux_lm_coef:
        assert isinstance(model, RewardModel)
        states = model.states(*rows)
        scores = model.score(states, batch["attention_mask"])
    else:
        scores = model(*rows)
    ranked = scores, batch["groups"], batch["targets"]
    if section.loss == "listwise":
        loss = listwise_loss(*ranked, num_rankings=num_rankings)
    else:
        loss = ranking_loss(
            *ranked,
            margins=batch["margins"],
            votes=batch["votes"] if section.soft_labels else None,
            label_smoothing=section.label_smoothing,
            num_rankings=num_rankings,
        )
    if section.centering_coef:
        penalty = centering_penalty(*ranked, num_rankings=num_rankings)
        loss = loss + section.centering_coef * penalty
    if section.aux_lm_coef:
        assert lm_head is not None
        assert states is not None
        language = _lm_loss(states, batch, lm_head, num_rankings)
        loss = loss + section.aux_lm_coef * language
    return loss, scores


def _lm_loss(
    states: Tensor, batch: Batch, lm_head: nn.Module, num_rankings: int | Tensor | None
) -> Tensor:
    better, _ = strict_pairs(batch["groups"], batch["targets"])
    # A ranking of ties alone has no best response, and is none of those that are counted.
    learned = batch["best_mask"] & torch.isin(batch["groups"], batch["groups"][better])[:, None]
    rows, places = learned[:, 1:].nonzero(as_tuple=True)
    tokens = batch["input_ids"][rows, places + 1]
    logprobs = head_logprobs(states[rows, places], lm_head, tokens).logprobs
    return mean_by_prompt(-logprobs, batch["groups"][rows], num_rankings)


def margin_of(section: Reward, ranking: Ranking) -> float | None:
    """Return what the loss subtracts: a ranking's margin, or what its strength stands for."""
    if section.margin == "column":
        return ranking.margin
    if section.margin == "none" or ranking.strength is None:
        return None
    return MARGINS[section.margin][STRENGTHS.index(ranking.strength)]


def check_columns(section: Reward, rows: Sequence[RankedTokens]) -> None:
    """Refuse a loss for which no row has what it needs.

    Raises:
        InputError: names the key and the missing column.
    """
    if section.margin != "none" and all(row.margin is None for row in rows):
        column = "margin" if section.margin == "column" else "strength"
        raise InputError(
            f"reward.margin={section.margin}: no row of data.reward.train has a {column}; map"
            " one in columns, or choose margin=none"
        )
    if section.soft_labels and not any(row.ranking.votes for row in rows):
        raise InputError(
            "reward.soft_labels=true: no row of data.reward.train has votes; give agreement, votes"
            " or a list of labels, or choose soft_labels=false"
        )


@torch.no_grad()
def output_head(causal_lm: PreTrainedModel) -> nn.Module:
    """Return a model's output embeddings, frozen, for the auxiliary LM loss.

    Raises:
        InputError: the model's own logits are not what they make of its last states.
    """
    head: nn.Module = causal_lm.get_output_embeddings()
    worst = 0.0
    texts = probe_texts(causal_lm.config.get_text_config().vocab_size)
    for text, own in zip(texts, own_logprobs(causal_lm, texts), strict=True):
        ids = torch.tensor([text], device=causal_lm.device)
        states = causal_lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        found = head_logprobs(states[0, :-1], head, ids[0, 1:]).logprobs.cpu()
        worst = max(worst, (found - own).abs().max().item())
    if not worst <= (1e-3 if causal_lm.dtype == torch.float32 else 0.5):
        raise InputError(
            f"reward.aux_lm_coef: log-probabilities of {type(causal_lm).__name__} computed from its"
            f" output embeddings differ from its own by up to {worst:.2g}; allowed for it: 0"
        )
    # Embeddings that are tied to it are thawed again where all weights are trained.
    return head.requires_grad_(False)
