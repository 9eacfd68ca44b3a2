"""Checkpoints on the disk: complete or absent, found, refused, and when they are due."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from align import checkpoints
from align.checkpoints import continue_folder, find_checkpoint, write_checkpoint
from align.engine import Engine
from align.errors import InputError, RecipeError, TrainingError
from align.lock import locked
from align.recipe_io import load_recipe
from align.recipe_ppo import Ppo
from align.recipe_run import Run
from align.state import (
    copy_into,
    generators_state,
    load_state,
    save_state,
    set_generators_state,
)
from pipelines import checkpointing
from pipelines.checkpointing import Checkpoints
from pipelines.process import Signals, Stopped


def write(stage: Path, step: int, inputs: str = "a", keep: int = 2, text: str = "state") -> None:
    def fill(folder: Path) -> None:
        (folder / "state.json").write_text(f"{text} {step}")

    write_checkpoint(stage, step, fill, inputs_sha256=inputs, wandb_id="w1", keep=keep)


def log(stage: Path, name: str, *lines: str) -> None:
    stage.mkdir(exist_ok=True)
    with (stage / name).open("a") as file:
        file.writelines(line + "\n" for line in lines)


def found(stage: Path, inputs: str = "a") -> tuple[str | None, list[str]]:
    said: list[str] = []
    checkpoint = find_checkpoint(stage, inputs, said.append)
    return checkpoint.path.name if checkpoint else None, said


def names(stage: Path) -> list[str]:
    return sorted(path.name for path in (stage / "checkpoints").iterdir())


def test_the_newest_are_kept_and_the_newest_is_found(tmp_path):
    assert found(tmp_path) == (None, [])
    for step in (1, 2, 99_999_999, 100_000_000):  # a ninth digit comes after the eighth
        write(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-00000002", "step-100000000", "step-99999999"]
    assert found(tmp_path) == ("step-100000000", [])
    checkpoint = find_checkpoint(tmp_path, "a", print)
    assert checkpoint is not None
    assert (checkpoint.facts.step, checkpoint.facts.wandb_id) == (100_000_000, "w1")


def test_going_on_cuts_the_logs_and_removes_what_came_after(tmp_path):
    stage = tmp_path / "sft"
    log(stage, "metrics.jsonl", "one", "two")
    write(stage, 2)
    log(stage, "metrics.jsonl", "three")
    log(stage, "samples.jsonl", "late")
    write(stage, 3)
    (stage / "checkpoints" / "step-00000003" / "state.json").write_text("x")
    (stage / "model").mkdir()
    (stage / "model" / "w").touch()
    (stage / "stage.json").touch()
    checkpoint = find_checkpoint(stage, "a", lambda text: None)
    assert checkpoint is not None
    continue_folder(stage, checkpoint)
    assert (stage / "metrics.jsonl").read_text() == "one\ntwo\n"
    assert sorted(path.name for path in stage.iterdir()) == ["checkpoints", "metrics.jsonl"]
    assert names(stage) == ["step-00000002"]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda c: (c / "checksums.json").unlink(), "it is incomplete: checksums.json is missing"),
        (lambda c: (c / "checksums.json").write_text("{"), "checksums.json is altered"),
        (
            lambda c: (c / "state.json").write_text(""),
            "state.json is altered: its checksum differs",
        ),
        (lambda c: (c / "state.json").unlink(), "it is incomplete or altered: state.json"),
        (lambda c: (c / "extra").touch(), "it is incomplete or altered: extra"),
        (
            lambda c: (c / "facts.json").write_text("{}"),
            "facts.json is altered: its checksum differs",
        ),
        (
            lambda c: (c.parents[1] / "metrics.jsonl").write_text("o"),
            "metrics.jsonl has 1 bytes, fewer than the 8 that it had then",
        ),
    ],
)
def test_what_is_damaged_is_named_and_the_one_before_taken(tmp_path, damage, why):
    log(tmp_path, "metrics.jsonl")
    write(tmp_path, 1)
    log(tmp_path, "metrics.jsonl", "one", "two")
    write(tmp_path, 2)
    newest = tmp_path / "checkpoints" / "step-00000002"
    damage(newest)
    assert found(tmp_path) == ("step-00000001", [f"{newest} is not used: {why}"])


def test_no_flipped_bit_and_no_cut_is_overlooked(tmp_path):
    rng = random.Random(0)
    write(tmp_path, 1)
    write(tmp_path, 2, text="state " * 100)
    newest = tmp_path / "checkpoints" / "step-00000002"
    for _ in range(200):
        file = rng.choice(sorted(newest.iterdir()))
        content = file.read_bytes()
        changed = bytearray(content)
        if rng.random() < 0.5:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        else:
            del changed[rng.randrange(len(changed)) :]
        file.write_bytes(changed)
        # White space between the checksums does not matter.
        if file.name != "checksums.json" or changed.split() != content.split():
            assert found(tmp_path)[0] == "step-00000001", (file.name, changed)
        file.write_bytes(content)
    assert found(tmp_path) == ("step-00000002", [])


def test_other_inputs_are_said_without_reading_the_rest(tmp_path, monkeypatch):
    write(tmp_path, 1)
    read = []
    whole = checkpoints.sha256_file
    monkeypatch.setattr(checkpoints, "sha256_file", lambda path: read.append(path) or whole(path))
    name, (said,) = found(tmp_path, "b")
    assert name is None
    assert said.endswith("made from other inputs: settings, data, parents or version differ")
    assert [path.name for path in read] == ["facts.json"]


def test_a_failed_write_leaves_those_before_and_nothing_else(tmp_path):
    def fill(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    write(tmp_path, 1)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path, 2, fill, inputs_sha256="a", wandb_id=None, keep=1)
    assert names(tmp_path) == ["step-00000001"]
    assert found(tmp_path) == ("step-00000001", [])
    (tmp_path / "checkpoints" / "writing").mkdir()  # of a process that was killed
    write(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def checkpoint_policy(tmp_path, **settings) -> Checkpoints:
    return Checkpoints(
        tmp_path, Run(**settings), None, inputs_sha256="a", wandb_id=None, signals=Signals()
    )


def due(tmp_path, monkeypatch, cost: float, minutes: list[float], **settings) -> list[bool]:
    """Say when checkpoints are due, where writing one takes ``cost`` seconds."""
    clock = [1000.0]
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: clock[0])

    def fill(folder: Path) -> None:
        clock[0] += cost

    policy = checkpoint_policy(tmp_path, **settings)
    answers = []
    for step, minute in enumerate(minutes, 1):
        clock[0] = max(clock[0], 1000.0 + 60 * minute)
        answers.append(policy.due(step))
        policy.boundary(step, fill)
    return answers


def test_when_a_checkpoint_is_due(tmp_path, monkeypatch):
    def ask(name: str, *more, **settings) -> list[bool]:
        return due(tmp_path / name, monkeypatch, *more, **settings)

    yes, no = True, False
    # Once a minute; and writing takes 3 s, so 150 s later at the soonest: 2 % of the time.
    assert ask("a", 0.1, [0.5, 1.1, 1.5, 2.2]) == [no, yes, no, yes]
    assert ask("b", 3.0, [1.1, 2.2, 3.6, 3.7]) == [yes, no, no, yes]
    assert ask("c", 9.0, [2.9, 3.0, 5.0], checkpoint_minutes=3.0) == [no, yes, no]
    assert ask("d", 9.0, [0, 0, 0, 0, 0], checkpoint_steps=2) == [no, yes, no, yes, no]
    assert ask("e", 0.0, [99.0], keep_checkpoints=0) == [no]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["run.checkpoint_steps=5", "run.checkpoint_minutes=5.0"],
            "run.checkpoint_minutes=5.0: checkpoint_steps=5 says how often already; allowed: one",
        ),
        (
            ["run.keep_checkpoints=0", "run.checkpoint_steps=5"],
            "run.checkpoint_steps=5: keep_checkpoints=0 writes none; allowed with it: null",
        ),
        (["run.checkpoint_minutes=0"], "run.checkpoint_minutes=0: "),
        (["run.keep_checkpoints=-1"], "run.keep_checkpoints=-1: "),
    ],
)
def test_what_a_recipe_may_not_ask(overrides, expected):
    with pytest.raises(RecipeError, match=re.escape(expected)):
        load_recipe("miniature", overrides)


def test_a_signal_waits_for_the_boundary_and_is_heard_there(tmp_path):
    signals = Signals()
    policy = Checkpoints(tmp_path, Run(), None, inputs_sha256="a", wandb_id=None, signals=signals)

    def train() -> None:
        with signals.held():
            policy.boundary(1, lambda folder: None)
            signals.come(15)
            policy.boundary(2, lambda folder: None)

    with pytest.raises(Stopped) as stopped:
        train()
    assert stopped.value.signum == 15
    assert names(tmp_path) == ["step-00000002"]
    with pytest.raises(Stopped):
        Signals().come(2)  # nothing is being trained
    late = Signals()
    with pytest.raises(Stopped), late.held():
        late.come(2)  # and no boundary follows


def test_a_full_disk_says_the_step(tmp_path):
    def fill(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    policy = checkpoint_policy(tmp_path, checkpoint_steps=1)
    with pytest.raises(TrainingError, match=r"step 7: the checkpoint .* No space left .* is kept"):
        policy.boundary(7, fill)


def test_a_state_comes_back_bit_for_bit(tmp_path):
    shared = torch.randn(3, 4)
    state = {
        "step": 3,
        1: {"a/b": shared.t(), "same": shared, "empty": torch.empty(0)},
        "bytes": torch.arange(5, dtype=torch.uint8),
        "low": torch.randn(4).bfloat16(),
        "numbers": [0.1 + 0.2, -float("inf"), None, True],
        "dict": {"tensor": "no tensor", "dict": [1]},
    }
    save_state(tmp_path, state)
    back = load_state(tmp_path)
    assert list(back) == list(state)
    for key, value in state[1].items():
        assert torch.equal(back[1][key], value)
    assert torch.equal(back["bytes"], state["bytes"])
    assert back["low"].dtype == torch.bfloat16
    assert torch.equal(back["low"], state["low"])
    assert (back["numbers"], back["dict"]) == (state["numbers"], state["dict"])
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_generators_go_on_where_they_were(tmp_path):
    def draw() -> list[float]:
        import numpy

        return [random.gauss(0, 1), float(numpy.random.normal()), float(torch.randn(()))]

    draw()
    save_state(tmp_path, {"generators": generators_state()})
    expected = [draw(), draw()]
    set_generators_state(load_state(tmp_path)["generators"])
    assert [draw(), draw()] == expected


def test_other_tensors_are_refused():
    with pytest.raises(ValueError, match="not those of this model"):
        copy_into({"a": torch.zeros(3)}, {"a": torch.zeros(1)})


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw"])
def test_an_engine_goes_on_as_if_nothing_had_happened(tmp_path, optimizer):
    """Also with 8-bit states, which share their quantisation maps."""
    section = Ppo(
        lr=1e-2,
        batch_size=4,
        minibatch_size=4,
        steps=9,
        max_new_tokens=4,
        optimizer=optimizer,
        schedule="linear",
    )

    def make() -> tuple[Engine, nn.Linear]:
        torch.manual_seed(0)
        layer = nn.Linear(128, 64)
        return Engine([([layer.weight], 1e-2), ([layer.bias], 1e-3)], section, 8), layer

    def train(engine: Engine, layer: nn.Linear, steps: range) -> None:
        for step in steps:
            x = torch.randn(8, 128, generator=torch.Generator().manual_seed(step))
            engine.backward(layer(x).square().mean())
            engine.step(engine.parameters)

    engine, layer = make()
    train(engine, layer, range(3))
    save_state(tmp_path, {"engine": engine.state(), "parameters": layer.state_dict()})
    train(engine, layer, range(3, 6))
    again, other = make()
    state = load_state(tmp_path)
    copy_into(dict(other.named_parameters()), state["parameters"])
    again.load(state["engine"], again.share())
    train(again, other, range(3, 6))
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)
    assert (again.lr, again.step_count) == (engine.lr, engine.step_count)


def test_one_process_holds_a_run_and_its_end_lets_go(tmp_path):
    run = tmp_path / "runs" / "x"
    with locked(run):
        with (
            pytest.raises(InputError, match="another process is making a stage of this run"),
            locked(run),
        ):
            pass
        assert list(run.iterdir()) == []
    child = os.fork()
    if child == 0:
        with locked(run):
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert run.is_dir()  # killed, it could not clear it away
    with locked(run):
        (run / "recipe.yaml").touch()
    assert list(run.iterdir()) == [run / "recipe.yaml"]
    with locked(tmp_path / "other" / "x"):
        pass
    assert not (tmp_path / "other").exists()


def test_a_started_process_holds_a_run_with_its_starter_and_after_it(tmp_path):
    code = "import sys; from align.lock import locked; from pathlib import Path\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with locked(tmp_path) as held:
        stranger = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "another process" in stranger.stderr
        child = subprocess.Popen(
            command,
            env=os.environ | held,
            close_fds=False,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="another process"), locked(tmp_path):
        pass
    child.communicate("\n")
    assert child.returncode == 0
    with locked(tmp_path):
        pass
