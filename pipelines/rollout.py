"""Rollouts: responses of the policy with everything that PPO needs to know about them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from align import group
from align.functional import kl_k1, kl_k3, masked_mean, masked_sum
from align.functions import Chat
from align.generation import Generated
from align.recipe_ppo import Ppo
from align.roles import Roles
from align.sequences import Sequences, join, micro_batches
from data.records import Prompt
from pipelines.load_roles import LoadedRoles
from pipelines.win_rate import repetitive_rate

# (prompts, responses, sequences) -> [B] float32
Scorer = Callable[[list[Chat], list[str], Sequences], Tensor]


@dataclass(frozen=True, slots=True)
class Rollout:
    """A batch of responses: ``B`` rows, ``R`` response tokens; all under the sampling policy."""

    sequences: Sequences
    prompts: list[Chat]
    responses: list[str]
    ended: Tensor  # [B] bool, True where a stop token was sampled
    scores: Tensor  # [B] of the reward, before any penalty
    logprobs: Tensor  # [B, R] under the policy
    ref_logprobs: Tensor  # [B, R] under the frozen SFT model
    values: Tensor  # [B, R] of the state before each token
    entropy: Tensor  # [B, R]
    # [B] of the state after the last token; only where truncated responses bootstrap from it.
    last_values: Tensor | None
    repetitive_rate: float
    seconds: dict[str, float]  # time/rollout and time/score

    @property
    def mask(self) -> Tensor:
        """``response_mask``, ``[B, R]`` bool."""
        return self.sequences.response_mask

    @property
    def kl(self) -> Tensor:
        """KL to the reference per token (k1), ``[B, R]``; what is logged as KL."""
        return kl_k1(self.logprobs, self.ref_logprobs)

    def metrics(self) -> dict[str, float]:
        """What the rollout says about the policy, under the keys that are logged."""
        tokens = masked_sum(torch.ones_like(self.logprobs), self.mask)
        kl = float(masked_sum(self.kl, self.mask))
        return {
            "score/mean": float(self.scores.mean()),
            "score/std": float(self.scores.std(correction=0)),
            "kl/mean": kl / len(self.scores),
            "kl/token": kl / float(tokens),
            "kl/k3": float(masked_mean(kl_k3(self.logprobs, self.ref_logprobs), self.mask)),
            "entropy": float(masked_mean(self.entropy, self.mask)),
            "length/mean": float(tokens) / len(self.scores),
            "eos_rate": float(self.ended.float().mean()),
            "empty_rate": sum(not text.strip() for text in self.responses) / len(self.responses),
            "repetitive_rate": self.repetitive_rate,
        }


def as_chat(prompt: Prompt) -> Chat:
    """Return the prompt as role/content dicts, the form that score functions get."""
    return [{"role": m.role, "content": m.content} for m in prompt.messages]


def now(device: torch.device) -> float:
    """Return the time in seconds when the device has done all that it was given so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def passes(lengths: Sequence[int], section: Ppo) -> list[list[int]]:
    """Return the rows of each forward pass over these rows."""
    return micro_batches(
        lengths,
        rows=section.micro_batch_size or section.minibatch_size,
        tokens=section.max_tokens_per_microbatch,
    )


@torch.no_grad()
def collect(
    loaded: LoadedRoles,
    prompts: list[Prompt],
    score: Scorer,
    section: Ppo,
    *,
    seed: int,
    alone: bool = False,
) -> Rollout:
    """Sample one response per prompt and compute scores, log-probabilities and values.

    The log-probabilities come from the forward pass that training uses, in the micro-batches of
    the first epoch: before the first update the ratio is 1, exactly so where a pass with and one
    without gradient run the same kernels. What was computed while sampling is never used.

    Of several processes each samples its part of every minibatch, and runs policy, reference and
    critic on it; the first scores them all. All get the whole rollout.

    Args:
        alone: this process makes it without the others.
    """
    together = group.size() > 1 and not alone
    roles = loaded.roles
    started = now(roles.device)
    prompt_ids = [loaded.renderer.prompt(prompt.messages) for prompt in prompts]
    minibatches = micro_batches(range(len(prompts)), rows=section.minibatch_size)
    if together:
        minibatches = [list(group.part(minibatch)) for minibatch in minibatches]
    mine = [row for minibatch in minibatches for row in minibatch]
    generated = _sample(loaded, prompt_ids, mine, section, seed)
    if together:
        generated = _all_responses(generated, mine)
    sampled = now(roles.device)
    sequences = roles.with_trunk(join(prompt_ids, generated.responses).to(roles.device))
    chats = [as_chat(prompt) for prompt in prompts]
    responses = [loaded.renderer.decode(ids) for ids in generated.responses]
    columns = _look_at(roles, sequences, minibatches, section)
    if together:
        columns = _all_rows(columns, mine)
    logprobs, entropy, reference, values, last_values = columns
    scores = score(chats, responses, sequences) if group.is_first() else torch.empty(0)
    if together:
        scores = group.from_first(scores.cpu()).to(roles.device)
    return Rollout(
        sequences=sequences,
        prompts=chats,
        responses=responses,
        ended=torch.tensor(generated.ended, device=roles.device),
        scores=scores.float(),
        logprobs=logprobs,
        ref_logprobs=reference,
        values=values,
        entropy=entropy,
        last_values=last_values if section.bootstrap_truncated else None,
        repetitive_rate=repetitive_rate(generated.responses),
        seconds={"time/rollout": sampled - started, "time/score": now(roles.device) - sampled},
    )


def _sample(
    loaded: LoadedRoles, prompt_ids: list[list[int]], mine: list[int], section: Ppo, seed: int
) -> Generated:
    """Sample the policy's responses to some of the prompts, each from a random stream of its own.

    Args:
        mine: the numbers of these prompts among all.
    """
    return loaded.roles.generate(
        "policy",
        [prompt_ids[row] for row in mine],
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        end_ids=loaded.end_ids,
        pad_id=loaded.pad_id,
        seed=seed,
        batch_size=section.rollout.batch_size,
        streams=mine,
    )


def _all_responses(here: Generated, mine: list[int]) -> Generated:
    """Return the responses of all processes in the order of their prompts.

    Args:
        mine: the numbers of the prompts that were answered here.
    """
    found = [
        one
        for rows, part in group.gather((mine, here))
        for one in zip(rows, part.responses, part.ended, strict=True)
    ]
    _, responses, ended = zip(*sorted(found), strict=True)
    return Generated(list(responses), list(ended))


def _all_rows(columns: list[Tensor], mine: list[int]) -> list[Tensor]:
    """Return what all processes have computed, in the order of the rows, on the same device."""
    device = columns[0].device
    parts = group.gather((mine, [column.cpu() for column in columns]))
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    together = [torch.cat(same) for same in zip(*(part for _, part in parts), strict=True)]
    return [column[order].to(device) for column in together]


def _look_at(
    roles: Roles, sequences: Sequences, minibatches: list[list[int]], section: Ppo
) -> list[Tensor]:
    """Return the columns of ``_look`` for the rows of all minibatches, one after the other."""
    parts = []
    for minibatch in minibatches:
        for indices in passes([sequences.lengths[row] for row in minibatch], section):
            rows = [minibatch[i] for i in indices]
            parts.append(_look(roles, sequences.rows(rows), section))
    width = sequences.response_mask.shape[1]
    return [_stack(column, width) for column in zip(*parts, strict=True)]


def _look(roles: Roles, part: Sequences, section: Ppo) -> tuple[Tensor, ...]:
    """Return what policy, reference and critic say about some rows, ``[b, r]`` or ``[b]`` each."""
    policy = roles.policy(part, section.temperature, with_entropy=True)
    reference = roles.logprobs("reference", part, section.temperature)
    values = policy.values if policy.values is not None else roles.values(part)
    last_values = values[:, 0]
    if section.bootstrap_truncated:
        last_values = roles.last_values(part)
    assert policy.entropy is not None
    return policy.logprobs, policy.entropy, reference, values, last_values


def _stack(parts: tuple[Tensor, ...], width: int) -> Tensor:
    """Put parts ``[b, r]`` or ``[b]`` under each other, ``[B, width]`` or ``[B]``."""
    if parts[0].ndim == 1:
        return torch.cat(parts)
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])
