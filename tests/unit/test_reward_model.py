"""The reward model: where it reads its score, in which precision, and what a folder must hold."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from align.adapters import WEIGHTS
from align.errors import InputError, ParentError, TrainingError
from align.recipe_adapter import Adapter
from reward.calibrate import SCORE_FILE, RewardModelError, center_on
from reward.head import HEAD_KEY, ScoreHead, draw_maps, load_score_head
from reward.model import RewardModel, last_hidden, load_reward_model, new_reward_model
from tests import tiny
from tests.adapters import sft_adapter

ADAPTER = Adapter(r=4, alpha=8.0)
END = 1  # tiny's end-of-turn id
MakeBase = Callable[[], PreTrainedModel]
bases = pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])


def rows() -> list[list[int]]:
    """Rows of 9, 5 and 7 tokens that end their turn; the end token also occurs inside."""
    generator = torch.Generator().manual_seed(5)
    draws = [torch.randint(2, 300, (n,), generator=generator).tolist() for n in (8, 4, 6)]
    draws[0][3] = END
    return [[*draw, END] for draw in draws]


def padded(side: str, pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows())) + 2  # every row has padding
    ids, mask = [], []
    for row in rows():
        fill, real = [pad_id] * (width - len(row)), [True] * len(row)
        empty = [False] * len(fill)
        ids.append(row + fill if side == "right" else fill + row)
        mask.append(real + empty if side == "right" else empty + real)
    return torch.tensor(ids), torch.tensor(mask)


def trained(make: MakeBase, folder: Path) -> RewardModel:
    """A reward model with adapter, head and shift away from their first values."""
    model = new_reward_model(make(), ADAPTER, sft_adapter(make(), folder / "sft"), seed=3)
    with torch.no_grad():
        model.head.weight.mul_(3.0)
        model.head.shift.fill_(0.25)
    return model.eval()


def saved(make: MakeBase, folder: Path) -> tuple[RewardModel, Path]:
    make().save_pretrained(folder / "base")
    model = trained(make, folder)
    model.save(folder / "reward", str(folder / "base"), None)
    return model, folder / "reward"


@bases
@pytest.mark.parametrize("pad_id", [0, END], ids=["pad", "pad is end of turn"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_change_scores(
    make: MakeBase, side: str, pad_id: int, tmp_path: Path
) -> None:
    model = trained(make, tmp_path)
    with torch.no_grad():
        alone = [model(torch.tensor([r]), torch.ones(1, len(r)).bool()).item() for r in rows()]
        batch = model(*padded(side, pad_id)).tolist()
    assert batch == pytest.approx(alone, abs=1e-5)
    assert max(alone) - min(alone) > 0.1  # else equality says little


@bases
def test_scores_are_those_of_transformers_and_peft(make: MakeBase, tmp_path: Path) -> None:
    # Their own classifier, loaded from our folder, scores an unpadded row at its last token.
    model, folder = saved(make, tmp_path)
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        ours = model(*padded("left", 0)) + 0.25
        expected = [theirs(torch.tensor([row])).logits.item() for row in rows()]
    assert ours.tolist() == pytest.approx(expected, abs=1e-5)


@bases
def test_a_saved_model_scores_the_same(make: MakeBase, tmp_path: Path) -> None:
    model, folder = saved(make, tmp_path)
    torch.manual_seed(99)
    fresh = load_reward_model(make(), folder)
    with torch.no_grad():
        assert torch.equal(fresh(*padded("right", 0)), model(*padded("right", 0)))
    assert not any(p.requires_grad for p in fresh.parameters())


def test_what_is_trained_is_the_adapter_and_the_head(tmp_path: Path) -> None:
    model = trained(tiny.llama, tmp_path)
    model(*padded("right", 0)).sum().backward()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "score" in name or "head" in name for name in trainable)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable
    heads = [p for p in model.parameters() if p.requires_grad and p.shape == (1, 32)]
    assert len(heads) == 1  # the head that is trained is the one that PEFT saves


def test_starts_from_every_tensor_of_the_sft_adapter(tmp_path: Path) -> None:
    folder = sft_adapter(tiny.llama(), tmp_path / "sft")
    model = new_reward_model(tiny.llama(), ADAPTER, folder, seed=0)
    state = model.classifier.state_dict()
    tensors = load_file(folder / WEIGHTS)
    assert len(tensors) == 28  # 2 layers x 7 projections x (A, B)
    for name, tensor in tensors.items():
        assert torch.equal(state[name.replace(".weight", ".default.weight")], tensor)


def test_an_sft_adapter_of_another_rank_is_refused(tmp_path: Path) -> None:
    folder = sft_adapter(tiny.llama(), tmp_path / "sft")
    with pytest.raises(ParentError, match=r"\(4, 64\) in the file; \(8, 64\) is needed"):
        new_reward_model(tiny.llama(), Adapter(r=8, alpha=8.0), folder, seed=0)


def test_an_sft_adapter_of_another_alpha_is_refused(tmp_path: Path) -> None:
    folder = sft_adapter(tiny.llama(), tmp_path / "sft")
    with pytest.raises(ParentError, match=r"alpha=8.0, the recipe has 16.0"):
        new_reward_model(tiny.llama(), Adapter(r=4, alpha=16.0), folder, seed=0)


def test_an_sft_adapter_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    folder = sft_adapter(tiny.llama(), tmp_path / "sft")
    tensors = load_file(folder / WEIGHTS)
    name = min(tensors)
    del tensors[name]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ParentError, match="is missing in the file"):
        new_reward_model(tiny.llama(), ADAPTER, folder, seed=0)


def drawn(seed: int) -> Tensor:
    head = ScoreHead(4095)
    draw_maps(head, seed)
    return head.weight.detach()


def test_the_first_head_depends_on_the_seed_alone() -> None:
    weight = drawn(seed=7)
    torch.manual_seed(1)
    assert torch.equal(drawn(seed=7), weight)
    assert not torch.equal(drawn(seed=8), weight)
    # 1 / sqrt(4095 + 1) = 1/64; the deviation of 4095 draws is within 4 % of it (3.6 sigma)
    assert weight.std().item() == pytest.approx(1 / 64, rel=0.04)


def test_removing_the_head_from_the_file_makes_loading_fail(tmp_path: Path) -> None:
    _, folder = saved(tiny.llama, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    del tensors[HEAD_KEY]
    save_file(tensors, folder / WEIGHTS)
    for load in (load_score_head, lambda path: load_reward_model(tiny.llama(), path)):
        with pytest.raises(RewardModelError, match="the score head was not saved"):
            load(folder)


def test_removing_an_adapter_tensor_makes_loading_fail(tmp_path: Path) -> None:
    _, folder = saved(tiny.llama, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    del tensors[min(name for name in tensors if "lora_" in name)]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ParentError, match="is missing in the file"):
        load_reward_model(tiny.llama(), folder)


def test_a_whole_model_without_a_tensor_of_its_body_is_refused(tmp_path: Path) -> None:
    model = new_reward_model(tiny.llama(), Adapter(method="full"), tmp_path / "sft", seed=3)
    model.save(tmp_path / "model", str(tmp_path / "sft"), None)
    assert load_reward_model(None, tmp_path / "model").head.weight.equal(model.head.weight)
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    (name,) = (name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 tensors are missing .*like layers\.1\.mlp\.down_proj"):
        load_reward_model(None, tmp_path / "model")


def test_a_head_of_another_precision_is_refused(tmp_path: Path) -> None:
    save_file({HEAD_KEY: torch.zeros(1, 4, dtype=torch.bfloat16)}, tmp_path / WEIGHTS)
    with pytest.raises(RewardModelError, match="one float32 row"):
        load_score_head(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"shift": 0.0}', '{"shift": NaN, "scale": 1.0}', '{"shift": 0.0, "scale": 0.0}'],
)
def test_a_broken_score_file_is_refused(content: str, tmp_path: Path) -> None:
    save_file({HEAD_KEY: torch.zeros(1, 4)}, tmp_path / WEIGHTS)
    (tmp_path / SCORE_FILE).write_text(content)
    with pytest.raises(RewardModelError, match=SCORE_FILE):
        load_score_head(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardModelError, match=WEIGHTS):
        load_score_head(tmp_path)


def test_last_hidden_by_hand() -> None:
    hidden = torch.arange(12.0).view(3, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]]).bool()
    assert last_hidden(hidden, mask).tolist() == [[1.0], [7.0], [10.0]]


def test_head_by_hand() -> None:
    head = ScoreHead(2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[2.0, -1.0]]))
    head.shift.fill_(0.5)
    head.scale.fill_(2.0)
    # (2*1 - 3 - 0.5) / 2 = -0.75 and (2*0.5 + 1 - 0.5) / 2 = 0.75
    assert head(torch.tensor([[[1.0, 3.0], [0.5, -1.0]]])).tolist() == [[-0.75, 0.75]]


def test_head_stays_in_float32() -> None:
    head = ScoreHead(64)
    draw_maps(head, seed=0)
    weight = head.weight.detach().clone()
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), head).to(torch.bfloat16).half()
    assert model[0].weight.dtype == torch.float16
    assert torch.equal(head.weight, weight)
    assert head.shift.dtype == head.scale.dtype == torch.float32
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = hidden.double() @ weight[0].double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head(hidden)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=0)


def test_a_bfloat16_base_keeps_a_float32_head(tmp_path: Path) -> None:
    folder = sft_adapter(tiny.llama(), tmp_path / "sft")
    model = new_reward_model(tiny.llama().bfloat16(), ADAPTER, folder, seed=3)
    assert model.head.weight.dtype == torch.float32
    assert model(*padded("right", 0)).dtype == torch.float32
    model.save(tmp_path / "reward", "base", None)
    assert torch.equal(load_score_head(tmp_path / "reward").weight, model.head.weight)


def test_centring_makes_the_mean_score_zero() -> None:
    raw = torch.tensor([1.0, 2.0, 6.0])
    calibration = center_on(raw)
    assert calibration == (3.0, 1.0)
    assert ((raw - calibration.shift) / calibration.scale).mean().item() == 0.0


def test_scaling_makes_their_spread_one() -> None:
    calibration = center_on(torch.tensor([1.0, 2.0, 6.0]), unit_spread=True)
    # Distances from the mean 3 are 2, 1 and 3: sqrt((4 + 1 + 9) / 3) = sqrt(14 / 3)
    assert calibration == (3.0, pytest.approx(2.160247, abs=1e-6))
    with pytest.raises(TrainingError, match=r"all 2 scores are 1.5, without a spread"):
        center_on(torch.tensor([1.5, 1.5]), unit_spread=True)


def test_shift_survives_the_file(tmp_path: Path) -> None:
    _, folder = saved(tiny.llama, tmp_path)
    assert json.loads((folder / SCORE_FILE).read_text()) == {"shift": 0.25, "scale": 1.0}
    assert math.isclose(load_score_head(folder).shift.item(), 0.25)
