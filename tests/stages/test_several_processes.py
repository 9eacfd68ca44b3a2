"""Real DeepSpeed in two and four gloo processes on the CPU: they train what one process trains."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.manifest import read_manifest
from align.recipe import StageName
from launch import verify
from pipelines import stage
from tests.stages.test_llama2_recipes import base

ROOT = Path(__file__).resolve().parents[2]
LORA, FULL = "llama2-7b/lora-zero2", "llama2-7b/full-zero3-offload"
SMALL = (
    "run.threads=1",
    "tracking.mode=disabled",
    "data.world.demonstration_rows=10",  # of batches of 4: the last is filled up
    "data.world.ranked_prompts=10",
    "data.world.prompt_rows=8",
    "data.world.heldout_rows=4",
    "data.max_prompt_tokens=96",
    "data.sft={train: [{world: demonstrations}],"
    " heldout: [{world: demonstrations, split: heldout}]}",
    "data.reward={train: [{world: rankings}], heldout: [{world: pairs, split: heldout}]}",
    "data.prompts={train: [{world: prompts}], heldout: [{world: prompts, split: heldout}]}",
    "sft.batch_size=4",
    "sft.epochs=2.0",
    "sft.log_every=1",
    "sft.samples=2",
    "reward.batch_size=4",
    "reward.epochs=2.0",
    "reward.log_every=1",
)
PPO = (
    "ppo.steps=2",
    "ppo.batch_size=8",
    "ppo.minibatch_size=4",
    "ppo.rollout.batch_size=2",
    "ppo.max_new_tokens=8",
    "ppo.probe_every=1",
    "ppo.probe_prompts=2",
)
EVALUATION = (
    "evaluate.prompts=2",
    "evaluate.pairs=4",
    "evaluate.max_new_tokens=8",
    "evaluate.batch_size=2",
    "evaluate.bootstrap=20",
)
IN_FLOAT32 = ("base.dtype=float32", "adapter.dropout=0.0")
LORA_IN_FLOAT32 = (*IN_FLOAT32, "evaluate=null", "ppo=null")
ALONE = ("distributed.processes=1", "distributed.zero=0", "distributed.offload=none")


def command(root: Path, what: str, recipe: str, name: str, *more: str) -> list[str]:
    places = (f"base.id={root / 'base'}", f"run.root={root / 'runs'}", f"name={name}")
    given = {word.partition("=")[0] for word in more}
    small = [word for word in SMALL if not covers(given, word)]
    return [sys.executable, "-m", "launch", what, recipe, *small, *places, *more]


def covers(given: set[str], word: str) -> bool:
    """Whether a word's key, or its section, is given already."""
    key = word.partition("=")[0]
    return bool({key, key.partition(".")[0]} & given)


def run(
    root: Path, what: str, recipe: str, name: str, *more: str
) -> subprocess.CompletedProcess[str]:
    """Run a command, whatever becomes of it."""
    return subprocess.run(
        command(root, what, recipe, name, *more),
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,  # four processes on a busy core
    )


def align(root: Path, what: str, recipe: str, name: str, *more: str) -> Path:
    """Run a command; return the run directory."""
    done = run(root, what, recipe, name, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if "  rows " in line]
    assert len(said) == len(set(said))  # one process speaks
    return root / "runs" / name


def alone(root: Path, name: str, recipe: str, stages: Sequence[StageName], *more: str) -> Path:
    """Make stages in this very process; return the run directory."""
    places = (f"base.id={root / 'base'}", f"run.root={root / 'runs'}", f"name={name}")
    given = {word.partition("=")[0] for word in more}
    small = [word for word in SMALL if not covers(given, word)]
    for one in stages:
        assert stage.main([one, recipe, *small, *places, *ALONE, *more]) == 0
    return root / "runs" / name


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def answers(folder: Path) -> list[str]:
    rows = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row)["response"] for row in rows]


def check_same(name: StageName, one: Path, several: Path) -> None:
    """Losses within 1e-5 of each other, gradients and weights within what that leaves of them.

    Adam and clipping hide a factor in the gradient; its norm does not.
    """
    for ours, theirs in zip(metrics(several / name), metrics(one / name), strict=True):
        assert ours.keys() == theirs.keys()
        for key in {"loss", "perplexity", "accuracy", "lr"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["step"], key)
        if "grad_norm" in theirs:
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), ours["step"]
    files = sorted(path.name for path in (one / name / "model").glob("*.safetensors"))
    assert files
    for file in files:
        ours, theirs = (
            load_file(several / name / "model" / file),
            load_file(one / name / "model" / file),
        )
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            difference = (ours[key] - tensor).norm() / tensor.norm().clamp(min=1e-6)
            assert difference < 1e-3, key


def parent(run: Path) -> tuple[str, str]:
    return f"run.parents.sft={run / 'sft'}", "sft=null"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("several")
    base(root, 4)
    return root


def test_llama2_7b_full_zero3_offload_trains_what_one_process_does(root: Path) -> None:
    one = alone(root, "full-one", FULL, ("sft", "reward"))
    several = align(root, "sft", FULL, "full", "--nproc", "2")
    check_same("sft", one, several)
    # From the same parent: what is compared is this stage alone.
    reward = align(root, "reward", FULL, "full-reward", "--nproc", "2", *parent(one))
    check_same("reward", one, reward)
    assert read_manifest(several / "sft", "sft").metrics["trained/share"] == 1.0
    assert not list(several.rglob("checkpoints"))


@pytest.mark.slow
def test_llama2_7b_lora_zero2_runs(root: Path) -> None:
    run = align(root, "run", LORA, "lora", *PPO, *EVALUATION, "--nproc", "2")
    for folder in ("sft/model", "reward/model", "ppo/policy", "ppo/value"):
        tensors = load_file(run / folder / "adapter_model.safetensors")
        assert all(tensor.any() for tensor in tensors.values())  # the B of LoRA starts at 0
    assert metrics(run / "sft")[0]["loss"] > metrics(run / "sft")[-2]["loss"]
    assert read_manifest(run / "evaluate", "evaluate").metrics
    stages, beside = verify.verify_run(run)
    assert {check.state for check in stages.values()} <= {"ok", "not made"}, stages
    assert beside.state == "ok", beside


@pytest.fixture(scope="module")
def one(root: Path) -> Path:
    return alone(root, "one", LORA, ("sft", "reward"), *LORA_IN_FLOAT32)


WAYS = [
    ["distributed.zero=0"],
    ["distributed.zero=1"],
    ["distributed.zero=2"],
    ["distributed.zero=2", "distributed.offload=optimizer"],
    ["distributed.zero=3"],
    ["distributed.zero=3", "distributed.offload=all"],
]


# Of four the last batch of an epoch, 2 rows of 4, leaves two with nothing to learn from.
GROUPS = [*((2, way) for way in WAYS), (4, ["distributed.zero=2"]), (4, ["distributed.zero=3"])]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "way"), GROUPS, ids=str)
def test_lora_by_every_way_is_that_of_one_process(
    root: Path, one: Path, processes: int, way: list[str]
) -> None:
    name = f"way-{processes}-" + "-".join(part.partition("=")[2] for part in way)
    settings = [*LORA_IN_FLOAT32, *way, "--nproc", str(processes)]
    check_same("sft", one, align(root, "sft", LORA, name, *settings))
    check_same("reward", one, align(root, "reward", LORA, f"{name}-r", *settings, *parent(one)))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
def test_a_reward_model_with_a_deep_head(root: Path, one: Path, zero: int) -> None:
    deep = [*LORA_IN_FLOAT32, "reward.head={depth: 2, width: 16}", *parent(one)]
    deep += ["reward.scale_on=demonstrations"]
    expected = alone(root, f"deep-one-{zero}", LORA, ("reward",), *deep)
    way = (f"distributed.zero={zero}", "--nproc", "2")
    check_same("reward", expected, align(root, "reward", LORA, f"deep-{zero}", *deep, *way))


@pytest.mark.slow
def test_packs_and_one_process_with_zero(root: Path) -> None:
    packed = [*LORA_IN_FLOAT32, "sft.packing=true", "sft.micro_batch_size=1"]
    one = alone(root, "packs-one", LORA, ("sft",), *packed)
    check_same("sft", one, align(root, "sft", LORA, "packs", *packed, "--nproc", "2"))
    check_same("sft", one, align(root, "sft", LORA, "packs-1", *packed, "--nproc", "1"))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_pretraining_is_that_of_one_process(root: Path, zero: int) -> None:
    settings = ["sft=null", "reward=null", "ppo=null", "evaluate=null"]
    settings += ["data.prompts=null", "data.reward=null", "data.sft=null", "base.id=pretrain"]
    settings += ["pretrain.steps=6", "pretrain.batch_size=8", "pretrain.log_every=1"]

    def pretrain(name: str, *more: str) -> Path:
        places = [f"run.root={root / 'runs'}", f"name={name}", "tracking.mode=disabled"]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "launch",
                "pretrain",
                "miniature/smoke",
                *settings,
                *places,
                *more,
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0
        return root / "runs" / name

    several = pretrain(f"base-{zero}", f"distributed.zero={zero}", "--nproc", "2")
    check_same("pretrain", pretrain(f"base-one-{zero}"), several)


@contextmanager
def in_training(
    root: Path, name: str, *more: str, path: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """The launcher of sft in two processes that has made its first step.

    Args:
        path: where the processes look for modules as well.
    """
    settings = [*LORA_IN_FLOAT32, "sft.epochs=2000.0", "--nproc", "2", *more]
    with subprocess.Popen(
        command(root, "sft", LORA, name, *settings),
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{path}", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        log = root / "runs" / name / "sft" / "metrics.jsonl"
        while not (log.is_file() and log.read_text()):
            assert process.poll() is None
            time.sleep(0.2)
        yield process


@pytest.mark.slow
def test_the_death_of_one_process_ends_all(root: Path) -> None:
    with in_training(root, "dead") as process:
        os.kill(rank(1, process.pid), signal.SIGKILL)
        killed = time.monotonic()
        assert process.stderr is not None
        errors = process.stderr.read()
        assert process.wait() == 1
    assert time.monotonic() - killed < 30
    assert "sft: rank 1 was killed by SIGKILL" in errors
    assert not (root / "runs" / "dead" / "sft" / "stage.json").exists()


@pytest.mark.slow
def test_no_process_outlives_the_one_that_has_started_the_group(root: Path) -> None:
    with in_training(root, "orphans") as process:
        ranks = [rank(number, process.pid) for number in (0, 1)]
        os.kill(parent_of(ranks[0]), signal.SIGKILL)
        assert process.wait() == 1
        killed = time.monotonic()
        while any(lives(number) for number in ranks):
            assert time.monotonic() - killed < 10
            time.sleep(0.2)


def rank(number: int, launcher: int) -> int:
    """Return the process of this rank below the launcher."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            settings = (folder / "environ").read_bytes().split(b"\0")
            grandparent = parent_of(parent_of(int(folder.name)))
        except OSError:
            continue
        if f"RANK={number}".encode() in settings and grandparent == launcher:
            return int(folder.name)
    raise AssertionError(f"no rank {number}")


def lives(process: int) -> bool:
    """Whether it has not ended, be it that nobody has asked how."""
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2]
    except OSError:
        return False


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """What runs in this process sets its number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
