"""Stage 3: the policy answers prompts, the reward scores the answers, PPO updates the policy.

The loop of InstructGPT (Ouyang et al. 2022, section 3.5) with the implementation details of Huang
et al. 2024: scores at the last token, a per-token KL penalty in the reward, GAE, whitened
advantages, clipped policy and value losses over several epochs.
"""

import resource
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.adapters import WEIGHTS, save_adapter
from align.engine import Engine
from align.errors import TrainingError
from align.functional import (
    explained_variance,
    gae,
    masked_whiten,
    next_kl_coef,
    penalise_missing_eos,
    ppo_policy_loss,
    ppo_value_loss,
    token_rewards,
)
from align.models import base_location
from align.recipe import Ppo
from align.roles import Role, Roles
from align.seeds import derive_seed
from data.order import draw
from data.records import Prompt
from data.render import render_all
from pipelines.load_roles import LoadedRoles, load_roles
from pipelines.probe import Probe
from pipelines.rollout import Rollout, collect, micro_batches
from pipelines.scoring import ppo_scorer
from pipelines.stage import StageJob, StageResult

# |ratio - 1| allowed before the first update, and |KL| per token at step 0, by base dtype. In
# float32 both are 0 on a CPU; what is left covers kernels that differ with and without gradient.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.05}


@dataclass(frozen=True, slots=True)
class Estimates:
    """What a rollout is worth, per token: ``[B, R]`` each."""

    advantages: Tensor  # whitened over the rollout
    returns: Tensor


def run(job: StageJob) -> StageResult:
    """Train policy and critic; see the module's docstring."""
    recipe, section = job.recipe, job.recipe.ppo
    assert section is not None
    loaded = load_roles(
        job,
        _starting_adapters(job, section),
        max_new_tokens=section.max_new_tokens,
        trainable=("policy", "value"),
    )
    score = ppo_scorer(section, loaded.roles)
    prompts, dropped = _usable(job, loaded)
    probe = Probe(job, loaded, score)
    engine = _engine(loaded.roles, section)
    kl_coef = section.kl.coef
    job.log.start(section.steps)

    job.log.log(0, probe.look(step=0))
    for step in range(1, section.steps + 1):
        started = perf_counter()
        rows = draw(len(prompts), (step - 1) * section.batch_size, section.batch_size, recipe.seed)
        batch = [prompts[row] for row in rows]
        seed = derive_seed(recipe.seed, "rollout", step)

        rollout = collect(loaded, batch, score, section, seed=seed)
        if step == 1:
            _check_reference(rollout, _TOLERANCE[recipe.base.dtype])
        estimates = estimate(rollout, section, kl_coef)
        updates = update(loaded.roles, engine, rollout, estimates, section, seed=seed)
        if updates["ppo/ratio_first_max_error"] > _TOLERANCE[recipe.base.dtype]:
            raise _ratio_error(step, updates["ppo/ratio_first_max_error"])

        metrics = rollout.metrics() | updates | {"kl/coef": kl_coef, "lr": engine.lr}
        metrics |= _costs(rollout, perf_counter() - started)
        if section.kl.target is not None:
            kl_coef = next_kl_coef(
                kl_coef,
                metrics["kl/mean"],
                target=section.kl.target,
                horizon=section.kl.horizon,
                num_responses=section.batch_size,
            )
        stopped = section.kl.stop is not None and metrics["kl/mean"] > section.kl.stop
        if step % section.probe_every == 0 or step == section.steps or stopped:
            metrics |= probe.look(step)
        job.log.log(step, metrics)
        if stopped:
            job.log.note(
                f"stopped at step {step}: kl/mean={metrics['kl/mean']:.2f} exceeds"
                f" ppo.kl.stop={section.kl.stop}"
            )
            break

    metrics["steps"] = float(step)
    folders = _save(job, loaded)
    return StageResult(metrics, folders, loaded.tokenizer, loaded.facts, {"prompts": dropped})


def _starting_adapters(job: StageJob, section: Ppo) -> dict[Role, Path]:
    """Return where each role starts: the critic from the reward model if there is one."""
    sft = job.parent_folder("sft") / "model"
    adapters: dict[Role, Path] = {"policy": sft, "reference": sft, "value": sft}
    if section.reward == "model":
        reward = job.parent_folder("reward") / "model"
        adapters |= {"reward": reward, "value": reward}
    return adapters


def _usable(job: StageJob, loaded: LoadedRoles) -> tuple[list[Prompt], Counter[str]]:
    """Return the training prompts that can be tokenised, and why others cannot."""
    prompts = [row for row in job.data["prompts"].train if isinstance(row, Prompt)]
    rendered, dropped = render_all(
        prompts, lambda prompt: (prompt, loaded.renderer.prompt(prompt.messages))
    )
    job.check_dropped("prompts", dropped)
    return [prompt for prompt, _ in rendered], dropped


def _engine(roles: Roles, section: Ppo) -> Engine:
    updates = section.steps * section.epochs * (section.batch_size // section.minibatch_size)
    groups = [
        (roles.role_parameters("policy"), section.lr),
        (roles.role_parameters("value"), section.value_lr or section.lr),
    ]
    return Engine(groups, section, updates)


def estimate(rollout: Rollout, section: Ppo, kl_coef: float) -> Estimates:
    """Turn scores and KL into token rewards, and those into advantages and returns."""
    scores = rollout.scores
    if section.missing_eos is not None:
        penalty = section.missing_eos
        scores = penalise_missing_eos(scores, rollout.ended, mode=penalty.mode, value=penalty.value)
    rewards = token_rewards(scores, rollout.kl, rollout.mask, kl_coef)
    advantages, returns = gae(
        rewards, rollout.values, rollout.mask, gamma=section.gamma, lam=section.lam
    )
    return Estimates(masked_whiten(advantages, rollout.mask), returns)


def update(
    roles: Roles,
    engine: Engine,
    rollout: Rollout,
    estimates: Estimates,
    section: Ppo,
    *,
    seed: int,
) -> dict[str, float]:
    """Run several epochs of clipped updates on one rollout; return their mean metrics.

    The first epoch takes the rows as they come, in the micro-batches that the log-probabilities
    were computed in; later epochs shuffle them.
    """
    generator = torch.Generator().manual_seed(seed)
    num_rows, size = len(rollout.scores), section.micro_batch_size or section.minibatch_size
    totals: dict[str, float] = {}
    first_error, tokens_seen = 0.0, 0.0
    norms: list[float] = []
    for epoch in range(section.epochs):
        order = torch.arange(num_rows)
        if epoch > 0:
            order = torch.randperm(num_rows, generator=generator)
        for minibatch in order.split(section.minibatch_size):
            num_tokens = rollout.mask[minibatch].sum()
            for rows in micro_batches(len(minibatch), size):
                sums = _backward(
                    roles, engine, rollout, estimates, minibatch[rows], section, num_tokens
                )
                error = sums.pop("ratio_max_error")
                if not norms:
                    first_error = max(first_error, error)
                for key, value in sums.items():
                    totals[key] = totals.get(key, 0.0) + value
            tokens_seen += float(num_tokens)
            norms.append(engine.step())
    means = {f"ppo/{key}": value / tokens_seen for key, value in totals.items()}
    metrics = means | {"ppo/ratio_first_max_error": first_error}
    metrics["grad_norm"] = sum(norms) / len(norms)
    explained = explained_variance(rollout.values, estimates.returns, rollout.mask)
    if explained == explained:  # NaN where all returns are equal
        metrics["ppo/explained_variance"] = explained
    return metrics


def _backward(
    roles: Roles,
    engine: Engine,
    rollout: Rollout,
    estimates: Estimates,
    rows: Tensor,
    section: Ppo,
    num_tokens: Tensor,
) -> dict[str, float]:
    """Add the gradients of one micro-batch; return token sums of what is logged.

    Policy and value go through their forward and backward pass one after the other: with gradient
    checkpointing a second role would otherwise be recomputed under the wrong adapter.
    """
    part, mask = rollout.sequences.rows(rows), rollout.mask[rows]
    policy = ppo_policy_loss(
        roles.logprobs("policy", part, section.temperature),
        rollout.logprobs[rows],
        estimates.advantages[rows],
        mask,
        clip=section.clip,
        num_tokens=num_tokens,
    )
    engine.backward(policy.loss)
    value = ppo_value_loss(
        roles.values(part),
        rollout.values[rows],
        estimates.returns[rows],
        mask,
        clip=section.value_clip,
        num_tokens=num_tokens,
    )
    engine.backward(section.value_coef * value.loss)
    losses = {
        "policy_loss": policy.loss.detach() * num_tokens,
        "value_loss": value.loss.detach() * num_tokens,
    }
    return {key: float(x) for key, x in (policy.sums | value.sums | losses).items()}


def _check_reference(rollout: Rollout, tolerance: float) -> None:
    """Before any update the policy is the reference: their log-probabilities are equal."""
    error = float(torch.where(rollout.mask, rollout.kl, 0.0).abs().max())
    if error > tolerance:
        raise TrainingError(
            f"step 0: log-probabilities of policy and reference differ by up to {error:.2e}"
            f" (allowed {tolerance:.0e}), but both are the SFT model; the likely cause is an"
            " adapter that was not loaded, or dropout"
        )


def _ratio_error(step: int, error: float) -> TrainingError:
    return TrainingError(
        f"step {step}: before the first update of the rollout, |ratio - 1| is up to {error:.2e},"
        " but sampling and updated policy are the same; the likely causes are dropout, padding or"
        " position ids that differ between rollout and update, or another temperature"
    )


def _costs(rollout: Rollout, seconds: float) -> dict[str, float]:
    """Return time per phase, response tokens per second, and the process's peak memory."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return rollout.seconds | {
        "time/update": seconds - sum(rollout.seconds.values()),
        "tokens_per_second": float(rollout.mask.sum()) / seconds,
        "memory/peak_bytes": float(peak),
    }


def _save(job: StageJob, loaded: LoadedRoles) -> tuple[str, ...]:
    """Write policy and critic, and check that the policy's folder gives the same model again."""
    roles, base = loaded.roles, base_location(job.recipe)
    assert roles.peft is not None
    assert roles.value_head is not None
    policy, value = job.directory / "policy", job.directory / "value"
    save_adapter(roles.peft, policy, "policy", base=base)
    loaded.tokenizer.save_pretrained(policy)
    save_adapter(roles.peft, value, "value", base=base)
    save_file(roles.value_head.state_dict(), value / "value_head.safetensors")
    _check_saved(roles, policy)
    return ("policy", "value", "samples.jsonl")


def _check_saved(roles: Roles, folder: Path) -> None:
    saved = load_file(folder / WEIGHTS)
    live = get_peft_model_state_dict(roles.peft, adapter_name="policy", save_embedding_layers=False)
    if saved.keys() != live.keys() or any(
        not torch.equal(saved[key], live[key].cpu()) for key in saved
    ):
        raise TrainingError(f"{folder}: the saved policy is not the one in memory")
