"""Texts after a prefix: their positions count it, with a cache, padded, and in every pass alike.

Learned positions (GPT-2) show what is wrong anywhere, rotary ones (Llama) only shifts in a text.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from align.adapters import save_trained
from align.generation import generate
from align.recipe import Recipe
from align.recipe_adapter import Adapter
from pipelines.sft import add_adapter
from reward.model import new_reward_model
from tests import tiny
from tests.adapters import randomise

Make = Callable[[], PreTrainedModel]
COUNT = 5
ADAPTER = Adapter(method="prefix", prefix_tokens=COUNT)
TEXTS = [[5, 9, 200, 31, 7, 1], [8, 6]]
both_kinds = pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])


def trained(make: Make) -> Any:
    """A model with a random prefix."""
    section = {"name": "x", "base": {"id": "x"}, "adapter": ADAPTER.model_dump(), "data": {}}
    model = add_adapter(make(), Recipe.model_validate(section)).eval()
    randomise(model, seed=4)
    return model


@torch.no_grad()
def by_hand(model: Any, ids: list[int]) -> Any:
    """What the base says to a text alone, after the prefix, at positions that are spelled out."""
    return model.get_base_model()(
        input_ids=torch.tensor([ids]),
        past_key_values=model.get_prompt(1),
        attention_mask=torch.ones(1, COUNT + len(ids), dtype=torch.long),
        position_ids=COUNT + torch.arange(len(ids))[None],
        use_cache=False,
        output_hidden_states=True,
    )


@both_kinds
def test_the_whole_pass(make: Make) -> None:
    model = trained(make)
    for text in TEXTS:
        ids = torch.tensor([text])
        with torch.no_grad():
            found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        torch.testing.assert_close(found, by_hand(model, text).logits[0], atol=1e-5, rtol=1e-5)


@both_kinds
def test_sampling_with_the_cache_padded_on_the_left(make: Make) -> None:
    model = trained(make)
    made = generate(
        model, TEXTS, max_new_tokens=6, temperature=0, end_ids=[319], pad_id=0, seed=0, engine="hf"
    )
    for text, response in zip(TEXTS, made.responses, strict=True):
        assert len(response) > 1
        for number, token in enumerate(response):
            logits = by_hand(model, text + response[:number]).logits[0, -1]
            assert int(logits.argmax()) == token


@both_kinds
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reward_model_padded_on_either_side(make: Make, side: str, tmp_path: Any) -> None:
    policy = trained(make)
    save_trained(policy, tmp_path, base="x", revision=None)
    model = new_reward_model(make(), ADAPTER, tmp_path, seed=3).eval()
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.bool)
    for row, text in enumerate(TEXTS):
        place = slice(9 - len(text), 9) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = torch.tensor(text), True
    last = [by_hand(policy, text).hidden_states[-1][0, -1] for text in TEXTS]
    expected = [(state * model.head.weight[0]).sum().item() for state in last]
    assert model(ids, mask).tolist() == pytest.approx(expected, abs=1e-5)
