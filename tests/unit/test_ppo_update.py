"""One PPO step on tiny models: exact before the update, the same however it is split, guarded."""

import math

import pytest
import torch
from torch.testing import assert_close

from align.engine import Engine
from align.errors import TrainingError
from align.manifest import BaseFacts
from align.recipe import MissingEos, Ppo, TokenizerSection
from align.roles import Roles
from align.sequences import Sequences
from data.order import draw
from data.records import Message, Prompt
from data.render import Renderer
from data.tokenizer import end_ids, prepare_tokenizer
from pipelines import ppo
from pipelines.load_roles import LoadedRoles
from pipelines.rollout import collect
from reward.model import ScoreHead
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


@pytest.fixture(params=[tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
def loaded(request, tmp_path):
    torch.manual_seed(0)
    sft = adapters.sft_adapter(request.param(), tmp_path / "sft", seed=1)
    rm = adapters.sft_adapter(request.param(), tmp_path / "rm", seed=2)
    heads = [ScoreHead(32), ScoreHead(32)]
    for head in heads:
        head.weight.data.fill_(0.1)
    roles = Roles(
        request.param(),
        {"policy": sft, "reference": sft, "reward": rm, "value": rm},
        reward_head=heads[0],
        value_head=heads[1],
        trainable=("policy", "value"),
    )
    tokenizer = prepare_tokenizer(tiny.tokenizer(), TokenizerSection())
    renderer = Renderer(tokenizer, 64, 64)
    facts = BaseFacts(id="tiny", revision=None, sha256="")
    return LoadedRoles(
        roles, facts, tokenizer, renderer, end_ids(tokenizer), tokenizer.pad_token_id
    )


def rolled(loaded, section=SECTION, seed=0):
    score = lambda prompts, responses, sequences: loaded.roles.scores(sequences)  # noqa: E731
    return collect(loaded, PROMPTS, score, section, seed=seed)


def engine_of(loaded, section=SECTION):
    return ppo._engine(loaded.roles, section)


def changed(**changes):
    return Ppo.model_validate(SECTION.model_dump() | changes)


# T3, T4: exact on the first micro-batch; step 0 has no KL to the reference.
def test_t3_ratio_is_exactly_one_and_kl_zero_before_the_first_update(loaded):
    rollout = rolled(loaded)
    assert float(rollout.kl.abs().max()) == 0.0
    estimates = ppo.estimate(rollout, SECTION, kl_coef=0.05)
    one_pass = changed(epochs=1, minibatch_size=8, micro_batch_size=4)
    rollout = rolled(loaded, one_pass)
    updates = ppo.update(
        loaded.roles, engine_of(loaded, one_pass), rollout, estimates, one_pass, seed=0
    )
    assert updates["ppo/ratio_first_max_error"] == 0.0
    assert updates["ppo/clip_fraction"] == 0.0
    assert updates["ppo/approx_kl"] == 0.0


def test_t3_holds_for_every_rollout_not_only_the_first(loaded):
    engine = engine_of(loaded)
    for step in range(3):
        rollout = rolled(loaded, seed=step)
        estimates = ppo.estimate(rollout, SECTION, kl_coef=0.05)
        updates = ppo.update(loaded.roles, engine, rollout, estimates, SECTION, seed=step)
        assert updates["ppo/ratio_first_max_error"] == 0.0
        assert updates["ppo/approx_kl"] > 0.0
    assert float(rolled(loaded).kl.abs().max()) > 0.0


# T21: gradients do not depend on the micro-batch size.
def test_t21_gradients_are_equal_for_micro_batches_of_1_2_and_4(loaded):
    rollout = rolled(loaded)
    estimates = ppo.estimate(rollout, SECTION, kl_coef=0.05)
    parameters = engine_of(loaded).parameters
    gradients = []
    for size in (1, 2, 4):
        section = changed(micro_batch_size=size)
        engine = engine_of(loaded, section)
        rows = torch.arange(4)
        for part in rows.split(size):
            ppo._backward(
                loaded.roles, engine, rollout, estimates, part, section, rollout.mask[rows].sum()
            )
        gradients.append([p.grad.clone() for p in parameters])
        for p in parameters:
            p.grad = None
    for other in gradients[1:]:
        for mine, theirs in zip(other, gradients[0], strict=True):
            assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_policy_learns_what_the_reward_wants(loaded):
    """A reward for tokens on one side of a plane in output space: their share rises."""
    section = changed(steps=10, lr=5e-3, epochs=4, batch_size=32, minibatch_size=8)
    engine = engine_of(loaded, section)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    along = loaded.roles.base.get_output_embeddings().weight @ direction
    wanted = along > along.quantile(0.7)

    def share(prompts, responses, sequences):
        hits = wanted[sequences.response_ids] & sequences.response_mask
        return hits.sum(1) / sequences.response_mask.sum(1)

    shares = []
    for step in range(section.steps):
        rollout = collect(loaded, PROMPTS * 4, share, section, seed=step)
        shares.append(rollout.metrics()["score/mean"])
        estimates = ppo.estimate(rollout, section, kl_coef=0.0)
        ppo.update(loaded.roles, engine, rollout, estimates, section, seed=step)
    assert sum(shares[-3:]) / 3 > sum(shares[:3]) / 3 + 0.08


# T27: the penalty follows the generator's flag.
def test_t27_missing_eos_lowers_the_returns_of_unfinished_responses_only(loaded):
    rollout = rolled(loaded)
    penalised = changed(missing_eos=MissingEos(mode="subtract", value=5.0).model_dump())
    plain = ppo.estimate(rollout, SECTION, kl_coef=0.05).returns
    less = ppo.estimate(rollout, penalised, kl_coef=0.05).returns
    last = rollout.mask.sum(1) - 1
    rows = torch.arange(len(last))
    expected = torch.where(rollout.ended, 0.0, -5.0)
    assert_close((less - plain)[rows, last], expected, rtol=0, atol=1e-4)
    stopped = [
        bool(set(row[m].tolist()) & set(loaded.end_ids))
        for row, m in zip(rollout.sequences.response_ids, rollout.mask, strict=True)
    ]
    assert rollout.ended.tolist() == stopped


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
    kept = zip(rollout.sequences.response_ids, rollout.mask, strict=True)
    assert [ids[mask].tolist() for ids, mask in kept] == sampled.responses


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
    sequence = rollout.sequences.rows(slice(row, row + 1))
    shorter = torch.zeros_like(sequence.response_mask)
    shorter[:, :2] = True
    cut = Sequences(
        sequence.input_ids,
        torch.cat([sequence.attention_mask[:, : sequence.prompt_width], shorter], 1),
        shorter,
    )
    assert_close(loaded.roles.scores(cut)[0], rollout.values[row, 2], rtol=0, atol=2e-5)


# T31: PyTorch's Adam with the epsilon that the published hyper-parameters go with.
def test_t31_adam_epsilon(loaded):
    optimizer = engine_of(loaded).optimizer
    assert {group["eps"] for group in optimizer.param_groups} == {1e-5}


# T1: sampling at a temperature means log-probabilities at that temperature.
def test_t1_the_temperature_is_in_all_log_probabilities(loaded):
    section = changed(temperature=0.5)
    rollout = rolled(loaded, section)
    logits = loaded.roles.response_logits("policy", rollout.sequences)
    expected = torch.log_softmax(logits / 0.5, -1)
    expected = expected.gather(-1, rollout.sequences.response_ids.unsqueeze(-1)).squeeze(-1)
    mask = rollout.mask
    assert_close(rollout.logprobs[mask], expected[mask], rtol=0, atol=1e-5)
    assert_close(rollout.ref_logprobs[mask], expected[mask], rtol=0, atol=1e-5)


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


def test_dropout_between_rollout_and_update_shows_in_the_ratio(loaded):
    rollout = rolled(loaded)
    estimates = ppo.estimate(rollout, SECTION, kl_coef=0.05)
    for module in loaded.roles.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    layer = next(m for m in loaded.roles.modules() if "policy" in getattr(m, "lora_A", {}))
    layer.lora_dropout["policy"] = torch.nn.Dropout(0.5)
    loaded.roles.train()
    updates = ppo.update(loaded.roles, engine_of(loaded), rollout, estimates, SECTION, seed=0)
    assert updates["ppo/ratio_first_max_error"] > 1e-3


def test_a_frozen_adapter_stops_the_first_step(loaded):
    rollout = rolled(loaded)
    estimates = ppo.estimate(rollout, SECTION, kl_coef=0.05)
    engine = engine_of(loaded)
    for parameter in loaded.roles.role_parameters("value"):
        parameter.requires_grad_(False)
    loaded.roles.value_head.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match="got no gradient"):
        ppo.update(loaded.roles, engine, rollout, estimates, SECTION, seed=0)


def test_a_non_finite_gradient_stops_before_the_weights_change(loaded):
    engine = engine_of(loaded)
    before = [p.detach().clone() for p in engine.parameters]
    for parameter in engine.parameters:
        parameter.grad = torch.full_like(parameter, math.nan)
    with pytest.raises(TrainingError, match="step 1: the gradient's norm is nan"):
        engine.step()
    assert all(torch.equal(p, b) for p, b in zip(engine.parameters, before, strict=True))


def test_engine_learning_rate_warms_up_and_falls_to_zero():
    parameter = torch.nn.Parameter(torch.zeros(1))
    section = changed(schedule="linear", warmup_ratio=0.2, lr=1.0)
    engine = Engine([([parameter], 1.0)], section, num_steps=10)
    rates = []
    for _ in range(10):
        rates.append(engine.lr)
        parameter.grad = torch.ones(1)
        engine.step()
    expected = [0.0, 0.5, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates == pytest.approx(expected)
    assert engine.lr == 0.0


def test_draws_see_every_row_once_before_any_twice():
    stream = draw(10, 0, 20, seed=3)
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    assert draw(10, 7, 6, seed=3) == stream[7:13]
    assert draw(10, 0, 10, seed=4) != stream[:10]
