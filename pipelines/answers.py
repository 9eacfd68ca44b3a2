"""Answers of one model to held-out prompts, and what can be measured on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from align.functions import Chat
from align.recipe import Evaluate
from align.roles import Role
from align.sequences import join, micro_batches
from data.records import Prompt
from pipelines.load_roles import LoadedRoles
from pipelines.rollout import Scorer, as_chat
from pipelines.win_rate import bootstrap, repetitive_rate

GoldJudge = Callable[[list[Chat], list[str]], list[float]]


@dataclass(frozen=True, slots=True)
class Answers:
    """One answer per prompt, in the order of the prompts."""

    ids: list[list[int]]  # stop token included
    texts: list[str]
    ended: list[bool]
    log_ratios: list[float] | None  # log p_model - log p_sft of the answer; None for greedy ones
    scores: list[float] | None  # of the reward that PPO maximises
    gold: list[float] | None


@torch.no_grad()
def answer(
    loaded: LoadedRoles,
    role: Role,
    prompts: Sequence[Prompt],
    section: Evaluate,
    *,
    seed: int,
    scorer: Scorer | None,
    gold: GoldJudge | None,
) -> Answers:
    """Let one role answer the prompts, and judge the answers.

    Args:
        seed: of the sampling; the same one for every model, so that they differ by nothing else.
        scorer: what PPO maximises, None if there is no such thing.
        gold: the judge that training never sees, None if there is none.
    """
    roles = loaded.roles
    chats = [as_chat(prompt) for prompt in prompts]
    prompt_ids = [loaded.renderer.prompt(prompt.messages) for prompt in prompts]
    generated = roles.generate(
        role,
        prompt_ids,
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        end_ids=loaded.end_ids,
        pad_id=loaded.pad_id,
        seed=seed,
        batch_size=section.batch_size,
    )
    texts = [loaded.renderer.decode(ids) for ids in generated.responses]
    log_ratios: list[float] = []
    scores: list[float] = []
    sequences = join(prompt_ids, generated.responses).to(roles.device)
    for rows in micro_batches(sequences.lengths, rows=section.batch_size):
        part = sequences.rows(rows)
        if section.temperature > 0:
            ours = roles.logprobs(role, part, section.temperature)
            theirs = roles.logprobs("reference", part, section.temperature)
            log_ratios += ((ours - theirs) * part.response_mask).sum(1).tolist()
        if scorer is not None:
            scores += scorer([chats[i] for i in rows], [texts[i] for i in rows], part).tolist()
    return Answers(
        ids=generated.responses,
        texts=texts,
        ended=generated.ended,
        log_ratios=log_ratios or None,
        scores=scores if scorer is not None else None,
        gold=gold(chats, texts) if gold is not None else None,
    )


def answer_metrics(
    answers: Answers, categories: Sequence[str] | None, *, resamples: int, seed: int
) -> dict[str, float]:
    """Return the measures of one model's answers.

    ``kl/mean`` is in nats per response: the sum over its tokens of ``log p_model - log p_sft``, on
    the model's own samples (k1). Greedy answers are no samples and have none. ``length/mean``
    counts the stop token. ``score`` and ``gold`` come with a 90 % bootstrap interval.
    """
    count = len(answers.texts)
    metrics = {
        "length/mean": sum(map(len, answers.ids)) / count,
        "eos_rate": sum(answers.ended) / count,
        "empty_rate": sum(not text for text in answers.texts) / count,
        "repetitive_rate": repetitive_rate(answers.ids),
    }
    if answers.log_ratios is not None:
        metrics["kl/mean"] = sum(answers.log_ratios) / count
    for name, values in (("score", answers.scores), ("gold", answers.gold)):
        if values is not None:
            metrics |= bootstrap(values, resamples=resamples, seed=seed).metrics(name)
    if answers.gold is not None and categories is not None:
        for category in sorted(set(categories)):
            values = [g for g, c in zip(answers.gold, categories, strict=True) if c == category]
            metrics[f"gold/{category}"] = sum(values) / len(values)
    return metrics
