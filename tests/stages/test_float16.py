"""Bases in float16, whose losses are scaled. On the CPU, where it is slow: it is made for GPUs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align import loss_scale
from align.checkpoints import FOLDER
from align.metrics import MetricsLog
from pipelines import stage
from tests.faults import facts
from tests.stages.test_llama2_recipes import base
from tests.stages.test_several_processes import (
    LORA,
    PPO,
    WAYS,
    alone,
    command,
    metrics,
    parent,
)
from tests.two_processes import run_in_two

COMMON = ("adapter.dropout=0.0", "evaluate=null", *PPO)
IN_FLOAT32, IN_FLOAT16 = (*COMMON, "base.dtype=float32"), (*COMMON, "base.dtype=float16")
NF4 = (*IN_FLOAT32, "base.quantization=nf4")
STAGES = ("sft", "reward", "ppo")
TOO_FAR = 2.0**24  # where the first steps are left out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("float16")
    base(root, 4)
    return root


@pytest.fixture(scope="module")
def in_float32(root: Path) -> Path:
    return alone(root, "in-32", LORA, STAGES, *IN_FLOAT32)


def distance(one: Path, other: Path, file: str) -> float:
    """How far two adapters, as what they add to the base, are from each other."""
    files = [load_file(run / file / "adapter_model.safetensors") for run in (one, other)]
    added = [
        [f[name] @ f[name.replace("lora_B", "lora_A")] for name in sorted(f) if "lora_B" in name]
        for f in files
    ]
    pairs = zip(*added, strict=True)
    square = sum(float((a - b).square().sum()) for a, b in pairs)
    return (square / sum(float(b.square().sum()) for b in added[1])) ** 0.5


@pytest.mark.parametrize("kind", ["plain", pytest.param("nf4", marks=pytest.mark.slow)])
def test_every_stage_learns_what_it_does_in_float32(
    root: Path, in_float32: Path, kind: str
) -> None:
    if kind == "plain":
        expected, settings = in_float32, IN_FLOAT16
    else:
        expected = alone(root, "nf4-32", LORA, STAGES, *NF4, "base.compute_dtype=float32")
        settings = (*NF4, "base.compute_dtype=float16")
    found = alone(root, f"{kind}-16", LORA, STAGES, *settings)
    for name in ("sft", "reward"):
        for ours, theirs in zip(metrics(found / name), metrics(expected / name), strict=True):
            if "lr" not in theirs:  # a look at held-out rows
                continue
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3), (name, ours["step"])
            if "grad_norm" not in ours:  # scaled too far: from here on it has learned a step less
                assert name == "reward"
                assert ours["step"] > 1
                break
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)
        assert distance(found, expected, f"{name}/model") < {"sft": 0.05, "reward": 0.5}[name]
    rows = metrics(found / "ppo")[1:]
    assert [row["loss_scale"] for row in rows] == [2.0**16] * 2
    assert [row["skipped_steps"] for row in rows] == [0.0] * 2
    assert abs(rows[0]["kl/mean"]) < 0.01
    assert distance(found, expected, "ppo/policy") < 2  # other answers, but steps as large


def test_the_own_models_of_all_weights_compute_in_it(root: Path) -> None:
    """Weights stay in float32: after SFT with LoRA all are trained, by small steps."""
    settings = (*IN_FLOAT16, "ppo.layout=separate", "ppo.lr=1e-6")
    run = alone(root, "separate", LORA, STAGES, *settings)
    policy = load_file(run / "ppo" / "policy" / "model.safetensors")
    assert {tensor.dtype for tensor in policy.values()} == {torch.float32}
    for row in metrics(run / "ppo")[1:]:
        assert row["grad_norm"] > 0
        assert row["loss_scale"] == 2.0**16


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_stage_goes_on_with_its_scale_bit_for_bit(
    root: Path, in_float32: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Interrupted in the steps that are left out, while the scale falls."""
    monkeypatch.setattr(loss_scale, "_START", TOO_FAR)
    settings = (*IN_FLOAT16, "run.checkpoint_steps=1")
    if name == "ppo":
        settings += (parent(in_float32)[0], f"run.parents.reward={in_float32 / 'reward'}")
        settings += ("sft=null", "reward=null")
    whole = alone(root, f"whole-{name}", LORA, (name,), *settings) / name
    scales = [row["loss_scale"] for row in metrics(whole) if "loss_scale" in row]
    assert scales[-1] <= scales[0] < TOO_FAR
    log, lines = MetricsLog.log, []

    def log_once(self, step, values):
        lines.append(step)
        if len(lines) > 2:
            raise KeyboardInterrupt
        log(self, step, values)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "log", log_once)
        with pytest.raises(KeyboardInterrupt):
            alone(root, f"broken-{name}", LORA, (name,), *settings)
    assert list((root / "runs" / f"broken-{name}" / name / FOLDER).glob("step-*"))
    again = alone(root, f"broken-{name}", LORA, (name,), *settings) / name
    assert facts(again) == facts(whole)


def process(start: str, *arguments: str) -> None:
    """A stage as one of a group, and where its scale starts."""
    loss_scale._START = float(start)
    assert stage.main([*arguments]) == 0


def together(root: Path, called: str, start: float, name: str, *settings: str) -> Path:
    _, _, _, *words = command(root, name, LORA, called, *settings, "distributed.processes=2")
    run_in_two(__name__, str(start), *words)
    return root / "runs" / called / name


@pytest.fixture
def given(in_float32: Path) -> dict[str, tuple[str, ...]]:
    sft, reward = parent(in_float32)[0], f"run.parents.reward={in_float32 / 'reward'}"
    return {"sft": (), "reward": (sft, "sft=null"), "ppo": (sft, reward, "sft=null", "reward=null")}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=" ".join)
@pytest.mark.parametrize("name", STAGES)
def test_two_processes_learn_what_one_does(
    root: Path,
    given: dict[str, tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    way: list[str],
) -> None:
    start, settings = 2.0**10, (*IN_FLOAT16, *given[name])
    called = f"{name}-" + "-".join(part.partition("=")[2] for part in way)
    found = together(root, called, start, name, *settings, *way)
    monkeypatch.setattr(loss_scale, "_START", start)
    expected = alone(root, f"{called}-one", LORA, (name,), *settings) / name
    for ours, theirs in zip(metrics(found), metrics(expected), strict=True):
        assert ours.get("loss_scale") == theirs.get("loss_scale")
        for key in {"loss", "ppo/policy_loss", "ppo/value_loss", "grad_norm"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=2e-2, abs=1e-3), ours["step"]
    file = "policy" if name == "ppo" else "model"
    assert distance(found, expected, file) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[::2] + WAYS[-1:], ids=" ".join)
@pytest.mark.parametrize("name", STAGES)
def test_two_processes_leave_steps_out(
    root: Path, given: dict[str, tuple[str, ...]], name: str, way: list[str]
) -> None:
    """The same ones in both, or they would wait for each other."""
    called = f"far-{name}-" + "-".join(part.partition("=")[2] for part in way)
    longer = {"sft": "sft.epochs=6.0", "reward": "reward.epochs=6.0", "ppo": "ppo.epochs=4"}[name]
    settings = (*IN_FLOAT16, longer, *given[name], *way)
    found = together(root, called, TOO_FAR, name, *settings)
    scales = [row["loss_scale"] for row in metrics(found) if "loss_scale" in row]
    assert TOO_FAR > scales[0] >= scales[-1] > 1
    files = {"sft": ["model"], "reward": ["model"], "ppo": ["policy", "value"]}[name]
    for file in files:
        tensors = load_file(found / file / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors.values())
    if name == "ppo":
        skipped = [row["skipped_steps"] for row in metrics(found)[1:]]
        assert skipped[0] > 0
        assert metrics(found)[-1]["grad_norm"] > 0
