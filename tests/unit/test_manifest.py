"""Manifests: read back as written, refused when wrong, hashes that notice every change."""

import hashlib
import math
from pathlib import Path

import pytest

from align.errors import InputError, ParentError
from align.manifest import (
    BaseFacts,
    Manifest,
    begin_folder,
    check_replaceable,
    check_same_origin,
    find_manifest,
    read_manifest,
    sha256_outputs,
    write_manifest,
)


def make(**changes: object) -> Manifest:
    values: dict[str, object] = {
        "stage": "sft",
        "name": "x",
        "seed": 1,
        "recipe_sha256": "r",
        "inputs_sha256": "i",
        "code_version": "0",
        "versions": {},
        "base": BaseFacts(id="b", revision=None, sha256="base"),
        "tokenizer_sha256": "tokenizer",
        "template_sha256": "template",
        "pad_id": 0,
        "eos_ids": (1, 2),
        "parents": (),
        "data": (),
        "metrics": {"loss": 0.5},
        "outputs": {"model/a": "1", "model/b": "2"},
        "wandb_id": None,
        "started": "then",
        "finished": "now",
    }
    return Manifest.model_validate(values | changes)


def test_reads_back_as_written(tmp_path: Path) -> None:
    write_manifest(tmp_path, make())
    assert read_manifest(tmp_path, "sft") == make()
    assert [path.name for path in tmp_path.iterdir()] == ["stage.json"]


def test_a_metric_that_is_not_a_number_reads_back(tmp_path: Path) -> None:
    write_manifest(tmp_path, make(metrics={"loss": math.nan, "lr": math.inf}))
    metrics = read_manifest(tmp_path, "sft").metrics
    assert math.isnan(metrics["loss"])
    assert metrics["lr"] == math.inf


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("mark", ["stage.json", "metrics.jsonl"])
def test_a_stage_takes_the_place_of_a_stage(tmp_path: Path, mark: str) -> None:
    begin_folder(tmp_path / "new" / "sft")
    assert contents(tmp_path / "new" / "sft") == {"metrics.jsonl"}
    old = tmp_path / "old"
    (old / "model").mkdir(parents=True)
    (old / "model" / "w").touch()
    (old / mark).write_text("before")
    begin_folder(old)
    assert contents(old) == {"metrics.jsonl"}
    assert (old / "metrics.jsonl").read_text() == ""


def test_what_is_no_stage_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "reward" / "stage.json").mkdir(parents=True)
    (tmp_path / "reward" / "model.py").write_text("precious")
    before = contents(tmp_path)
    for refuse in (check_replaceable, begin_folder):
        with pytest.raises(InputError, match=r"reward: would be replaced.*it holds model\.py, but"):
            refuse(tmp_path / "reward")
    assert contents(tmp_path) == before


def test_a_folder_killed_while_it_is_emptied_can_be_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "stage.json").touch()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("align.manifest.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            begin_folder(tmp_path)
    assert not (tmp_path / "stage.json").exists()
    begin_folder(tmp_path)
    assert contents(tmp_path) == {"metrics.jsonl"}


def test_missing_broken_or_another_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParentError, match=r"no finished sft stage here \(stage.json is missing\)"):
        read_manifest(tmp_path, "sft")
    write_manifest(tmp_path, make())
    with pytest.raises(ParentError, match="holds stage sft; stage reward is needed"):
        read_manifest(tmp_path, "reward")
    (tmp_path / "stage.json").write_text('{"stage": "sft"')
    with pytest.raises(ParentError, match="not a manifest"):
        read_manifest(tmp_path, "sft")
    assert find_manifest(tmp_path) is None


@pytest.mark.parametrize("name", ["../x", "/etc/x", "model/../../x"])
def test_an_output_outside_the_stage_is_refused(tmp_path: Path, name: str) -> None:
    write_manifest(tmp_path, make())
    path = tmp_path / "stage.json"
    path.write_text(path.read_text().replace("model/a", name))
    with pytest.raises(ParentError, match="points outside"):
        read_manifest(tmp_path, "sft")


def test_outputs_are_hashed_by_content_and_name(tmp_path: Path) -> None:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "deep" / "w").write_bytes(b"abc")
    (tmp_path / "head").write_bytes(b"")
    (tmp_path / "other").write_bytes(b"not an output")
    outputs = sha256_outputs(tmp_path, ("model", "head"))
    assert outputs == {
        "head": hashlib.sha256(b"").hexdigest(),
        "model/deep/w": hashlib.sha256(b"abc").hexdigest(),
    }
    one = make(outputs=outputs).outputs_sha256()
    assert one == make(outputs=dict(reversed(outputs.items()))).outputs_sha256()
    assert one != make(outputs={**outputs, "head": "0"}).outputs_sha256()
    assert one != make(outputs={"heads": outputs["head"]}).outputs_sha256()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tokenizer_sha256": "t2"}, "tokenizer differs"),
        ({"template_sha256": "t2"}, "chat template differs"),
        ({"base": BaseFacts(id="b", revision=None, sha256="b2")}, "base differs"),
    ],
)
def test_parents_of_different_origin_are_refused(changes: dict[str, object], what: str) -> None:
    check_same_origin({"sft": make(), "reward": make(stage="reward")})
    with pytest.raises(ParentError, match=rf"sft and reward do not fit together: their {what}"):
        check_same_origin({"sft": make(), "reward": make(**changes)})
