"""The reward stage end to end: learns, centres, saves what loads elsewhere, refuses what is broken.

Parents are real: a tiny base in a folder and a short sft stage, each stage in its own process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from align.adapters import WEIGHTS
from align.errors import TrainingError
from align.recipe import TokenizerSection
from align.recipe_adapter import Adapter
from align.recipe_reward import Reward
from data.order import SortedBatches
from data.records import Message, Ranking
from data.render import Renderer, Unusable
from data.tokenizer import prepare_tokenizer
from pipelines import reward_task, stage
from pipelines.ranked_tokens import RankedTokens, collate, ranked_tokens
from pipelines.reward_loss import output_head
from pipelines.reward_model import RewardTrainer, check_reload
from reward.head import HEAD_KEY
from reward.model import RewardModel, load_reward_model, new_reward_model
from reward.ranking import strict_pairs
from reward.scorer import score_rows
from tests import tiny
from tests.adapters import sft_adapter

REPOSITORY = Path(__file__).parents[2]
RECIPE = """
name: test
seed: 11
base: {{id: {root}/base}}
adapter: {{r: 4, alpha: 8.0}}
data:
  root: {root}
  max_prompt_tokens: 96
  max_response_tokens: 96
  sft: {{train: [{{path: sft.jsonl}}]}}
  reward: {{train: [{{path: train.jsonl}}], heldout: [{{path: heldout.jsonl}}]}}
sft: {{lr: 1.0e-3, batch_size: 8, samples: 0}}
reward: {{lr: 1.0e-2, batch_size: 8, micro_batch_size: 4, epochs: 3, log_every: 5}}
tracking: {{mode: disabled}}
run: {{root: {root}/runs, threads: 1}}
"""

# Scores a probe in a process of its own, under another seed than the one that trained.
SCORE_PROBE = """
import json, sys, torch
torch.manual_seed(12345)
from transformers import AutoModelForCausalLM
from reward.model import load_reward_model
from reward.scorer import score_rows
base, folder, rows = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = load_reward_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
print(json.dumps(score_rows(model, rows, batch_size=3, pad_id=0).tolist()))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def rankings(count: int, seed: int) -> list[dict[str, object]]:
    """Four words per response; the more of them are "kite", the better. Lengths say little."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, object]] = []
    for number in range(count):
        amount = 2 + number % 3
        kites = torch.randperm(5, generator=generator)[:amount].tolist()
        responses = []
        for n in kites:
            order = torch.randperm(4, generator=generator).tolist()
            words = ["kite"] * n + ["boats"] * (4 - n)
            responses.append(" ".join(words[i] for i in order))
        prompt = f"Tom has {number} boats. Say it."
        rows.append({"prompt": prompt, "responses": responses, "scores": kites})
    return rows


def write(path: Path, rows: Sequence[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, data, recipe and the finished stages sft and reward."""
    root = tmp_path_factory.mktemp("reward")
    tiny.llama().save_pretrained(root / "base")
    tiny.tokenizer().save_pretrained(root / "base")
    write(root / "train.jsonl", rankings(64, seed=1))
    write(root / "heldout.jsonl", rankings(24, seed=2))
    answers = [
        [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": "kite boats"}]
        for i in range(16)
    ]
    write(root / "sft.jsonl", [{"messages": messages} for messages in answers])
    (root / "recipe.yaml").write_text(RECIPE.format(root=root))
    for name in ("sft", "reward"):
        result = python("-m", "pipelines.stage", name, str(root / "recipe.yaml"), "--debug")
        assert result.returncode == 0, result.stderr
    return root


def stage_metrics(root: Path) -> dict[str, float]:
    manifest = json.loads((root / "runs/test/reward/stage.json").read_text())
    metrics: dict[str, float] = manifest["metrics"]
    return metrics


def test_it_learns_and_says_how_well(root: Path) -> None:
    metrics = stage_metrics(root)
    shares = ["accuracy", "length/prefers_longer", "length/bias"]
    shares += [f"probe_wins/{name}" for name in ("empty", "repeated", "truncated", "other_prompt")]
    if find_spec("sklearn"):
        shares.append("accuracy/bag_of_words")
    expected = {f"{share}{end}" for share in shares for end in ("", "/low", "/high")}
    parts = {key for key in metrics if key.startswith(("accuracy/margin/", "accuracy/length/"))}
    assert {f"accuracy/margin/{third}/pairs" for third in ("low", "middle", "high")} <= parts
    bins = {key for key in metrics if key.startswith("calibration/bin")}
    assert len(bins) >= 3
    assert set(metrics) - bins - parts == expected | {
        "loss",
        "pairs",
        "accuracy/longer_wins",
        "accuracy/train",
        "calibration/ece",
        "calibration/ece_scaled",
        "calibration/brier",
        "calibration/brier_scaled",
        "calibration/temperature",
        "length/correlation",
        "length/labels_prefer_longer",
        "margin/mean",
        "trained/parameters",
        "trained/share",
    }
    assert metrics["accuracy"] > 0.9
    assert metrics["accuracy/train"] > 0.9
    assert metrics["accuracy/low"] <= metrics["accuracy"] <= metrics["accuracy/high"]
    assert metrics["margin/mean"] > 0.5
    assert metrics["loss"] < 0.4


def test_metrics_are_logged_under_our_keys(root: Path) -> None:
    lines = (root / "runs/test/reward/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert set(rows[0]) >= {"step", "loss", "lr", "grad_norm", "accuracy", "tokens_per_second"}
    # 64 rankings, 8 per step, 3 epochs; the first step, every fifth, the last, the final metrics
    assert [row["step"] for row in rows] == [1, 5, 10, 15, 20, 24, 24]
    assert rows[0]["loss"] > rows[-1]["loss"]


def demonstrations(root: Path) -> list[tuple[list[int], list[int]]]:
    tokenizer = AutoTokenizer.from_pretrained(root / "runs/test/reward/model")
    renderer = Renderer(tokenizer, 96, 96)
    rows = [json.loads(line) for line in (root / "sft.jsonl").read_text().splitlines()]
    conversations = [[Message(**message) for message in row["messages"]] for row in rows]
    return [(renderer.demonstration(messages).input_ids, []) for messages in conversations]


def probe_scores(root: Path, folder: Path, rows: Sequence[object]) -> list[float]:
    result = python("-c", SCORE_PROBE, str(root / "base"), str(folder), json.dumps(rows))
    assert result.returncode == 0, result.stderr
    scores: list[float] = json.loads(result.stdout)
    return scores


def test_demonstrations_score_zero_on_average_in_a_fresh_process(root: Path) -> None:
    scores = probe_scores(root, root / "runs/test/reward/model", demonstrations(root))
    assert sum(scores) / len(scores) == pytest.approx(0.0, abs=1e-5)
    assert max(scores) - min(scores) > 1e-3


def test_a_saved_model_that_scores_differently_fails_the_stage(root: Path) -> None:
    folder, rows = root / "runs/test/reward/model", demonstrations(root)[:4]
    scores = torch.tensor(probe_scores(root, folder, rows))

    def load(folder: Path) -> RewardModel:
        base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
        return load_reward_model(base, folder)

    check_reload(load, folder, rows, scores, pad_id=0, batch_size=3)
    for wrong in (scores + 2e-5, scores * torch.nan):
        with pytest.raises(TrainingError, match="scores differently"):
            check_reload(load, folder, rows, wrong, pad_id=0, batch_size=3)


def test_scores_are_compared_as_computed_in_batches_of_one_shape() -> None:
    class Shapes(torch.nn.Module):
        """Rounds differently in batches of another shape, as bfloat16 on a GPU does."""

        def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return mask.sum(1) + 0.01 * input_ids.shape[0]

    rows = [([2, 3], [4] * n) for n in range(5)]
    scores = score_rows(Shapes(), rows, batch_size=2, pad_id=0)
    shapes: Any = Shapes()
    check_reload(lambda _: shapes, Path("model"), rows, scores, pad_id=0, batch_size=2)


def test_a_trained_model_is_saved_before_anything_is_measured(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("measuring")

    monkeypatch.setattr(reward_task, "measure", fail)
    parent = f"run.parents.sft={root / 'runs/test/sft'}"
    arguments = [str(root / "recipe.yaml"), parent, "name=measured", "reward.epochs=0.1"]
    assert stage.main(["reward", *arguments]) == 1
    folder = root / "runs/measured/reward"
    assert not (folder / "stage.json").exists()
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    load_reward_model(base, folder / "model")


@pytest.mark.slow
def test_doing_it_again_gives_the_same_model(root: Path) -> None:
    folder = root / "runs/test/reward/model"
    rows = demonstrations(root)[:5]
    before, tensors = probe_scores(root, folder, rows), load_file(folder / WEIGHTS)
    recipe = str(root / "recipe.yaml")
    result = python("-m", "pipelines.stage", "reward", recipe, "--force")
    assert result.returncode == 0, result.stderr
    again = load_file(folder / WEIGHTS)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert probe_scores(root, folder, rows) == pytest.approx(before, abs=1e-6)


def test_a_model_without_its_head_does_not_load(root: Path, tmp_path: Path) -> None:
    for path in (root / "runs/test/reward/model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[HEAD_KEY]
    save_file(tensors, tmp_path / WEIGHTS)
    result = python("-c", SCORE_PROBE, str(root / "base"), str(tmp_path), "[[[2, 3, 1], []]]")
    assert result.returncode != 0
    assert "the score head was not saved" in result.stderr


def test_another_template_than_the_sft_models_is_refused(root: Path, tmp_path: Path) -> None:
    # A tree whose sft stage says that it was made with another template than its files hold.
    manifest = json.loads((root / "runs/test/sft/stage.json").read_text())
    parent = tmp_path / "sft"
    (parent / "model").mkdir(parents=True)
    for path in (root / "runs/test/sft/model").iterdir():
        (parent / "model" / path.name).write_bytes(path.read_bytes())
    manifest["template_sha256"] = "0" * 64
    (parent / "stage.json").write_text(json.dumps(manifest))
    recipe, overrides = str(root / "recipe.yaml"), [f"run.parents.sft={parent}", "name=other"]
    result = python("-m", "pipelines.stage", "reward", recipe, *overrides)
    assert result.returncode == 2, result.stderr
    assert "chat template" in result.stderr
    assert not (root / "runs/other/reward").exists()


def ranked(
    prompt: list[int],
    responses: tuple[list[int], ...],
    targets: tuple[float, ...],
    margin: float | None = None,
    votes: bool = False,
) -> RankedTokens:
    texts = tuple(str(number) for number in range(len(responses)))
    ranking = Ranking((Message("user", "x"),), texts, targets, votes=votes)
    return RankedTokens(prompt, responses, ranking, margin)


def tokens(seed: int, tie_first: bool = False) -> list[RankedTokens]:
    """Six rankings of 2, 3, 4, 2, 3 and 4 random responses."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(2, 300, (count,), generator=generator).tolist()

    rows = []
    for number in range(6):
        amount = 2 + number % 3
        targets = tuple(0.0 if tie_first and number == 0 else float(k) for k in range(amount))
        responses = tuple([*draw(2 + k), 1] for k in range(amount))
        rows.append(ranked(draw(4), responses, targets))
    return rows


def train(
    folder: Path,
    rows: list[RankedTokens],
    micro: int,
    seen: list[Any] | None = None,
    **loss: Any,
) -> tuple[RewardModel, list[float]]:
    """Train two epochs of steps of four rankings and of the two that remain; return the losses."""
    base = tiny.llama()
    model = new_reward_model(base, Adapter(r=4, alpha=8.0), folder, seed=3)

    def collator(batch: list[RankedTokens]) -> Any:
        if seen is not None:
            seen.append(batch)
        return collate(batch, 0)

    trainer = RewardTrainer(
        section=Reward(lr=1e-2, batch_size=4, **loss),
        lm_head=output_head(base),
        order=SortedBatches([row.width for row in rows], 4, seed=5),
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=4,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=4 // micro,
            learning_rate=1e-2,
            optim="sgd",  # Adam's first steps would hide the gradient's size
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            disable_tqdm=True,
            seed=5,
        ),
        train_dataset=rows,
        data_collator=collator,
    )
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_step_draws_from_all_rows_and_its_micro_batches_are_of_like_length(
    tmp_path: Path,
) -> None:
    folder = sft_adapter(tiny.llama(), tmp_path / "sft")
    rows, drawn = tokens(seed=2), []
    train(folder, rows, 2, seen=drawn)
    steps = [drawn[:2], drawn[2:3], drawn[3:5], drawn[5:]]  # micro-batches of 4, 2, 4 and 2 rows
    widths = [[row.width for part in step for row in part] for step in steps]
    assert [len(step) for step in widths] == [4, 2, 4, 2]
    assert all(step == sorted(step) for step in widths)
    epochs = [[id(row) for part in parts for row in part] for parts in (drawn[:3], drawn[3:])]
    assert all(sorted(epoch) == sorted(map(id, rows)) for epoch in epochs)
    assert set(epochs[0][:4]) != set(epochs[1][:4])


LOSSES = {
    "pairs": {},
    "margin": {"margin": "column"},
    "label smoothing": {"label_smoothing": 0.25},
    "soft labels": {"soft_labels": True},
    "listwise": {"loss": "listwise"},
    "centering": {"centering_coef": 0.5},
    "aux lm": {"aux_lm_coef": 0.5},
    "several": {"loss": "listwise", "centering_coef": 0.1, "aux_lm_coef": 0.1},
}


@pytest.mark.parametrize(
    ("tie_first", "loss"),
    [(False, {}), *((True, loss) for loss in LOSSES.values())],
    ids=["without a tie", *LOSSES],
)
def test_training_does_not_depend_on_the_micro_batches(
    tie_first: bool, loss: dict[str, Any], tmp_path: Path
) -> None:
    folder = sft_adapter(tiny.llama(), tmp_path / "sft")
    rows = [
        ranked(r.prompt, r.responses, r.targets, margin=0.5 * number, votes=number % 3 > 0)
        for number, r in enumerate(tokens(seed=2, tie_first=tie_first))
    ]
    (whole, losses), *others = (train(folder, rows, micro, **loss) for micro in (4, 2, 1))
    start = new_reward_model(tiny.llama(), Adapter(r=4, alpha=8.0), folder, seed=3)
    before, after = dict(start.named_parameters()), dict(whole.named_parameters())
    moved = {name: (after[name] - value).abs().max().item() for name, value in before.items()}
    assert (whole.head.weight - start.head.weight).abs().max().item() > 1e-3
    assert max(moved[name] for name in moved if "lora" in name) > 1e-3
    for other, other_losses in others:
        assert other_losses == pytest.approx(losses, abs=1e-5)
        for name, value in other.named_parameters():
            torch.testing.assert_close(value, after[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", list(LOSSES.values())[1:], ids=list(LOSSES)[1:])
def test_every_loss_is_another(loss: dict[str, Any], tmp_path: Path) -> None:
    folder = sft_adapter(tiny.llama(), tmp_path / "sft")
    rows = [ranked(r.prompt, r.responses, r.targets, votes=True) for r in tokens(seed=2)]
    # What is subtracted is decided before, by ``margin_of``.
    given = [replace(row, margin=2.0) for row in rows] if "margin" in loss else rows
    plain, other = train(folder, rows, 4)[1][0], train(folder, given, 4, **loss)[1][0]
    assert abs(other - plain) > 0.01


def test_scores_that_float32_cannot_tell_apart_are_no_tie() -> None:
    row = ranked([2], ([3, 1], [4, 1]), (16777216.0, 16777217.0))
    batch = collate([row], 0)
    better, worse = strict_pairs(batch["groups"], batch["targets"])
    assert (better.tolist(), worse.tolist()) == ([1], [0])


def test_equal_responses_with_different_scores_are_dropped() -> None:
    tokenizer = prepare_tokenizer(tiny.tokenizer(), TokenizerSection())
    renderer = Renderer(tokenizer, 64, 64)
    prompt = (Message("user", "Say hello."),)
    with pytest.raises(Unusable, match="identical_responses"):
        ranked_tokens(renderer, Ranking(prompt, ("Hello", "Hello"), (1.0, 0.0)), None)
    tied = ranked_tokens(renderer, Ranking(prompt, ("Hello", "Hello"), (1.0, 1.0)), None)
    assert tied.responses[0] == tied.responses[1]
    assert tied.responses[0][-1] == 1  # ends its turn
