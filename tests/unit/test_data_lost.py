"""How dropped rows are counted and named: by reason, by file, and no more than twenty."""

from data.lost import LostRows


def lost(**origins: list[str]) -> LostRows:
    rows = LostRows()
    for reason, its in origins.items():
        for origin in its:
            rows.add(reason, origin)
    return rows


def test_rows_are_named_by_reason_and_file() -> None:
    rows = lost(too_long=["b.jsonl:7", "a/b:c.jsonl:2", "b.jsonl:9"], empty=["a/b:c.jsonl:3"])
    assert rows.named() == (
        "empty 1 (a/b:c.jsonl row 3), too_long 3 (b.jsonl rows 7, 9; a/b:c.jsonl row 2)"
    )
    assert rows.total() == 4
    assert rows.counts() == {"too_long": 3, "empty": 1}


def test_beyond_twenty_rows_of_a_reason_the_others_are_counted() -> None:
    numbers = ", ".join(str(n) for n in range(1, 16))
    first, second = ([f"{name}:{n}" for n in range(1, 16)] for name in "ab")
    assert lost(long=first).named() == f"long 15 (a rows {numbers})"
    found = lost(long=[*first, *second], empty=["a:16"]).named()
    assert (
        found == f"empty 1 (a row 16), long 30 (a rows {numbers}; b rows 1, 2, 3, 4, 5 and 10 more)"
    )


def test_rows_add_up_and_what_is_added_stays_as_it_was() -> None:
    train, heldout = lost(long=["a:1"]), lost(long=["b:1"], empty=["b:2"])
    assert (train + heldout).origins == {"long": ["a:1", "b:1"], "empty": ["b:2"]}
    assert (train.origins, heldout.total()) == ({"long": ["a:1"]}, 2)
    assert not LostRows() + LostRows()
