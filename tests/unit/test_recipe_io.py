"""Reading recipes: what is accepted, and what the message says about each kind of mistake."""

from pathlib import Path

import pytest

from align.errors import RecipeError
from align.recipe_io import dump_recipe, find_recipe, load_recipe

GOOD = """\
name: tiny
seed: 7
base: {id: pretrain}
tokenizer: {vocab_size: 320}
data:
  pretrain:
    train: [{world: text}]
  sft:
    train: [{world: demonstrations}]
  prompts:
    train: [{world: prompts}]
pretrain:
  lr: 1e-3
  batch_size: 8
  steps: 4
  sequence_length: 32
  model:
    hidden_size: 32
    num_layers: 2
    num_heads: 4
    num_kv_heads: 2
    intermediate_size: 64
    max_positions: 1024
sft:
  lr: 1e-5
  batch_size: 8
ppo:
  lr: 1e-5
  batch_size: 64
  minibatch_size: 16
  steps: 2
  max_new_tokens: 8
  reward: data.judge:gold
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    """Return the message's lines, without the folder that the file lies in."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [line.removeprefix(f"{path.parent}/") for line in str(caught.value).splitlines()]


def line_of(text: str, start: str) -> int:
    return 1 + next(i for i, line in enumerate(text.splitlines()) if line.startswith(start))


def test_numbers_follow_yaml_1_2(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.seed == 7
    assert recipe.sft is not None
    assert recipe.sft.lr == 0.00001
    assert recipe.data.pretrain is not None
    assert recipe.data.pretrain.train[0].world == "text"


def test_overrides_are_typed_like_the_file(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, GOOD),
        [
            "seed=11",
            "run.root=/data/runs",
            "sft.lr=3e-4",
            "data.sft.train=[{world: pairs, rows: 5}]",
            "data.prompts.train.0.rows=9",
            "data.root=1e-5=x",
            "evaluate={}",
            "pretrain.micro_batch_size=null",
        ],
    )
    assert (recipe.seed, recipe.run.root, recipe.data.root) == (11, "/data/runs", "1e-5=x")
    assert recipe.sft is not None
    assert recipe.sft.lr == 0.0003
    assert recipe.data.sft is not None
    assert recipe.data.sft.train[0].rows == 5
    assert recipe.data.prompts is not None
    assert recipe.data.prompts.train[0].rows == 9
    assert recipe.evaluate is not None


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    awkward = [
        "data.root='1e-5'",
        "tracking.project='yes: #no'",
        "tracking.entity='2026-01-01'",
        'tokenizer.pad_token="<|p\\u00e4d|>\\n\\t"',
        "tokenizer.id='null'",
        "tokenizer.vocab_size=null",
        "data.sft.train.0.world=null",
        "data.sft.train.0.path=' '",
        "base.revision=' '",
        "data.sft.train.0.columns={'0': a.b, '=': '<<'}",
        "adapter.targets=[q_proj, '']",
        "sft.lr=1e-300",
        "ppo.kl.target=6",
    ]
    recipe = load_recipe(write(tmp_path, GOOD), awkward)
    assert recipe.tokenizer.pad_token == "<|p\u00e4d|>\n\t"
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seed: 7", "seed: abc", "seed=abc: found 'abc' (text); allowed: a whole number of at le"),
        ("seed: 7", "seed: 7.0", "seed=7.0: found 7.0; allowed: a whole number of at least 0"),
        ("seed: 7", "seed: true", "seed=true: found true; allowed: a whole number"),
        ("seed: 7", "seed:", "seed: has no value; write null"),
        ("seed: 7", "sede: 7", "sede=7: unknown key; did you mean seed?"),
        ("seed: 7", "seed: [1", "not YAML: "),
        ("seed: 7", "seed: !!python/object:os.system x", "the tag !!python/object:os.system"),
        ("seed: 7", "seed: 7\nseed: 8", "seed: given twice, first in line 2; keep one"),
        ("seed: 7", "lr: 7", "lr=7: unknown key; did you mean pretrain.lr or sft.lr or"),
        ("name: tiny", "name: ../x", "name=../x: found '../x' (text); allowed: at most 80 letters"),
        ("name: tiny", "name: no", "ok"),
        ("name: tiny", "name: null", "name: found null; allowed: at most 80 letters"),
        ("base: {id: pretrain}", "base: pretrain", "base=pretrain: found 'pretrain' (text); allo"),
        ("base: {id: pretrain}", "base: {id: x, dtype: fp32}", "base.dtype=fp32: found 'fp32' (t"),
        ("base: {id: pretrain}", "base: {}", "base.id: missing; needed: text"),
        (
            "tokenizer: {vocab_size: 320}",
            "tokenizer: {vocab_size: 320, id: gpt2}",
            "tokenizer.vocab_size=320: is of the tokenizer that the pretrain stage trains; has no"
            " effect beside tokenizer.id; give one of the two",
        ),
        (
            "    train: [{world: text}]",
            "    train: [{world: text, shape: alpaca}]",
            "shape=alpaca: has",
        ),
        (
            "    train: [{world: text}]",
            "    train: [{world: text, columns: {a: b}}]",
            "columns: has no",
        ),
        (
            "    train: [{world: text}]",
            "    train: [{world: text, labels: {a: tie}}]",
            "labels: has no",
        ),
        (
            "    train: [{world: text}]",
            "    train: [{path: a.jsonl, split: test}]",
            "split=test: has no effect on",
        ),
        (
            "base: {id: pretrain}",
            "base: {id: x, dtype: half}",
            "base.dtype=half: found 'half' (text); allowed: float32, bfloat16 or float16",
        ),
        (
            "base: {id: pretrain}",
            "base: {id: pretrain, quantization: int8, double_quantization: true}",
            "base.double_quantization=true: has no effect with base.quantization=int8; allowed",
        ),
        (
            "base: {id: pretrain}",
            "base: {id: pretrain, compute_dtype: bfloat16}",
            "base.compute_dtype=bfloat16: has no effect with base.quantization=none; allowed",
        ),
        ("base: {id: pretrain}", "base: {id: gpt2}", "pretrain: has no effect while base.id=gpt2"),
        ("    train: [{world: text}]", "    train: []", "data.pretrain.train: found an empty list"),
        (
            "    train: [{world: text}]",
            "    train: [{wrld: text}]",
            "data.pretrain.train.0.wrld=te",
        ),
        (
            "    train: [{world: text}]",
            "    train: [{world: text, path: x}]",
            "data.pretrain.train.0.world=text: found path and world; allowed: exactly one of path",
        ),
        ("    train: [{world: text}]", "\ttrain: [{world: text}]", "not YAML: a tab; YAML is ind"),
        (
            "  minibatch_size: 16",
            "  minibatch_size: 12",
            "ppo.minibatch_size=12: does not divide b",
        ),
        ("  reward: data.judge:gold", "  reward: gold", "ppo.reward=gold: found 'gold' (text); al"),
        ("  reward: data.judge:gold", "  reward: model", "ppo.reward=model: needs a reward sectio"),
        ("  reward: data.judge:gold", "  lam: .nan", "ppo.lam=NaN: found NaN; allowed: a number f"),
    ],
)
def test_message_names_line_key_and_what_is_allowed(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    path = write(tmp_path, text)
    if expected == "ok":
        load_recipe(path)
        return
    lines = problems(path)
    hits = [line for line in lines if expected in line]
    assert hits, lines
    number = int(hits[0].split(":")[1])
    changed = line_of(GOOD, old)
    # A cross-section finding stands at the section it is about; a repeated key at the second.
    allowed_lines = {changed, changed + new.count("\n"), line_of(text, "pretrain:")}
    if "YAML" not in expected:
        assert number in allowed_lines, hits


def test_all_problems_of_a_file_are_reported_together(tmp_path: Path) -> None:
    text = (
        GOOD.replace("seed: 7", "seed: x")
        .replace("  epochs", "  epoch")
        .replace("  minibatch_size: 16", "  minibatch_size: 12")
        .replace("  sequence_length: 32", "  sequence_len: 32")
    )
    lines = problems(write(tmp_path, text), "sft.lr=-1", "sft.batch_size=2.5")
    keys = {
        "seed=x",
        "pretrain.sequence_length: missing",
        "pretrain.sequence_len=32: unknown key; did you mean pretrain.sequence_length?",
        "sft.lr=-1: found -1; allowed: a number greater than 0",
        "sft.batch_size=2.5: found 2.5; allowed: a whole number greater than 0",
        "ppo.minibatch_size=12: does not divide batch_size=64; allowed: 1, 2, 4, 8, 16, 32, 64",
    }
    assert all(any(key in line for line in lines) for key in keys), lines
    assert len(lines) == len(keys)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("foo", "foo: not an override; allowed: section.key=value"),
        ("=3", "=3: not an override"),
        ("seed=", "seed=: has no value"),
        ("seed=x", "seed=x: found 'x' (text); allowed: a whole number of at least 0"),
        ("seed=[1", "seed=[1: the value is not YAML"),
        ("sft.lrr=1", "sft.lrr=1: unknown key; did you mean sft.lr?"),
        ("base.id.x=1", "base.id.x=1: base.id.x is not inside a section"),
        ("data.sft.train.7.rows=1", "data.sft.train.7.rows=1: data.sft.train.7.rows is not inside"),
        ("sft={lr: 1, batch_size: x}", "sft={lr: 1, batch_size: x}: sft.batch_size=x: found 'x'"),
        ("seed=!!python/name:os x", "seed=!!python/name:os x: the tag !!python/name:os is not"),
    ],
)
def test_override_messages_name_the_override(tmp_path: Path, override: str, expected: str) -> None:
    lines = problems(write(tmp_path, GOOD), override)
    assert len(lines) == 1
    assert lines[0].startswith(expected)


def test_a_tokenizer_that_nobody_trains_has_no_size(tmp_path: Path) -> None:
    data_only = GOOD.partition("pretrain:\n  lr")[0]
    path = write(tmp_path, f"{data_only}run: {{parents: {{pretrain: elsewhere}}}}\n")
    (problem,) = problems(path)
    assert "tokenizer.vocab_size=320: is of the tokenizer" in problem
    assert problem.endswith("has no effect without a pretrain section; leave it out")
    load_recipe(path, ["tokenizer.vocab_size=null"])


def test_an_override_given_twice_is_refused(tmp_path: Path) -> None:
    assert problems(write(tmp_path, GOOD), "seed=1", "seed=2") == [
        "seed=2: seed is given twice; keep one"
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "recipe.yaml: the file is empty"),
        (b"# only a comment\n", "recipe.yaml: the file is empty"),
        (b"- a\n- b\n", "recipe.yaml:1: found a list; allowed: sections"),
        (b"just words\n", "recipe.yaml:1: found 'just words' (text); allowed: sections"),
        (b"name: \xff\xfe\n", "recipe.yaml: not UTF-8 text (byte 6)"),
        (b"name: a\n---\nname: b\n", "not YAML: a second document"),
        (b"a: &a [*a]\n", "too large or nested too deeply"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (b"x" * 1_000_001, "larger than 1,000,000 bytes"),
        (b"name: \x00\n", "not YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, expected: str) -> None:
    lines = problems(write(tmp_path, content))
    assert len(lines) == 1
    assert expected in lines[0]


def test_an_alias_bomb_is_refused(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 10):
        rows.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    assert "too large" in problems(write(tmp_path, "\n".join(rows)))[0]


def test_a_plain_alias_is_fine(tmp_path: Path) -> None:
    text = GOOD.replace("[{world: demonstrations}]", "&d [{world: demonstrations}]").replace(
        "[{world: prompts}]", "*d"
    )
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.data.prompts == recipe.data.sft


def test_find_recipe_reports_directories_and_near_names(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a directory"):
        find_recipe(tmp_path)
    with pytest.raises(RecipeError, match="no such file and no shipped recipe"):
        find_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match=r"did you mean .*miniature"):
        find_recipe("miniatur")
