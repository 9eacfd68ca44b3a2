"""Four roles on one base: each is the model it should be, and none disturbs another."""

import copy
import time

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from align.errors import ParentError
from align.functional import ppo_policy_loss, ppo_value_loss
from align.roles import Roles
from align.sequences import Sequences, join
from reward.model import ScoreHead
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


@pytest.fixture
def roles(make_base, folders):
    sft, reward = folders["sft"], folders["reward"]
    return Roles(
        make_base(),
        {"policy": sft, "reference": sft, "reward": reward, "value": reward},
        reward_head=head(0),
        value_head=head(0),
        trainable=("policy", "value"),
    )


@pytest.fixture
def batch():
    return join(PROMPTS, RESPONSES, pad_id=0)


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


# T6, T10: positions, and the mask aligned with the predicted token.
def test_t10_each_role_is_the_model_in_its_folder(make_base, folders, roles, batch):
    for role, folder in (("policy", "sft"), ("reference", "sft"), ("reward", "reward")):
        model = PeftModel.from_pretrained(make_base(), folders[folder]).eval()
        actual = real(roles.logprobs(role, batch), batch)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            expected = teacher_forced(model, prompt, response)
            assert_close(actual[row], expected, rtol=0, atol=2e-5)


def test_the_base_role_is_the_bare_base_bit_for_bit(make_base, roles, batch):
    bare = make_base()(
        batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
    ).logits[:, batch.prompt_width - 1 : -1]
    assert torch.equal(roles.response_logits("base", batch), bare)


def test_t16_policy_and_reference_start_equal(roles, batch):
    assert torch.equal(roles.logprobs("policy", batch), roles.logprobs("reference", batch))


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


def test_padding_row_order_and_company_change_nothing(roles, batch):
    def everything(sequences):
        return [
            *real(roles.logprobs("policy", sequences), sequences),
            *real(roles.values(sequences), sequences),
            *roles.scores(sequences),
        ]

    def widened(extra_left, extra_right):
        left = torch.zeros(len(batch), extra_left, dtype=torch.long)
        right = torch.zeros(len(batch), extra_right, dtype=torch.long)
        return Sequences(
            torch.cat([left, batch.input_ids, right], 1),
            torch.cat([left.bool(), batch.attention_mask, right.bool()], 1),
            torch.cat([batch.response_mask, right.bool()], 1),
        )

    expected = everything(batch)
    for other in (widened(3, 0), widened(0, 4), widened(2, 2), join(PROMPTS, RESPONSES, 17)):
        for mine, theirs in zip(everything(other), expected, strict=True):
            assert_close(mine, theirs, rtol=0, atol=2e-5)
    alone = [everything(join([p], [r], 0)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    for row in range(3):
        for kind in range(3):
            assert_close(alone[row][kind], expected[3 * kind + row], rtol=0, atol=2e-5)


# T7: a token whose id is the pad id is real where the text says so.
def test_t7_a_pad_valued_token_inside_a_text_counts(roles):
    with_pad = join([[5, 0, 7]], [[20, 0, 1]], pad_id=0)
    assert with_pad.attention_mask.all()
    padded = join([[5, 0, 7], [5, 6, 7, 8]], [[20, 0, 1], [20]], pad_id=0)
    assert_close(
        real(roles.logprobs("policy", padded), padded)[0],
        roles.logprobs("policy", with_pad)[0],
        rtol=0,
        atol=2e-5,
    )


# T26: what stands after the stop token is seen by no role.
def test_t26_tokens_outside_the_mask_are_invisible(roles, batch):
    dirty = batch.input_ids.clone()
    dirty[~batch.attention_mask] = 99
    dirty = Sequences(dirty, batch.attention_mask, batch.response_mask)
    assert torch.equal(roles.scores(dirty), roles.scores(batch))
    for mine, theirs in zip(
        real(roles.values(dirty), batch), real(roles.values(batch), batch), strict=True
    ):
        assert torch.equal(mine, theirs)


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
    assert all(".policy." in n or ".value." in n or "value_head" in n for n in before)
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
        reward_head=head(0),
        trainable=("policy",),
    )
    assert {p.dtype for p in roles.role_parameters("policy")} == {torch.float32}
    assert roles.logprobs("policy", batch).dtype == torch.float32
    assert roles.scores(batch).dtype == torch.float32
