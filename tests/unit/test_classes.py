"""Loss and figures of classifiers against hand arithmetic, transformers and scikit-learn."""

import copy
import math
from pathlib import Path

import pytest
import torch
from sklearn.metrics import classification_report
from tokenizers import processors
from transformers import AutoConfig, AutoModelForSequenceClassification

from align.errors import InputError
from align.recipe_reward import Classes, Reward
from data.records import Labelled, Message
from data.render import Renderer, Unusable
from data.tokenizer import prepare_encoder_tokenizer
from pipelines.labelled_tokens import LabelledTokens, check_classes, measure_classifier
from pipelines.reward_task import reward_task
from reward.baseline import bag_of_words_labels
from reward.classes import class_loss, class_metrics, figures_by_class
from reward.encoder import EncoderReward, Form, load_encoder_reward, new_encoder_reward
from reward.model import RewardModel, load_reward_model, new_reward_model
from reward.scorer import score_rows
from tests import tiny
from tests.adapters import randomise, sft_adapter
from tests.finished import ADAPTER, foreign_tokenizer


def section(labels=("a", "b", "c"), **keys) -> Reward:
    settings = {"loss": "classes", "classes": {"labels": labels}, "center_on": "none"}
    return Reward(lr=0.1, batch_size=2, **settings | keys)


# Softmax (1/2, 1/4, 1/4), and (1/5, 3/5, 1/5).
LOGITS = torch.tensor([[2.0, 1.0, 1.0], [1.0, 3.0, 1.0]]).log()


def test_the_loss_is_the_negative_logarithm_of_the_labels_probability() -> None:
    # -(ln 1/2 + ln 1/5) / 2
    found = class_loss(LOGITS, torch.tensor([0, 2])).item()
    assert found == pytest.approx((math.log(2) + math.log(5)) / 2)


def test_label_smoothing_spreads_a_share_over_all_classes() -> None:
    # Of 0.3 each class gets 0.1: 0.8 for the label, 0.1 for each of the others.
    first = 0.8 * math.log(2) + 0.1 * 2 * math.log(4)
    second = 0.8 * math.log(5) + 0.1 * (math.log(5) + math.log(5 / 3))
    found = class_loss(LOGITS, torch.tensor([0, 2]), label_smoothing=0.3).item()
    assert found == pytest.approx((first + second) / 2)


def test_the_parts_of_a_step_add_up_to_it_also_in_bfloat16() -> None:
    labels = torch.tensor([0, 2])
    parts = [class_loss(LOGITS[i : i + 1], labels[i : i + 1], num_rows=2) for i in (0, 1)]
    assert sum(parts).item() == pytest.approx(class_loss(LOGITS, labels).item())
    assert class_loss(LOGITS.bfloat16(), labels).dtype == torch.float32


def test_the_loss_is_that_of_transformers_own_classifier() -> None:
    config = tiny.llama().config
    config.num_labels = 3
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    rows = [LabelledTokens([5, 6], [7, 1], 2, Labelled(("x",), "c"))]
    rows.append(LabelledTokens([8], [9, 10, 1], 0, Labelled(("y",), "a")))
    task = reward_task(section())
    batch = task.collate(rows, 0, share_prompts=True)
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"].long(),
        labels=torch.tensor([2, 0]),
    )
    loss, scores = task.loss(lambda ids, mask: output.logits, batch, None, None)
    assert loss.item() == pytest.approx(output.loss.item(), abs=1e-6)
    assert torch.equal(scores, output.logits)
    assert task.count(batch) == 2
    expected = (output.logits.argmax(-1) == torch.tensor([2, 0])).tolist()
    assert task.outcomes(scores, batch).tolist() == expected


def test_figures_of_five_rows() -> None:
    # Probabilities of the choice 0.9, 0.9, 0.9, 0.6, 0.6; right: three of them.
    said, given, labels = [0.9, 0.9, 0.9, 0.6, 0.6], [0, 0, 1, 1, 0], torch.tensor([0, 0, 0, 1, 1])
    probabilities = torch.tensor(
        [[p if c == g else 1 - p for c in (0, 1)] for p, g in zip(said, given, strict=True)]
    )
    metrics = class_metrics(probabilities.log(), labels)
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["accuracy/majority"] == pytest.approx(3 / 5)
    # Of the surer three 2/3 are right, of the others 1/2.
    ece = 3 / 5 * abs(0.9 - 2 / 3) + 2 / 5 * abs(0.6 - 1 / 2)
    assert metrics["calibration/ece"] == pytest.approx(ece, abs=1e-6)
    right = (0.9, 0.9, 0.1, 0.6, 0.4)
    assert metrics["loss"] == pytest.approx(-sum(map(math.log, right)) / 5, abs=1e-6)
    # Wilson's interval of 3 in 5 at z = 1.645: (0.6 + z^2/10 -+ z sqrt(.24/5 + z^2/100)) / 1.541
    assert metrics["accuracy/low"] == pytest.approx(0.2726, abs=1e-3)
    assert metrics["accuracy/high"] == pytest.approx(0.8574, abs=1e-3)


def test_calibration_counts_choices_that_have_less_than_half() -> None:
    # Both choices have 0.4, and one of them is right.
    logits = torch.tensor([[0.4, 0.3, 0.3], [0.3, 0.4, 0.3]]).log()
    found = class_metrics(logits, torch.tensor([0, 0]))
    assert found["calibration/ece"] == pytest.approx(0.1, abs=1e-6)


def test_figures_by_class_are_those_of_scikit_learn_and_leave_unseen_classes_out() -> None:
    given, labels = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 0, 0, 1, 1])
    metrics = figures_by_class(given, labels, ["up", "down", "never"])
    # up: 2 of the 3 given are right, 2 of the 3 there are found; down: 1 of 2, 1 of 2
    assert metrics["class/up/precision"] == metrics["class/up/recall"] == pytest.approx(2 / 3)
    assert metrics["class/down/f1"] == pytest.approx(1 / 2)
    assert metrics["f1/macro"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics["class/up/rows"] == 3
    assert not any("never" in key for key in metrics)
    report = classification_report(labels, given, output_dict=True)
    assert metrics["class/down/recall"] == report["1"]["recall"]
    assert metrics["f1/macro"] == pytest.approx(report["macro avg"]["f1-score"])


def test_words_alone_tell_classes_apart_where_they_can() -> None:
    texts = ["a red kite", "the kite", "a kite flies", "two boats", "the boats", "boats sail"]
    found = bag_of_words_labels(texts, [4, 4, 4, 7, 7, 7], ["one kite", "my boats"])
    assert found.tolist() == [4, 7]


def test_a_measured_classifier_is_compared_with_words_and_the_majority(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rows(pairs):
        return [
            LabelledTokens([i], [], label, Labelled((text,), "abc"[label]))
            for i, (text, label) in enumerate(pairs)
        ]

    train = rows([("kite one", 0), ("kite two", 0), ("boats one", 1), ("boats two", 1)])
    heldout = rows([("kite", 0), ("boats", 1), ("boats", 1), ("boats", 0)])
    right = {0: 0, 1: 1, 2: 1, 3: 0}

    def score(given):
        return torch.nn.functional.one_hot(torch.tensor([right[i] for (i,), _ in given]), 3) * 9.0

    notes: list[str] = []
    metrics = measure_classifier(section(), score, train, heldout, notes.append)
    assert metrics["accuracy"] == 1
    assert metrics["accuracy/bag_of_words"] == pytest.approx(3 / 4)
    assert metrics["accuracy/majority"] == pytest.approx(1 / 2)
    assert metrics["accuracy/train"] == pytest.approx(1 / 4 + 1 / 4)  # rows 0 and 2
    assert "accuracy" not in measure_classifier(section(), score, train, [], notes.append)
    # Files are often sorted by label: of four rows the first two are of one class.
    monkeypatch.setattr("pipelines.labelled_tokens.BASELINE_ROWS", 2)
    few = measure_classifier(section(), score, train, heldout, notes.append)
    assert few["accuracy/bag_of_words"] == pytest.approx(3 / 4)
    assert notes == []


def test_rows_of_one_class_are_refused_and_unseen_classes_are_said() -> None:
    one = [LabelledTokens([5], [], 1, Labelled(("x",), "b"))] * 3
    with pytest.raises(InputError, match=r"all 3 rows are of the class 'b'; .* two or more"):
        check_classes(section(), one, print)
    notes: list[str] = []
    check_classes(section(), [*one, LabelledTokens([5], [], 2, one[0].record)], notes.append)
    assert notes == ["reward  data.reward.train has no row of a: never learned"]


def test_labels_have_numbers_unless_their_names_look_like_some() -> None:
    assert Classes(labels=("no", "yes")).numbers == {"no": 0, "yes": 1, "0": 0, "1": 1}
    assert Classes(labels=("1", "2", "3")).numbers == {"1": 0, "2": 1, "3": 2}
    assert Classes(labels=("-1", "none")).numbers == {"-1": 0, "none": 1}


def test_texts_stand_as_the_tokenizer_for_pairs_has_them() -> None:
    plain = tiny.wordpiece()
    tokenizer = prepare_encoder_tokenizer(copy.deepcopy(plain))
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    # What transformers' tokenizer of BERT does with one text and with two.
    plain.backend_tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", sep), ("[CLS]", cls)
    )
    renderer = Renderer(tokenizer, 64, 64)
    for texts in (("Tom has boats.",), ("Tom has boats.", "Hello to Mira!")):
        first, second = renderer.labelled(Labelled(texts, "a"))
        assert first + second == plain(*texts)["input_ids"]
        assert bool(second) == (len(texts) == 2)


def test_a_decoder_reads_the_end_last_and_its_beginning_of_text_first() -> None:
    tokenizer = foreign_tokenizer()
    renderer = Renderer(tokenizer, 8, 5)

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    assert renderer.labelled(Labelled(("kite",), "a")) == (ids("<s>kite</s>"), [])
    pair = renderer.labelled(Labelled(("kite", "hello"), "a"))
    assert pair == (ids("<s>kite</s>"), ids("hello</s>"))
    # A text loses its beginning, but for <s>; a second one is never cut; "<s>" in it is text.
    long = "boats " * 9
    first, _ = renderer.labelled(Labelled((long,), "a"))
    assert first == [ids("<s>")[0], *ids(long + "</s>")[-7:]]
    with pytest.raises(Unusable, match="response_too_long"):
        renderer.labelled(Labelled(("kite", long), "a"))
    (first, _), control = renderer.labelled(Labelled(("</s>",), "a")), ids("</s>")[0]
    assert first.count(control) == 1
    # A response stands behind its prompt as for any reward model.
    prompt = (Message("user", "?"),)
    found = Renderer(tokenizer, 64, 64).labelled(Labelled(("kite",), "a", prompt))
    assert [*found[0], *found[1]] == ids("<s>[user]\n?\n[assistant]\nkite</s>")


@pytest.mark.parametrize("pooling", ["decoder", "cls", "mean"])
@torch.no_grad()
def test_logits_are_the_same_alone_padded_and_after_reloading(pooling: str, tmp_path: Path) -> None:
    labels, base = ("a", "b", "c"), tmp_path / "base"
    if pooling == "decoder":
        model: RewardModel | EncoderReward = new_reward_model(
            tiny.llama(), ADAPTER, sft_adapter(tiny.llama(), tmp_path / "sft"), 0, labels
        )
    else:
        tiny.bert().save_pretrained(base)
        settings = {"config": AutoConfig.from_pretrained(base)}
        form = Form(pooling, 3, 64)  # type: ignore[arg-type]
        model = new_encoder_reward(str(base), settings, ADAPTER, form, 0, labels)
    randomise(model, 5)
    model.eval().save(tmp_path / "saved", str(base), None)
    rows = [[5, 6, 7, 1], [8, 0, 3], [9] * 7]
    alone = torch.cat([model(torch.tensor([row]), torch.ones(1, len(row)).bool()) for row in rows])
    assert alone.shape == (3, 3)
    assert alone.dtype == torch.float32
    assert alone.std(0).min() > 0.02  # else equality says little
    for side in ("left", "right"):
        for pad in (0, 1):
            pads = [[pad] * (7 - len(row)) for row in rows]
            padded = [p + r if side == "left" else r + p for p, r in zip(pads, rows, strict=True)]
            real = [
                [0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p)
                for p, r in zip(pads, rows, strict=True)
            ]
            batch = model(torch.tensor(padded), torch.tensor(real).bool())
            torch.testing.assert_close(batch, alone, rtol=0, atol=1e-5)
    pairs = [(row[:1], row[1:]) for row in rows]
    assert torch.equal(score_rows(model, pairs, batch_size=1, pad_id=0), alone)
    torch.manual_seed(99)
    if pooling == "decoder":
        again: RewardModel | EncoderReward = load_reward_model(tiny.llama(), tmp_path / "saved")
    else:
        again = load_encoder_reward(tmp_path / "saved", str(base), settings)
    assert again.labels == labels
    assert torch.equal(score_rows(again, pairs, batch_size=1, pad_id=0), alone)
