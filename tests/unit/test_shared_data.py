"""Real files of many formats: the settings that read them, and the rows that they give.

``FILES`` doubles as documentation: how each published format is written down in a recipe. Counts of
rows and of defects are those that the data's own README files state; where they state none for a
file, they were counted with a few lines of json.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.errors import DataError
from align.recipe import Base, Data, Recipe, TokenizerSection
from data.load import LoadedData, load_records
from data.records import Message
from data.render import Renderer
from data.tokenizer import prepare_tokenizer
from pipelines.benchmark import measure_benchmark
from tests import tiny

ROOT = Path(os.environ.get("ALIGN_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
pytestmark = pytest.mark.skipif(
    not ROOT.is_dir(),
    reason=f"no published data sets at {ROOT}; ALIGN_SHARED_DATA names their folder",
)

STAGE = {"pretrain": "pretrain", "sft": "sft", "reward": "reward", "prompts": "ppo"}


@dataclass(frozen=True)
class File:
    """A file, the recipe section that it suits, its settings, its rows, what is dropped."""

    section: str
    path: str
    rows: int
    settings: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)


# 0: the first is better, 1: the second, 2: a tie.
AUTOJ = {
    "columns": {"first": "response 1", "second": "response 2"},
    "labels": {"0": "first", "1": "second", "2": "tie"},
}
# 1: the first, 2: the second, 0: a tie; the first of three annotators.
PANDALM = {
    "columns": {
        "prompt": "instruction",
        "input": "input",
        "first": "response1",
        "second": "response2",
        "label": "annotator1",
    },
    "labels": {"1": "first", "2": "second", "0": "tie"},
}
LLMBAR = {
    "columns": {"prompt": "input", "first": "output_1", "second": "output_2"},
    "labels": {"1": "first", "2": "second"},
}
TULU = {
    "columns": {"first": "completion_a", "second": "completion_b", "label": "preference"},
    "labels": {
        "a-is-better": "first",
        "a-is-slightly-better": "first",
        "tie": "tie",
        "b-is-slightly-better": "second",
        "b-is-better": "second",
    },
}
GSM8K = {"columns": {"prompt": "question", "completion": "answer"}}
SEED_TASKS = {"columns": {"input": "instances.0.input", "output": "instances.0.output"}}

FILES = [
    File(
        "reward",
        "hh_rlhf/train.jsonl.gz",
        4173,
        {},
        {"identical_responses": 24, "different_prompts": 9, "empty_response": 5},
    ),
    File(
        "reward",
        "hh_rlhf/test.jsonl.gz",
        895,
        {},
        {"identical_responses": 4, "different_prompts": 1, "ends_on_user": 1},
    ),
    File(
        "reward",
        "hh_rlhf/harmless_train.jsonl.gz",
        1558,
        {},
        {"different_prompts": 4, "empty_response": 2},
    ),
    File("reward", "hh_rlhf/harmless_test.jsonl.gz", 301, {}, {"empty_response": 2}),
    File(
        "reward",
        "prefs_other/autoj/train.jsonl",
        926,
        AUTOJ,
        {"all_tied": 247, "identical_responses": 6},
    ),
    File("reward", "prefs_other/autoj/test.jsonl", 161, AUTOJ, {"all_tied": 42}),
    File("reward", "summarization_prefs/human_pairs_train.jsonl", 44, AUTOJ, {"all_tied": 5}),
    File("reward", "summarization_prefs/human_pairs_test.jsonl", 15, AUTOJ, {"all_tied": 4}),
    File(
        "reward",
        "prefs_other/pandalm/train.json",
        601,
        PANDALM,
        {"all_tied": 47, "empty_response": 29, "invalid": 6},
    ),
    File(
        "reward",
        "prefs_other/pandalm/test.json",
        173,
        PANDALM,
        {"all_tied": 25, "empty_response": 2},
    ),
    File("reward", "prefs_other/llmbar/adversarial_gptinst.json", 78, LLMBAR),
    File("reward", "prefs_other/llmbar/adversarial_gptout.json", 38, LLMBAR),
    File("reward", "prefs_other/llmbar/adversarial_manual.json", 40, LLMBAR),
    File("reward", "prefs_other/llmbar/adversarial_neighbor.json", 109, LLMBAR),
    File("reward", "prefs_other/llmbar/faireval_human.json", 58, LLMBAR),
    File(
        "reward", "prefs_other/llmbar/llmeval2_human.json", 157, LLMBAR, {"identical_responses": 1}
    ),
    File("reward", "prefs_other/llmbar/mt_bench_human.json", 160, LLMBAR),
    File("reward", "prefs_other/llmbar/natural.json", 80, LLMBAR),
    File(
        "reward",
        "prefs_other/tulu_human/train.jsonl",
        766,
        TULU,
        {"all_tied": 232, "identical_responses": 25},
    ),
    File(
        "reward",
        "prefs_other/tulu_human/test.jsonl",
        172,
        TULU,
        {"all_tied": 43, "identical_responses": 9},
    ),
    File("reward", "ranking_kwise/gsm8k_correctness/train.jsonl.gz", 979, {}, {"all_tied": 111}),
    File(
        "reward",
        "ranking_kwise/sfres_human/train.jsonl",
        458,
        {"columns": {"score": "scores.overall"}},
        {"all_tied": 90, "identical_responses": 28},
    ),
    File("reward", "ranking_kwise/topical_chat_human/train.jsonl", 45),
    File("reward", "ranking_kwise/truthfulqa_tiers/train.jsonl", 640),
    File("reward", "formats/dpo_en_demo.json", 120),
    File("sft", "sft/gsm8k/train.jsonl", 5723, GSM8K),
    File("sft", "sft/gsm8k/test.jsonl", 531, GSM8K),
    File("sft", "sft/alpaca_en_demo/train.json", 860),
    File("sft", "sft/self_instruct_human/alpaca_format.json", 350),
    File("sft", "sft/self_instruct_human/seed_tasks.jsonl", 147, SEED_TASKS),
    File("sft", "sft/self_instruct_human/user_oriented_instructions.jsonl", 203, SEED_TASKS),
    File("sft", "sft/p3_prompt_completion/train.jsonl.gz", 5200),
    File("sft", "sft/p3_prompt_completion/test.jsonl.gz", 400),
    File("sft", "sft/sgd_chat/train.jsonl.gz", 1700),
    File("sft", "sft/sgd_chat/test.jsonl.gz", 150),
    File("sft", "formats/kto_en_demo.json", 120, {"shape": "messages"}),
    # Tool calls are no chat turns: half of the rows hold them.
    File("sft", "formats/glaive_toolcall_en_demo.json", 120, {}, {"invalid": 60}),
    File("prompts", "prompts/gsm8k_verifiable.jsonl", 2000),
    File("prompts", "prompts/hh_helpful_chat_train.jsonl.gz", 1500),
    File("prompts", "prompts/hh_helpful_train.jsonl.gz", 4163),
    File("prompts", "prompts/hh_helpful_test.jsonl", 894),
    File("prompts", "prompts/human_instructions.jsonl", 350),
    # A .txt file is one text, whatever its lines are.
    File("pretrain", "text/tinyshakespeare/train.txt", 1),
    File("pretrain", "text/tinyshakespeare/val.txt", 1),
    File("pretrain", "text/wikipedia_sample/train.txt.gz", 1),
    File("pretrain", "text/us_speeches/train.jsonl.gz", 106),
    File("pretrain", "text/us_speeches/val.jsonl.gz", 9),
    File("pretrain", "classification/banking77/train.csv", 10003),
    File("pretrain", "classification/banking77/test.csv", 1971),
    File("pretrain", "classification/movie_reviews/train.jsonl.gz", 400),
    File("pretrain", "classification/movie_reviews/test.jsonl.gz", 100),
    File("pretrain", "classification/sentence_polarity/train.jsonl", 8553),
    File("pretrain", "classification/sentence_polarity/test.jsonl", 1026),
]
# Their candidates answer no prompt: the articles that they summarise are not in the file.
WITHOUT_PROMPT = [
    "ranking_kwise/cnndm_human/train.jsonl",
    "ranking_kwise/cnndm_human/test.jsonl",
]


def load(section: str, source: dict[str, Any], **settings: Any) -> LoadedData:
    data = Data(root=str(ROOT), **{section: {"train": [source]}}, **settings)
    recipe = Recipe(name="x", base=Base(id="some/model"), data=data)
    return load_records(recipe, STAGE[section])[section]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.path)
def test_every_row_is_kept_or_counted(file):
    source = {"path": file.path, **file.settings}
    loaded = load(file.section, source, bad_rows="drop", max_dropped=1.0)
    (facts,) = loaded.facts
    assert (facts.rows, facts.dropped) == (file.rows, file.dropped)
    assert facts.kept == len(loaded.train) == file.rows - sum(file.dropped.values())


def test_every_file_is_covered():
    found = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*")
        if path.is_file() and path.suffix != ".md" and path.parent.name != "LICENSES"
    }
    assert found == {file.path for file in FILES} | set(WITHOUT_PROMPT)


def test_hh_loads_with_the_default_settings():
    hh = [file for file in FILES if file.path.startswith("hh_rlhf/")]
    assert len(hh) == 4
    for file in hh:
        assert load("reward", {"path": file.path}).facts[0].kept > 0


@pytest.mark.parametrize("path", WITHOUT_PROMPT)
def test_candidates_without_a_prompt_are_refused(path):
    with pytest.raises(DataError, match="prompt: got nothing"):
        load("reward", {"path": path, "shape": "ranking"})


def test_rows_that_are_malformed_are_named():
    source = {"path": "prefs_other/pandalm/train.json", **PANDALM}
    with pytest.raises(DataError) as error:
        load("reward", source, max_dropped=1.0)
    lines = str(error.value).splitlines()
    # The answers that are the boolean true, upstream idx 157 to 164.
    assert [line.split(":")[1] for line in lines[1:-1]] == ["99", "100", "101", "103", "104", "106"]
    assert lines[1] == (
        "  prefs_other/pandalm/train.json:99: response1: got the boolean true,"
        " expected text or a list of {role, content}; correct or remove the row"
    )


def test_hh_prompts_are_those_of_the_prompt_file():
    """The prompt file was derived from the pairs by its authors, not by this loader."""
    pairs = load("prompts", {"path": "hh_rlhf/train.jsonl.gz"}).train
    prompts = load("prompts", {"path": "prompts/hh_helpful_train.jsonl.gz"}).train
    chats = load("prompts", {"path": "prompts/hh_helpful_chat_train.jsonl.gz"}).train
    known = {record.messages for record in prompts}
    assert {record.messages for record in chats} <= known
    kept = {record.messages for record in pairs}
    # Of 4173 pairs 29 have one equal or empty answer; their prompts are in the prompt file only.
    assert len(known - kept) <= 29
    assert kept - known == set()


def test_a_pair_by_hand():
    record = load("reward", {"path": "prefs_other/llmbar/adversarial_gptout.json", **LLMBAR}).train[
        0
    ]
    assert record.messages == (
        Message(
            "user",
            "Combine the two sentences into a single sentence without adding or removing any"
            " information:\nHe stayed at home. He didn't go to the party.",
        ),
    )
    best = record.responses[record.scores.index(max(record.scores))]
    assert best == "He didn't go to the party, instead staying at home."


# Its files under RewardBench's names of them, where it has them.
LLMBAR_FILES = {
    "llmbar-natural": ("natural", 80),
    "llmbar-adver-neighbor": ("adversarial_neighbor", 109),
    "llmbar-adver-GPTInst": ("adversarial_gptinst", 78),
    "llmbar-adver-GPTOut": ("adversarial_gptout", 38),
    "llmbar-adver-manual": ("adversarial_manual", 40),
    "mt-bench": ("mt_bench_human", 160),
    "faireval": ("faireval_human", 58),
    "llmeval2": ("llmeval2_human", 157),
}


def test_llmbar_goes_through_the_benchmark() -> None:
    """By the rule "longer wins", whose accuracies a few lines of json give as well."""
    benchmark = {
        name: LLMBAR | {"path": f"prefs_other/llmbar/{file}.json"}
        for name, (file, _) in LLMBAR_FILES.items()
    }
    data = Data.model_validate({"root": str(ROOT), "benchmark": benchmark, "max_dropped": 0.02})
    recipe = Recipe.model_construct(name="x", base=Base(id="some/model"), data=data)
    loaded = load_records(recipe, "evaluate")
    job: Any = SimpleNamespace(data=loaded, check_dropped=lambda *_: None)
    found = measure_benchmark(
        job,
        Renderer(prepare_tokenizer(tiny.tokenizer(), TokenizerSection()), 100_000, 100_000),
        lambda rows: torch.tensor([float(len(r)) for row, _ in rows for r in row.responses]),
    )
    for name, (file, rows) in LLMBAR_FILES.items():
        pairs = json.loads((ROOT / "prefs_other" / "llmbar" / f"{file}.json").read_text())
        assert len(pairs) == rows
        texts = [[p[f"output_{n}"].strip() for n in (p["label"], 3 - p["label"])] for p in pairs]
        kept = [(better, worse) for better, worse in texts if better != worse and worse]
        share = sum(len(better) > len(worse) for better, worse in kept) / len(kept)
        assert found[f"benchmark/subset/{name}/prompts"] == len(kept)
        assert found[f"benchmark/subset/{name}"] == pytest.approx(share)
