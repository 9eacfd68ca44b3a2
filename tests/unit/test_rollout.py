"""Rollouts: what they are sampled from, how they end, and what the critic says after them."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from align.roles import Roles
from pipelines.rollout import collect
from tests import adapters, tiny
from tests.unit.test_ppo_update import (
    PROMPTS,
    changed,
    head,
    load,
    rolled,
    sampled_ids,
    updater_of,
    worth,
)

ENGINES = ["native", "hf"]


def nothing(prompts, responses, sequences):
    return torch.zeros(len(responses))


def random_head(seed):
    made = head()
    made.weight.data = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
    return made


# T1: at one temperature is sampled and learned.
@pytest.mark.parametrize("engine", ENGINES)
def test_t1_responses_are_sampled_at_the_temperature(engine, tmp_path):
    loaded = load(tiny.llama, tmp_path, engine=engine)
    count = 1500
    section = changed(temperature=0.5, batch_size=count, minibatch_size=500, max_new_tokens=1)
    rollout = collect(loaded, [PROMPTS[0]] * count, nothing, section, seed=0)
    drawn = torch.bincount(rollout.sequences.response_tokens, minlength=320) / count

    plain = PeftModel.from_pretrained(tiny.llama(), tmp_path / "sft").eval()
    with torch.no_grad():
        prompt = torch.tensor([loaded.renderer.prompt(PROMPTS[0].messages)])
        logits = plain(prompt).logits[0, -1]
    half, one = (logits / 0.5).softmax(-1), logits.softmax(-1)
    likelier = half > one  # all tokens that a low temperature is good for
    spread = 4 * (0.25 / count) ** 0.5
    assert float((half - one)[likelier].sum()) > 3 * spread
    assert float(drawn[likelier].sum()) == pytest.approx(float(half[likelier].sum()), abs=spread)


@pytest.mark.parametrize("engine", ENGINES)
def test_t1_rollout_and_update_have_the_same_temperature(engine, tmp_path):
    loaded = load(tiny.llama, tmp_path, engine=engine)
    section = changed(temperature=0.5, lr=1e-2)
    for step in range(2):
        rollout = rolled(loaded, section, seed=step)
        metrics = updater_of(loaded, section).update(rollout, worth(rollout, section), seed=step)
        assert metrics["ppo/ratio_first_max_error"] < 1e-4
        assert metrics["ppo/approx_kl"] > 0


# T17: a stop token is an end also where the limit would have been one.
@pytest.mark.parametrize("engine", ENGINES)
def test_t17_a_stop_token_at_the_last_place_is_an_end(engine, tmp_path):
    loaded = load(tiny.llama, tmp_path, engine=engine)
    free = sampled_ids(rolled(replace(loaded, end_ids=(319,))))
    assert {len(ids) for ids in free} == {6}
    stop = next(ids[-1] for ids in free if ids[-1] not in ids[:-1])
    rollout = rolled(replace(loaded, end_ids=(stop,)))
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in free]
    assert sampled_ids(rollout) == expected
    ended = [ids[-1] == stop for ids in expected]
    assert rollout.ended.tolist() == ended
    whole = [end for ids, end in zip(expected, ended, strict=True) if len(ids) == 6]
    assert sorted(set(whole)) == [False, True]  # as long as each other, and only some have ended


# T17: the state after the last token, under the critic and none of the other roles.
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("trunk", ["own", "policy"])
def test_t17_the_last_value_is_the_critics_of_the_state_after_the_response(engine, trunk, tmp_path):
    loaded = load(tiny.llama, tmp_path, engine=engine)
    folders = {"policy": tmp_path / "sft", "reward": tmp_path / "rm"}
    for role, seed in (("reference", 3), ("value", 4)):  # no two roles are the same
        folders[role] = adapters.sft_adapter(tiny.llama(), tmp_path / role, seed=seed)
    if trunk == "policy":
        del folders["value"]
    roles = Roles(
        tiny.llama(),
        folders,
        heads={"reward": random_head(8), "value": head()},
        engine=engine,
    )
    section = changed(bootstrap_truncated=True)
    rollout = collect(replace(loaded, roles=roles), PROMPTS, nothing, section, seed=0)

    critic = folders["value"] if trunk == "own" else folders["policy"]
    model = PeftModel.from_pretrained(tiny.llama(), critic).eval().get_base_model()
    expected = []
    for prompt, response in zip(PROMPTS, sampled_ids(rollout), strict=True):
        ids = torch.tensor([loaded.renderer.prompt(prompt.messages) + response])
        with torch.no_grad():
            expected.append(model.base_model(ids).last_hidden_state[0, -1] @ head().weight[0])
    assert rollout.last_values is not None
    assert_close(rollout.last_values, torch.stack(expected), rtol=0, atol=2e-5)
