"""Rollouts: responses of the policy with everything that PPO needs to know about them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from align.functional import kl_k1, masked_mean, masked_sum
from align.functions import Chat
from align.recipe import Ppo
from align.sequences import Sequences, join
from data.records import Prompt
from pipelines.load_roles import LoadedRoles

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
    seconds: dict[str, float]  # time/rollout and time/score

    @property
    def mask(self) -> Tensor:
        """``response_mask``, ``[B, R]`` bool."""
        return self.sequences.response_mask

    @property
    def kl(self) -> Tensor:
        """KL to the reference per token (k1), ``[B, R]``."""
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
            "entropy": float(masked_mean(self.entropy, self.mask)),
            "length/mean": float(tokens) / len(self.scores),
            "eos_rate": float(self.ended.float().mean()),
        }


def as_chat(prompt: Prompt) -> Chat:
    """Return the prompt as role/content dicts, the form that score functions get."""
    return [{"role": m.role, "content": m.content} for m in prompt.messages]


def micro_batches(num_rows: int, size: int) -> Iterator[slice]:
    """Cut a batch into slices of at most ``size`` rows."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


@torch.no_grad()
def collect(
    loaded: LoadedRoles, prompts: list[Prompt], score: Scorer, section: Ppo, *, seed: int
) -> Rollout:
    """Sample one response per prompt and compute scores, log-probabilities and values.

    The log-probabilities come from the forward pass that training uses, in micro-batches of the
    same rows and width as the first epoch's: before the first update the ratio is exactly 1.
    What ``generate`` computed while sampling is never used.
    """
    roles = loaded.roles
    started = perf_counter()
    prompt_ids = [loaded.renderer.prompt(prompt.messages) for prompt in prompts]
    generated = roles.generate(
        "policy",
        prompt_ids,
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        end_ids=loaded.end_ids,
        pad_id=loaded.pad_id,
        seed=seed,
    )
    sampled = perf_counter()
    sequences = join(prompt_ids, generated.responses, loaded.pad_id).to(roles.device)
    chats = [as_chat(prompt) for prompt in prompts]
    responses = [loaded.renderer.decode(ids) for ids in generated.responses]
    columns: list[tuple[Tensor, ...]] = []
    for rows in micro_batches(len(prompts), section.micro_batch_size or section.minibatch_size):
        part = sequences.rows(rows)
        logprobs, entropy = roles.logprobs_and_entropy("policy", part, section.temperature)
        reference = roles.logprobs("reference", part, section.temperature)
        values = roles.values(part)
        scores = score(chats[rows], responses[rows], part)
        columns.append((logprobs, entropy, reference, values, scores))
    logprobs, entropy, reference, values, scores = (
        torch.cat(column) for column in zip(*columns, strict=True)
    )
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
        seconds={"time/rollout": sampled - started, "time/score": perf_counter() - sampled},
    )
