"""Heads of several maps: what they compute, how they are saved, and who refuses them."""

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from align.adapter_methods import adapter_config, check_trained
from align.adapters import save_trained
from align.attention import packed_attention
from align.errors import InputError, ParentError
from align.models import without_dropout
from align.recipe_adapter import Adapter
from align.recipe_reward import Head
from align.roles import Roles
from align.sequences import join
from pipelines.load_roles import _heads
from pipelines.plain_checkpoint import write_reward_model
from reward.calibrate import SCORE_FILE
from reward.encoder import Form, load_encoder_reward, new_encoder_reward
from reward.head import ScoreHead, draw_maps, load_score_head
from reward.model import RewardModel, load_reward_model, new_reward_model
from tests import tiny
from tests.adapters import randomise
from tests.unit.test_packing import REPEATED, ROWS, padded

HEAD = Head(depth=3, width=8)
# The maps of a decoder with 32 states: 8 x 32, 8 x 8, 1 x 8.
NAMES = ("weight", "deeper.0", "deeper.1")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "alpha": 8.0},
    "full": {},
    "head_only": {},
    "bottleneck": {"bottleneck_size": 4},
    "prefix": {"prefix_tokens": 3},
}
every_method = pytest.mark.parametrize("method", METHODS)
MASK = torch.ones(2, 5, dtype=torch.bool)
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def made(method: str, folder: Path, labels: tuple[str, ...] = ()) -> RewardModel:
    """A reward model that starts from an SFT model of the same method."""
    adapter = Adapter.model_validate({"method": method} | METHODS[method])
    base: Any = tiny.llama()
    base.save_pretrained(folder / "base")
    if method == "full":
        base.save_pretrained(folder / "sft")
    else:
        config = adapter_config(adapter, "CAUSAL_LM", base)
        assert config is not None
        adapted = get_peft_model(base, config)
        randomise(adapted, 1)
        save_trained(cast(Any, adapted), folder / "sft", base=str(folder / "base"), revision=None)
        base = tiny.llama()
    model = new_reward_model(base, adapter, folder / "sft", 3, labels, HEAD)
    check_trained(model.classifier, adapter.method)
    return model.eval()


def again(method: str, folder: Path) -> RewardModel:
    return load_reward_model(None if method == "full" else tiny.llama(), folder)


def test_a_deep_head_by_hand() -> None:
    head = ScoreHead(2, widths=(2,))
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        head.deeper[0].copy_(torch.tensor([[3.0, -1.0]]))
    head.shift.fill_(0.5)
    head.scale.fill_(2.0)

    def gelu(x: float) -> float:  # x times the normal distribution's share below x
        return x * (1 + math.erf(x / math.sqrt(2))) / 2

    # The state (1, -1) becomes (1, -2); 3 gelu(1) - gelu(-2) = 2.524034 + 0.045500
    expected = (3 * gelu(1.0) - gelu(-2.0) - 0.5) / 2
    assert expected == pytest.approx(1.034767, abs=1e-6)
    assert head(torch.tensor([1.0, -1.0])).item() == pytest.approx(expected, abs=1e-6)


def test_a_linear_head_is_drawn_as_before() -> None:
    head = ScoreHead(32, 3)
    draw_maps(head, seed=7)
    drawn = torch.randn(3, 32, generator=torch.Generator().manual_seed(7)) / math.sqrt(33)
    assert torch.equal(head.weight, drawn)
    assert sorted(head.state_dict()) == ["scale", "shift", "weight"]


def test_every_map_is_drawn_by_its_inputs() -> None:
    head = ScoreHead(255, widths=(1023, 63))
    draw_maps(head, seed=7)
    maps = [head.weight, *head.deeper]
    assert [tuple(m.shape) for m in maps] == [(1023, 255), (63, 1023), (1, 63)]
    for weight, deviation in zip(maps[:2], (1 / 16, 1 / 32), strict=True):
        assert weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert torch.equal(maps[2], _again(head, 7)[2])


def _again(head: ScoreHead, seed: int) -> list[Tensor]:
    torch.manual_seed(1)  # a generator of its own
    draw_maps(head, seed)
    return [head.weight, *head.deeper]


def test_a_deep_head_stays_in_float32() -> None:
    head = ScoreHead(64, widths=(16,))
    draw_maps(head, seed=0)
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = head(hidden.float())
    head.to(torch.bfloat16).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head(hidden)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)


@every_method
@pytest.mark.parametrize("labels", [(), ("a", "b")], ids=["score", "classes"])
def test_a_saved_deep_head_scores_the_same(
    method: str, labels: tuple[str, ...], tmp_path: Path
) -> None:
    model = made(method, tmp_path, labels)
    model(IDS, MASK).sum().backward()
    maps = [model.head.weight, *model.head.deeper]
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in maps)
    with torch.no_grad():  # away from what is drawn, in place: what PEFT saves moves with it
        for parameter in maps:
            parameter.mul_(1.5)
        expected = model(IDS, MASK)
    assert expected.std() > 1e-3
    folder = tmp_path / "model"
    model.save(folder, str(tmp_path / "base"), None)
    assert json.loads((folder / SCORE_FILE).read_text())["head_widths"] == [8, 8]
    torch.manual_seed(99)
    loaded = again(method, folder)
    with torch.no_grad():
        assert torch.equal(loaded(IDS, MASK), expected)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_deep_head_without_one_of_its_tensors_is_refused(method: str, tmp_path: Path) -> None:
    made(method, tmp_path).save(tmp_path / "model", str(tmp_path / "base"), None)
    (file,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(file)
    heads = [name for name in tensors if ".score." in f".{name}"]
    assert sorted(name.rpartition("score.")[2] for name in heads) == sorted(NAMES)
    for head in heads:
        save_file({n: t for n, t in tensors.items() if n != head}, file, {"format": "pt"})
        for load in (load_score_head, lambda folder: again(method, folder)):
            with pytest.raises(ParentError, match="score head"):
                load(tmp_path / "model")


def test_a_head_of_another_depth_than_its_score_file_is_refused(tmp_path: Path) -> None:
    made("lora", tmp_path).save(tmp_path / "model", str(tmp_path / "base"), None)
    file = tmp_path / "model" / SCORE_FILE
    for widths in ([8], [8, 16], [8, 8, 8], "8", [0, 8]):
        file.write_text(json.dumps({"shift": 0.0, "scale": 1.0, "head_widths": widths}))
        with pytest.raises(ParentError, match=r"score\.json tells of|head_widths"):
            load_score_head(tmp_path / "model")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_programs_refuse_it_and_draw_no_head(method: str, tmp_path: Path) -> None:
    made(method, tmp_path).save(tmp_path / "model", str(tmp_path / "base"), None)
    theirs: Any = AutoPeftModelForSequenceClassification
    if method == "full":
        theirs = AutoModelForSequenceClassification
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        theirs.from_pretrained(tmp_path / "model", num_labels=1)


def test_it_is_not_exported(tmp_path: Path) -> None:
    made("lora", tmp_path).save(tmp_path / "model", str(tmp_path / "base"), None)
    with pytest.raises(InputError, match=r"reward\.head\.depth=1"):
        write_reward_model(cast(Any, None), tmp_path / "model", tmp_path, [], torch.float32)


def test_rows_that_share_a_prompt_are_scored_as_alone(tmp_path: Path) -> None:
    model = made("lora", tmp_path)
    with torch.no_grad():
        alone = [model(torch.tensor([r]), torch.ones(1, len(r)).bool()).item() for r in ROWS]
        with packed_attention(model.backbone):
            together = model(*padded("left"), REPEATED)
    assert max(alone) - min(alone) > 0.02  # else equality says little
    assert together.tolist() == pytest.approx(alone, abs=1e-5)


def test_the_critic_takes_the_shape_of_the_reward_models_head(tmp_path: Path) -> None:
    model = made("lora", tmp_path)
    folder = tmp_path / "model"
    model.calibrate(0.25, 2.0)
    model.save(folder, str(tmp_path / "base"), None)
    folders = {"reference": tmp_path / "sft", "reward": folder, "value": folder}
    heads = _heads(folders, 32, value_on_policy=False)
    roles = Roles(tiny.llama(), folders, heads=heads, trainable=("value",))
    names = {name for name, p in heads["value"].named_parameters() if p.requires_grad}
    assert names == set(NAMES)
    assert not any(p.requires_grad for p in heads["reward"].parameters())
    sequences = join([[5, 6, 7], [10]], [[8, 9], [11, 12, 13, 14]])
    rows = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    with torch.no_grad():
        expected = model(torch.tensor(rows), MASK)
        scores = roles.scores(sequences)
    assert scores.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_encoder_with_a_deep_head(method: str, tmp_path: Path) -> None:
    base = tiny.bert()
    base.save_pretrained(tmp_path / "base")
    settings = {"config": without_dropout(base.config)}
    adapter = Adapter.model_validate({"method": method} | METHODS[method])
    location, form = str(tmp_path / "base"), Form("mean", 3, 64)
    model = new_encoder_reward(location, settings, adapter, form, 3, (), HEAD).eval()
    check_trained(model.classifier, adapter.method)
    model.calibrate(0.25, 2.0)
    with torch.no_grad():
        expected = model(IDS, MASK)
    assert expected.std() > 1e-3
    folder = tmp_path / "model"
    model.save(folder, location, None)
    torch.manual_seed(99)
    with torch.no_grad():
        assert torch.equal(load_encoder_reward(folder, location, settings)(IDS, MASK), expected)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    maps = {n.rpartition("score.")[2]: t for n, t in tensors.items() if ".score." in f".{n}"}
    assert {name: tuple(t.shape) for name, t in maps.items()} == dict(
        zip(NAMES, [(8, 32), (8, 8), (1, 8)], strict=True)
    )
    # The head by torch's own layers, on the mean of the states that the body alone gives.
    layers = torch.nn.Sequential()
    for weight in (maps[name] for name in NAMES):
        layers.extend([torch.nn.Linear(*reversed(weight.shape), bias=False), torch.nn.GELU()])
        layers[-2].weight.data.copy_(weight)
    if method == "full":
        body = model.backbone
        with torch.no_grad():
            ids = {"token_type_ids": torch.zeros_like(IDS)}
            states = body(input_ids=IDS, attention_mask=MASK.long(), **ids).last_hidden_state
            by_torch = (layers[:-1](states.mean(1)).squeeze(-1) - 0.25) / 2.0
        assert expected.tolist() == pytest.approx(by_torch.tolist(), abs=1e-5)
    for head in [name for name in tensors if ".score." in f".{name}"]:
        save_file({n: t for n, t in tensors.items() if n != head}, file, {"format": "pt"})
        with pytest.raises(ParentError, match=f"{head} is missing in the file"):
            load_encoder_reward(folder, location, settings)
