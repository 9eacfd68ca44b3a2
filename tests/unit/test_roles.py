"""Four roles on one base: each is the model it should be, and none disturbs another."""

import copy
import time

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from align import lora
from align.errors import InputError, ParentError
from align.functional import ppo_policy_loss, ppo_value_loss
from align.quantization import prepare_quantized
from align.recipe import Base
from align.roles import Roles
from align.sequences import Sequences, join
from reward.head import ScoreHead
from tests import adapters, tiny

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]
RESPONSES = [[20, 21, 22, 1], [23, 1], [24, 25, 26]]
MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2}


def head(seed: int) -> ScoreHead:
    made = ScoreHead(32)
    made.weight.data = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
    return made


@pytest.fixture(params=MODELS)
def make_base(request):
    return MODELS[request.param]


@pytest.fixture
def folders(make_base, tmp_path):
    return {
        "sft": adapters.sft_adapter(make_base(), tmp_path / "sft", seed=1),
        "reward": adapters.sft_adapter(make_base(), tmp_path / "reward", seed=2),
    }


def make_roles(base, folders, **settings):
    sft, reward = folders["sft"], folders["reward"]
    return Roles(
        base,
        {"policy": sft, "reference": sft, "reward": reward, "value": reward},
        heads={"reward": head(0), "value": head(0)},
        trainable=("policy", "value"),
        **settings,
    )


@pytest.fixture(params=["native", "hf"])
def roles(make_base, folders, request):
    return make_roles(make_base(), folders, engine=request.param)


@pytest.fixture
def batch():
    return join(PROMPTS, RESPONSES)


@torch.no_grad()
def teacher_forced(model, prompt, response):
    """One row without padding, one token after another: the plainest way to log-probabilities."""
    logprobs = []
    for t, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:t]])).logits[0, -1]
        logprobs.append(torch.log_softmax(logits, -1)[token])
    return torch.stack(logprobs)


def real(values, batch):
    return [row[mask] for row, mask in zip(values, batch.response_mask, strict=True)]


# T10: the mask aligned with the predicted token.
def test_t10_each_role_is_the_model_in_its_folder(make_base, folders, roles, batch):
    for role, folder in (("policy", "sft"), ("reference", "sft"), ("reward", "reward")):
        model = PeftModel.from_pretrained(make_base(), folders[folder]).eval()
        actual = real(roles.logprobs(role, batch), batch)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            expected = teacher_forced(model, prompt, response)
            assert_close(actual[row], expected, rtol=0, atol=2e-5)


def test_the_base_role_is_the_bare_base(make_base, roles, batch):
    actual = real(roles.logprobs("base", batch), batch)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        expected = teacher_forced(make_base(), prompt, response)
        assert_close(actual[row], expected, rtol=0, atol=2e-5)


def test_t16_policy_and_reference_start_equal(roles, batch):
    assert torch.equal(roles.logprobs("policy", batch), roles.logprobs("reference", batch))


# T6: every text counts its positions from 0, wherever it stands in the row or the batch. Learned
# positions show it; rotary ones would hide it.
def test_t6_positions_start_anew_with_every_text(folders, make_base, roles, batch):
    last = batch.rows([0, 1, 2, 2])
    assert last.position_ids.tolist()[-9:] == list(range(9))
    alone = roles.logprobs("policy", batch.rows([2]))[0]
    for row, actual in enumerate(real(roles.logprobs("policy", last), last)[2:]):
        assert_close(actual, alone, rtol=0, atol=2e-5, msg=lambda m, row=row: f"{row}: {m}")


# T4: a frozen 4-bit base has other kernels with and without gradients; old and new
# log-probabilities come from the same ones.
def test_t4_on_a_4_bit_base_the_ratio_is_1_and_gradients_stay(tmp_path, batch):
    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    sft = adapters.sft_adapter(tiny.llama(hidden_size=64, intermediate_size=128), tmp_path / "sft")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, quantization_config=nf4
    )
    prepare_quantized(base, Base(id="tiny", quantization="nf4"), torch.device("cpu"))
    roles = Roles(base, {"policy": sft, "reference": sft}, trainable=("policy",))
    roles.generate(
        "policy", PROMPTS, max_new_tokens=4, temperature=1.0, end_ids=[1], pad_id=0, seed=0
    )
    with torch.no_grad():
        old, reference = roles.logprobs("policy", batch), roles.logprobs("reference", batch)
    new = roles.logprobs("policy", batch)
    assert torch.equal(new, old)
    assert torch.equal(new, reference)
    new.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in roles.role_parameters("policy"))


# T5: in bfloat16 what sampling computed is not what training computes; only the latter is used.
def test_t5_in_bfloat16_the_ratio_is_1_by_the_training_pass(make_base, folders, batch):
    sft = folders["sft"]
    roles = Roles(make_base().bfloat16(), {"policy": sft, "reference": sft}, trainable=("policy",))
    with torch.no_grad():
        old = roles.logprobs("policy", batch)
    assert torch.equal(roles.logprobs("policy", batch), old)
    assert torch.equal(roles.logprobs("reference", batch), old)
    exact = make_roles(make_base(), folders).logprobs("policy", batch)
    assert 1e-4 < float((old - exact)[batch.response_mask].abs().max()) < 1.0


def test_t5_a_trained_model_beside_a_bfloat16_base_computes_in_bfloat16(make_base, folders, batch):
    model = make_base()
    roles = Roles(
        make_base().bfloat16(),
        {"reference": folders["sft"]},
        models={"policy": model},
        trainable=("policy",),
    )
    seen = []
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D))
    layer.register_forward_hook(
        lambda m, inputs, output: seen.append((output.dtype, torch.is_autocast_cache_enabled()))
    )
    with torch.no_grad():
        old = roles.logprobs("policy", batch)
    assert torch.equal(roles.logprobs("policy", batch), old)
    assert old.dtype == torch.float32
    # Sampling keeps the copies of the weights for its next token; no pass with gradients does.
    assert seen == [(torch.bfloat16, True), (torch.bfloat16, False)]
    roles.logprobs("policy", batch).sum().backward()
    assert {p.grad.dtype for p in roles.role_parameters("policy")} == {torch.float32}


# T11: values belong to the state before a token, scores to the last token.
def test_t11_scores_and_values_by_hand(make_base, folders, roles, batch):
    model = PeftModel.from_pretrained(make_base(), folders["reward"]).eval()
    weight = head(0).weight[0]
    scores, values = roles.scores(batch), real(roles.values(batch), batch)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = torch.tensor([prompt + response])
        hidden = model.get_base_model().base_model(ids).last_hidden_state[0]
        assert_close(scores[row], hidden[-1] @ weight, rtol=0, atol=2e-5)
        before = hidden[len(prompt) - 1 : -1] @ weight
        assert_close(values[row], before, rtol=0, atol=2e-5)


def everything(roles, sequences):
    """Every role's answer for every text: a list of (log-probabilities, values, score)."""
    return list(
        zip(
            real(roles.logprobs("policy", sequences), sequences),
            real(roles.values(sequences), sequences),
            roles.scores(sequences),
            strict=True,
        )
    )


@pytest.mark.parametrize("order", [[0], [1], [2], [2, 0], [1, 2, 0]])
def test_row_order_and_company_change_nothing(roles, batch, order):
    expected = everything(roles, batch)
    for row, actual in zip(order, everything(roles, batch.rows(order)), strict=True):
        for mine, theirs in zip(actual, expected[row], strict=True):
            assert_close(mine, theirs, rtol=0, atol=2e-5)


# T7: a token whose id is the pad id is real where the text says so; padding is not.
def test_t7_a_pad_valued_token_inside_a_text_counts(roles):
    alone = join([[5, 0, 7]], [[20, 0, 1]])
    assert alone.response_mask.all()
    assert alone.padded()[1].all()
    beside = join([[5, 0, 7], [5, 6, 7, 8]], [[20, 0, 1], [20, 9, 9, 9, 9]])
    assert_close(
        real(roles.logprobs("policy", beside), beside)[0],
        roles.logprobs("policy", alone)[0],
        rtol=0,
        atol=2e-5,
    )


# T7, T26: in padded batches, what stands in the padding is seen by no role.
def test_t26_what_fills_the_padding_is_invisible(make_base, folders, batch, monkeypatch):
    roles = make_roles(make_base(), folders, engine="hf")
    expected = everything(roles, batch)
    zeros = Sequences.padded
    monkeypatch.setattr(Sequences, "padded", lambda self: zeros(self, pad_id=99))
    for mine, theirs in zip(everything(roles, batch), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def gradients(roles, batch):
    policy = roles.policy(batch, 0.7, with_entropy=True)
    loss = (policy.logprobs.sum() + 0.3 * policy.entropy.sum()) + (roles.values(batch) ** 2).sum()
    loss.backward()
    return {name: p.grad for name, p in roles.named_parameters() if p.requires_grad}


def test_both_engines_give_the_same_numbers_and_gradients(make_base, folders, batch):
    native, hf = (make_roles(make_base(), folders, engine=e) for e in ("native", "hf"))
    ours, theirs = gradients(native, batch), gradients(hf, batch)
    assert len(ours) > 8
    for name, gradient in theirs.items():
        largest = float(gradient.abs().max())
        assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * max(1.0, largest))
    for mine, expected in zip(everything(native, batch), everything(hf, batch), strict=True):
        for a, b in zip(mine, expected, strict=True):
            assert_close(a, b, rtol=0, atol=1e-5)


def test_both_engines_choose_the_same_greedy_tokens(make_base, folders):
    native, hf = (make_roles(make_base(), folders, engine=e) for e in ("native", "hf"))
    settings = {"max_new_tokens": 20, "temperature": 0, "pad_id": 0, "seed": 0, "batch_size": 2}
    sampled = hf.generate("policy", PROMPTS, end_ids=[1], **settings).responses
    assert native.generate("policy", PROMPTS, end_ids=[1], **settings).responses == sampled
    # Some rows stop early, the others go on without them.
    stops = [sampled[0][3], sampled[2][7]]
    ours = native.generate("policy", PROMPTS, end_ids=stops, **settings)
    assert ours == hf.generate("policy", PROMPTS, end_ids=stops, **settings)
    assert any(ours.ended)


def test_sampling_computes_no_adapter_beside_its_layer(tmp_path, monkeypatch):
    roles = Roles(tiny.llama(), {"policy": adapters.sft_adapter(tiny.llama(), tmp_path / "sft")})
    monkeypatch.setattr(lora._LoraLinear, "apply", lambda *_: pytest.fail("beside the layer"))
    settings = {"temperature": 1.0, "max_new_tokens": 6, "pad_id": 0, "seed": 0}
    assert roles.generate("policy", PROMPTS, end_ids=[1], **settings).responses


def test_a_base_with_a_sliding_window_is_refused_by_the_native_engine(folders, make_base):
    base = make_base()
    base.config.sliding_window = 8
    with pytest.raises(InputError, match=r"ppo.rollout.engine=native.*sliding window.*hf"):
        make_roles(base, folders)


def test_base_weights_exist_once(make_base, roles):
    shared = {p.data_ptr() for n, p in roles.base.named_parameters() if ".lora_" not in n}
    assert len(shared) == len(list(make_base().parameters()))
    own = [{p.data_ptr() for p in roles.role_parameters(r)} for r in ("policy", "reference")]
    assert not own[0] & own[1]


def test_switching_roles_leaves_gradients_alone_and_takes_microseconds(roles, batch):
    def trainable():
        return {name for name, p in roles.named_parameters() if p.requires_grad}

    before = trainable()
    assert before
    assert all(".policy." in n or ".value." in n or "heads.value" in n for n in before)
    for role in ("reference", "reward", "base", "policy"):
        with roles.use(role), roles.use("value"):
            pass
    roles.logprobs("reference", batch)
    assert trainable() == before
    started = time.perf_counter()
    for _ in range(200):
        with roles.use("policy"):
            pass
    assert (time.perf_counter() - started) / 200 < 1e-3


def optimise(roles, batch, steps=3):
    parameters = [*roles.role_parameters("policy"), *roles.role_parameters("value")]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    advantages = torch.ones_like(batch.response_mask, dtype=torch.float32)
    for _ in range(steps):
        new = roles.logprobs("policy", batch)
        values = roles.values(batch)
        mask = batch.response_mask
        loss = ppo_policy_loss(new, new.detach(), advantages, mask, clip=0.2, num_tokens=9).loss
        loss += ppo_value_loss(
            values, values.detach(), advantages, mask, clip=0.2, num_tokens=9
        ).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()


# T24: training the critic, which starts as a copy of the reward model, must not move the scores.
def test_t24_training_moves_policy_and_value_and_nothing_else(roles, batch):
    def look():
        with torch.no_grad():
            return {
                "policy": roles.logprobs("policy", batch),
                "reference": roles.logprobs("reference", batch),
                "base": roles.logprobs("base", batch),
                "scores": roles.scores(batch),
                "values": roles.values(batch),
            }

    before = look()
    optimise(roles, batch)
    after = look()
    for name in ("reference", "base", "scores"):
        assert torch.equal(before[name], after[name]), name
    for name in ("policy", "values"):
        assert not torch.equal(before[name], after[name]), name


# T8: dropout in the files of an adapter or a base has no effect.
def test_t8_dropout_is_off_even_in_training_mode(make_base, folders, batch):
    base = make_base()
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    config = (folders["sft"] / "adapter_config.json").read_text()
    (folders["sft"] / "adapter_config.json").write_text(
        config.replace('"lora_dropout": 0.0', '"lora_dropout": 0.5')
    )
    roles = Roles(base, {"policy": folders["sft"]}).train()
    assert torch.equal(roles.logprobs("policy", batch), roles.logprobs("policy", batch))


# T9: sampling with the cache gives the tokens that the full forward pass gives.
def test_t9_greedy_sampling_equals_the_uncached_argmax(roles):
    roles.train()
    sampled = roles.generate(
        "policy", PROMPTS, max_new_tokens=6, temperature=0, end_ids=[1], pad_id=0, seed=0
    ).responses
    roles.base.set_attn_implementation("sdpa")
    with roles.use("policy"), torch.no_grad():
        for prompt, response in zip(PROMPTS, sampled, strict=True):
            ids = list(prompt)
            for token in response:
                assert int(roles.base(torch.tensor([ids])).logits[0, -1].argmax()) == token
                ids.append(token)
    assert roles.training


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"intermediate_size": 48}])
def test_an_adapter_for_another_base_is_refused(folders, change):
    with pytest.raises(ParentError, match="does not fit the base"):
        Roles(tiny.llama(**change), {"policy": folders["sft"]})


def test_bf16_base_keeps_adapters_and_scores_in_float32(make_base, folders, batch):
    sft = folders["sft"]
    roles = Roles(
        copy.deepcopy(make_base()).bfloat16(),
        {"policy": sft, "reward": sft},
        heads={"reward": head(0)},
        trainable=("policy",),
    )
    assert {p.dtype for p in roles.role_parameters("policy")} == {torch.float32}
    assert roles.logprobs("policy", batch).dtype == torch.float32
    assert roles.scores(batch).dtype == torch.float32


def test_a_layer_that_is_called_like_a_role_is_none_of_its_parameters(tmp_path):
    def make():  # projections of BERT are called ``value``
        base = tiny.llama()
        for layer in base.model.layers:
            layer.self_attn.value = layer.self_attn._modules.pop("v_proj")
        return base

    ours = dict.fromkeys(("policy", "reference"), adapters.sft_adapter(make(), tmp_path / "sft"))
    heads = {"value": ScoreHead(32)}  # a critic on the policy's states has no more
    roles = Roles(make(), ours, heads=heads, trainable=("policy", "value"), engine="hf")
    trained = {name for name, p in roles.named_parameters() if p.requires_grad}
    assert all(".policy." in name or name.startswith("heads.value.") for name in trained)
