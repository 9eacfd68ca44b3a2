"""``align verify``: whatever is changed in a finished run or in what it was made from is found."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from launch import verify
from launch.sums import FILE, add_sums, drop_sums, put_back_sums, read_sums
from launch.verify import verify_run
from tests.finished import edit_manifest
from tests.flips import check_flips
from tests.stand_ins import RECIPE, align, build

DATA = RECIPE.replace("{world: demonstrations}", "{path: rows.jsonl}").replace(
    "base: {id: some/model}",
    "base: {id: ./base}\ntokenizer: {id: ./tokenizer, chat_template: chat.jinja}",
)
BESIDE_OUTPUTS = ("metrics.jsonl", "recipe.yaml", "stage.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a finished run, and folders of a tracker and an export in it."""
    place = tmp_path_factory.mktemp("verify")
    build(place)
    (place / "r.yaml").write_text(DATA)
    (place / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (place / "chat.jinja").write_text("{{ messages }}")
    (place / "m.py").write_text("def f(prompts, responses): return [0.0 for _ in prompts]\n")
    for folder in ("base", "tokenizer"):
        (place / folder).mkdir()
        (place / folder / "config.json").write_text("{}")
    tracked = place / "runs/x/wandb/offline-run-1"
    tracked.mkdir(parents=True)
    (tracked / "run.wandb").write_bytes(bytes(range(256)))
    os.symlink("offline-run-1", tracked.parent / "latest-run")
    align(place, "run", "r.yaml")
    align(place, "export", "runs/x")
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """The same, elsewhere: what is copied stays valid."""
    copy = tmp_path / "copy"
    shutil.copytree(made, copy, symlinks=True)
    return copy


def problems(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(place)
    stages, beside = verify_run(Path("runs/x"))
    found = [f"{stage}: {text}" for stage, check in stages.items() for text in check.problems]
    return found + beside.problems


def test_200_of_200_changed_bytes_are_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert check_flips(Path("runs/x"), 200, monkeypatch) == 200


def test_every_byte_of_the_hashes_themselves(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(verify, "_inputs", lambda directory, manifest: ([], []))
    path = Path("runs/x") / FILE
    content = path.read_bytes()
    for at in range(0, len(content), 11):
        for changed in (content[at] ^ 1, content[at] ^ 0x20, ord("\n"), ord("a"), 0xFF):
            if changed != content[at]:
                path.write_bytes(content[:at] + bytes([changed]) + content[at + 1 :])
                stages, beside = verify_run(Path("runs/x"))
                assert any(c.problems for c in (*stages.values(), beside)), (at, changed)


def test_the_file_is_one_that_sha256sum_reads(place: Path) -> None:
    done = subprocess.run(
        ["sha256sum", "-c", FILE], cwd=place / "runs/x", capture_output=True, text=True, check=True
    )
    named = {line.removesuffix(": OK") for line in done.stdout.splitlines()}
    assert named == {
        *(f"{stage}/{file}" for stage in ("sft", "ppo", "evaluate") for file in BESIDE_OUTPUTS),
        *("recipe.yaml", "report.html", "export/ppo/export.json", "wandb/offline-run-1/run.wandb"),
    }


def test_moved_and_copied_trees_stay_valid(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(place, monkeypatch) == []
    (place / "runs").rename(place / "kept")
    monkeypatch.chdir(place / "kept")  # from here the data are not found
    stages, beside = verify_run(Path("x"))
    assert not [check.problems for check in (*stages.values(), beside) if check.problems]
    assert any("data is not compared: rows.jsonl: no such file" in n for n in stages["sft"].notes)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("rows.jsonl", ["sft: data rows.jsonl: was changed since this stage was made"]),
        (
            "chat.jinja",
            [f"{s}: tokenizer.chat_template: was changed" for s in ("sft", "ppo", "evaluate")],
        ),
        ("base/config.json", [f"{s}: base.id: was changed" for s in ("sft", "ppo", "evaluate")]),
        ("tokenizer/config.json", [f"{s}: tokenizer.id: was changed" for s in ("sft", "ppo")]),
        ("m.py", [f"{s}: ppo.reward.0: was changed" for s in ("ppo", "evaluate")]),
    ],
)
def test_changed_inputs_are_said_with_their_stages(
    place: Path, monkeypatch: pytest.MonkeyPatch, file: str, expected: list[str]
) -> None:
    (place / file).write_text((place / file).read_text().replace("a", "b") + " ")
    found = problems(place, monkeypatch)
    stages = [text.split(": ")[0] for text in found]
    assert [text.split(": ")[0] for text in expected] == stages or "evaluate" in stages
    assert all(any(text.startswith(start) for text in found) for start in expected), found


def test_swapped_files_are_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sft, ppo = (place / "runs/x" / stage / "model/w" for stage in ("sft", "ppo"))
    ours, theirs = sft.read_bytes(), ppo.read_bytes()
    sft.write_bytes(theirs)
    ppo.write_bytes(ours)
    assert problems(place, monkeypatch) == [
        "sft: model/w: differs from its manifest",
        "ppo: model/w: differs from its manifest",
    ]


def test_a_stage_of_another_run_is_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is whole in itself, with another tokenizer, template and base."""
    run = place / "runs" / "x"
    (run / "sft/model/w").write_text("other")
    edit_manifest(
        run / "sft",
        outputs={"model/w": "d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa"},
        tokenizer_sha256="u",
        template_sha256="u",
        base={"id": "c", "revision": None, "sha256": "c"},
    )
    add_sums(run, ["sft"])
    found = problems(place, monkeypatch)
    assert {text.split(": ")[0] for text in found} == {"ppo", "evaluate"}
    for what in ("tokenizer (u) is not this stage's (t)", "base (c)", "chat template (u)"):
        assert any(f"ppo: parent sft: its {what}" in text for text in found)
    assert any("ppo: parent sft: ../sft is not what this stage was made from" in t for t in found)


def test_without_the_hashes_the_run_is_not_ok(place: Path) -> None:
    (place / "runs/x" / FILE).unlink()
    output, _ = align(place, "verify", "runs/x", code=1)
    assert "SHA256SUMS: is missing; `align run` writes what is there now" in output
    align(place, "run", "r.yaml")
    result = json.loads(align(place, "verify", "runs/x", "--json")[0])
    notes = ["export/ppo/export.json: no hash covers it", "report.html: no hash covers it"]
    assert result["beside"]["notes"] == notes


def test_a_stage_that_is_being_made_has_no_hashes(place: Path) -> None:
    before = read_sums(place / "runs/x")
    (place / "runs/x/sft/stage.json").unlink()  # as a stage does that begins
    align(place, "sft", "r.yaml", "--force", code=2, FAIL="sft")
    after = read_sums(place / "runs/x")
    assert set(before) - set(after) == {"recipe.yaml", *(f"sft/{f}" for f in BESIDE_OUTPUTS)}
    drop_sums(place / "runs/x", ["ppo"])
    assert not any(name.startswith("ppo/") for name in read_sums(place / "runs/x"))


def test_a_stage_that_refuses_to_begin_keeps_its_hashes(tmp_path: Path) -> None:
    lines = {"ppo/stage.json": "0" * 64, "recipe.yaml": "1" * 64, "sft/stage.json": "2" * 64}
    (tmp_path / FILE).write_text("".join(f"{h}  {name}\n" for name, h in lines.items()))
    dropped = drop_sums(tmp_path, ["ppo", "recipe.yaml"])
    assert read_sums(tmp_path).keys() == {"sft/stage.json"}
    put_back_sums(tmp_path, dropped)
    assert read_sums(tmp_path) == lines
