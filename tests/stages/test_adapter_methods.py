"""Every adapter method through the real stages, on the built-in world with models made in seconds.

What is whole goes on to PPO; every folder is checked by the stages themselves, which load it anew.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.adapters import trained_method
from pipelines import stage
from tests import tiny

ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {},
    "head_only": {},
    "top_layers": {"top_layers": 1},
    "bitfit": {},
    "bottleneck": {"bottleneck_size": 4},
    "prefix": {"prefix_tokens": 4},
    "lora": {"r": 4, "dora": True, "rslora": True, "dropout": 0.1, "init": "gaussian"},
}
TRAINING = {"lr": 1e-2, "batch_size": 4, "log_every": 1}
HELD_OUT = {"split": "heldout"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("methods")
    for name, model in (("llama", tiny.llama()), ("gpt2", tiny.gpt2())):
        model.save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    return root


def recipe(root: Path, name: str, **changes: Any) -> Path:
    def world(what: str) -> dict[str, Any]:
        return {"train": [{"world": what}], "heldout": [{"world": what} | HELD_OUT]}

    settings = {
        "name": name,
        "base": {"id": str(root / ("gpt2" if name == "bitfit" else "llama"))},
        "adapter": {"method": name} | ADAPTERS[name],
        "data": {
            "max_prompt_tokens": 140,
            "max_response_tokens": 100,
            "max_dropped": 1.0,
            "world": {
                "demonstration_rows": 12,
                "ranked_prompts": 8,
                "prompt_rows": 8,
                "heldout_rows": 8,
                "responses_per_ranking": 2,
            },
            "sft": world("demonstrations"),
            "reward": world("rankings"),
            "prompts": world("prompts"),
        },
        "sft": TRAINING | {"samples": 2},
        "reward": TRAINING,
        "evaluate": {"prompts": 4, "pairs": 8, "max_new_tokens": 8},
        "tracking": {"mode": "disabled"},
        "run": {"root": str(root / "runs"), "threads": 1},
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings | changes))
    return path


def ppo(layout: str) -> dict[str, Any]:
    sizes = {"batch_size": 4, "minibatch_size": 4, "steps": 2, "max_new_tokens": 8}
    return TRAINING | sizes | {"layout": layout, "probe_prompts": 4, "epochs": 1}


def finish(path: Path, *stages: str) -> None:
    for name in stages:
        assert stage.main([name, str(path), "--debug"]) == 0, name


def metrics(root: Path, name: str, of: str) -> dict[str, float]:
    made = json.loads((root / "runs" / name / of / "stage.json").read_text())
    found: dict[str, float] = made["metrics"]
    return found


@pytest.mark.parametrize("name", ["head_only", "top_layers", "bitfit", "bottleneck"])
def test_sft_reward_and_evaluation(bases: Path, name: str) -> None:
    finish(recipe(bases, name), "sft", "reward", "evaluate")
    run = bases / "runs" / name
    assert trained_method(run / "sft/model") == trained_method(run / "reward/model") == name
    assert 0 < metrics(bases, name, "sft")["trained/share"] < 0.5
    found = metrics(bases, name, "evaluate")
    assert found["sft/perplexity"] != found["base/perplexity"]
    # The evaluation's passes are its own: they agree with those of the stage.
    assert found["sft/perplexity"] == pytest.approx(metrics(bases, name, "sft")["perplexity"])


def test_prefix_through_sft_and_reward(bases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(bases, "prefix", evaluate=None)
    finish(path, "sft", "reward")
    assert "adapter.method=prefix trains 512 parameters" not in capsys.readouterr().err


def test_full_through_every_stage(bases: Path) -> None:
    finish(recipe(bases, "full", ppo=ppo("separate")), "sft", "reward", "ppo", "evaluate")
    assert metrics(bases, "full", "sft")["trained/share"] == 1.0
    rows = (bases / "runs/full/ppo/metrics.jsonl").read_text().splitlines()
    start, first, *_ = map(json.loads, rows)
    assert start["probe/kl"] == 0.0
    assert first["kl/mean"] == 0.0
    assert first["ppo/ratio_first_max_error"] == 0.0
    found = metrics(bases, "full", "evaluate")
    assert found["sft/perplexity"] == pytest.approx(metrics(bases, "full", "sft")["perplexity"])
    assert found["ppo/kl/mean"] != 0


def test_dora_through_every_stage(bases: Path) -> None:
    finish(recipe(bases, "lora", ppo=ppo("shared")), "sft", "reward", "ppo", "evaluate")
    rows = (bases / "runs/lora/ppo/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[1])["ppo/ratio_first_max_error"] == 0.0


def test_ppo_from_models_by_another_method_is_refused(
    bases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "bottleneck"
    finish(recipe(bases, name), "sft", "reward")
    parents = {stage: str(bases / "runs" / name / stage) for stage in ("sft", "reward")}
    run = {"root": str(bases / "runs"), "parents": parents}
    more = {"sft": None, "reward": None, "evaluate": None, "ppo": ppo("shared"), "run": run}
    path = recipe(bases, "lora", **more)
    assert stage.main(["ppo", str(path)]) == 2
    assert "was trained with adapter.method=bottleneck; allowed" in capsys.readouterr().err
