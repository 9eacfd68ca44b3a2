"""A reward model on an encoder, end to end: trained, scored by PPO and by the evaluation.

The policy is a decoder with another tokenizer, so that PPO has to write its text anew for the
encoder. Expected scores are those of transformers' own classifier on text written out by hand.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.errors import DataError
from align.recipe import TokenizerSection
from align.recipe_io import load_recipe
from align.stages import parent_stages, recipe_sha256, why_not_done
from data.tokenizer import prepare_tokenizer
from launch.verify import verify_run
from pipelines import stage
from tests import tiny
from tests.adapters import sft_adapter
from tests.finished import finish, origin, pretrain_stage

RECIPE = """
name: x
seed: 3
base: {{id: {root}/base/model}}
adapter: {{r: 4, alpha: 8.0}}
data:
  root: {root}
  max_prompt_tokens: 96
  max_response_tokens: 32
  sft: {{train: [{{path: pairs.jsonl}}]}}
  reward: {{train: [{{path: pairs.jsonl}}], heldout: [{{path: pairs.jsonl}}]}}
  prompts: {{train: [{{path: pairs.jsonl}}], heldout: [{{path: pairs.jsonl}}]}}
reward:
  base: {{id: {root}/encoder, pooling: {pooling}, adapter: {{method: {method}}}}}
  lr: 5.0e-3
  batch_size: 8
  micro_batch_size: 4
  epochs: 4
ppo:
  lr: 1.0e-3
  steps: 1
  batch_size: 4
  minibatch_size: 2
  max_new_tokens: 8
  probe_prompts: 2
evaluate: {{prompts: 4, max_new_tokens: 8, batch_size: 4, bootstrap: 20}}
tracking: {{mode: disabled}}
run: {{root: {root}/runs, threads: 1, parents: {{sft: {root}/runs/x/sft}}}}
"""


def rows() -> list[dict[str, str]]:
    """The answer with kites is better."""
    return [
        {
            "prompt": f"Tom has {number} boats. Say it.",
            "chosen": f"kite {number} kite",
            "rejected": f"boats {number} boats",
        }
        for number in range(32)
    ]


def build(root: Path, pooling: str, method: str) -> Path:
    tokenizer = prepare_tokenizer(tiny.tokenizer(), TokenizerSection())
    base = pretrain_stage(root / "base", tiny.llama(), tokenizer)
    sft = root / "runs/x/sft"
    tokenizer.save_pretrained(sft_adapter(tiny.llama(), sft / "model"))
    finish(sft, "sft", **origin(base, tokenizer))
    tiny.bert().save_pretrained(root / "encoder")
    tiny.wordpiece().save_pretrained(root / "encoder")
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    recipe = root / "r.yaml"
    recipe.write_text(RECIPE.format(root=root, pooling=pooling, method=method))
    return recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoder")
    recipe = build(root, "cls", "full")
    for name in ("reward", "ppo", "evaluate"):
        assert stage.main([name, str(recipe), "--debug"]) == 0, name
    return root


def manifest(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "runs/x" / name / "stage.json").read_text())
    return found


def test_it_learns_and_says_what_it_stands_on(root: Path) -> None:
    made = manifest(root, "reward")
    assert made["metrics"]["accuracy"] > 0.9
    assert made["base"]["architecture"] == "encoder"
    assert made["base"]["id"].endswith("encoder")
    assert made["parents"] == []
    parents = [(p["stage"], p["in_chain"]) for p in manifest(root, "ppo")["parents"]]
    assert parents == [("sft", True), ("reward", True)]
    assert {check.state for check in verify_run(root / "runs/x")[0].values()} == {"ok", "not made"}


@torch.no_grad()
def by_transformers(root: Path, prompt: str, response: str) -> float:
    """The score that transformers' classifier gives to a text that is written by hand."""
    folder = root / "runs/x/reward/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = f"[CLS] Human: {prompt} Assistant: [SEP]"
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    start, answer = encode(first), [*encode(response), tokenizer.sep_token_id]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    segment = torch.tensor([[0] * len(start) + [1] * len(answer)])
    logit = model(input_ids=torch.tensor([start + answer]), token_type_ids=segment).logits.item()
    fixed = json.loads((folder / "score.json").read_text())
    return (logit - fixed["shift"]) / fixed["scale"]


def test_ppo_is_paid_by_the_encoders_score_of_the_text(root: Path) -> None:
    lines = (root / "runs/x/ppo/samples.jsonl").read_text().splitlines()
    assert lines
    for sample in map(json.loads, lines):
        (turn,) = sample["prompt"]
        expected = by_transformers(root, turn["content"], sample["response"])
        assert sample["score"] == pytest.approx(expected, abs=1e-4)


def test_the_evaluation_measures_it(root: Path) -> None:
    metrics = manifest(root, "evaluate")["metrics"]
    trained = manifest(root, "reward")["metrics"]
    assert metrics["reward/accuracy"] == trained["accuracy"]
    assert metrics["reward/pairs"] == 32
    assert "ppo/win_rate/mean" in metrics


def test_only_what_decides_an_encoders_result_makes_it_anew(root: Path) -> None:
    file = str(root / "r.yaml")
    recipe = load_recipe(file)
    assert parent_stages(recipe, "reward") == ()
    assert parent_stages(recipe, "ppo") == ("sft", "reward")
    assert why_not_done(recipe, "reward") is None
    for change in ("adapter.r=8", "base.dtype=bfloat16"):
        assert why_not_done(load_recipe(file, [change]), "reward") is None
    for change in ("reward.base.pooling=mean", "reward.base.adapter.method=bitfit"):
        changed = recipe_sha256(load_recipe(file, [change]), "reward")
        assert changed != recipe_sha256(recipe, "reward")
    shared = load_recipe(file, ["reward.base.adapter=null"])
    other = load_recipe(file, ["reward.base.adapter=null", "adapter.r=8"])
    assert recipe_sha256(shared, "reward") != recipe_sha256(other, "reward")
    config = root / "encoder/config.json"
    before = config.read_text()
    config.write_text(before + " ")
    assert why_not_done(recipe, "reward") == "its data or other input files have changed"
    config.write_text(before)
    with pytest.raises(DataError, match=r"reward.base.id=\./nowhere: no such folder"):
        why_not_done(load_recipe(file, ["reward.base.id=./nowhere"]), "reward")


def test_an_adapter_on_an_encoder_pays_ppo_of_another_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = build(tmp_path, "mean", "lora")
    keys = ["reward.epochs=0.5", "run.keep_checkpoints=0", "base.gradient_checkpointing=true"]
    assert stage.main(["reward", str(recipe), "name=other", "--debug", *keys]) == 0
    model = f"{tmp_path}/runs/other/reward"
    arguments = ["ppo", str(recipe), "--debug", f"ppo.reward=[{{model: {model}}}]"]
    assert stage.main(arguments) == 0
    found = manifest(tmp_path, "ppo")
    assert [(p["path"], p["in_chain"]) for p in found["parents"]] == [
        ("../sft", True),
        ("../../other/reward", False),
    ]
    config = tmp_path / "encoder/config.json"
    config.write_text(config.read_text() + " ")
    capsys.readouterr()
    assert stage.main([*arguments, "--force"]) == 2
    assert "its base (" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["data.max_response_tokens=250"], "leaves too little room for a prompt; allowed: at most"),
        (["reward.base.id={root}/base/model"], "no cls_token and no sep_token; allowed: encoders"),
        (["reward.base.id=no-such-org/no-such"], "reward.base.id=no-such-org/no-such: "),
    ],
)
def test_what_cannot_be_read_is_refused_before_training(
    keys: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = [key.format(root=root) for key in keys]
    assert stage.main(["reward", str(root / "r.yaml"), "name=refused", *changed]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (root / "runs/refused").exists()
