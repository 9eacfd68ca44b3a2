"""One PPO step on tiny models: exact before the update, the same however it is split, guarded."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from align.adapters import WEIGHTS, save_adapter
from align.engine import Engine
from align.errors import TrainingError
from align.manifest import BaseFacts
from align.merging import merged
from align.recipe import TokenizerSection
from align.recipe_distributed import Distributed
from align.recipe_ppo import MissingEos, Ppo
from align.roles import Roles
from align.sequences import join
from data.order import draw
from data.records import Message, Prompt
from data.render import Renderer
from data.tokenizer import end_ids, prepare_tokenizer
from pipelines import ppo
from pipelines.load_roles import LoadedRoles
from pipelines.rollout import collect, now
from pipelines.shaping import ScoreScaler, estimate
from pipelines.update import Updater
from reward.head import ScoreHead
from tests import adapters, tiny

SECTION = Ppo(
    lr=1e-3,
    batch_size=8,
    minibatch_size=4,
    steps=4,
    epochs=2,
    max_new_tokens=6,
    schedule="constant",
    warmup_ratio=0.0,
)
WORDS = ["hello", "What is red?", "Tom", "Say hello to Mira.", "a", "b c", "kite", "Paris"]
PROMPTS = [Prompt((Message("user", text),)) for text in WORDS]


def head():
    made = ScoreHead(32)
    made.weight.data = 0.3 * torch.randn(1, 32, generator=torch.Generator().manual_seed(7))
    return made


OWN = {"shared": (), "separate": ("policy", "value"), "critic": ("value",), "policy": ("policy",)}


def tied():
    return tiny.llama(tie_word_embeddings=True)


def own_model(base, role, folder):
    model = merged(base, folder)
    return model if role == "policy" else model.base_model


def load(make_base, folder, *, layout="shared", trunk="own", engine="native", layers="all"):
    """The roles as the stage would load them, from random adapters."""
    torch.manual_seed(0)
    sft = adapters.sft_adapter(make_base(), folder / "sft", seed=1, layers=layers)
    rm = adapters.sft_adapter(make_base(), folder / "rm", seed=2, layers=layers)
    folders = {"policy": sft, "reference": sft, "reward": rm}
    if trunk == "own":
        folders["value"] = rm
    own = [role for role in OWN[layout] if role in folders]
    roles = Roles(
        make_base(),
        {role: path for role, path in folders.items() if role not in own},
        models={role: own_model(make_base(), role, folders[role]) for role in own},
        heads={"reward": head(), "value": head()},
        trainable=("policy", "value"),
        engine=engine,
    )
    tokenizer = prepare_tokenizer(tiny.tokenizer(), TokenizerSection())
    renderer = Renderer(tokenizer, 64, 64)
    facts = BaseFacts(id="tiny", revision=None, sha256="")
    return LoadedRoles(
        roles, facts, tokenizer, renderer, end_ids(tokenizer), tokenizer.pad_token_id
    )


@pytest.fixture(params=[tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
def loaded(request, tmp_path):
    return load(request.param, tmp_path)


def rolled(loaded, section=SECTION, seed=0):
    score = lambda prompts, responses, sequences: loaded.roles.scores(sequences)  # noqa: E731
    return collect(loaded, PROMPTS, score, section, seed=seed)


def engine_of(loaded, section=SECTION):
    return ppo._engine(loaded.roles, section, Distributed())


def changed(**changes):
    return Ppo.model_validate(SECTION.model_dump() | changes)


def worth(rollout, section=SECTION, kl_coef=0.05):
    return estimate(rollout, section, kl_coef, ScoreScaler(section.reward_scaling))


def updater_of(loaded, section=SECTION, engine=None, tolerance=1e-4):
    engine = engine or engine_of(loaded, section)
    return Updater(loaded.roles, engine, section, ptx=None, tolerance=tolerance)


# T3, T4: exact on the first micro-batch; step 0 has no KL to the reference.
def test_t3_ratio_is_exactly_one_and_kl_zero_before_the_first_update(loaded):
    rollout = rolled(loaded)
    assert float(rollout.kl.abs().max()) == 0.0
    estimates = worth(rollout)
    one_pass = changed(epochs=1, minibatch_size=8, micro_batch_size=4)
    rollout = rolled(loaded, one_pass)
    updates = updater_of(loaded, one_pass).update(rollout, estimates, seed=0)
    assert updates["ppo/ratio_first_max_error"] == 0.0
    assert updates["ppo/clip_fraction"] == 0.0
    assert updates["ppo/approx_kl"] == 0.0


def test_t3_holds_for_every_rollout_not_only_the_first(loaded):
    updater = updater_of(loaded)
    for step in range(3):
        rollout = rolled(loaded, seed=step)
        estimates = worth(rollout)
        updates = updater.update(rollout, estimates, seed=step)
        assert updates["ppo/ratio_first_max_error"] == 0.0
        assert updates["ppo/approx_kl"] > 0.0
    assert float(rolled(loaded).kl.abs().max()) > 0.0


# T21: gradients do not depend on the micro-batch size.
def test_t21_gradients_are_equal_for_micro_batches_of_1_2_and_4(loaded):
    rollout = rolled(loaded)
    estimates = worth(rollout)
    parameters = engine_of(loaded).parameters
    gradients = []
    for cut in ({"micro_batch_size": n} for n in (1, 2, 4)):
        gradients.append(gradient_of_four_rows(loaded, rollout, estimates, changed(**cut)))
    for tokens in (1, 40, 10_000):
        section = changed(max_tokens_per_microbatch=tokens)
        gradients.append(gradient_of_four_rows(loaded, rollout, estimates, section))
    assert len(gradients[0]) == len(parameters)
    for other in gradients[1:]:
        for mine, theirs in zip(other, gradients[0], strict=True):
            assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def gradient_of_four_rows(loaded, rollout, estimates, section):
    """The gradients of the first minibatch, and how many passes they took."""
    updater = updater_of(loaded, section)
    rows = list(range(4))
    parts = updater._parts(rollout, estimates, rows, rollout.mask[rows].sum())
    if section.micro_batch_size is not None:
        assert len(parts) == 4 // section.micro_batch_size
    for part in parts:
        updater._backward(part, 0.0, policy=True)
    parameters = updater._engine.parameters
    gradients = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    return gradients


@pytest.mark.parametrize("layout", ["separate", "critic", "policy"])
@pytest.mark.parametrize("make_base", [tiny.llama, tiny.gpt2])
def test_all_layouts_give_the_same_numbers(make_base, layout, tmp_path):
    """Merged weights are the base plus its adapter, whoever adds them up."""
    shared = load(make_base, tmp_path / "a")
    separate = load(make_base, tmp_path / "b", layout=layout)
    ours, theirs = rolled(shared), rolled(separate)
    assert sampled_ids(ours) == sampled_ids(theirs)
    for name in ("logprobs", "ref_logprobs", "values", "entropy", "scores"):
        assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-5)
    updates = [
        updater_of(loaded, tolerance=1e-3).update(rollout, worth(rollout), seed=0)
        for loaded, rollout in ((shared, ours), (separate, theirs))
    ]
    for key in ("ppo/ratio_first_max_error", "ppo/explained_variance"):
        assert updates[0][key] == pytest.approx(updates[1][key], abs=1e-4)
    if layout != "critic":
        moved = [p for p in separate.roles.role_parameters("policy") if p.grad is None]
        assert len(moved) == len(list(make_base().parameters()))  # cleared after the step


@pytest.mark.parametrize("make_base", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("trunk", ["own", "policy"])
def test_a_cached_trunk_changes_no_number_and_no_gradient(make_base, trunk, tmp_path):
    loaded = load(make_base, tmp_path, trunk=trunk, layers="top-half")
    assert loaded.roles.trunk.depth == 1
    section = changed(value={"trunk": trunk})
    cached = rolled(loaded, section)
    assert cached.sequences.trunk is not None
    plain = replace(cached, sequences=replace(cached.sequences, trunk=None))
    estimates = worth(cached)
    gradients = [gradient_of_four_rows(loaded, r, estimates, section) for r in (cached, plain)]
    for mine, theirs in zip(*gradients, strict=True):
        assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for role in ("policy", "reference", "reward"):
        pair = [
            loaded.roles.hidden(role, r.sequences, r.sequences.response_spans)
            for r in (cached, plain)
        ]
        assert_close(*pair, rtol=0, atol=1e-6)
    part = cached.sequences.rows([3, 1])
    assert_close(
        loaded.roles.logprobs("policy", part)[0],
        rolled(loaded, section).logprobs[3, : part.response_mask.shape[1]],
        rtol=0,
        atol=1e-5,
    )


def test_a_critic_on_the_policys_states_trains_both_in_one_pass(tmp_path):
    loaded = load(tiny.llama, tmp_path, trunk="policy")
    roles = loaded.roles
    assert roles.value_on_policy
    assert len(roles.role_parameters("value")) == 1
    rollout = rolled(loaded)
    before = [p.detach().clone() for p in updater_of(loaded)._engine.parameters]
    metrics = updater_of(loaded).update(rollout, worth(rollout), seed=0)
    assert metrics["ppo/ratio_first_max_error"] == 0.0
    after = [*roles.role_parameters("policy"), *roles.role_parameters("value")]
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("trunk", ["own", "policy"])
def test_t23_warming_up_the_critic_leaves_the_policy_alone(tmp_path, trunk):
    loaded = load(tiny.llama, tmp_path, trunk=trunk)
    policy, value = (loaded.roles.role_parameters(role) for role in ("policy", "value"))
    before = [[p.detach().clone() for p in group] for group in (policy, value)]
    rollout = rolled(loaded)
    metrics = updater_of(loaded).update(rollout, worth(rollout), seed=0, policy=False)
    assert all(torch.equal(p, b) for p, b in zip(policy, before[0], strict=True))
    assert any(not torch.equal(p, b) for p, b in zip(value, before[1], strict=True))
    assert "ppo/policy_loss" not in metrics


# T14: the KL counts in the loss, and then nowhere else.
def test_t14_a_kl_in_the_loss_pulls_towards_the_reference(tmp_path):
    loaded = load(tiny.llama, tmp_path)
    generator = torch.Generator().manual_seed(0)
    for p in loaded.roles.role_parameters("policy"):
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    section = changed(kl={"coef": 0.0, "loss_coef": 10.0, "estimator": "k3"}, lr=3e-3)
    zero = lambda prompts, responses, sequences: torch.zeros(len(sequences))  # noqa: E731
    updater, kls = updater_of(loaded, section), []
    for step in range(15):
        rollout = collect(loaded, PROMPTS, zero, section, seed=step)
        kls.append(rollout.metrics()["kl/k3"])
        updater.update(rollout, worth(rollout, section, kl_coef=10.0), seed=step)
    assert kls[-1] < 0.7 * kls[0]


def test_the_policy_learns_what_the_reward_wants(loaded):
    """A reward for tokens on one side of a plane in output space: their share rises."""
    section = changed(steps=10, lr=5e-3, epochs=4, batch_size=32, minibatch_size=8)
    updater = updater_of(loaded, section)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    along = loaded.roles.base.get_output_embeddings().weight @ direction
    wanted = along > along.quantile(0.7)

    def share(prompts, responses, sequences):
        hits = sequences.per_response(wanted[sequences.response_tokens])
        return hits.sum(1) / sequences.response_mask.sum(1)

    shares = []
    for step in range(section.steps):
        rollout = collect(loaded, PROMPTS * 4, share, section, seed=step)
        shares.append(rollout.metrics()["score/mean"])
        estimates = worth(rollout, section, kl_coef=0.0)
        updater.update(rollout, estimates, seed=step)
    assert sum(shares[-3:]) / 3 > sum(shares[:3]) / 3 + 0.08


# T27: the penalty follows the generator's flag.
def test_t27_missing_eos_lowers_the_returns_of_unfinished_responses_only(loaded):
    rollout = rolled(loaded)
    penalised = changed(missing_eos=MissingEos(mode="subtract", value=5.0).model_dump())
    plain = worth(rollout).returns
    less = worth(rollout, penalised).returns
    last = rollout.mask.sum(1) - 1
    rows = torch.arange(len(last))
    expected = torch.where(rollout.ended, 0.0, -5.0)
    assert_close((less - plain)[rows, last], expected, rtol=0, atol=1e-4)
    stopped = [bool(set(ids) & set(loaded.end_ids)) for ids in sampled_ids(rollout)]
    assert rollout.ended.tolist() == stopped


def sampled_ids(rollout):
    lengths = rollout.mask.sum(1).tolist()
    return [ids.tolist() for ids in rollout.sequences.response_tokens.split(lengths)]


# T29: what is trained on are the sampled ids, never text that was encoded again.
def test_t29_the_policy_trains_on_the_sampled_ids(loaded):
    rollout = rolled(loaded)
    sampled = loaded.roles.generate(
        "policy",
        [loaded.renderer.prompt(prompt.messages) for prompt in PROMPTS],
        max_new_tokens=SECTION.max_new_tokens,
        temperature=1.0,
        end_ids=loaded.end_ids,
        pad_id=loaded.pad_id,
        seed=0,
    )
    assert sampled_ids(rollout) == sampled.responses


# T15: one number per response, one per token, and which is which.
def test_t15_kl_is_logged_per_response_and_per_token(loaded):
    for parameter in loaded.roles.role_parameters("policy"):
        parameter.data.mul_(1.5)
    rollout = rolled(loaded)
    pairs = zip(rollout.logprobs - rollout.ref_logprobs, rollout.mask, strict=True)
    per_response = [float(kl[mask].sum()) for kl, mask in pairs]
    metrics = rollout.metrics()
    assert metrics["kl/mean"] == pytest.approx(sum(per_response) / 8, rel=1e-4)
    tokens = int(rollout.mask.sum())
    assert metrics["kl/token"] == pytest.approx(sum(per_response) / tokens, rel=1e-4)


# T23: the critic starts as the reward model: its first values are scores of unfinished answers.
def test_t23_the_critic_starts_from_the_reward_model(loaded):
    rollout = rolled(loaded)
    row = int(rollout.mask.sum(1).argmax())
    ids = sampled_ids(rollout)[row]
    cut = join([loaded.renderer.prompt(PROMPTS[row].messages)], [ids[:2]])
    assert_close(loaded.roles.scores(cut)[0], rollout.values[row, 2], rtol=0, atol=2e-5)


# T31: PyTorch's Adam with the epsilon that the published hyper-parameters go with.
def test_t31_adam_epsilon(loaded):
    optimizer = engine_of(loaded).optimizer.optimizer
    assert {group["eps"] for group in optimizer.param_groups} == {1e-5}


# T1: sampling at a temperature means log-probabilities at that temperature.
def test_t1_the_temperature_is_in_all_log_probabilities(loaded):
    section = changed(temperature=0.5)
    rollout = rolled(loaded, section)
    hidden = loaded.roles.hidden("policy", rollout.sequences, rollout.sequences.response_spans)
    logits = loaded.roles.base.get_output_embeddings()(hidden)
    expected = torch.log_softmax(logits / 0.5, -1)
    expected = expected.gather(-1, rollout.sequences.response_tokens[:, None])[:, 0]
    assert_close(rollout.logprobs[rollout.mask], expected, rtol=0, atol=1e-5)
    assert_close(rollout.ref_logprobs[rollout.mask], expected, rtol=0, atol=1e-5)


def test_sampling_leaves_the_global_random_state_alone(loaded):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    rolled(loaded)
    assert torch.equal(torch.rand(3), expected)


def test_a_reference_that_is_not_the_sft_model_is_noticed(loaded):
    loaded.roles.role_parameters("reference")[1].data.add_(0.1)
    with pytest.raises(TrainingError, match=r"step 0: .* policy and reference differ"):
        ppo._check_reference(rolled(loaded), 1e-4)


def test_nan_passes_neither_check_before_the_first_update(loaded):
    rollout = rolled(loaded)
    broken = replace(rollout, logprobs=rollout.logprobs * math.nan)
    with pytest.raises(TrainingError, match=r"step 0: .* differ by up to nan"):
        ppo._check_reference(broken, 1e-4)
    estimates = worth(rollout)
    for tolerance in (1e-4, math.inf):
        with pytest.raises(TrainingError, match=r"\|ratio - 1\| is up to nan"):
            updater_of(loaded, tolerance=tolerance).update(broken, estimates, seed=0)


def saved(loaded, folder):
    """The policy as the stage writes it."""
    roles = loaded.roles
    if "policy" in roles.models:
        roles.model("policy").save_pretrained(folder)
    else:
        save_adapter(roles.peft, folder, "policy", base="base", revision=None)
    return folder / ("model.safetensors" if "policy" in roles.models else WEIGHTS)


@pytest.mark.parametrize("make_base", [tiny.llama, tiny.gpt2, tied])
@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_a_saved_policy_is_compared_number_by_number(make_base, layout, tmp_path):
    loaded = load(make_base, tmp_path, layout=layout)
    file = saved(loaded, tmp_path / "policy")
    ppo._check_saved(loaded.roles, file.parent)
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    turned = tensors[name].flip(0)  # the same sum
    for wrong in (tensors | {name: turned}, {n: t for n, t in tensors.items() if n != name}):
        save_file({n: t.contiguous() for n, t in wrong.items()}, file, {"format": "pt"})
        with pytest.raises(TrainingError, match=r"is not the one in memory: \d tensors differ"):
            ppo._check_saved(loaded.roles, file.parent)


def test_the_time_is_read_when_a_gpu_has_finished(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    now(torch.device("cpu"))
    assert waited == []
    first, second = (now(torch.device("cuda", 0)) for _ in range(2))
    assert waited == [torch.device("cuda", 0)] * 2
    assert first < second


def test_dropout_between_rollout_and_update_shows_in_the_ratio(loaded):
    rollout = rolled(loaded)
    estimates = worth(rollout)
    for module in loaded.roles.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    layer = next(m for m in loaded.roles.modules() if "policy" in getattr(m, "lora_A", {}))
    layer.lora_dropout["policy"] = torch.nn.Dropout(0.5)
    loaded.roles.train()
    before = [p.detach().clone() for p in loaded.roles.parameters()]
    with pytest.raises(TrainingError, match=r"\|ratio - 1\| is up to .* dropout"):
        updater_of(loaded).update(rollout, estimates, seed=0)
    assert all(torch.equal(p, b) for p, b in zip(loaded.roles.parameters(), before, strict=True))


def test_a_frozen_adapter_stops_the_first_step(loaded):
    rollout = rolled(loaded)
    estimates = worth(rollout)
    updater = updater_of(loaded)
    for parameter in loaded.roles.role_parameters("value"):
        parameter.requires_grad_(False)
    loaded.roles.heads["value"].weight.requires_grad_(True)
    with pytest.raises(TrainingError, match="got no gradient"):
        updater.update(rollout, estimates, seed=0)


def test_a_non_finite_gradient_stops_before_the_weights_change(loaded):
    engine = engine_of(loaded)
    before = [p.detach().clone() for p in engine.parameters]
    for parameter in engine.parameters:
        parameter.grad = torch.full_like(parameter, math.nan)
    with pytest.raises(TrainingError, match="step 1: the gradient's norm is nan"):
        engine.step(engine.parameters)
    assert all(torch.equal(p, b) for p, b in zip(engine.parameters, before, strict=True))


def test_engine_learning_rate_warms_up_and_falls_to_zero():
    parameter = torch.nn.Parameter(torch.zeros(1))
    section = changed(schedule="linear", warmup_ratio=0.2, lr=1.0)
    engine = Engine([([parameter], 1.0)], section, num_steps=10)
    rates = []
    for _ in range(10):
        rates.append(engine.lr)
        parameter.grad = torch.ones(1)
        engine.step([parameter])
    expected = [0.0, 0.5, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates == pytest.approx(expected)
    assert engine.lr == 0.0


def test_draws_see_every_row_once_before_any_twice():
    stream = draw(10, 0, 20, seed=3)
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    assert draw(10, 7, 6, seed=3) == stream[7:13]
    assert draw(10, 0, 10, seed=4) != stream[:10]
