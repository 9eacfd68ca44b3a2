"""Classifiers by the reward stage, end to end: trained, reloaded, and their probability as reward.

An encoder that reads texts, and a decoder that reads responses to prompts. Expected probabilities
are the softmax of transformers' own classifiers on text that is written out by hand.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from align.adapters import WEIGHTS
from align.errors import ParentError
from align.recipe import TokenizerSection
from align.recipe_io import load_recipe
from align.sequences import join
from align.stages import read_parents, read_reward_models, why_not_done
from data.load import LoadedData
from data.records import Message, Prompt
from data.tokenizer import prepare_tokenizer
from launch.verify import verify_run
from pipelines import export, report, scoring, stage
from pipelines.load_roles import load_roles
from pipelines.rollout import as_chat
from pipelines.scoring import ppo_scorer, reward_roles
from pipelines.stage import StageJob
from reward.encoder import load_encoder_reward
from reward.model import load_reward_model
from tests import tiny
from tests.adapters import sft_adapter
from tests.finished import edit_manifest, finish, origin, pretrain_stage

RECIPE = """
name: {name}
seed: 3
base: {{id: {root}/base/model}}
adapter: {{r: 4, alpha: 8.0}}
data:
  root: {root}
  max_prompt_tokens: 96
  max_response_tokens: 32
  reward: {{train: [{{path: {rows}}}], heldout: [{{path: {rows}}}]}}
  prompts: {{train: [{{path: prompts.jsonl}}], heldout: [{{path: prompts.jsonl}}]}}
reward:
  {base}
  loss: classes
  classes: {{labels: [boats, kites, tie]}}
  center_on: none
  lr: 5.0e-3
  batch_size: 8
  micro_batch_size: 4
  epochs: 4
  heldout_every: 6
  keep: best
ppo:
  reward: [{{model: reward, label: kites}}]
  lr: 1.0e-3
  steps: 1
  batch_size: 4
  minibatch_size: 2
  max_new_tokens: 8
  probe_prompts: 2
evaluate: {{prompts: 4, max_new_tokens: 8, batch_size: 4, bootstrap: 20}}
tracking: {{mode: disabled}}
run: {{root: {root}/runs, threads: 1, parents: {{sft: {root}/runs/sft/sft}}}}
"""
LABELS = ("boats", "kites", "tie")
# The key that tells the recipes apart, the rows, and the stages that are made.
RUNS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "encoder": (
        "base: {{id: {root}/encoder, adapter: {{method: full}}}}",
        "texts.jsonl",
        ("reward",),
    ),
    "decoder": ("optimizer: adamw", "answers.jsonl", ("reward", "ppo", "evaluate")),
    "texts": ("optimizer: adamw", "texts.jsonl", ("reward",)),
}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def build(root: Path) -> None:
    tokenizer = prepare_tokenizer(tiny.tokenizer(), TokenizerSection())
    base = pretrain_stage(root / "base", tiny.llama(), tokenizer)
    sft = root / "runs/sft/sft"
    tokenizer.save_pretrained(sft_adapter(tiny.llama(), sft / "model"))
    finish(sft, "sft", **origin(base, tokenizer))
    tiny.bert().save_pretrained(root / "encoder")
    tiny.wordpiece().save_pretrained(root / "encoder")
    answers = [
        (number, label, {"boats": "boats", "kites": "kite", "tie": "Paris"}[label])
        for number in range(16)
        for label in (LABELS[:2] if number % 4 else LABELS)
    ]
    texts = [{"text": f"{word} {n} {word}", "label": label} for n, label, word in answers]
    write(root / "texts.jsonl", texts)
    prompted = [
        {"prompt": f"Tom has {n} boats. Say it.", "response": f"{word} {n}", "label": label}
        for n, label, word in answers
    ]
    write(root / "answers.jsonl", prompted)
    write(root / "prompts.jsonl", [{"prompt": f"Tom has {n} boats."} for n in range(8)])
    for name, (template, rows, _) in RUNS.items():
        key = template.format(root=root)
        (root / f"{name}.yaml").write_text(RECIPE.format(root=root, name=name, rows=rows, base=key))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classifier")
    build(root)
    for name, (_, _, stages) in RUNS.items():
        for made in stages:
            assert stage.main([made, f"{root}/{name}.yaml", "--debug"]) == 0, (name, made)
    return root


def manifest(root: Path, name: str, made: str = "reward") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "runs" / name / made / "stage.json").read_text())
    return found


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_it_learns_and_says_how_well(name: str, root: Path) -> None:
    made = manifest(root, name)
    metrics = made["metrics"]
    assert metrics["accuracy"] > 0.9
    assert metrics["accuracy/majority"] == 16 / 36  # 16 of each, but 4 of tie
    assert metrics["accuracy/bag_of_words"] > 0.9
    assert metrics["rows"] == 36
    assert [metrics[f"class/{label}/rows"] for label in LABELS] == [16, 16, 4]
    assert {"f1/macro", "calibration/ece", "loss", "accuracy/train", "best_step"} <= set(metrics)
    reads = "text" if name == "encoder" else "response"
    assert made["classifier"] == {"labels": list(LABELS), "reads": reads}
    rows = (root / "runs" / name / "reward/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["loss"] > 2 * metrics["loss"]
    assert why_not_done(load_recipe(f"{root}/{name}.yaml"), "reward") is None
    found = verify_run(root / "runs" / name)[0].values()
    assert {check.state for check in found} == {"ok", "not made"}


# What the classifiers are given of a prompt and a response, and the prefix of its own length.
WRITTEN = {
    "encoder": "[CLS] {response} [SEP]",
    "decoder": "\n\nHuman: {prompt}\n\nAssistant: {response}<|end|>",
    "texts": "{response}<|end|>",
}
PROMPT = (Message("user", "Tom has 3 boats."),)
RESPONSES = ["kite 3", "boats and boats and boats", "Paris", ""]


@torch.no_grad()
def by_transformers(root: Path, name: str, response: str) -> list[float]:
    """The probabilities that transformers' own classifier gives to text written out by hand."""
    folder = root / "runs" / name / "reward/model"
    whole = name == "encoder"
    load = AutoModelForSequenceClassification.from_pretrained
    model = load(folder) if whole else load(root / "base/model", num_labels=3)
    if not whole:
        model = PeftModel.from_pretrained(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = WRITTEN[name].format(prompt=PROMPT[0].content, response=response)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    found: list[float] = model.eval()(input_ids=ids).logits.softmax(-1)[0].tolist()
    return found


def ppo_scores(root: Path, source: dict[str, Any]) -> list[float]:
    """What PPO pays for the responses, through its own scoring path."""
    recipe = load_recipe(f"{root}/decoder.yaml", [f"ppo.reward={json.dumps([source])}"])
    assert recipe.ppo is not None
    prompts = LoadedData((Prompt(PROMPT),), (), ())
    job = StageJob(
        recipe,
        "ppo",
        root / "runs/decoder/ppo",
        read_parents(recipe, "ppo"),
        {"prompts": prompts},
        Console(),
        read_reward_models(recipe, "ppo"),
    )
    sft = job.parent_folder("sft") / "model"
    folders = {"policy": sft, "reference": sft} | reward_roles(job)
    loaded = load_roles(job, folders, max_new_tokens=32)
    responses = [loaded.renderer.response(PROMPT, text) for text in RESPONSES]
    sequences = join([loaded.renderer.prompt(PROMPT)] * len(RESPONSES), responses)
    scorer = ppo_scorer(job, recipe.ppo, loaded)
    return scorer([as_chat(Prompt(PROMPT))] * len(RESPONSES), RESPONSES, sequences).tolist()


@pytest.mark.parametrize("reads_text", [False, True], ids=["on our base", "on a base of its own"])
@pytest.mark.parametrize("name", WRITTEN)
def test_ppo_is_paid_the_probability_that_transformers_gives(
    name: str, reads_text: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reads_text:
        monkeypatch.setattr(scoring, "_roles", lambda job: {})
    model = "reward" if name == "decoder" and not reads_text else f"{root}/runs/{name}/reward"
    expected = [by_transformers(root, name, response) for response in RESPONSES]
    for number in (1, 2):
        found = ppo_scores(root, {"model": model, "label": LABELS[number]})
        assert found == pytest.approx([p[number] for p in expected], abs=1e-5)
    assert max(p[1] for p in expected) - min(p[1] for p in expected) > 0.1


def test_a_run_of_ppo_and_its_evaluation_are_paid_in_probabilities(root: Path) -> None:
    assert 0 < manifest(root, "decoder", "ppo")["metrics"]["score/mean"] < 1
    assert 0 < manifest(root, "decoder", "evaluate")["metrics"]["sft/score/mean"] < 1


def test_an_evaluation_without_ppo_has_no_scores(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = f"run.parents.reward={root}/runs/texts/reward"
    keys = ["name=plain", "ppo=null", "reward=null", "data.reward=null", parent]
    arguments = ["evaluate", f"{root}/texts.yaml", *keys]
    assert stage.main([*arguments, "--debug"]) == 0
    metrics = manifest(root, "plain", "evaluate")["metrics"]
    assert "sft/length/mean" in metrics
    assert not any(key.startswith(("sft/score", "reward/")) for key in metrics)
    benchmark = "data.benchmark={a: {path: answers.jsonl, shape: pairs}}"
    assert stage.main([*arguments, benchmark]) == 2
    assert "data.benchmark: tests a reward model; " in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "ppo.reward=[{model: reward, label: birds}]",
            "found 'birds'; allowed: a reward model, or as a part of ppo.reward {model: reward",
        ),
        ("ppo.reward=model", "ppo.reward {model: reward, label: boats or kites or tie}"),
        (
            "ppo.reward=f:g ppo.heldout_reward=reward",
            "the model is a classifier; allowed: a reward",
        ),
        ("ppo.reward=[{model: ROOT/runs/texts/reward}]", "the model is a classifier; allowed: "),
        (
            "ppo.reward=[{ensemble: [ROOT/runs/texts/reward, ROOT/runs/encoder/reward]}]",
            "a classifier has no place in an ensemble",
        ),
        (
            "ppo.reward=[{ensemble: [reward, ROOT/runs/texts/reward], label: tie}]",
            "is a class of one model",
        ),
        ("ppo.heldout_reward=ROOT/runs/texts/reward", "ppo.heldout_reward: "),
        ("data.benchmark={a: {path: a}}", "needs a reward section, with a loss of pairs"),
    ],
)
def test_a_reward_that_names_no_class_is_refused(
    key: str, message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = key.replace("ROOT", str(root)).split(" ppo.", 1)
    arguments = ["ppo", f"{root}/decoder.yaml", keys[0], *(f"ppo.{k}" for k in keys[1:])]
    assert stage.main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_without_its_head_or_labels_is_refused(root: Path, tmp_path: Path) -> None:
    for name, file in (("decoder", WEIGHTS), ("encoder", "model.safetensors")):
        folder = Path(shutil.copytree(root / "runs" / name / "reward/model", tmp_path / name))
        tensors = load_file(folder / file)
        heads = [key for key in tensors if "score" in key or key.startswith("classifier.")]
        assert heads
        save_file({k: v for k, v in tensors.items() if k != heads[0]}, folder / file)
        with pytest.raises(ParentError):
            load(root, name, folder)
        save_file(tensors, folder / file)
        load(root, name, folder)
        score = json.loads((folder / "score.json").read_text())
        (folder / "score.json").write_text(json.dumps(score | {"labels": score["labels"][:2]}))
        with pytest.raises(ParentError):
            load(root, name, folder)


def load(root: Path, name: str, folder: Path) -> None:
    if name == "encoder":
        load_encoder_reward(folder)
    else:
        load_reward_model(AutoModelForCausalLM.from_pretrained(root / "base/model"), folder)


def test_a_whole_model_names_its_labels(root: Path) -> None:
    config = json.loads((root / "runs/encoder/reward/model/config.json").read_text())
    assert config["id2label"] == {"0": "boats", "1": "kites", "2": "tie"}
    assert config["label2id"] == {"boats": 0, "kites": 1, "tie": 2}


def test_a_decoder_is_exported_as_transformers_own_classifier(root: Path) -> None:
    out = root / "out"
    keys = [f"{root}/decoder.yaml", "--out", str(out), "--debug"]
    assert export.main(["reward", *keys]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = WRITTEN["decoder"].format(prompt=PROMPT[0].content, response="kite 3")
    with torch.no_grad():
        logits = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits
    expected = by_transformers(root, "decoder", "kite 3")
    assert logits.softmax(-1)[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert model.config.id2label == dict(enumerate(LABELS))


def test_the_report_describes_a_classifier(root: Path) -> None:
    edit_manifest(root / "runs/sft/sft", started="2026-01-01", finished="2026-01-01")
    page = report.write_report(root / "runs/decoder").read_text()
    assert "Of 36 held-out rows it names the class of" in page
    assert "Always naming the most frequent class gets 44" in page
