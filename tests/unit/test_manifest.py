"""Manifests: read back as written, refused when wrong, hashes that notice every change."""

import hashlib
import math
from pathlib import Path

import pytest

from align.errors import ParentError
from align.manifest import (
    BaseFacts,
    Manifest,
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
