"""Links in a run tree: refused by name; nothing outside is written or removed, no loop endless."""

import json
from pathlib import Path

import pytest

from align.errors import DataError, InputError
from align.fingerprints import folder_sha256
from align.lock import locked
from align.manifest import METRICS, begin_folder, check_replaceable
from align.recipe import Recipe
from align.stages import source_fingerprint
from launch.verify import verify_run
from tests.finished import placeholder


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A finished stage; beside the runs a folder that is not theirs, as a stage may look."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / METRICS).write_text("kept")
    (outside / "w").write_text("weights")
    stage = placeholder(tmp_path / "runs/x/sft", "sft")
    (stage / METRICS).write_text("")
    return stage


def replace(path: Path, target: Path) -> None:
    """Put a link in the place of a file or folder, which is kept under another name."""
    if path.exists():
        path.rename(path.with_name(path.name + ".kept"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (".", "outside"),
        (METRICS, f"outside/{METRICS}"),
        ("model", "outside"),
        ("checkpoints", "outside"),
        ("checkpoints/step-00000001", "outside"),
        ("../recipe.yaml", "outside/w"),
        ("model/loop", "runs/x/sft/model"),
        ("model/itself", "runs/x/sft/model/itself"),
    ],
)
def test_a_stage_is_not_made_through_a_link(
    stage: Path, tmp_path: Path, name: str, target: str
) -> None:
    link = Path(stage / name).resolve() if name.startswith("..") else stage / name
    replace(link, tmp_path / target)
    before = sorted(tmp_path.rglob("*"))
    for refuse in (check_replaceable, begin_folder):
        with pytest.raises(InputError, match="is a link; a stage's folder holds") as caught:
            refuse(stage)
        assert str(caught.value).startswith(f"{link}: ")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "outside" / METRICS).read_text() == "kept"
    assert (tmp_path / "outside/w").read_text() == "weights"


def test_runs_themselves_may_lie_behind_a_link(stage: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(tmp_path / "runs")
    behind = tmp_path / "linked/x/sft"
    with locked(behind.parent):
        begin_folder(behind)
    assert [path.name for path in stage.iterdir()] == [METRICS]


def test_a_link_that_leads_nowhere_is_no_run_directory(tmp_path: Path) -> None:
    for name, target in (("itself", "itself"), ("a", "b"), ("b", "a"), ("nowhere", "missing")):
        (tmp_path / name).symlink_to(tmp_path / target)
    before = sorted(tmp_path.iterdir())
    for run in ("itself", "a/x", "nowhere"):
        with (
            pytest.raises(InputError, match=r"(itself|a|nowhere): is a link to nothing, or to its"),
            locked(tmp_path / run),
        ):
            pass
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["model", "model/w", "model/loop", "samples.jsonl"])
def test_verify_names_links_even_to_equal_files(stage: Path, tmp_path: Path, name: str) -> None:
    target = {"model/w": "outside/w", "model/loop": "runs/x/sft/model"}.get(name, "outside")
    kept = stage / name
    if kept.is_dir():
        (kept / "w").unlink()
        kept.rmdir()
    elif kept.exists():
        kept.unlink()
    (tmp_path / "outside" / METRICS).unlink()
    kept.symlink_to(tmp_path / target)
    checks, _ = verify_run(stage.parent)
    assert checks["sft"].problems == [f"{name}: is a link; a run tree holds plain files"]


def test_verify_names_a_stage_that_is_a_link(stage: Path, tmp_path: Path) -> None:
    stage.rename(tmp_path / "elsewhere")
    stage.symlink_to(tmp_path / "elsewhere")
    checks, _ = verify_run(stage.parent)
    assert checks["sft"].state == "differs"
    assert checks["sft"].problems == ["is a link; a run tree holds plain files"]


def test_a_source_that_links_to_itself(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "rows.jsonl")
    source = {"path": "rows.jsonl"}
    recipe = {"name": "x", "base": {"id": "b"}, "data": {"root": str(tmp_path)}}
    recipe["data"] |= {"sft": {"train": [source]}}  # type: ignore[operator]
    whole = Recipe.model_validate_json(json.dumps(recipe))
    assert whole.data.sft is not None
    with pytest.raises(DataError, match=r"rows\.jsonl: no such file"):
        source_fingerprint(whole, whole.data.sft.train[0])


def test_a_base_folder_with_loops(tmp_path: Path) -> None:
    from align.models import base_facts

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read as safetensors"):
        base_facts(str(tmp_path), None)
    assert folder_sha256(tmp_path)
