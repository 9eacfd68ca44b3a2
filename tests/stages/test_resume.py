"""Stages that are interrupted at any moment and go on: bit for bit what they are without that."""

import json
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.checkpoints import FOLDER
from align.lock import locked
from align.manifest import METRICS
from tests.fault_server import POINTS
from tests.faults import SETTINGS, Server, facts, without_clock
from tests.tensorboard_events import scalars
from tests.wandb_server import KEY, wandb_server

STAGES = tuple(SETTINGS)
LATER = {"pretrain": 5, "sft": 5, "reward": 7, "ppo": 3}  # what the last process goes on from
FULL = ("adapter.method=full", "adapter.dropout=0.0", "ppo.layout=separate")
CLASSES = (
    "reward.loss=classes",
    "reward.classes={labels: [a, b]}",
    "reward.center_on=none",
    "data.reward={train: [{path: labelled.jsonl}], heldout: [{path: labelled.jsonl}]}",
    "ppo=null",
    "evaluate=null",
)
MASKED = (
    "pretrain.objective=masked",
    "pretrain.model.num_kv_heads=null",
    "sft=null",
    "reward=null",
    "ppo=null",
    "evaluate=null",
)
SAVES = 2  # of tensors in one checkpoint: what is each process's own, and what all have in common
KILLS = 120  # of the slow test, over all stages


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("resume"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(server: Server) -> dict[str, tuple[dict, int]]:
    """What every stage gives without interruption, and its number of fault points."""
    found = {}
    for stage in STAGES:
        done = server.run(stage)
        assert done.code == 0, done.output
        assert done.points is not None
        assert not (server.folder(stage) / FOLDER).exists()
        found[stage] = facts(server.folder(stage)), done.points
    return found


@pytest.fixture
def again(server: Server, whole: dict, tmp_path: Path) -> Iterator[Server]:
    """The server, with every stage finished; afterwards they are put back as they were."""
    kept = tmp_path / "kept"
    shutil.copytree(server.home / "runs", kept)
    yield server
    shutil.rmtree(server.home / "runs")
    shutil.copytree(kept, server.home / "runs")


def finish(server: Server, stage: str) -> str:
    done = server.run(stage)
    assert done.code == 0, done.output
    return done.output


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_goes_on_bit_for_bit(again: Server, whole: dict, stage: str) -> None:
    """Killed while it writes a checkpoint, and once more after it has gone on.

    In the middle of the first epoch, then of the second; logs and samples that no checkpoint covers
    have been written by then.
    """
    shutil.rmtree(again.folder(stage))
    at_step_2 = (SAVES, "during", "save_file")
    later = (SAVES * (LATER[stage] - 1), "during", "save_file")
    assert again.run(stage, fault=at_step_2).code == -signal.SIGKILL
    second = again.run(stage, fault=later)
    assert second.code == -signal.SIGKILL
    assert "goes on after step 1, from" in second.output
    assert f"goes on after step {LATER[stage]}, from" in finish(again, stage)
    assert facts(again.folder(stage)) == whole[stage][0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_kills_at_any_moment(again: Server, whole: dict, stage: str) -> None:
    expected, points = whole[stage]
    rng = random.Random(stage)
    kills = rounds = went_on = 0
    while kills < KILLS // len(STAGES):
        rounds += 1
        shutil.rmtree(again.folder(stage))
        while True:
            if rng.random() < 0.2:
                done = again.run(stage, seconds=rng.uniform(0.05, 4.0))
            else:
                fault = (rng.randrange(points), rng.choice(POINTS))
                done = again.run(stage, fault=fault)
            went_on += "goes on after step" in done.output
            if done.code == 0:
                break
            assert done.code == -signal.SIGKILL, done.output
            kills += 1
        assert facts(again.folder(stage)) == expected, f"round {rounds}, after {kills} kills"
    # For a table, with pytest -s: stage, kills, how often it finished and was bit for bit the same.
    print(f"\n| {stage} | {kills} | {rounds} of {rounds} bit-identical |")
    assert went_on > 0


@pytest.mark.parametrize(
    ("stage", "signum", "code"), [("ppo", signal.SIGTERM, 143), ("sft", signal.SIGINT, 130)]
)
def test_a_signal_saves_after_the_step(
    again: Server, whole: dict, stage: str, signum: int, code: int
) -> None:
    shutil.rmtree(again.folder(stage))
    second_line = (1, "after", "log")
    done = again.run(stage, "run.checkpoint_steps=1000", fault=second_line, signum=signum)
    assert done.code == code, done.output
    assert "stopping after this step" in done.output
    (saved,) = (again.folder(stage) / FOLDER).iterdir()
    output = finish(again, stage)
    assert f"goes on after step {int(saved.name.removeprefix('step-'))}, from" in output
    assert facts(again.folder(stage)) == whole[stage][0]


def interrupt(server: Server, stage: str, whole: dict) -> list[Path]:
    """Kill a stage late in its training; return its checkpoints, oldest first."""
    shutil.rmtree(server.folder(stage))
    at = int(whole[stage][1] * 0.6)
    assert server.run(stage, fault=(at, "before")).code == -signal.SIGKILL
    found = sorted((server.folder(stage) / FOLDER).glob("step-*"))
    assert len(found) >= 2
    return found


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_skipped_by_name(again: Server, whole: dict, damage: str) -> None:
    older, newest = interrupt(again, "pretrain", whole)[-2:]
    rng = random.Random(damage)
    file = rng.choice([path for path in newest.iterdir() if path.name != "checksums.json"])
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    output = finish(again, "pretrain")
    assert f"{newest.name} is not used: " in output
    assert f"goes on after step {int(older.name.removeprefix('step-'))}, from" in output
    assert facts(again.folder("pretrain")) == whole["pretrain"][0]


def test_a_checkpoint_of_other_inputs_is_not_used(again: Server, whole: dict) -> None:
    interrupt(again, "pretrain", whole)
    done = again.run("pretrain", "pretrain.lr=1e-3")
    assert done.code == 0, done.output
    assert "is not used: it was made from other inputs" in done.output
    assert "goes on" not in done.output


def test_a_full_disk_ends_the_stage_and_leaves_the_last_good_state(
    again: Server, whole: dict
) -> None:
    newest = interrupt(again, "pretrain", whole)[-1]
    size = (newest / "state.safetensors").stat().st_size
    done = again.run("pretrain", file_bytes=size // 2)
    assert done.code == 1
    step = int(newest.name.removeprefix("step-"))
    assert f"step {step + 1}: the checkpoint could not be written: " in done.output
    assert "Traceback" not in done.output
    assert f"goes on after step {step}, from" in finish(again, "pretrain")
    assert facts(again.folder("pretrain")) == whole["pretrain"][0]


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("ppo", ("ppo.keep=best", "ppo.ema=null", "ppo.reward_scaling.mode=sft")),
        ("ppo", (*FULL, "ppo.stop.empty_rate=1.0")),
        ("sft", ("sft.packing=true", "sft.optimizer=adamw_8bit", "adapter.r=64")),
        ("sft", ("base.quantization=nf4",)),
        ("reward", (*FULL, "reward.optimizer=adamw_8bit")),
        ("reward", CLASSES),
        ("ppo", ("reward.head.depth=2",)),
        ("pretrain", MASKED),
        ("pretrain", (*MASKED, "pretrain.next_sentence=true")),
    ],
    ids=[
        "best",
        "separate",
        "packing-8bit",
        "nf4",
        "full",
        "classes",
        "deep-head",
        "masked",
        "next-sentence",
    ],
)
@pytest.mark.slow
def test_other_settings_go_on_bit_for_bit(
    again: Server, stage: str, settings: tuple[str, ...]
) -> None:
    rows = [{"text": f"{'ab'[n % 2]} {n}", "label": "ab"[n % 2]} for n in range(32)]
    (again.home / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for parent in STAGES[: STAGES.index(stage)]:
        assert again.run(parent, *settings).code == 0
    done = again.run(stage, *settings)
    assert done.code == 0, done.output
    expected = facts(again.folder(stage))
    shutil.rmtree(again.folder(stage))
    for _ in range(2):
        at_its_second = (SAVES, "during", "save_file")
        assert again.run(stage, *settings, fault=at_its_second).code == -signal.SIGKILL
    last = again.run(stage, *settings)
    assert "goes on after step" in last.output
    assert facts(again.folder(stage)) == expected


def test_the_wandb_run_goes_on(again: Server, whole: dict) -> None:
    """Offline a folder for each part, and one id, which the manifest has."""
    shutil.rmtree(again.folder("ppo"))
    offline = "tracking.mode=offline"
    killed = again.run("ppo", offline, fault=(3, "after", "log"))
    assert killed.code == -signal.SIGKILL
    done = again.run("ppo", offline)
    assert done.code == 0
    wandb_id = json.loads((again.folder("ppo") / "stage.json").read_text())["wandb_id"]
    parts = [path.name for path in (again.folder("ppo").parent / "wandb").glob("offline-run-*")]
    assert len(parts) == 2
    ids = {name.rpartition("-")[2] for name in parts}
    assert ids == {wandb_id}, killed.output + done.output
    assert facts(again.folder("ppo")) == whole["ppo"][0]


def test_the_wandb_run_goes_on_online(again: Server, whole: dict) -> None:
    """With a server on this machine: one run, with every line of the log, and no secret."""
    shutil.rmtree(again.folder("pretrain"))
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    with wandb_server() as wandb:
        env = wandb.environment() | {"HF_TOKEN": secret}
        killed = again.run("pretrain", "tracking.mode=auto", fault=(2, "after", "log"), env=env)
        assert killed.code == -signal.SIGKILL
        done = again.run("pretrain", "tracking.mode=auto", env=env)
        assert done.code == 0, done.output
    manifest = json.loads((again.folder("pretrain") / "stage.json").read_text())
    assert list(wandb.runs) == [manifest["wandb_id"]]
    (run,) = wandb.runs.values()
    assert (run.facts["groupName"], run.facts["jobType"]) == ("miniature-smoke", "pretrain")
    assert run.config["manifest"]["outputs"] == manifest["outputs"]
    assert run.config["pretrain"]["steps"] == 8
    assert run.exit_code == 0
    lines = (again.folder("pretrain") / METRICS).read_text().splitlines()
    rows: dict[int, dict[str, float]] = {}  # W&B joins the lines of a step
    for row in without_clock(lines):
        rows.setdefault(int(row["step"]), {}).update(row)
    sent = [json.dumps(row) for row in wandb.rows(manifest["wandb_id"])]
    assert without_clock(sent) == list(rows.values())
    assert "Steps must be monotonically" not in done.output
    for request in wandb.requests:
        assert KEY not in request.path + request.body
        assert secret not in request.path + request.body
    output = killed.output + done.output
    assert KEY not in output
    assert secret not in output


def test_tensorboard_has_every_line_of_the_log_once(again: Server, whole: dict) -> None:
    """Killed with a line logged that no checkpoint covers; what goes on logs it again."""
    shutil.rmtree(again.folder("pretrain"))
    tensorboard = ("tracking.mode=auto", "tracking.backend=tensorboard")
    killed = again.run("pretrain", *tensorboard, fault=(2, "after", "log"))
    assert killed.code == -signal.SIGKILL
    assert "goes on after step" in (done := again.run("pretrain", *tensorboard)).output
    assert done.code == 0
    lines = map(json.loads, (again.folder("pretrain") / METRICS).read_text().splitlines())
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        step = line.pop("step")
        for key, value in line.items():
            expected.setdefault(key, []).append((step, pytest.approx(value, rel=1e-6)))
    events = again.folder("pretrain").parent / "tensorboard" / "pretrain"
    assert scalars(events) == expected
    assert facts(again.folder("pretrain")) == whole["pretrain"][0]


def test_force_starts_from_nothing(again: Server, whole: dict) -> None:
    interrupt(again, "pretrain", whole)
    done = again.run("pretrain", "--force")
    assert done.code == 0, done.output
    assert "goes on" not in done.output
    assert facts(again.folder("pretrain")) == whole["pretrain"][0]


def test_a_second_process_is_refused(again: Server, whole: dict) -> None:
    """Whichever stage it wants; the first one is played by this process."""
    before = (again.folder("pretrain") / "stage.json").read_bytes()
    with locked(again.folder("pretrain").parent):
        done = again.run("pretrain", "pretrain.lr=1e-3")
    assert done.code == 2
    assert "another process is making a stage of this run" in done.output
    assert (again.folder("pretrain") / "stage.json").read_bytes() == before
    assert again.run("pretrain", "pretrain.lr=1e-3").code == 0
