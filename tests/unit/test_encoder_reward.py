"""Encoder reward models: one score whatever is beside it, and the same one from transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    ModernBertConfig,
    PreTrainedModel,
)

from align.adapter_methods import check_trained
from align.adapters import WEIGHTS, is_adapter
from align.errors import InputError, ParentError
from align.models import without_dropout
from align.recipe_adapter import Adapter
from align.recipe_reward import Pooling
from data.records import Message
from data.render import Renderer
from data.tokenizer import prepare_encoder_tokenizer
from reward.calibrate import SCORE_FILE, RewardModelError
from reward.encoder import (
    EncoderReward,
    Form,
    left_aligned,
    load_encoder_reward,
    masked_mean,
    new_encoder_reward,
    num_positions,
    passes_of_like_length,
    segments,
)
from reward.scorer import pad_rows
from tests import tiny

SEP = 3
MakeBase = Callable[..., PreTrainedModel]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "alpha": 8.0},
    "full": {},
    "head_only": {},
    "top_layers": {"top_layers": 1},
    "bitfit": {},
    "bottleneck": {"bottleneck_size": 4},
}
bases = pytest.mark.parametrize("make", [tiny.bert, tiny.roberta], ids=["bert", "roberta"])
poolings = pytest.mark.parametrize("pooling", ["cls", "mean"])


def rows() -> list[list[int]]:
    """[CLS] prompt [SEP] response [SEP]: rows of 10, 6 and 8 tokens."""
    generator = torch.Generator().manual_seed(5)
    draws = [torch.randint(5, 150, (n,), generator=generator).tolist() for n in (7, 3, 5)]
    return [[2, *draw[:2], SEP, *draw[2:], SEP] for draw in draws]


def padded(side: str, fill: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows())) + 2  # every row has padding
    ids, mask = [], []
    for row in rows():
        rest, real = [fill] * (width - len(row)), [True] * len(row)
        empty = [False] * len(rest)
        ids.append(row + rest if side == "right" else rest + row)
        mask.append(real + empty if side == "right" else empty + real)
    return torch.tensor(ids), torch.tensor(mask)


def trained(
    make: MakeBase, pooling: Pooling, folder: Path, method: str = "lora"
) -> tuple[EncoderReward, dict[str, Any]]:
    """A reward model away from its first values, and what its base is loaded with."""
    base = make()
    base.save_pretrained(folder / "base")
    settings = {"config": without_dropout(base.config)}
    adapter = Adapter.model_validate({"method": method} | METHODS[method])
    model = new_encoder_reward(
        str(folder / "base"), settings, adapter, Form(pooling, SEP, 64), seed=3
    )
    check_trained(model.classifier, adapter.method)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.calibrate(0.25, 2.0)
    return model.eval(), settings


def scores(model: EncoderReward, side: str = "right", fill: int = 0) -> list[float]:
    with torch.no_grad():
        found: list[float] = model(*padded(side, fill)).tolist()
    return found


@bases
@poolings
def test_padding_does_not_change_scores(make: MakeBase, pooling: Pooling, tmp_path: Path) -> None:
    model, _ = trained(make, pooling, tmp_path)
    with torch.no_grad():
        alone = [model(torch.tensor([r]), torch.ones(1, len(r)).bool()).item() for r in rows()]
    assert max(alone) - min(alone) > 0.02  # else equality says little
    for side in ("right", "left"):
        for fill in (0, SEP, 77):
            assert scores(model, side, fill) == pytest.approx(alone, abs=1e-5), (side, fill)


@pytest.mark.parametrize(
    ("make", "pooling", "method"),
    [(tiny.bert, "cls", method) for method in METHODS]
    + [(tiny.roberta, "mean", method) for method in ("lora", "full", "bitfit")],
)
def test_a_saved_model_scores_the_same(
    make: MakeBase, pooling: Pooling, method: str, tmp_path: Path
) -> None:
    model, settings = trained(make, pooling, tmp_path, method)
    model.save(tmp_path / "model", str(tmp_path / "base"), None)
    torch.manual_seed(99)
    fresh = load_encoder_reward(tmp_path / "model", str(tmp_path / "base"), settings)
    assert scores(fresh) == scores(model)
    assert not any(p.requires_grad for p in fresh.parameters())
    assert is_adapter(tmp_path / "model") == (method != "full")


def spelled_out(make: MakeBase, row: list[int]) -> dict[str, torch.Tensor]:
    """Return what the library's model is given for one row; BERT is told the response's segment."""
    given = {"input_ids": torch.tensor([row])}
    if make is tiny.bert:
        second = [0] * (row.index(SEP) + 1) + [1] * (len(row) - row.index(SEP) - 1)
        given["token_type_ids"] = torch.tensor([second])
    return given


@bases
@pytest.mark.parametrize("method", ["lora", "full", "top_layers"])
def test_cls_scores_are_those_of_transformers(make: MakeBase, method: str, tmp_path: Path) -> None:
    model, _ = trained(make, "cls", tmp_path, method)
    model.save(tmp_path / "model", str(tmp_path / "base"), None)
    theirs = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
        if method == "full"
        else AutoPeftModelForSequenceClassification.from_pretrained(
            tmp_path / "model", num_labels=1
        )
    ).eval()
    expected = []
    for row in rows():
        given = spelled_out(make, row)
        with torch.no_grad():
            expected.append((theirs(**given).logits.item() - 0.25) / 2.0)
    assert scores(model, "left") == pytest.approx(expected, abs=1e-5)


def test_cls_is_the_first_token_where_the_encoder_has_a_choice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        classifier_pooling="mean",
        pad_token_id=0,
        cls_token_id=2,
        bos_token_id=2,
        sep_token_id=SEP,
        eos_token_id=SEP,
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    settings = {"config": without_dropout(config)}
    form = Form("cls", SEP, 64)
    model = new_encoder_reward(str(tmp_path / "base"), settings, Adapter(method="full"), form, 3)
    model.eval().save(tmp_path / "model", str(tmp_path / "base"), None)
    body: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    for row, found in zip(rows(), scores(model), strict=True):
        with torch.no_grad():
            states = body.model(input_ids=torch.tensor([row])).last_hidden_state
            expected = body.classifier(body.head(states[:, 0])).item()
            assert abs(body.classifier(body.head(states.mean(1))).item() - expected) > 1e-3
        assert found == pytest.approx(expected, abs=1e-5)
    assert scores(load_encoder_reward(tmp_path / "model")) == pytest.approx(scores(model))


@bases
def test_mean_scores_are_a_linear_map_of_the_mean_state(make: MakeBase, tmp_path: Path) -> None:
    model, _ = trained(make, "mean", tmp_path, "head_only")
    model.save(tmp_path / "model", str(tmp_path / "base"), None)
    (name,) = load_file(tmp_path / "model" / WEIGHTS)
    assert name == "base_model.model.score.weight"
    weight = load_file(tmp_path / "model" / WEIGHTS)[name]
    body = make().base_model  # what was not trained is the base as it was
    expected = []
    for row in rows():
        given = spelled_out(make, row)
        with torch.no_grad():
            states = body(**given).last_hidden_state[0]
        expected.append(((states.sum(0) / len(row)) @ weight[0] - 0.25).item() / 2.0)
    assert scores(model) == pytest.approx(expected, abs=1e-5)


@bases
@poolings
def test_the_first_model_depends_on_the_seed_alone(
    make: MakeBase, pooling: Pooling, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    settings = {"config": without_dropout(make().config)}

    def made(seed: int) -> list[float]:
        torch.seed()  # whatever was drawn before
        adapter = Adapter(r=4)
        form = Form(pooling, SEP, 64)
        return scores(new_encoder_reward(str(tmp_path), settings, adapter, form, seed).eval())

    assert made(1) == made(1)
    assert made(1) != made(2)


@poolings
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_without_a_tensor_of_its_head_is_refused(
    pooling: Pooling, method: str, tmp_path: Path
) -> None:
    model, settings = trained(tiny.bert, pooling, tmp_path, method)
    model.save(tmp_path / "model", str(tmp_path / "base"), None)
    (file,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(file)
    heads = [
        name for name in tensors if "score" in name or "classifier" in name or "pooler" in name
    ]
    assert len(heads) == (1 if pooling == "mean" else 4)
    for head in heads:
        save_file({n: t for n, t in tensors.items() if n != head}, file, {"format": "pt"})
        with pytest.raises(ParentError, match=f"{head} is missing in the file"):
            load_encoder_reward(tmp_path / "model", str(tmp_path / "base"), settings)


@pytest.mark.parametrize("content", ["", "{}", '{"pooling": "max", "separator": 3}', "[]"])
def test_a_score_file_that_does_not_say_how_to_read_is_refused(
    content: str, tmp_path: Path
) -> None:
    (tmp_path / SCORE_FILE).write_text(content)
    with pytest.raises(RewardModelError, match=SCORE_FILE):
        load_encoder_reward(tmp_path)


def test_score_file(tmp_path: Path) -> None:
    model, _ = trained(tiny.bert, "mean", tmp_path)
    model.save(tmp_path / "model", str(tmp_path / "base"), None)
    assert json.loads((tmp_path / "model" / SCORE_FILE).read_text()) == {
        "shift": 0.25,
        "scale": 2.0,
        "pooling": "mean",
        "separator": SEP,
        "max_prompt_tokens": 64,
    }


def test_segments_and_alignment_by_hand() -> None:
    ids = torch.tensor([[9, 2, 5, 3, 6, 7, 3], [2, 5, 3, 8, 3, 6, 3], [2, 5, 6, 3, 9, 9, 9]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    moved, real = left_aligned(ids, mask, pad_id=0)
    assert moved.tolist() == [[2, 5, 3, 6, 7, 3, 0], [2, 5, 3, 8, 3, 6, 3], [2, 5, 6, 3, 0, 0, 0]]
    assert real.sum(1).tolist() == [6, 7, 4]
    # One separator alone, as in a text without a response, makes no second segment.
    expected = [[0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0]]
    assert segments(moved, real, SEP).tolist() == expected


def test_mean_by_hand() -> None:
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [float("nan"), 9.0]]])
    assert masked_mean(states, torch.tensor([[True, True, False]])).tolist() == [[2.0, 4.0]]


def test_positions_are_those_that_can_be_used() -> None:
    assert num_positions(tiny.bert().base_model) == 256
    # RoBERTa counts from its pad id, 0 here, on: of 257 one is never used.
    assert num_positions(tiny.roberta().base_model) == 256


def test_a_conversation_as_an_encoder_reads_it() -> None:
    tokenizer = prepare_encoder_tokenizer(tiny.wordpiece())
    renderer = Renderer(tokenizer, 64, 64)
    question = [Message("user", "What is the capital of France?")]
    ids = renderer.prompt(question) + renderer.response(question, "Paris.")
    assert tokenizer.convert_ids_to_tokens([ids[0], ids[-1]]) == ["[CLS]", "[SEP]"]
    expected = tokenizer(
        "[CLS] Human: What is the capital of France? Assistant: [SEP] Paris. [SEP]",
        add_special_tokens=False,
    )["input_ids"]
    assert ids == expected
    assert ids.count(SEP) == 2
    # What looks like a special token in a text is none.
    assert renderer.response(question, "Paris [SEP] [CLS]").count(SEP) == 1
    short = Renderer(tokenizer, 9, 64).prompt(question)
    assert short == [ids[0], *renderer.prompt(question)[-8:]]


def test_a_decoders_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="no cls_token and no sep_token; allowed: encoders"):
        prepare_encoder_tokenizer(tiny.tokenizer())


def test_rows_of_like_length_pass_together() -> None:
    assert passes_of_like_length([], 10) == []
    assert passes_of_like_length([7], 10) == [[0]]
    # 4 x 9 at once is 36; 3 x 2 and 9 apart is 15 and a pass more.
    assert passes_of_like_length([2, 9, 2, 2], 20) == [[0, 2, 3], [1]]
    assert passes_of_like_length([2, 9, 2, 2], 22) == [[0, 2, 3, 1]]


@pytest.mark.parametrize("fixed", [0, 3, 30])
def test_no_division_costs_less(fixed: int) -> None:
    """Against all divisions of the rows in the order of their lengths."""
    numbers = torch.Generator().manual_seed(fixed)
    for _ in range(20):
        lengths = torch.randint(1, 20, (7,), generator=numbers).tolist()
        in_order = sorted(lengths)
        costs = []
        for cuts in range(2**6):
            ends = [n for n in range(1, 7) if cuts >> (n - 1) & 1] + [7]
            parts = [in_order[first:end] for first, end in zip([0, *ends], ends, strict=False)]
            costs.append(sum(len(part) * part[-1] + fixed for part in parts))
        found = passes_of_like_length(lengths, fixed)
        assert sorted(row for rows in found for row in rows) == list(range(7))
        padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in found)
        assert padded + fixed * len(found) == min(costs)


@bases
@poolings
def test_passes_change_neither_scores_nor_gradients(
    make: MakeBase, pooling: Pooling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = trained(make, pooling, tmp_path, "full")
    texts = [[5 + i % 20 for i in range(n)] for n in (30, 2, 3, 28, 2)]
    ids, mask = pad_rows(texts, 0)
    weights = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0])
    found = []
    for fixed in (10**6, 1):
        monkeypatch.setattr("reward.encoder._FIXED_TOKENS_ON_CPU", fixed)
        shapes: list[torch.Size] = []
        hook = model.backbone.register_forward_pre_hook(
            lambda _, args, given, shapes=shapes: shapes.append([*args, *given.values()][0].shape),
            with_kwargs=True,
        )
        model.zero_grad()
        scores = model(ids, mask)
        (scores * weights).sum().backward()
        hook.remove()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((shapes, scores.detach(), gradients))
    (at_once, expected, theirs), (apart, ours, own) = found
    assert at_once == [(5, 30)]
    assert apart == [(2, 2), (1, 3), (1, 28), (1, 30)]
    assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    alone = [model(ids[row : row + 1], mask[row : row + 1]).detach() for row in range(5)]
    assert_close(ours, torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert any(g.abs().max() > 0 for g in theirs.values())
    assert_close(own, theirs, rtol=1e-4, atol=1e-5)
