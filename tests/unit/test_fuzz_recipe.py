"""Recipes from a fuzzer: whatever a file holds, it is a recipe or a message that names the file."""

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from align.errors import RecipeError
from align.recipe import Recipe
from align.recipe_io import dump_recipe, load_recipe, shipped_recipes

# The same examples every time: a run of the tests says something about the code only.
EXAMPLES = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
)
SHIPPED = {name: file.read_bytes() for name, file in shipped_recipes().items()}

TEXT = st.text(st.characters(), max_size=40)  # surrogates and control characters too
SCALARS = st.one_of(
    st.sampled_from(
        [".nan", ".inf", "-.inf", "1e400", "0x10", "0o17", "1_000", "9" * 400, "-0", "1e-5", "~"]
    ),
    st.sampled_from(
        ["yes", "null", "''", "!!python/object/apply:os.system ['true']", "!!binary x"]
    ),
    st.sampled_from(
        ["&a [1]", "*a", "{a: b", "[", "- - -", "? x", "|", ">", "\t", "\ufeff", "..."]
    ),
    st.integers().map(str),
    st.floats().map(repr),
    TEXT,
)
LINES = st.builds(
    "{}{}:{}{}".format,
    st.sampled_from(["", "  ", "    ", "\t", "- "]),
    st.sampled_from(
        ["name", "seed", "base", "id", "sft", "lr", "data", "<<", "extra", "ppo", "=", ""]
    ),
    st.sampled_from([" ", "", "\n"]),
    SCALARS,
)


def read(content: bytes) -> Recipe | str:
    """Return the recipe that a file of this content is, or the message with which it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_bytes(content)
        try:
            recipe = load_recipe(file)
        except RecipeError as error:
            message = str(error)
            assert all(line.startswith(str(file)) for line in message.split("\n")), message
            message.encode()  # it can be printed
            return message
        (Path(folder) / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(Path(folder) / "again.yaml") == recipe
        return recipe


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@EXAMPLES
@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    assert isinstance(read(content), str)


@EXAMPLES
@given(st.lists(LINES, max_size=12).map("\n".join))
def test_any_lines(text: str) -> None:
    assert isinstance(read(encoded(text)), str)


@EXAMPLES
@given(st.sampled_from(sorted(SHIPPED)), st.randoms(use_true_random=False), st.integers(1, 4))
def test_shipped_recipes_with_other_bytes(name: str, rng: random.Random, flips: int) -> None:
    content = bytearray(SHIPPED[name])
    for _ in range(flips):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    read(bytes(content))


@EXAMPLES
@given(st.sampled_from(sorted(SHIPPED)), st.randoms(use_true_random=False), LINES | SCALARS)
def test_shipped_recipes_with_other_lines(name: str, rng: random.Random, new: str) -> None:
    lines = SHIPPED[name].decode().split("\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        lines.insert(at, new)
    elif kind == 1:
        lines.insert(at, lines[rng.randrange(len(lines))])  # a key twice, or in another section
    elif kind == 2:
        lines[at] = "\t" + lines[at]
    elif kind == 3:
        del lines[at]
    else:  # another value of the same key
        lines[at] = f"{lines[at].partition(':')[0]}: {new}"
    read(encoded("\n".join(lines)))


@EXAMPLES
@given(
    st.lists(
        st.sampled_from(["seed", "sft.lr", "data.sft.train.0.rows", "a", "sft..lr", "=", ""]),
        min_size=1,
        max_size=3,
    ),
    SCALARS,
)
def test_overrides(keys: list[str], value: str) -> None:
    try:
        load_recipe("miniature/smoke", [f"{key}={value}" for key in keys])
    except RecipeError as error:
        message = str(error)
        message.encode()
        assert any(key in message for key in keys)


BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (BOMB.encode(), "too large or nested too deeply for a recipe (aliases?)"),
        (b"a: &a [*a]", "not YAML"),
        (b"[\n" * 5_000, "nested too deeply"),
        (b"a: " + b"{b: " * 400, "not YAML"),
        (
            b"name: !!python/object/apply:os.system ['true']",
            "the tag !!python/object/apply:os.system",
        ),
        (b"seed: " + b"9" * 5_000, "seed"),
        (b"seed: .nan", "seed"),
        (b"sft: {lr: .inf}", "lr"),
        (b"name: a\nname: b", "given twice, first in line 1"),
        (b"base:\n\tid: x", "a tab; YAML is indented with spaces"),
        (b"name: \xff", "not UTF-8 text (byte 6)"),
        (encoded("name: \ud83d"), "not UTF-8 text"),
        (b'name: "\\ud83d"', "name: half of a surrogate pair"),
        (b'tracking: {project: "\\udc00"}', "tracking.project: half of a surrogate pair"),
        (b'"\\ud83d": 1', "a key that is not text"),
        (b"a: &x 1\nb: &x 2", "the anchor &x is given twice"),
        (b"name: a\x00b", "not YAML"),
        (b"x" * 1_000_001, "larger than 1,000,000 bytes"),
        (b"\xef\xbb\xbfname: a\r\nname: b\r\n", ":2: "),
    ],
    ids=range(19),
)
def test_named_refusals(content: bytes, expected: str) -> None:
    message = read(content)
    assert isinstance(message, str)
    assert expected in message


def test_a_byte_order_mark_and_windows_line_ends_are_read() -> None:
    plain = SHIPPED["miniature/smoke"]
    assert read(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n")) == read(plain)
