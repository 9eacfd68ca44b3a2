"""The update of PPO: several epochs of clipped steps on one rollout."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from align import group
from align.engine import Engine
from align.errors import TrainingError
from align.functional import (
    entropy_bonus,
    explained_variance,
    kl_loss,
    masked_sum,
    ppo_policy_loss,
    ppo_value_loss,
)
from align.recipe_ppo import Ppo
from align.roles import PolicyOutput, Roles
from align.sequences import Sequences, micro_batches
from align.zero_layers import ZeroLayers
from pipelines.ptx import Ptx
from pipelines.rollout import Rollout, passes
from pipelines.shaping import Estimates


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one forward pass: ``b`` of them, ``r`` response tokens."""

    sequences: Sequences
    mask: Tensor  # [b, r] bool
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    num_tokens: Tensor  # response tokens of the whole optimiser step


class Updater:
    """Runs the epochs of one rollout after another.

    Args:
        ptx: language modelling mixed into the policy's loss, None without.
        tolerance: how far the ratio may be from 1 before the first step of a rollout.
        layers: the base's, if the group shares them out. Then all its processes make equally many
            passes: who has fewer goes once more through a text, of which nothing counts.
    """

    def __init__(
        self,
        roles: Roles,
        engine: Engine,
        section: Ppo,
        *,
        ptx: Ptx | None,
        tolerance: float,
        layers: ZeroLayers | None = None,
    ) -> None:
        self._roles, self._engine, self._section = roles, engine, section
        self._ptx, self._tolerance, self._layers = ptx, tolerance, layers
        self._policy = roles.role_parameters("policy")
        self._critic = roles.role_parameters("value")
        self.ptx_steps = 0  # batches of language modelling so far

    def update(
        self, rollout: Rollout, estimates: Estimates, *, seed: int, policy: bool = True
    ) -> dict[str, float]:
        """Run the epochs on one rollout and return their mean metrics.

        The first epoch takes the rows as they come, in the micro-batches that the log-probabilities
        were computed in; later epochs shuffle them. Of several processes each takes its part of
        every minibatch.

        Args:
            policy: False trains the critic only.

        Raises:
            TrainingError: the ratio is not 1 before the first step; a parameter got no gradient; a
                gradient is not finite.
        """
        with self._parted():
            totals, norms, first_error = self._epochs(rollout, estimates, seed, policy=policy)
        everywhere = group.gather((totals, first_error))
        tokens_seen = self._section.epochs * float(rollout.mask.sum())
        metrics = {
            f"ppo/{key}": sum(theirs[key] for theirs, _ in everywhere) / tokens_seen
            for key in totals
        }
        metrics["ppo/ratio_first_max_error"] = max(error for _, error in everywhere)
        finite = [norm for norm in norms if math.isfinite(norm)]
        if finite:
            metrics["grad_norm"] = sum(finite) / len(finite)
        if self._engine.loss_scale is not None:
            metrics["loss_scale"] = self._engine.loss_scale.value
            metrics["skipped_steps"] = float(len(norms) - len(finite))
        explained = explained_variance(rollout.values, estimates.returns, rollout.mask)
        if explained == explained:  # NaN where all returns are equal
            metrics["ppo/explained_variance"] = explained
        return metrics

    def _epochs(
        self, rollout: Rollout, estimates: Estimates, seed: int, *, policy: bool
    ) -> tuple[dict[str, float], list[float], float]:
        """Return this process's token sums, each step's norm, and the largest first |ratio - 1|."""
        section = self._section
        generator = torch.Generator().manual_seed(seed)
        trained = self._policy + self._critic if policy else self._critic
        totals: dict[str, float] = {}
        norms: list[float] = []
        first_error = 0.0
        for epoch in range(section.epochs):
            order = list(range(len(rollout.scores)))
            if epoch > 0:
                order = torch.randperm(len(order), generator=generator).tolist()
            for minibatch in micro_batches(order, rows=section.minibatch_size):
                rows = [order[i] for i in minibatch]
                num_tokens = rollout.mask[rows].sum()
                for part in self._parts(rollout, estimates, rows, num_tokens):
                    sums = self._backward(part, estimates.kl_loss_coef, policy=policy)
                    error = sums.pop("ratio_max_error", 0.0)
                    if not norms:
                        self._check_ratio(error)
                        first_error = max(first_error, error)
                    for key, value in sums.items():
                        totals[key] = totals.get(key, 0.0) + value
                if policy and self._ptx is not None:
                    ptx = self._backward_ptx() * float(num_tokens)
                    totals["ptx_loss"] = totals.get("ptx_loss", 0.0) + ptx
                norms.append(self._engine.step(trained))
        return totals, norms, first_error

    def try_backward(self, sequences: Sequences) -> None:
        """Add the gradients of a micro-batch, whatever they are: for the memory that it takes."""
        mask = sequences.response_mask
        zeros = torch.zeros(mask.shape, device=mask.device)
        part = Part(sequences, mask, zeros, zeros, zeros, zeros, zeros, num_tokens=mask.sum())
        with self._parted():
            self._backward(part, self._section.kl.loss_coef, policy=True)

    def _parted(self) -> AbstractContextManager[None]:
        return self._layers.parted() if self._layers is not None else nullcontext()

    def _parts(
        self, rollout: Rollout, estimates: Estimates, minibatch: list[int], num_tokens: Tensor
    ) -> list[Part]:
        """Return this process's passes over its rows of a minibatch."""
        everywhere = [self._passes(rollout, rows) for rows in group.parts(minibatch)]
        here, parts = everywhere[group.rank()], []
        for chosen in here:
            sequences = rollout.sequences.rows(chosen)
            width = sequences.response_mask.shape[1]
            parts.append(
                Part(
                    sequences,
                    sequences.response_mask,
                    logprobs=rollout.logprobs[chosen, :width],
                    ref_logprobs=rollout.ref_logprobs[chosen, :width],
                    values=rollout.values[chosen, :width],
                    advantages=estimates.advantages[chosen, :width],
                    returns=estimates.returns[chosen, :width],
                    num_tokens=num_tokens,
                )
            )
        if self._layers is not None:
            most = max(len(theirs) for theirs in everywhere)
            parts += [_idle(parts[-1])] * (most - len(here))
        return parts

    def _passes(self, rollout: Rollout, rows: Sequence[int]) -> list[list[int]]:
        """Return the rows of each forward pass over some of a rollout's."""
        lengths = tuple(rollout.sequences.lengths[row] for row in rows)
        return [[rows[i] for i in indices] for indices in passes(lengths, self._section)]

    def _backward(self, part: Part, kl_loss_coef: float, *, policy: bool) -> dict[str, float]:
        """Add the gradients of one micro-batch; return token sums of what is logged.

        Policy and critic go through their passes one after the other: with gradient checkpointing
        a second role would be recomputed under the wrong adapter. A critic on the policy's hidden
        states shares its pass.
        """
        section, shared = self._section, self._roles.value_on_policy
        loss, values = torch.zeros(()), None
        sums: dict[str, Tensor] = {}
        if policy or shared:
            output = self._roles.policy(
                part.sequences, section.temperature, with_entropy=section.entropy_coef > 0
            )
            values = output.values
            if policy:
                loss, sums = self._policy_loss(part, output, kl_loss_coef)
        if policy and not shared:
            self._engine.backward(loss)
        value = ppo_value_loss(
            values if values is not None else self._roles.values(part.sequences),
            part.values,
            part.returns,
            part.mask,
            clip=section.value_clip,
            num_tokens=part.num_tokens,
        )
        value_loss = section.value_coef * value.loss
        self._engine.backward(loss + value_loss if policy and shared else value_loss)
        sums = sums | value.sums | {"value_loss": value.loss.detach() * part.num_tokens}
        return {key: float(x) for key, x in sums.items()}

    def _policy_loss(
        self, part: Part, output: PolicyOutput, kl_loss_coef: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        section, num_tokens = self._section, part.num_tokens
        clipped = ppo_policy_loss(
            output.logprobs,
            part.logprobs,
            part.advantages,
            part.mask,
            clip=section.clip,
            dual_clip=section.dual_clip,
            num_tokens=num_tokens,
        )
        loss = clipped.loss
        sums = clipped.sums | {"policy_loss": loss.detach() * num_tokens}
        if kl_loss_coef > 0:
            penalty = kl_loss(
                section.kl.estimator,
                output.logprobs,
                part.ref_logprobs,
                part.mask,
                num_tokens=num_tokens,
            )
            loss = loss + kl_loss_coef * penalty
            sums["kl_loss"] = penalty.detach() * num_tokens
        if output.entropy is not None:
            loss = loss - section.entropy_coef * entropy_bonus(
                output.entropy, part.mask, num_tokens=num_tokens
            )
            sums["entropy"] = masked_sum(output.entropy.detach(), part.mask)
        return loss, sums

    def _backward_ptx(self) -> float:
        """Add the gradient of language modelling, and return this process's part of its loss."""
        assert self._ptx is not None
        assert self._section.ptx is not None
        total = 0.0
        in_step = self._layers is not None
        for loss in self._ptx.losses(self._roles, self.ptx_steps, in_step=in_step):
            self._engine.backward(self._section.ptx.coef * loss)
            total += float(loss.detach())
        self.ptx_steps += 1
        return total

    def _check_ratio(self, error: float) -> None:
        if not error <= self._tolerance:  # NaN is refused, too
            raise TrainingError(
                "before the first update of the rollout, |ratio - 1| is up to"
                f" {error:.2e} (allowed {self._tolerance:.0e}), but sampling and updated policy are"
                " the same; the likely causes are dropout, padding or position ids that differ"
                " between rollout and update, or another temperature"
            )


def _idle(part: Part) -> Part:
    """Return a pass through the same text of which no token counts: its gradients are zeros."""
    return replace(part, mask=torch.zeros_like(part.mask))
