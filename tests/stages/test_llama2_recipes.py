"""The Llama-2 recipes with all their keys, end to end, on a tiny random Llama of the same kind.

And the step at the longest lengths before training: it leaves no trace in any stage.
"""

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align import models
from align.manifest import read_manifest
from align.recipe import StageName
from pipelines import ppo, reward_model, reward_start, sft, stage
from tests import tiny

STAGES: tuple[StageName, ...] = ("sft", "reward", "ppo", "evaluate")
SMALL = (
    "run.threads=1",
    "tracking.mode=disabled",
    "data.world.demonstration_rows=8",
    "data.world.ranked_prompts=8",
    "data.world.prompt_rows=8",
    "data.world.heldout_rows=4",
    "data.max_prompt_tokens=96",
    "data.sft={train: [{world: demonstrations}],"
    " heldout: [{world: demonstrations, split: heldout}]}",
    "data.reward={train: [{world: pairs}], heldout: [{world: pairs, split: heldout}]}",
    "data.prompts={train: [{world: prompts}], heldout: [{world: prompts, split: heldout}]}",
    "sft.batch_size=4",
    "sft.samples=2",
    "reward.batch_size=4",
    "ppo.steps=2",
    "ppo.batch_size=4",
    "ppo.minibatch_size=2",
    "ppo.rollout.batch_size=2",
    "ppo.max_new_tokens=8",
    "ppo.probe_every=1",
    "ppo.probe_prompts=2",
    "evaluate.prompts=2",
    "evaluate.pairs=4",
    "evaluate.max_new_tokens=8",
    "evaluate.batch_size=2",
    "evaluate.bootstrap=20",
)


def base(root: Path, key_value_heads: int) -> Path:
    """Write a Llama as Llama 2 is: untied, without biases; 64 wide, for 4-bit blocks of 64."""
    model = tiny.llama(
        hidden_size=64,
        intermediate_size=128,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.02,
    )
    model.save_pretrained(root / "base")
    tiny.tokenizer().save_pretrained(root / "base")
    return root / "base"


def run(root: Path, recipe: str, name: StageName, *more: str) -> Path:
    """Run one stage in this process; return its folder."""
    places = (f"base.id={root / 'base'}", f"run.root={root / 'runs'}", "name=x")
    assert stage.main([name, recipe, *SMALL, *places, *more]) == 0
    return root / "runs" / "x" / name


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("7b")
    base(root, 4)
    for name in STAGES:
        run(root, "llama2-7b/qlora", name)
    return root


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("time/", "memory/", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


def check_finished(run: Path) -> None:
    for name in STAGES:
        manifest = read_manifest(run / name, name)
        assert manifest.base.precision == "nf4+double"
    for folder in ("sft/model", "reward/model", "ppo/policy", "ppo/value"):
        tensors = load_file(run / folder / "adapter_model.safetensors")
        assert all(tensor.any() for tensor in tensors.values())  # the B of LoRA starts at 0
    start, *steps = metrics(run / "ppo")
    assert abs(start["probe/kl"]) < 0.1
    assert [row["ppo/ratio_first_max_error"] < 0.1 for row in steps] == [True, True]


def test_llama2_7b_qlora_runs(finished: Path) -> None:
    check_finished(finished / "runs" / "x")


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "heads"), [("llama2-13b/qlora", 4), ("llama2-70b/qlora", 2)])
def test_the_larger_ones_run(tmp_path: Path, recipe: str, heads: int) -> None:
    base(tmp_path, heads)
    for name in STAGES:
        run(tmp_path, recipe, name)
    check_finished(tmp_path / "runs" / "x")


@pytest.mark.parametrize(("name", "module"), [("sft", sft), ("reward", reward_model), ("ppo", ppo)])
def test_the_step_over_the_longest_texts_changes_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: StageName, module: Any
) -> None:
    """With dropout in sft and reward, so that random numbers are drawn in it."""
    tried: list[str] = []
    monkeypatch.setattr(module, "check_memory", lambda *given: tried.append(given[-1]))
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    without = run(tmp_path, "llama2-7b/qlora", name, "--force")
    assert len(tried) == 1
    before = finished / "runs" / "x" / name
    assert metrics(without) == metrics(before)
    files = [file.relative_to(before) for file in before.rglob("*.safetensors")]
    assert files
    for file in files:
        ours, theirs = load_file(without / file), load_file(before / file)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(("name", "module"), [("sft", sft), ("reward", reward_start)])
def test_the_trained_model_is_gone_when_the_saved_one_is_loaded(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: StageName, module: Any
) -> None:
    load, loaded = module.load_causal_lm, []

    def load_alone(*given: Any) -> Any:
        gc.collect()
        assert [ref for ref in loaded if ref() is not None] == []
        model = load(*given)
        loaded.append(weakref.ref(model.base_model.layers[0].self_attn.q_proj.weight))
        return model

    for place in (module, models):
        monkeypatch.setattr(place, "load_causal_lm", load_alone)
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    run(tmp_path, "llama2-7b/qlora", name, "--force")
    assert len(loaded) == 2


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The stages of this module set the number of threads of this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
