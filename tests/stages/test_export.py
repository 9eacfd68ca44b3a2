"""align export: plain checkpoints that transformers alone loads, and says the same with.

Stages are finished by hand, with random adapters on tiny bases; a fresh process that knows no
Align and no PEFT loads what was exported. The real command runs on real stages in
``test_quantized_base``.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from align.manifest import find_manifest, sha256_file
from align.models import load_causal_lm, recipe_base_facts
from align.recipe_io import load_recipe
from align.roles import add_adapters
from pipelines import export, plain_checkpoint
from pipelines.run_facts import read_run
from tests import tiny
from tests.adapters import sft_adapter
from tests.exports import (
    RECIPE,
    ROWS,
    TEXTS,
    run_export,
    said_by_transformers,
    sampled,
    tokenizer,
)
from tests.finished import edit_manifest, finish, origin, plain, reward_stage, unfinish

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2}

CAUSAL, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"


def make_run(root: Path, model: str = "llama", kind: str = "none") -> Path:
    """Write a run whose stages sft, reward and ppo are finished; return its directory."""
    base = root / "base"
    MODELS[model]().save_pretrained(base)
    (root / "x").mkdir()
    file = root / "x" / "recipe.yaml"
    file.write_text(RECIPE.format(base=base, root=root, kind=kind))
    recipe = load_recipe(file)
    facts = origin(base, tokenizer()) | {"base": recipe_base_facts(recipe)}
    for stage, name, seed in (("sft", "model", 1), ("ppo", "policy", 2)):
        folder = root / "x" / stage
        sft_adapter(load_causal_lm(recipe, str(base)), folder / name, seed=seed)
        tokenizer().save_pretrained(folder / name)
        (folder / "samples.jsonl").write_text(sampled())
        finish(folder, stage, (name, "samples.jsonl"), **facts)
    reward_stage(root / "x/reward", base, load_causal_lm(recipe, str(base)), tokenizer(), seed=3)
    edit_manifest(root / "x/reward", base=facts["base"].model_dump())
    return root / "x"


KINDS = ["llama-none", "llama-nf4", "gpt2-none", "gpt2-nf4"]
EXPORTS = {
    "float32": (CAUSAL, "ppo", "--dtype", "float32"),
    "bfloat16": (CAUSAL, "ppo"),
    "reward": (CLASSIFIER, "reward"),
}


@dataclass(frozen=True)
class Exported:
    """A run, the folder of an export of it, and what a fresh process says of that."""

    run: Path
    folder: Path
    found: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.folder / "export.json").read_text())
        return facts


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Every export of every kind of run, loaded in one fresh process."""
    runs, folders = {}, {}
    for kind in KINDS:
        runs[kind] = make_run(tmp_path_factory.mktemp(kind), *kind.split("-"))
        for name, (loader, stage, *options) in EXPORTS.items():
            folder = runs[kind].parent / "deep" / name
            assert run_export(runs[kind], stage, folder, *options) == 0
            folders[f"{kind}/{name}"] = (loader, str(folder))
    found = said_by_transformers(folders)
    return {
        key: Exported(runs[key.partition("/")[0]], Path(folders[key][1]), facts)
        for key, facts in found.items()
    }


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("plain"))


def adapted(run: Path, folder: str) -> Any:
    recipe = load_recipe(run / "recipe.yaml")
    return PeftModel.from_pretrained(load_causal_lm(recipe, recipe.base.id), run / folder).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_the_policy_says_what_the_adapter_says(
    exports: dict[str, Exported], kind: str
) -> None:
    made = exports[f"{kind}/float32"]
    assert made.found["dtype"] == "torch.float32"
    model = adapted(made.run, "ppo/policy")
    for row, logits in zip(ROWS, made.found["alone"], strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([row])).logits[0].flatten()
        assert_close(torch.tensor(logits), expected, rtol=0, atol=2e-4)
    assert made.facts["drift"]["kl/max"] < 1e-8
    assert made.facts["drift"]["logits/max"] < 2e-4


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_the_policy_is_in_bfloat16(exports: dict[str, Exported], kind: str) -> None:
    made = exports[f"{kind}/bfloat16"]
    tensors = load_file(made.folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    found, drift = made.found, made.facts["drift"]
    assert found["dtype"] == "torch.bfloat16"
    assert "quantization_config" not in found["config"]
    assert found["padding"] == "left"
    assert found["template"] == tokenizer().chat_template
    assert (found["stops"], found["pad"]) == ([1], [0, 0])
    assert 1e-7 < drift["kl/mean"] < made.facts["max_drift"]["kl/mean"] == 0.01
    assert drift["kl/mean"] <= drift["kl/max"]
    assert 1e-3 < drift["logits/mean"] < drift["logits/max"] < 0.5
    assert drift["texts"] == len(TEXTS)
    responses = [row["response"] for row in made.facts["texts"]]
    assert responses == [f"{answer}4" for _, answer in TEXTS]


def test_the_drift_is_what_one_measures_by_hand(plain_run: Path, tmp_path: Path) -> None:
    assert run_export(plain_run, "ppo", tmp_path / "plain") == 0
    facts = json.loads((tmp_path / "plain" / "export.json").read_text())
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    kls, differences = [], []
    for row in facts["texts"]:
        prompt, whole = (
            tokenizer().apply_chat_template(messages, add_generation_prompt=more, return_dict=False)
            for messages, more in (
                (row["prompt"], True),
                ([*row["prompt"], {"role": "assistant", "content": row["response"]}], False),
            )
        )
        ids = torch.tensor([whole[: whole.index(1) + 1]])  # up to the end token
        with torch.no_grad():
            ours, theirs = (
                model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
                for model in (adapted(plain_run, "ppo/policy"), written)
            )
        p, q = torch.log_softmax(ours, -1), torch.log_softmax(theirs, -1)
        kls += (p.exp() * (p - q)).sum(-1).tolist()
        differences.append((ours - theirs).abs().flatten())
    assert facts["drift"]["tokens"] == len(kls)
    # Padded and alone, bfloat16 rounds a little differently.
    assert facts["drift"]["kl/mean"] == pytest.approx(sum(kls) / len(kls), rel=0.2)
    assert facts["drift"]["kl/max"] == pytest.approx(max(kls), rel=0.3)
    mean = torch.cat(differences).mean().item()
    assert facts["drift"]["logits/mean"] == pytest.approx(mean, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reward_model_scores_by_transformers_alone(
    exports: dict[str, Exported], kind: str
) -> None:
    made = exports[f"{kind}/reward"]
    found = made.found
    assert (found["dtype"], found["labels"], found["pad"]) == ("torch.float32", 1, [0, 0])
    assert found["padding"] == "right"
    assert found["class"].endswith("ForSequenceClassification")
    offset = found["config"]["score_offset"]
    assert offset == pytest.approx(0.3 / 2.5)  # shift and scale of seed 3 in tests.finished
    if kind.endswith("none"):
        expected = [plain(made.run / "reward", made.run.parent / "base", row) for row in ROWS]
    else:
        expected = quantized_scores(made.run)
    assert max(expected) - min(expected) > 0.1
    for logits in (found["alone"], found["batch"]):
        assert [logit[0] - offset for logit in logits] == pytest.approx(expected, abs=1e-4)
    assert made.facts["score_offset"] == offset
    assert made.facts["drift"]["score/max"] < 1e-4


def quantized_scores(run: Path) -> list[float]:
    """Scores of the adapter on the quantised base, by PEFT and the numbers in the files."""
    model = adapted_body(run)
    head = load_file(run / "reward/model/adapter_model.safetensors")
    fixed = json.loads((run / "reward/model/score.json").read_text())
    scores = []
    for row in ROWS:
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
        raw = (head["base_model.model.score.weight"][0] * hidden).sum().item()
        scores.append((raw - fixed["shift"]) / fixed["scale"])
    return scores


def adapted_body(run: Path) -> Any:
    recipe = load_recipe(run / "recipe.yaml")
    base = load_causal_lm(recipe, recipe.base.id)
    add_adapters(base, {"reward": run / "reward" / "model"})
    return base.base_model


def test_a_reward_model_in_bfloat16_is_rounded_and_says_so(plain_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    assert run_export(plain_run, "reward", out, "--dtype", "bfloat16") == 0
    facts = json.loads((out / "export.json").read_text())
    assert 1e-4 < facts["drift"]["score/mean"] < facts["max_drift"]["score/mean"] == 0.1


def test_a_policy_in_float16_is_rounded_less_than_in_bfloat16(
    plain_run: Path, tmp_path: Path
) -> None:
    drift = {}
    for dtype in ("float16", "bfloat16"):
        assert run_export(plain_run, "ppo", tmp_path / dtype, "--dtype", dtype) == 0
        facts = json.loads((tmp_path / dtype / "export.json").read_text())
        drift[dtype] = facts["drift"]["kl/mean"]
        tensors = load_file(tmp_path / dtype / "model.safetensors")
        assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
    assert 0 < drift["float16"] < drift["bfloat16"] / 4  # by three bits of the mantissa


def test_export_json_says_what_it_was_made_from(plain_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    out.mkdir()  # an empty folder may be there
    assert run_export(plain_run, "sft", out) == 0
    facts = json.loads((out / "export.json").read_text())
    manifest = find_manifest(plain_run / "sft")
    assert manifest is not None
    assert facts["parents"] == [{"stage": "sft", "sha256": manifest.outputs_sha256()}]
    assert facts["base"] == manifest.base.model_dump()
    assert (facts["stage"], facts["name"], facts["dtype"]) == ("sft", "x", "bfloat16")
    assert {"torch", "transformers", "peft", "python"} <= set(facts["versions"])
    files = {path.name for path in out.iterdir()} - {"export.json"}
    assert files == set(facts["outputs"]) >= {"model.safetensors", "tokenizer.json"}
    assert all(sha256_file(out / name) == sha for name, sha in facts["outputs"].items())


def test_a_whole_model_is_exported_as_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    manifest = json.loads((run / "ppo/stage.json").read_text())
    for path in (run / "ppo/policy").iterdir():
        path.unlink()
    policy = tiny.llama(seed=7)
    policy.save_pretrained(run / "ppo/policy")
    facts = {key: manifest[key] for key in ("base", "tokenizer_sha256", "template_sha256")}
    finish(run / "ppo", "ppo", ("policy", "samples.jsonl"), **facts)
    for dtype in (torch.float32, torch.bfloat16):
        out = tmp_path / str(dtype)
        assert run_export(run, "ppo", out, "--dtype", str(dtype).removeprefix("torch.")) == 0
        written = AutoModelForCausalLM.from_pretrained(out).state_dict()
        expected = policy.state_dict()
        assert set(written) == set(expected)
        assert all(torch.equal(written[n], expected[n].to(dtype)) for n in expected)
        drift = json.loads((out / "export.json").read_text())["drift"]
        assert (drift["kl/max"] == 0.0) == (dtype == torch.float32)


def test_beyond_the_threshold_nothing_is_left(
    plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "plain"
    assert run_export(plain_run, "ppo", out, "--max-drift", "1e-9") == 1
    assert "ppo: the exported model is not the trained one: kl/mean " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert run_export(plain_run, "reward", out, "--dtype", "bfloat16", "--max-drift", "1e-9") == 1
    assert "score/mean " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_the_trained_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merged onto the base as it is stored, not as it was quantised: another model."""
    run = make_run(tmp_path, kind="nf4")

    def stored(recipe: Any, location: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)

    monkeypatch.setattr(plain_checkpoint, "load_causal_lm", stored)
    assert run_export(run, "ppo", tmp_path / "plain", "--dtype", "float32") == 1
    assert "is not the trained one: kl/mean 0." in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()


def test_what_is_in_the_way_is_left_alone(
    plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    for out, words in (
        ("taken", "taken: is not empty; remove it, or name another folder with --out"),
        ("taken/thesis.txt", "cannot be made: a file is in its place"),
        ("taken/thesis.txt/x", "cannot be made: a file is in its place"),
    ):
        assert run_export(plain_run, "ppo", tmp_path / out) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "precious"


def test_wrong_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = make_run(tmp_path), tmp_path / "plain"

    def refused(stage: str) -> str:
        assert run_export(run, stage, out) == 2
        assert not out.exists()
        return capsys.readouterr().err

    # A file that is not what the stage has made.
    weights = run / "reward" / "model" / "score.json"
    before = weights.read_text()
    weights.write_text(before.replace("2.5", "2.0"))
    assert "score.json: is not what the reward stage was finished with" in refused("reward")
    # A base that has changed since.
    tiny.llama(seed=9).save_pretrained(tmp_path / "base")
    assert "the recipe's base (" in refused("ppo")
    # No text to compare on.
    for stage in ("sft", "ppo"):
        (run / stage / "samples.jsonl").write_text("")
    assert "no sampled responses to measure the drift on" in refused("sft")
    unfinish(run / "ppo")
    assert "no finished ppo stage here" in refused("ppo")
    recipe = run / "recipe.yaml"
    recipe.write_text("".join(li for li in recipe.open() if not li.startswith("reward:")))
    recipe.write_text(
        recipe.read_text().replace("max_new_tokens: 8}", "max_new_tokens: 8, reward: m:f}")
    )
    assert "makes no reward stage; allowed with --stage: sft, ppo" in refused("reward")


def test_texts_come_from_the_stage_else_from_another(plain_run: Path) -> None:
    run = read_run(plain_run)
    source, texts = export.sampled_texts(run, "ppo")
    assert source == plain_run / "ppo" / "samples.jsonl"
    assert [text for _, text in texts] == [f"{answer}4" for _, answer in TEXTS]  # the last look
    assert export.sampled_texts(run, "reward")[0] == source
    assert export.sampled_texts(run, "sft")[0] == plain_run / "sft" / "samples.jsonl"
    rows = [{"prompt": [], "responses": {"sft": {"text": "a"}, "ppo": {"text": "b"}}}] * 20
    evaluated = {"evaluate": replace(run["ppo"], stage="evaluate", samples=rows)}
    assert export.sampled_texts(evaluated, "ppo")[1] == [([], "b")] * export.TEXTS
    assert export.sampled_texts(evaluated, "reward")[1][0] == ([], "a")
