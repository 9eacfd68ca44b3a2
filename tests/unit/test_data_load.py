"""What a stage is given, what is refused and counted, and what the user is told."""

import json
import subprocess
import sys

import pytest

from align.errors import DataError
from align.recipe import Base, Data, Recipe
from align.recipe_adapter import Adapter
from data import sources
from data.load import check_records, duplicates, load_records, shared_prompts
from data.records import Demonstration, Message, Prompt, Ranking, Text

PAIR = {"prompt": "hi", "chosen": "a", "rejected": "b"}
HI = (Message("user", "hi"),)


def recipe(root, **data):
    settings = {"root": str(root)} | data
    return Recipe(name="x", base=Base(id="some/model"), adapter=Adapter(), data=Data(**settings))


def write(root, name, *rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / name).write_text(text, encoding="utf-8")
    return {"path": name}


def load(root, stage, **data):
    return load_records(recipe(root, **data), stage)


def test_one_file_serves_every_stage(tmp_path):
    source = write(tmp_path, "pairs.jsonl", PAIR)
    sections = {name: {"train": [source]} for name in ("pretrain", "sft", "reward", "prompts")}
    ranking = Ranking(HI, ("a", "b"), (1.0, 0.0))
    demonstration = Demonstration((*HI, Message("assistant", "a")))
    for stage, expected in (
        ("pretrain", {"pretrain": ranking}),
        ("sft", {"sft": demonstration}),
        ("reward", {"reward": ranking, "sft": demonstration}),
        ("ppo", {"prompts": Prompt(HI)}),
    ):
        loaded = load(tmp_path, stage, **sections)
        assert {name: data.train for name, data in loaded.items()} == {
            name: (record,) for name, record in expected.items()
        }


def test_several_stages_are_judged_together_each_file_read_once(tmp_path, capsys, monkeypatch):
    good = write(tmp_path, "pairs.jsonl", PAIR, PAIR, PAIR | {"chosen": "b"})
    bad = write(tmp_path, "bad.jsonl", PAIR, PAIR | {"chosen": None})
    prompts = write(tmp_path, "prompts.jsonl", {"prompt": "hi"}, {"prompt": 3})
    world = {"world": "prompts"}
    sections = {name: {"train": [good]} for name in ("pretrain", "sft", "reward")}
    sections["prompts"] = {"train": [world]}
    stages = ("pretrain", "sft", "reward", "ppo", "evaluate")
    opened = []
    read = sources.read_file
    monkeypatch.setattr(sources, "read_file", lambda path: opened.append(path.name) or read(path))
    check_records(recipe(tmp_path, max_dropped=0.5, **sections), stages)
    assert opened == ["pairs.jsonl"]
    assert capsys.readouterr() == ("", "")

    sections |= {"sft": {"train": [bad]}, "reward": {"heldout": [bad], "train": [good]}}
    sections["prompts"] = {"train": [prompts]}
    with pytest.raises(DataError) as error:
        check_records(recipe(tmp_path, max_dropped=0.5, **sections), stages)
    lines = str(error.value).splitlines()
    assert lines[0] == "2 malformed rows:"
    assert [line.split(": ")[0].strip() for line in lines[1:3]] == [
        "bad.jsonl:2",
        "prompts.jsonl:2",
    ]
    with pytest.raises(DataError, match="holds prompts only; the reward stage needs ranked resp"):
        check_records(recipe(tmp_path, **sections | {"reward": {"train": [world]}}), ("reward",))


def test_origin_and_facts(tmp_path):
    first = write(tmp_path, "a.jsonl", *[PAIR | {"chosen": f"a{i}"} for i in range(3)])
    second = write(tmp_path, "b.jsonl", PAIR, PAIR | {"rejected": "a"})
    loaded = load(
        tmp_path,
        "reward",
        reward={"train": [first | {"rows": 2}], "heldout": [second]},
        max_dropped=0.5,
    )["reward"]
    assert [record.origin for record in loaded.train] == ["a.jsonl:1", "a.jsonl:2"]
    assert [record.origin for record in loaded.heldout] == ["b.jsonl:1"]
    facts = [(fact.id, fact.rows, fact.kept, fact.dropped) for fact in loaded.facts]
    assert facts == [("a.jsonl", 2, 2, {}), ("b.jsonl", 2, 1, {"identical_responses": 1})]
    assert len(loaded.facts[0].sha256) == 64


def test_malformed_rows_of_all_files_are_refused_together(tmp_path):
    bad = {"prompt": "hi", "chosen": None, "rejected": "b"}
    first = write(tmp_path, "a.jsonl", PAIR, *[bad] * 22)
    second = write(tmp_path, "b.jsonl", PAIR, {"prompt": "hi", "chosen": "a"})
    with pytest.raises(DataError) as error:
        load(tmp_path, "reward", reward={"train": [first], "heldout": [second]})
    lines = str(error.value).splitlines()
    assert lines[0] == "23 malformed rows:"
    assert lines[1] == (
        "  a.jsonl:2: chosen: got null, expected text or a list of {role, content};"
        " correct or remove the row"
    )
    assert lines[21:] == [
        "  ... and 3 more",
        "correct them, or set data.bad_rows=drop to go on without them",
    ]


def test_malformed_rows_may_be_dropped_and_are_named(tmp_path, capsys):
    source = write(tmp_path, "a.jsonl", PAIR, {"prompt": "hi"})
    loaded = load(tmp_path, "reward", reward={"train": [source]}, bad_rows="drop", max_dropped=0.5)[
        "reward"
    ]
    assert loaded.facts[0].dropped == {"invalid": 1}
    assert capsys.readouterr().err.splitlines() == [
        "1 malformed rows:",
        "  a.jsonl:2: chosen: got nothing, expected a value;"
        " the row has prompt; add it, or map chosen in columns",
        "data.reward.train[0] (a.jsonl): 1 of 2 rows dropped: invalid 1",
    ]


def test_too_many_dropped_rows_are_refused(tmp_path):
    source = write(tmp_path, "a.jsonl", *[PAIR] * 8, *[PAIR | {"chosen": "b"}] * 2)
    section = {"train": [source]}
    with pytest.raises(DataError) as error:
        load(tmp_path, "reward", reward=section, max_dropped=0.19)
    assert str(error.value) == (
        "data.reward.train[0] (a.jsonl): 2 of 10 rows dropped: identical_responses 2 (rows 9, 10);"
        " that is 20.00%, more than data.max_dropped=0.19 allows;"
        " correct the file, or raise data.max_dropped to go on without these rows"
    )
    assert len(load(tmp_path, "reward", reward=section, max_dropped=0.2)["reward"].train) == 8


def test_twenty_dropped_rows_are_named_and_the_others_counted(tmp_path, capsys):
    rows = [PAIR | {"prompt": str(number)} for number in range(9)]
    for count, end in ((20, "19, 20)"), (23, "19, 20 and 3 more)")):
        source = write(tmp_path, "a.jsonl", *[PAIR | {"chosen": "b"}] * count, *rows)
        load(tmp_path, "reward", reward={"train": [source]}, max_dropped=0.8)
        (said,) = capsys.readouterr().err.splitlines()
        start = f"identical_responses {count} (rows 1, 2, 3, 4, 5, 6, "
        assert start in said
        assert said.endswith(end)


def test_a_source_without_a_usable_row_is_refused(tmp_path):
    source = write(tmp_path, "a.jsonl", PAIR | {"chosen": "b"})
    with pytest.raises(DataError, match="none is left"):
        load(tmp_path, "reward", reward={"train": [source]}, max_dropped=1.0)


@pytest.mark.parametrize(
    ("stage", "section", "row", "message"),
    [
        ("sft", "sft", {"prompt": "hi"}, "holds prompts only; the sft stage needs answers"),
        ("sft", "sft", {"text": "hi"}, "holds plain text; the sft stage needs answers"),
        (
            "reward",
            "reward",
            {"prompt": "hi", "completion": "a"},
            "holds demonstrations without a comparison; the reward stage needs ranked responses",
        ),
        ("ppo", "prompts", {"text": "hi"}, "holds plain text; the ppo stage needs prompts"),
    ],
)
def test_a_source_of_the_wrong_kind_is_one_error(tmp_path, stage, section, row, message):
    good = write(tmp_path, "good.jsonl", PAIR)
    bad = write(tmp_path, "bad.jsonl", row, row)
    with pytest.raises(DataError) as error:
        load(tmp_path, stage, **{section: {"train": [good, bad]}})
    assert str(error.value) == f"data.{section}.train[1] (bad.jsonl) {message}"


def test_single_rows_of_the_wrong_kind_are_malformed(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]
    source = write(tmp_path, "a.jsonl", {"messages": turns}, {"messages": turns[:1]})
    with pytest.raises(DataError) as error:
        load(tmp_path, "sft", sft={"train": [source]})
    assert str(error.value).splitlines()[1] == (
        "  a.jsonl:2: row: got prompts only, expected answers; correct or remove the row"
    )


def test_missing_and_empty_files_name_the_path(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    for name, message in (
        ("none.jsonl", "no such file"),
        ("empty.jsonl", "the file is empty"),
        ("blank.jsonl", "the file is empty"),
        (".", "is a directory"),
    ):
        with pytest.raises(DataError, match=message):
            load(tmp_path, "sft", sft={"train": [{"path": name}]})


def test_duplicates_and_leaks_are_said(tmp_path, capsys):
    train = write(tmp_path, "a.jsonl", PAIR, PAIR, PAIR | {"chosen": "c"})
    heldout = write(tmp_path, "b.jsonl", PAIR | {"rejected": "d"}, PAIR | {"prompt": "new"})
    load(tmp_path, "reward", reward={"train": [train], "heldout": [heldout]})
    assert capsys.readouterr().err.splitlines() == [
        "data.reward.train: 1 of 3 records are duplicates",
        "data.reward.heldout: 1 of 2 prompts are also in train;"
        " held-out results are better than they should be",
    ]
    assert duplicates([Text("a"), Text("a", "b:2"), Text("c")]) == 1
    assert shared_prompts([Text("a")], [Text("a"), Text("b")]) == 1


def test_the_world_is_a_source(tmp_path):
    section = {
        "train": [{"world": "pairs", "rows": 5}],
        "heldout": [{"world": "pairs", "split": "heldout", "rows": 3}],
    }
    loaded = load(tmp_path, "reward", reward=section)["reward"]
    assert (len(loaded.train), len(loaded.heldout)) == (5, 3)
    assert all(isinstance(record, Ranking) for record in loaded.train)
    assert loaded.train[0].origin == "world:pairs/train:1"


def test_no_torch_is_imported():
    code = "import data.load, sys; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
