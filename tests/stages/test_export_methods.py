"""align export of what every adapter method trains: plain checkpoints, or a refusal by name.

Stages are finished by hand, with random values for all that a method trains. A fresh process
loads what was exported; what it says is compared with PEFT's model, or the whole one, as trained.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close

from align.adapter_methods import adapter_config
from align.adapters import save_trained
from align.models import load_causal_lm
from align.recipe import Recipe
from align.recipe_adapter import Adapter
from align.recipe_io import load_recipe
from reward.model import load_reward_model, new_reward_model
from tests import tiny
from tests.exports import RECIPE, ROWS, run_export, said_by_transformers, sampled, tokenizer
from tests.finished import finish, origin

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2}  # output embeddings of their own, and tied ones
KEYS: dict[str, dict[str, Any]] = {"top_layers": {"top_layers": 1}}
CASES = [
    (model, method)
    for method in ("full", "head_only", "top_layers", "bitfit")
    for model in MODELS
    if (model, method) != ("llama", "bitfit")  # it has no biases
]
LOADERS = {"sft": "AutoModelForCausalLM", "reward": "AutoModelForSequenceClassification"}


def shake(model: torch.nn.Module, seed: int) -> None:
    """Move every trainable parameter away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1


def make_run(root: Path, model: str, method: str) -> tuple[Path, dict[str, list[Any]]]:
    """Write finished stages sft and reward; return the run and what their models say to ROWS."""
    base = root / "base"
    MODELS[model]().save_pretrained(base)
    run = root / "x"
    run.mkdir()
    file = run / "recipe.yaml"
    text = RECIPE.format(base=base, root=root, kind="none").replace("ppo: {", "#")
    file.write_text(text)
    recipe = load_recipe(file)
    adapter = Adapter.model_validate({"method": method} | KEYS.get(method, {}))
    folders = {stage: run / stage / "model" for stage in LOADERS}
    facts = origin(base, tokenizer())

    language = load_causal_lm(recipe, str(base))
    config = adapter_config(adapter, "CAUSAL_LM", language)
    trained: Any = language if config is None else get_peft_model(language, config)
    shake(trained, seed=1)
    save_trained(trained, folders["sft"], base=str(base), revision=None)

    start = load_causal_lm(recipe, str(base))
    reward = new_reward_model(start, adapter, folders["sft"], seed=2)
    shake(reward.classifier, seed=2)
    reward.head.shift.fill_(0.3)
    reward.head.scale.fill_(2.5)
    reward.save(folders["reward"], str(base), None)

    (run / "sft" / "samples.jsonl").write_text(sampled())
    for stage, folder in folders.items():
        tokenizer().save_pretrained(folder)
        outputs = ("model", "samples.jsonl") if stage == "sft" else ("model",)
        finish(run / stage, stage, outputs, **facts)  # type: ignore[arg-type]
    return run, {
        "sft": language_logits(recipe, folders["sft"]),
        "reward": reward_scores(recipe, folders["reward"]),
    }


@torch.no_grad()
def language_logits(recipe: Recipe, folder: Path) -> list[Any]:
    """What the saved model says, by PEFT or transformers, row by row."""
    model: Any
    if (folder / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(load_causal_lm(recipe, recipe.base.id), folder)
    else:
        model = load_causal_lm(recipe, str(folder))
    return [model(input_ids=torch.tensor([row])).logits[0].flatten() for row in ROWS]


@torch.no_grad()
def reward_scores(recipe: Recipe, folder: Path) -> list[Any]:
    whole = not (folder / "adapter_config.json").is_file()
    base = None if whole else load_causal_lm(recipe, recipe.base.id)
    model = load_reward_model(base, folder)
    ids = [torch.tensor([row]) for row in ROWS]
    return [model(row, torch.ones_like(row, dtype=torch.bool)).item() for row in ids]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any, Any]]:
    """Of every case and stage: the export, what was trained says, and what a fresh process says."""
    folders, expected = {}, {}
    for model, method in CASES:
        run, said = make_run(tmp_path_factory.mktemp(method), model, method)
        for stage, loader in LOADERS.items():
            key, folder = f"{model}-{method}-{stage}", run.parent / stage
            assert run_export(run, stage, folder, "--dtype", "float32") == 0
            folders[key], expected[key] = (loader, str(folder)), said[stage]
    found = said_by_transformers(folders)
    return {key: (Path(folders[key][1]), expected[key], found[key]) for key in folders}


@pytest.mark.parametrize(("model", "method"), CASES)
def test_the_policy_says_what_was_trained(
    exports: dict[str, tuple[Path, Any, Any]], model: str, method: str
) -> None:
    folder, expected, found = exports[f"{model}-{method}-sft"]
    base = MODELS[model]()
    for row, ours, theirs in zip(ROWS, expected, found["alone"], strict=True):
        assert_close(torch.tensor(theirs), ours, rtol=0, atol=1e-4)
        bare = base(input_ids=torch.tensor([row])).logits[0].flatten()
        assert (bare - ours).abs().max() > 0.1
    # Other programs than transformers take the configuration's word for it.
    tied = model == "gpt2" and method != "head_only"
    assert found["config"]["tie_word_embeddings"] == tied
    facts = json.loads((folder / "export.json").read_text())
    assert 0 <= facts["drift"]["kl/mean"] < 1e-8
    assert facts["drift"]["logits/max"] < 1e-4


@pytest.mark.parametrize(("model", "method"), CASES)
def test_the_reward_model_gives_the_same_scores(
    exports: dict[str, tuple[Path, Any, Any]], model: str, method: str
) -> None:
    folder, expected, found = exports[f"{model}-{method}-reward"]
    assert max(expected) - min(expected) > 0.1
    offset = found["config"]["score_offset"]
    assert offset == pytest.approx(0.3 / 2.5)
    for logits in (found["alone"], found["batch"]):
        assert [logit[0] - offset for logit in logits] == pytest.approx(expected, abs=1e-4)
    assert json.loads((folder / "export.json").read_text())["drift"]["score/max"] < 1e-4


@pytest.mark.parametrize(
    ("stage", "key"),
    [("sft", "kl/mean"), pytest.param("reward", "score/mean", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("method", ["full", "head_only", "top_layers", "bitfit"])
def test_rounded_to_bfloat16_it_drifts_and_beyond_the_threshold_it_is_refused(
    exports: dict[str, tuple[Path, Any, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    stage: str,
    key: str,
) -> None:
    whole, _, _ = exports[f"gpt2-{method}-{stage}"]
    run, out = whole.parent / "x", tmp_path / "out"
    rounded = ("--dtype", "bfloat16")
    assert run_export(run, stage, out, *rounded, "--max-drift", "1e-9") == 1
    assert f"the exported model is not the trained one: {key} " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert run_export(run, stage, out, *rounded) == 0
    drift = json.loads((out / "export.json").read_text())["drift"]
    assert 1e-7 < drift[key] < 0.01
    expected = load_file(whole / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in expected)


@pytest.mark.parametrize("method", ["bottleneck", "prefix"])
@pytest.mark.parametrize("stage", LOADERS)
def test_what_no_weights_stand_for_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, stage: str
) -> None:
    run, _ = make_run(tmp_path, "gpt2", method)
    assert run_export(run, stage, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert f"was trained with adapter.method={method}, which puts " in said
    assert "allowed for export: any other method" in said
    assert not (tmp_path / "out").exists()
