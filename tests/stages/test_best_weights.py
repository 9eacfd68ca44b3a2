"""``keep: best`` of sft and reward: the weights that did best on held-out rows are kept."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import Server, facts

# Steps so large, after small ones, that training soon does harm.
LOOKS = {
    "sft": ("sft.lr=0.1", "sft.heldout_every=2", "sft.warmup_ratio=1.0"),
    "reward": ("reward.lr=0.1", "reward.heldout_every=2", "reward.warmup_ratio=1.0"),
}
FINAL = {"sft": "loss", "reward": "accuracy"}  # of the model that was saved, in the manifest


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("best"))
    for parent in ("pretrain", "sft"):
        assert server.run(parent).code == 0
    yield server
    server.close()


def made(server: Server, stage: str, *settings: str, **more: Any) -> dict[str, Any]:
    done = server.run(stage, *settings, "--force", **more)
    assert done.code == 0, done.output
    return facts(server.folder(stage))


def looks(folder: Path, metric: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[f"heldout/{metric}"] for row in rows if f"heldout/{metric}" in row}


@pytest.mark.parametrize("stage", [pytest.param("reward", marks=pytest.mark.slow), "sft"])
def test_the_best_weights_are_kept(server: Server, stage: str) -> None:
    settings, metric = LOOKS[stage], FINAL[stage]
    best = made(server, stage, *settings, f"{stage}.keep=best")
    seen = looks(server.folder(stage), metric)
    last = max(seen)
    assert sorted(seen) == [*range(2, last, 2), last]
    choose = min if metric == "loss" else max
    at = next(step for step in sorted(seen) if seen[step] == choose(seen.values()))
    assert at < last, seen  # or the test would show nothing
    assert best["metrics"]["best_step"] == at
    assert best["metrics"][f"heldout/{metric}"] == seen[at]
    assert best["metrics"][metric] == pytest.approx(seen[at], abs=1e-12)

    # Interrupted between the best look and the end, it is the same.
    shutil.rmtree(server.folder(stage))
    killed = server.run(stage, *settings, f"{stage}.keep=best", fault=(last - 2, "after", "log"))
    assert killed.code == -signal.SIGKILL
    done = server.run(stage, *settings, f"{stage}.keep=best")
    assert "goes on after step" in done.output
    assert facts(server.folder(stage)) == best

    kept_last = made(server, stage, *settings)
    assert looks(server.folder(stage), metric) == seen
    assert kept_last["metrics"][metric] == pytest.approx(seen[last], abs=1e-12)
    # A reward model's looks measure its loss as well, in which overfitting shows first.
    losses = looks(server.folder(stage), "loss")
    assert kept_last["metrics"]["loss"] == pytest.approx(losses[last], abs=1e-5)
    assert "best_step" not in kept_last["metrics"]
    # To look changes nothing.
    without = made(server, stage, settings[0], settings[2])
    assert weights(without) == weights(kept_last) != weights(best)


def weights(found: dict[str, Any]) -> dict[str, str]:
    return {name: sha256 for name, sha256 in found.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_held_out_rows_that_are_all_lost_as_tokens_are_refused_before_training(
    server: Server, stage: str, tmp_path: Path
) -> None:
    long = {"prompt": "Tom?", "chosen": "boats and kites " * 200, "rejected": "boats"}
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n")
    refused = server.run(
        stage,
        *LOOKS[stage],
        f"data.{stage}.heldout=[{{path: {tmp_path}/long.jsonl}}]",
        "data.max_dropped=0.5",
        "--force",
    )
    assert refused.code == 2
    lost = f"data.{stage}.heldout: no row is left once tokenised; {stage}.heldout_every needs some"
    assert lost in refused.output


def test_packs_are_looked_at_row_by_row(server: Server) -> None:
    packing = ("sft.packing=true", "sft.keep=best")
    found = made(server, "sft", *LOOKS["sft"], *packing)
    seen = looks(server.folder("sft"), "loss")
    assert found["metrics"]["loss"] == pytest.approx(min(seen.values()), abs=1e-12)
