"""Next-sentence prediction: what the pairs are, their loss, and an encoder that has learned it."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModel,
    BertConfig,
    BertForPreTraining,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from align.errors import InputError
from align.recipe import TokenizerSection
from align.recipe_io import load_recipe
from data.tokenizer import prepare_encoder_tokenizer, train_encoder_tokenizer
from pipelines import stage
from pipelines.encoder_base import read_encoder
from pipelines.next_sentence import PairRows, pair_rows
from pipelines.pretrain_masked import (
    MaskedTrainer,
    heldout_metrics,
    mask_tokens,
    masked_losses,
)
from reward.encoder import new_encoder_reward
from tests import tiny

LENGTH = 12  # of rows, at most: nine tokens of text
SIZES = (2, 9, 30, 10, 5, 9)  # of documents, in tokens
ROWS = (1, 1, 4, 2, 1, 1)  # and in rows: as few as hold them


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_encoder_tokenizer(tiny.TEXT, TokenizerSection(vocab_size=300))


def text_of(document: int, size: int) -> list[int]:
    """Ids that say which document they are of, and where they stand in it."""
    return [1000 * (document + 1) + place for place in range(size)]


def numbered(tokenizer: PreTrainedTokenizerFast) -> PairRows:
    first, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    documents = [[*text_of(d, size), end] for d, size in enumerate(SIZES)]
    documents[1] = [first, *documents[1]]  # as conversations begin
    return pair_rows([*documents, [4, end], [first, end]], LENGTH, tokenizer, "data.x")


def words(tokenizer: PreTrainedTokenizerFast, count: int = 12) -> PairRows:
    """Documents of random words of the vocabulary, of many lengths."""
    rng = random.Random(0)
    texts = [[rng.randrange(4, 300) for _ in range(rng.randint(2, 40))] for _ in range(count)]
    return pair_rows([[*text, tokenizer.sep_token_id] for text in texts], 20, tokenizer, "data.x")


def bert(**changes: Any) -> BertForPreTraining:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,  # large, so that mistakes show in the losses
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **changes,
    )
    return BertForPreTraining(config).eval()


def drawn(texts: PairRows, rows: Tensor, seed: int = 0) -> dict[str, Tensor]:
    return texts.draw(texts.collate(rows), torch.Generator().manual_seed(seed))


def parts(texts: PairRows, pairs: dict[str, Tensor]) -> list[tuple[list[int], list[int], int]]:
    """A, B and the label of every pair, read off its tokens; all around them is checked."""
    found = []
    begin, end = texts.tokenizer.cls_token_id, texts.tokenizer.sep_token_id
    for ids, mask, segments, label in zip(
        *(pairs[key].tolist() for key in ("input_ids", "attention_mask", "token_type_ids")),
        pairs["next_sentence_label"].tolist(),
        strict=True,
    ):
        size = sum(mask)
        assert mask == [1] * size + [0] * (len(ids) - size)
        assert set(ids[size:]) <= {texts.tokenizer.pad_token_id}
        first, second = (n for n, token in enumerate(ids) if token == end)
        assert (ids[0], second) == (begin, size - 1)
        assert segments == [0] * (first + 1) + [1] * (second - first) + [0] * (len(ids) - size)
        found.append((ids[1:first], ids[first + 1 : second], label))
    return found


def test_documents_become_as_few_rows_as_hold_them(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = numbered(tokenizer)
    assert len(texts) == sum(ROWS)
    assert texts.left_out == 2
    assert texts.num_tokens == sum(SIZES) + 3 * sum(ROWS)
    left = list(texts.texts)
    for document, (size, count) in enumerate(zip(SIZES, ROWS, strict=True)):
        rows, left = left[:count], left[count:]
        assert [token for row in rows for token in row] == text_of(document, size)
        lengths = [len(row) for row in rows]
        assert max(lengths) <= LENGTH - 3
        assert max(lengths) - min(lengths) <= 1
    for length in (6, 7, 8, 50):  # even of three tokens of text none is left alone
        documents = [[*text_of(d, d + 2), 2] for d in range(40)]
        found = pair_rows(documents, length, tokenizer, "data.x")
        assert min(map(len, found.texts)) >= 2
        assert max(map(len, found.texts)) <= length - 3


def test_b_follows_a_or_is_the_end_of_a_row_of_another_document(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = numbered(tokenizer)
    rows = torch.arange(len(texts)).repeat(400)
    pairs = drawn(texts, rows)
    splits, sources = set(), set()
    for row, (a, b, label) in zip(rows.tolist(), parts(texts, pairs), strict=True):
        own = texts.texts[row]
        assert a
        assert b
        assert a == own[: len(a)]
        assert len(a) + len(b) == len(own)
        if label == 0:
            assert a + b == own
            splits.add((row, len(a)))
        else:
            other = texts.texts.index(next(t for t in texts.texts if b[-1] in t))
            assert b == texts.texts[other][-len(b) :]
            assert len(b) < len(texts.texts[other])  # something stands before it
            assert b[0] // 1000 != a[0] // 1000
            sources.add((row, other))
    shares = pairs["next_sentence_label"].float().mean().item()
    assert shares == pytest.approx(0.5, abs=0.025)  # three standard deviations of 4000 draws
    # A row of nine tokens next to others as long is split everywhere, and meets all others.
    assert {place for row, place in splits if row == 1} == set(range(1, 9))
    assert {other for row, other in sources if row == 1} == {0, *range(2, 10)}
    assert {other for row, other in sources if row == 3} == {0, 1, *range(6, 10)}
    assert not torch.equal(drawn(texts, rows, seed=1)["input_ids"], pairs["input_ids"])


def test_every_row_of_other_documents_is_as_likely(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = numbered(tokenizer)
    found = parts(texts, drawn(texts, torch.full((6000,), 1)))
    ends = Counter(b[-1] for _, b, label in found if label == 1)
    share = sum(ends.values()) / 9
    assert len(ends) == 9
    # Of 333 draws each, four standard deviations.
    assert all(abs(count - share) < 4 * share**0.5 for count in ends.values())


def test_lengths_do_not_tell(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of each length of A, half of the B are another document's, as of all."""
    texts = numbered(tokenizer)
    found = parts(texts, drawn(texts, torch.arange(len(texts)).repeat(2000)))
    by_lengths: dict[tuple[int, int], list[int]] = {}
    for a, b, label in found:
        by_lengths.setdefault((len(a), len(b)), []).append(label)
    assert len(by_lengths) > 10
    for labels in by_lengths.values():
        assert abs(sum(labels) - len(labels) / 2) < 4.5 * (len(labels) / 4) ** 0.5


def test_of_every_row_a_share_of_its_own_length_is_hidden(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = words(tokenizer)
    pairs = drawn(texts, torch.arange(len(texts)).repeat(50))
    shown, chosen = mask_tokens(pairs, tokenizer, torch.Generator().manual_seed(1))
    lengths = pairs["attention_mask"].sum(1).tolist()
    assert min(lengths) < 12
    assert max(lengths) == 20
    assert chosen.sum(1).tolist() == [max(1, round(0.15 * length)) for length in lengths]
    assert (pairs["input_ids"][chosen] >= 4).all()  # below are the special ones
    assert torch.equal(shown[~chosen], pairs["input_ids"][~chosen])


def by_transformers(
    model: BertForPreTraining, pairs: dict[str, Tensor], shown: Tensor, chosen: Tensor
) -> tuple[float, float, float]:
    """Masked loss, next-sentence loss and accuracy, row by row without padding."""
    hidden, related, right = [], [], []
    for row, label in enumerate(pairs["next_sentence_label"]):
        size = int(pairs["attention_mask"][row].sum())
        labels = pairs["input_ids"][row].masked_fill(~chosen[row], -100)
        with torch.no_grad():
            output = model(
                input_ids=shown[row, None, :size],
                token_type_ids=pairs["token_type_ids"][row, None, :size],
                labels=labels[None, :size],
                next_sentence_label=label[None],
            )
        logits = output.seq_relationship_logits[0]
        related.append(F.cross_entropy(logits, label).item())
        right.append(float(logits[label] > logits[1 - label]))
        hidden += [output.loss.item() - related[-1]] * int(chosen[row].sum())
    means = [sum(values) / len(values) for values in (hidden, related, right)]
    return means[0], means[1], means[2]


def test_the_losses_are_those_of_transformers_row_by_row(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts, model = words(tokenizer), bert()
    rows = torch.arange(len(texts))
    pairs = drawn(texts, rows)
    shown, chosen = mask_tokens(pairs, tokenizer, torch.Generator().manual_seed(2))
    expected = by_transformers(model, pairs, shown, chosen)
    with torch.no_grad():
        ours = masked_losses(model, pairs, tokenizer, torch.Generator().manual_seed(2))
    assert ours.pairs is not None
    assert ours.hidden.mean().item() == pytest.approx(expected[0], abs=1e-5)
    assert ours.pairs.mean().item() == pytest.approx(expected[1], abs=1e-5)


def test_the_heldout_figures_are_those_of_transformers_and_the_seeds(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts, model = words(tokenizer, 40), bert()
    found = heldout_metrics(model, texts, tokenizer, len(texts), seed=3)
    generator = torch.Generator().manual_seed(3)
    pairs = texts.draw(texts.collate(torch.arange(len(texts))), generator)
    expected = by_transformers(model, pairs, *mask_tokens(pairs, tokenizer, generator))
    keys = ("loss", "next_sentence/loss", "next_sentence/accuracy")
    assert [found[key] for key in keys] == pytest.approx(expected, abs=1e-5)
    assert 0 < found["next_sentence/accuracy"] < 1
    batches = [heldout_metrics(model, texts, tokenizer, 7, seed) for seed in (3, 3, 4)]
    assert batches[0] == batches[1] != batches[2]


@pytest.mark.parametrize("size", [6, 12])
def test_micro_batches_add_up_to_the_means_of_the_step(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, size: int
) -> None:
    """Two of three short and three long rows; of a step of twelve rows they are half."""
    texts, model = words(tokenizer), bert()
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = MaskedTrainer(
        texts=texts, tokenizer=tokenizer, rows=size, model=model, args=arguments
    )
    by_length = sorted(range(len(texts)), key=lambda row: len(texts.texts[row]))
    micro = [texts.collate(torch.tensor(by_length[i : i + 3])) for i in (0, len(texts) - 3)]
    batches, count = trainer.get_batch_samples(iter(micro), 2, torch.device("cpu"))
    torch.manual_seed(5)
    ours = sum(trainer.compute_loss(model, b, num_items_in_batch=count).item() for b in batches)
    torch.manual_seed(5)
    hidden, related = [], []
    for batch in micro:
        pairs = texts.draw(batch)
        shown, chosen = mask_tokens(pairs, tokenizer)
        mean, other, _ = by_transformers(model, pairs, shown, chosen)
        hidden += [mean] * int(chosen.sum())
        related += [other] * 3
    means = sum(hidden) / len(hidden) + sum(related) / len(related)
    assert ours == pytest.approx(means * len(related) / size, abs=1e-5)


def test_a_row_without_anything_to_hide_teaches_sentences_alone(tmp_path: Path) -> None:
    tokenizer = prepare_encoder_tokenizer(tiny.wordpiece())
    unknown = tokenizer("☃ 中 文 ☃ ☃", add_special_tokens=False)["input_ids"]
    assert set(unknown) == {tokenizer.unk_token_id}
    known = tokenizer("the kite and the boats", add_special_tokens=False)["input_ids"]
    texts = pair_rows([unknown, unknown, known], 16, tokenizer, "data.pretrain.train")
    model = BertForPreTraining(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = MaskedTrainer(texts=texts, tokenizer=tokenizer, rows=1, model=model, args=arguments)
    empty = 0
    for row in range(len(texts)):
        batch = texts.collate(torch.tensor([row]))
        torch.manual_seed(row)
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=2)
        torch.manual_seed(row)
        parts = masked_losses(model, texts.draw(batch), tokenizer)
        assert parts.pairs is not None
        if len(parts.hidden) == 0:
            empty += 1
            assert loss.item() == pytest.approx(parts.pairs.sum().item())
            loss.backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert 0 < empty < len(texts)


RECIPE = """
name: x
base: {{id: pretrain}}
tokenizer: {{vocab_size: 260}}
data:
  root: {root}
  max_prompt_tokens: 48
  max_response_tokens: 16
  pretrain: {{train: [{{path: train.jsonl}}], heldout: [{{path: heldout.jsonl}}]}}
  reward: {{train: [{{path: pairs.jsonl}}]}}
pretrain:
  objective: masked
  next_sentence: true
  model:
    hidden_size: 32
    num_layers: 2
    num_heads: 4
    intermediate_size: 64
    max_positions: 64
    initializer_range: 0.1
  sequence_length: 24
  steps: 250
  batch_size: 32
  micro_batch_size: 16
  lr: 5.0e-3
reward:
  base: {{id: pretrain, pooling: cls, adapter: {{method: full}}}}
  lr: 1.0e-9
  batch_size: 4
  center_on: none
tracking: {{mode: disabled}}
run: {{root: {root}/runs, threads: 1}}
"""


def write(root: Path, train: list[str], heldout: list[str]) -> str:
    for name, texts in (("train", train), ("heldout", heldout)):
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (root / f"{name}.jsonl").write_text("".join(lines))
    pair = {"prompt": "aabb", "chosen": "ab", "rejected": "cd"}
    (root / "pairs.jsonl").write_text(
        "".join(json.dumps(pair | {"prompt": f"aab{n}"}) + "\n" for n in range(4))
    )
    (root / "r.yaml").write_text(RECIPE.format(root=root))
    return str(root / "r.yaml")


def documents(count: int, seed: int) -> list[str]:
    """Documents of two letters each, one of eight pairs of letters: another's B looks strange."""
    rng = random.Random(seed)
    letters = [rng.choice(["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op"]) for _ in range(count)]
    return ["".join(rng.choices(pair, k=rng.randint(8, 40))) for pair in letters]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("next")
    recipe = write(root, [*documents(400, 0), "a"], documents(200, 1))
    assert stage.main(["pretrain", recipe, "--debug"]) == 0
    return root


def test_it_learns_which_texts_follow(learned: Path) -> None:
    """Of eight kinds, one in eight of the strange B is of the same: 15/16 are to be had."""
    made = json.loads((learned / "runs/x/pretrain/stage.json").read_text())
    assert 0.75 < made["metrics"]["next_sentence/accuracy"] < 0.99
    assert made["metrics"]["next_sentence/loss"] < 0.55  # 0.69 is guessing
    assert made["metrics"]["perplexity"] < 4
    lines = (learned / "runs/x/pretrain/metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    # Of 260 tokens, and of two answers: micro-batches add up to the sum of the means.
    assert first["loss"] == pytest.approx(5.56 + 0.69, abs=0.7)
    assert {"perplexity", "next_sentence/accuracy", "next_sentence/loss"} < set(last)


def test_transformers_loads_it_with_the_pooler(learned: Path) -> None:
    folder = learned / "runs/x/pretrain/model"
    whole, info = BertForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    body, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(body.pooler.dense.weight, whole.bert.pooler.dense.weight)
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(body.pooler.dense.weight, saved["bert.pooler.dense.weight"])
    assert saved["bert.embeddings.token_type_embeddings.weight"].shape == (2, 32)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_reward_model_starts_from_the_pooler(learned: Path, method: str) -> None:
    saved = load_file(learned / "runs/x/pretrain/model/model.safetensors")
    recipe = load_recipe(str(learned / "r.yaml"), [f"reward.base.adapter.method={method}"])
    assert recipe.reward is not None
    assert recipe.reward.base is not None
    encoder = read_encoder(recipe, recipe.reward.base)
    adapter = recipe.reward.base.adapter
    assert adapter is not None
    model = new_encoder_reward(encoder.location, encoder.settings, adapter, encoder.form, seed=0)
    found = [p for n, p in model.named_parameters() if "pooler" in n and n.endswith("dense.weight")]
    assert found
    for weight in found:  # with an adapter the frozen one, too
        assert torch.equal(weight, saved["bert.pooler.dense.weight"])
    assert model.backbone.config.type_vocab_size == 2  # so that the response is B


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_reward_stage_takes_it(learned: Path, pooling: str) -> None:
    """Its learning rate is next to nothing: what comes out is what it has started from."""
    settings = [f"reward.base.pooling={pooling}", "--force", "--debug"]
    assert stage.main(["reward", str(learned / "r.yaml"), *settings]) == 0
    trained = load_file(learned / "runs/x/reward/model/model.safetensors")
    saved = load_file(learned / "runs/x/pretrain/model/model.safetensors")
    body = {name for name in saved if name.startswith("bert.")}
    if pooling == "mean":
        body -= {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert body == {name for name in trained if name.startswith("bert.")}
    for name in body:
        assert torch.allclose(trained[name], saved[name], atol=1e-6), name


def test_what_is_left_out_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write(tmp_path, [*documents(40, 0), "a", "b"], ["c", *documents(3, 1)])
    assert stage.main(["pretrain", recipe, "pretrain.steps=1", "--debug"]) == 0
    assert "3 documents left out: too short to be split in two" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("train", "heldout", "expected"),
    [
        (
            [*documents(3, 0), "a"],
            documents(3, 1),
            "data.pretrain: gives {n} rows of at most sequence_length=24 tokens, fewer than"
            " batch_size=32",
        ),
        (
            ["abab" * 500],
            documents(3, 1),
            "data.pretrain.train: 1 of 1 documents can be split in two, and",
        ),
        (documents(60, 0), ["abab", "a"], "data.pretrain.heldout: 1 of 2 documents can be split"),
    ],
)
def test_too_little_text_is_refused(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    train: list[str],
    heldout: list[str],
    expected: str,
) -> None:
    recipe = write(tmp_path, train, heldout)
    assert stage.main(["pretrain", recipe]) == 2
    rows = sum(-(-len(text) // 21) for text in train if len(text) > 1)
    assert expected.format(n=rows) in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "runs/x/pretrain/model").exists()


def test_one_document_is_refused_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(pair_rows([], LENGTH, tokenizer, "data.x")) == 0
    with pytest.raises(InputError, match=r"data.x: 0 of 1 documents can be split in two"):
        pair_rows([[7, 2]], LENGTH, tokenizer, "data.x")
