"""Responses of one prompt in one pass: what each would be alone, at the price of one prompt."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.attention import packed_attention
from align.models import recompute_activations
from align.recipe_adapter import Adapter
from reward.model import RewardModel, new_reward_model
from reward.packing import pack
from tests import tiny
from tests.adapters import sft_adapter

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
RESPONSES = [[[20, 1], [21, 22, 23, 1], [24, 1]], [[25, 26, 1], [1]], [[27, 28, 1]]]
ROWS = [p + r for p, responses in zip(PROMPTS, RESPONSES, strict=True) for r in responses]
REPEATED = torch.tensor([0, 5, 5, 0, 1, 0])
COMPUTED = sum(map(len, PROMPTS)) + sum(len(r) for responses in RESPONSES for r in responses)
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.25])  # of the scores, so that each counts

MODELS = {"llama": lambda: tiny.llama(num_key_value_heads=2), "gpt2": tiny.gpt2}


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The rows with padding of which every token is another."""
    width = max(map(len, ROWS)) + 2
    ids, mask = torch.arange(40, 40 + len(ROWS) * width).view(len(ROWS), width), []
    for number, row in enumerate(ROWS):
        first = 0 if side == "right" else width - len(row)
        ids[number, first : first + len(row)] = torch.tensor(row)
        mask.append([first <= column < first + len(row) for column in range(width)])
    return ids, torch.tensor(mask)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path) -> RewardModel:
    def base() -> PreTrainedModel:
        return MODELS[request.param]()

    model = new_reward_model(base(), Adapter(r=4, alpha=8.0), sft_adapter(base(), tmp_path), 3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def scores_and_gradients(model: RewardModel, *rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    scores = model(*rows)
    (scores * WEIGHTS).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return scores.detach(), found


def alone(model: RewardModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Each row by transformers' own attention, without padding."""
    model.zero_grad()
    scores = []
    for row, weight in zip(ROWS, WEIGHTS, strict=True):
        score = model(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))
        (score * weight).sum().backward()
        scores.append(score.detach())
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return torch.cat(scores), gradients


@pytest.mark.parametrize("recomputing", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("repeated", [None, REPEATED], ids=["packed", "shared"])
def test_scores_and_gradients_are_those_of_every_row_alone(
    model: RewardModel, repeated: Tensor | None, side: str, recomputing: bool
) -> None:
    expected, gradients = alone(model)
    if recomputing:
        recompute_activations(model.backbone)
    with packed_attention(model.backbone) as possible:
        assert possible
        rows = (*padded(side), *([] if repeated is None else [repeated]))
        found, ours = scores_and_gradients(model, *rows)
    assert (expected.max() - expected.min()) > 0.1
    assert torch.allclose(found, expected, atol=1e-6)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(ours[name], gradient, atol=1e-6 * float(gradient.abs().max())), name


def test_a_prompt_is_computed_once(model: RewardModel) -> None:
    seen: list[int] = []
    embeddings = model.backbone.get_input_embeddings()
    with packed_attention(model.backbone):
        embeddings.register_forward_hook(lambda module, given, output: seen.append(output.numel()))
        model(*padded("right"), REPEATED)
        model(*padded("right"))
    assert seen == [COMPUTED * 32, sum(map(len, ROWS)) * 32]


def test_the_state_of_a_repeated_token_is_that_of_the_first_row() -> None:
    ids, mask = padded("left")
    packed = pack(ids, mask, REPEATED)
    assert packed.input_ids[0, packed.places[mask]].tolist() == ids[mask].tolist()
    columns = [place for row in ROWS for place in range(len(row))]
    assert packed.position_ids[0, packed.places[mask]].tolist() == columns
