"""Stage 3: the policy answers prompts, the reward scores the answers, PPO updates the policy.

The loop of InstructGPT (Ouyang et al. 2022, section 3.5) with the implementation details of Huang
et al. 2024: scores at the last token, a per-token KL penalty in the reward, GAE, whitened
advantages, clipped policy and value losses over several epochs.
"""

from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from align import group
from align.adapters import save_adapter
from align.engine import Engine
from align.errors import TrainingError
from align.functional import next_kl_coef
from align.loss_scale import needs_scaling
from align.machine import peak_bytes
from align.models import base_location
from align.recipe import Recipe
from align.recipe_distributed import Distributed
from align.recipe_ppo import Ppo
from align.roles import Role, Roles
from align.seeds import derive_seed
from align.sequences import join
from align.zero import deepspeed_settings
from align.zero_layers import ZeroLayers
from data.order import draw
from data.records import Prompt
from pipelines.frozen import Frozen
from pipelines.load_roles import LoadedRoles, load_roles, usable_prompts
from pipelines.memory_check import check_memory
from pipelines.policy_copies import KeptPolicy
from pipelines.ppo_state import PpoState
from pipelines.probe import Probe
from pipelines.ptx import Ptx
from pipelines.rollout import Rollout, collect, now, passes
from pipelines.scoring import RewardScorer, ppo_scorer, reward_roles
from pipelines.shaping import ScoreScaler, estimate
from pipelines.stage import StageJob, StageResult
from pipelines.stopping import Stopping
from pipelines.update import Updater
from reward.combine import scale_warnings

# |ratio - 1| allowed before the first update, and |KL| per token at step 0, by the coarser of the
# base's dtype and the one that its layers compute in. In float32 both are 0 on a CPU; what is left
# covers kernels that differ with and without gradient.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.05}


def run(job: StageJob) -> StageResult | None:
    """Train policy and critic; see the module's docstring.

    Of several processes each holds all roles and takes its part of every minibatch; gradients are
    summed, and the optimiser's states may be shared out; during updates the models' layers, too.
    What is decided, the first decides for all.
    """
    recipe, section = job.recipe, job.recipe.ppo
    assert section is not None
    loaded = _load(job, section)
    tolerance = max(_TOLERANCE[name] for name in (recipe.base.dtype, loaded.facts.compute_dtype))
    roles = loaded.roles
    score = ppo_scorer(job, section, loaded)
    prompts = usable_prompts(job, loaded, job.data["prompts"].train)
    longest = max(len(loaded.renderer.prompt(prompt.messages)) for prompt in prompts)
    ptx = Ptx(job, loaded, section) if section.ptx is not None else None
    layers = _share_out(roles, section, recipe.distributed)
    engine = _engine(roles, section, recipe.distributed, layers)
    updater = Updater(roles, engine, section, ptx=ptx, tolerance=tolerance, layers=layers)
    scaler, stopping = ScoreScaler(section.reward_scaling), Stopping(section)
    kept = KeptPolicy(section, roles, Probe(job, loaded, score), scaler)
    kl_coef = section.kl.coef or section.kl.loss_coef
    state = PpoState(engine, updater, scaler, stopping, kept, kl_coef)
    frozen = Frozen(roles)
    _try_longest(recipe, loaded, engine, updater, longest)
    _begin(job, state)
    with job.signals.held():
        _train(job, loaded, prompts, score, state, tolerance, frozen)
    group.leave()
    if not group.is_first():
        return None

    metrics = kept.settle(state.metrics) | {"steps": float(state.step)}
    return StageResult(metrics, _save(job, loaded), loaded.tokenizer, loaded.facts)


def _begin(job: StageJob, state: PpoState) -> None:
    """Go on from a checkpoint, or take the first look at the policy."""
    assert job.recipe.ppo is not None
    job.log.start(job.recipe.ppo.steps)
    if job.recipe.distributed.zero == 3:
        job.log.note("ZeRO 3: all layers are whole in every process, except for updates")
    if job.checkpoints.found is not None:
        state.load(job.checkpoints.found.path)
        return
    state.metrics = _look(state, 0, {})
    job.log.log(0, state.metrics)
    state.stopping.reason(0, state.metrics)  # what later looks are compared with


def _train(
    job: StageJob,
    loaded: LoadedRoles,
    prompts: list[Prompt],
    score: RewardScorer,
    state: PpoState,
    tolerance: float,
    frozen: Frozen,
) -> None:
    """Sample, score, estimate and update, from the step after the state's to the last."""
    recipe, section, roles = job.recipe, job.recipe.ppo, loaded.roles
    assert section is not None
    updater, kept = state.updater, state.kept
    for step in range(state.step + 1, section.steps + 1):
        started = now(roles.device)
        first = (step - 1) * section.batch_size
        rows = draw(len(prompts), first, section.batch_size, recipe.seed)
        batch = [prompts[row] for row in rows]
        seed = derive_seed(recipe.seed, "rollout", step)

        rollout = collect(loaded, batch, score, section, seed=seed)
        if step == 1:
            _check_reference(rollout, _reference_tolerance(roles, tolerance))
        estimates = estimate(rollout, section, state.kl_coef, state.scaler)
        trains_policy = step > section.value.warmup_steps
        updates = updater.update(rollout, estimates, seed=seed, policy=trains_policy)
        kept.after_update()

        metrics = rollout.metrics() | estimates.metrics | updates
        metrics |= score.take_metrics() | {"kl/coef": state.kl_coef, "lr": state.engine.lr}
        metrics |= _costs(rollout, now(roles.device) - started)
        metrics = group.from_first(metrics)
        if step == 1:
            for warning in scale_warnings(metrics):
                job.log.note(f"ppo  warning: {warning}")
        if trains_policy:  # else its KL is 0, and says nothing about the coefficient
            state.kl_coef = _next_kl_coef(state.kl_coef, metrics["kl/mean"], section)
        looked = step % section.probe_every == 0 or step == section.steps
        if looked:
            metrics = _look(state, step, metrics)
        reason = state.stopping.reason(step, metrics)
        if reason is not None and not looked:
            metrics = _look(state, step, metrics)
        if looked or reason is not None:
            frozen.check(step)
        job.log.log(step, metrics)
        state.step, state.metrics = step, metrics
        if reason is not None:
            job.log.note(reason)
            break
        job.checkpoints.boundary(step, state.save)


def _look(state: PpoState, step: int, metrics: dict[str, float]) -> dict[str, float]:
    """Look at the policy: the first process does, and all know what it saw."""
    seen = state.kept.look(step, metrics, state.kl_coef) if group.is_first() else {}
    return group.from_first(seen)


def _load(job: StageJob, section: Ppo) -> LoadedRoles:
    """Load the roles.

    The critic starts from this recipe's own reward model where PPO maximises that, else from SFT:
    a reward model of another run, or on an encoder, may be no adapter on our base, and a
    classifier's head gives no score.
    """
    sft = job.parent_folder("sft") / "model"
    rewards = reward_roles(job)
    folders: dict[Role, Path] = {"policy": sft, "reference": sft} | rewards
    on_policy = section.value.trunk == "policy"
    if not on_policy:
        own = section.needs_reward_stage and "reward" in rewards
        own = own and job.parents["reward"].classifier is None
        folders["value"] = rewards["reward"] if own else sft
    return load_roles(
        job,
        folders,
        max_new_tokens=section.max_new_tokens,
        own_models=section.own_models,
        value_on_policy=on_policy,
        trainable=("policy", "value"),
        engine=section.rollout.engine,
    )


def _try_longest(
    recipe: Recipe, loaded: LoadedRoles, engine: Engine, updater: Updater, longest: int
) -> None:
    """Go once through the longest texts there can be; see ``pipelines.memory_check``.

    A rollout's prompts, with room in the cache for whole responses (but any token ends them), and
    a micro-batch of the update.
    """
    section, roles, token = recipe.ppo, loaded.roles, loaded.end_ids[0]
    assert section is not None
    prompt, response = [token] * longest, [token] * section.max_new_tokens
    rows = len(passes((longest + len(response),) * section.minibatch_size, section)[0])

    def step() -> None:
        roles.generate(
            "policy",
            [prompt] * (section.rollout.batch_size or section.batch_size),
            max_new_tokens=section.max_new_tokens,
            temperature=section.temperature,
            end_ids=range(roles.base.config.vocab_size),
            pad_id=loaded.pad_id,
            seed=0,
        )
        sequences = join([prompt] * rows, [response] * rows).to(roles.device)
        updater.try_backward(roles.with_trunk(sequences))
        engine.drop_gradients()

    what = f"prompts of {longest} and responses of {section.max_new_tokens} tokens"
    check_memory(recipe, "ppo", engine.parameters, step, what)


def _engine(
    roles: Roles, section: Ppo, distributed: Distributed, layers: ZeroLayers | None = None
) -> Engine:
    updates = section.steps * section.epochs * (section.batch_size // section.minibatch_size)
    groups = [
        (roles.role_parameters("policy"), section.lr),
        (roles.role_parameters("value"), section.value_lr or section.lr),
    ]
    return Engine(
        groups, section, updates, distributed, layers, in_float16=needs_scaling(roles.base)
    )


def _share_out(roles: Roles, section: Ppo, distributed: Distributed) -> ZeroLayers | None:
    if distributed.zero < 3:
        return None
    models = [roles.base, *(roles.model(role) for role in roles.models)]
    trained = roles.role_parameters("policy") + roles.role_parameters("value")
    return ZeroLayers(models, trained, deepspeed_settings(distributed, section))


def _next_kl_coef(coef: float, kl: float, section: Ppo) -> float:
    if section.kl.target is None:
        return coef
    return next_kl_coef(
        coef,
        kl,
        target=section.kl.target,
        horizon=section.kl.horizon,
        num_responses=section.batch_size,
    )


def _reference_tolerance(roles: Roles, tolerance: float) -> float:
    """Allow more where policy and reference round differently, token by token.

    The policy's own weights are float32, rounded to 16 bits where they are used; the reference is a
    base in 16 bits with its adapter beside it.
    """
    mixed = "policy" in roles.models and roles.base.dtype != torch.float32
    return 10 * tolerance if mixed else tolerance


def _check_reference(rollout: Rollout, tolerance: float) -> None:
    """Before any update the policy is the reference: their log-probabilities are equal."""
    error = float(torch.where(rollout.mask, rollout.kl, 0.0).abs().max())
    if not error <= tolerance:  # NaN is refused, too
        raise TrainingError(
            f"step 0: log-probabilities of policy and reference differ by up to {error:.2e}"
            f" (allowed {tolerance:.0e}), but both are the SFT model; the likely cause is an"
            " adapter that was not loaded, or dropout"
        )


def _costs(rollout: Rollout, seconds: float) -> dict[str, float]:
    """Return time per phase, response tokens per second, and the process's peak memory."""
    return rollout.seconds | {
        "time/update": seconds - sum(rollout.seconds.values()),
        "tokens_per_second": float(rollout.mask.sum()) / seconds,
        "memory/peak_bytes": float(peak_bytes()),
    }


def _save(job: StageJob, loaded: LoadedRoles) -> tuple[str, ...]:
    """Write policy and critic, and check that the policy's folder gives the same weights again."""
    roles, base = loaded.roles, base_location(job.recipe)
    policy, value = job.directory / "policy", job.directory / "value"
    for role, folder in (("policy", policy), ("value", value)):
        folder.mkdir(parents=True)
        if role in roles.models:
            roles.model(role).save_pretrained(folder, safe_serialization=True)
        elif role == "policy" or not roles.value_on_policy:
            assert roles.peft is not None
            save_adapter(roles.peft, folder, role, base=base, revision=loaded.facts.revision)
    loaded.tokenizer.save_pretrained(policy)
    save_file(roles.heads["value"].state_dict(), value / "value_head.safetensors")
    _check_saved(roles, policy)
    samples = ("samples.jsonl",) if (job.directory / "samples.jsonl").is_file() else ()
    return ("policy", "value", *samples)


def _check_saved(roles: Roles, folder: Path) -> None:
    """Compare what is in the files with what is in memory, tensor by tensor.

    Raises:
        TrainingError: names the first that differ.
    """
    live: dict[str, torch.Tensor]
    if "policy" in roles.models:
        live = roles.model("policy").state_dict()
    else:
        live = get_peft_model_state_dict(
            roles.peft, adapter_name="policy", save_embedding_layers=False
        )
    saved = {
        key: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }
    # Of tensors that share their memory only one is written.
    places = {live[key].data_ptr() for key in saved if key in live}
    wrong = [key for key in live if key not in saved and live[key].data_ptr() not in places]
    wrong += [
        key
        for key, tensor in saved.items()
        if key not in live or not torch.equal(tensor, live[key].cpu())
    ]
    if wrong:
        raise TrainingError(
            f"{folder}: the saved policy is not the one in memory: {len(wrong)} tensors differ,"
            f" like {wrong[:2]}"
        )
