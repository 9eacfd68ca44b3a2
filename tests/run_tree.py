"""A run directory as the stages leave it, with made-up numbers of a usual shape; no training."""

import json
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from align.manifest import (
    BaseFacts,
    DataFacts,
    Manifest,
    ParentFacts,
    find_manifest,
    sha256_outputs,
    write_manifest,
)
from align.recipe import StageName

CATEGORIES = ("facts", "format", "unknown", "harmful")
PARENTS: dict[StageName, tuple[StageName, ...]] = {
    "pretrain": (),
    "sft": ("pretrain",),
    "reward": ("pretrain", "sft"),
    "ppo": ("pretrain", "sft", "reward"),
    "evaluate": ("pretrain", "sft", "reward", "ppo"),
}


def write_run(
    directory: Path,
    stages: Sequence[StageName] = ("pretrain", "sft", "reward", "ppo", "evaluate"),
    *,
    gold: bool = True,
    steps: int = 40,
    prompts: int = 20,
    answer: str = "Hello, Mira! How are you today?",
    category: str = "facts",
) -> Path:
    """Write finished stages into ``directory`` and return it.

    Args:
        gold: whether there was a gold judge.
        answer: the text of every PPO answer.
        category: the first category's name.
    """
    rng = random.Random(0)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "recipe.yaml").write_text(f"name: {directory.name}\nseed: 0\n", encoding="utf-8")
    names = (category, *CATEGORIES[1:])
    for stage in stages:
        folder = directory / stage
        metrics: dict[str, float]
        samples: list[dict[str, Any]] = []
        if stage == "ppo":
            rows, metrics = _ppo(rng, steps, gold)
        elif stage == "evaluate":
            metrics = _evaluation(rng, stages, names, gold)
            rows = [{"step": 0.0} | metrics]
            samples = _samples(rng, stages, names, prompts, gold, answer)
        else:
            rows, metrics = _training(rng, stage, steps)
        write_stage(folder, stage, rows, metrics, samples, stages)
    return directory


def write_stage(
    folder: Path,
    stage: StageName,
    rows: Iterable[dict[str, float]],
    metrics: dict[str, float],
    samples: Sequence[dict[str, Any]] = (),
    present: Sequence[StageName] = (),
) -> None:
    """Write one finished stage: metrics, samples and manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "metrics.jsonl", rows)
    if samples:
        write_rows(folder / "samples.jsonl", samples)
    parents = []
    for parent in PARENTS[stage]:
        there = find_manifest(folder.parent / parent)
        if parent in present and there is not None:
            path = f"../{parent}"
            parents.append(ParentFacts(stage=parent, path=path, sha256=there.outputs_sha256()))
    minute = {"pretrain": 0, "sft": 12, "reward": 20, "ppo": 26, "evaluate": 55}[stage]
    manifest = Manifest(
        stage=stage,
        name=folder.parent.name,
        seed=0,
        recipe_sha256="1" * 64,
        inputs_sha256="2" * 64,
        code_version="0.1.0",
        versions={"python": "3.12.1", "torch": "2.13.0"},
        base=BaseFacts(id="pretrain/model", revision=None, sha256="3" * 64),
        tokenizer_sha256="4" * 64,
        template_sha256="5" * 64,
        pad_id=0,
        eos_ids=(1,),
        parents=tuple(parents),
        data=(
            DataFacts(
                id=f"world:{stage}/train",
                rows=4000,
                sha256="6" * 64,
                kept=3988,
                dropped={"response_too_long": 9, "nothing_to_learn": 3},
            ),
        ),
        metrics=metrics,
        outputs=sha256_outputs(folder, ("metrics.jsonl",)),
        wandb_id=None,
        started=f"2026-01-05T09:{minute:02d}:00+00:00",
        finished=f"2026-01-05T09:{minute + 4:02d}:30+00:00",
    )
    write_manifest(folder, manifest)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _training(
    rng: random.Random, stage: StageName, steps: int
) -> tuple[list[dict[str, float]], dict[str, float]]:
    floor, start = {"pretrain": (1.6, 6.0), "sft": (0.9, 1.7), "reward": (0.58, 0.7)}[stage]
    rows = []
    for step in range(1, steps + 1):
        fall = math.exp(-4 * step / steps)
        rows.append(
            {
                "step": float(step * 10),
                "loss": floor + (start - floor) * fall + rng.gauss(0, 0.02),
                "lr": 1e-3 * (1 - step / steps),
                "grad_norm": 0.4 + 0.8 * fall + rng.random() * 0.1,
                "tokens_per_second": 21_000 + rng.gauss(0, 600),
            }
        )
        if stage == "reward":
            rows[-1]["accuracy"] = 0.72 - 0.2 * fall + rng.gauss(0, 0.03)
    if stage == "reward":
        return rows, {
            "accuracy": 0.684,
            "accuracy/low": 0.655,
            "accuracy/high": 0.712,
            "accuracy/longer_wins": 0.541,
        }
    metrics = {"loss": floor, "perplexity": math.exp(floor)}
    if stage == "sft":
        metrics["eos_rate"] = 0.984
    return rows, metrics


def _ppo(
    rng: random.Random, steps: int, gold: bool
) -> tuple[list[dict[str, float]], dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(steps + 1):
        done = step / steps
        kl = 14 * done**1.3
        score = -0.1 + 2.1 * (1 - math.exp(-3 * done))
        row: dict[str, float] = {"step": float(step)}
        if step:
            row |= {
                "score/mean": score + rng.gauss(0, 0.12),
                "kl/mean": kl + rng.gauss(0, 0.4),
                "kl/coef": 0.05,
                "entropy": 1.4 - 0.8 * done + rng.gauss(0, 0.03),
                "length/mean": 21 + 6 * done + rng.gauss(0, 0.7),
                "eos_rate": min(1.0, 0.97 + 0.02 * done + rng.gauss(0, 0.005)),
                "ppo/clip_fraction": 0.04 + 0.05 * done + rng.random() * 0.02,
                "ppo/explained_variance": 0.75 * (1 - math.exp(-6 * done)) + rng.gauss(0, 0.03),
                "ppo/policy_loss": -0.01 + rng.gauss(0, 0.004),
                "ppo/value_loss": 0.1 + 0.5 * math.exp(-6 * done) + rng.random() * 0.03,
                "grad_norm": 0.6 + rng.random() * 0.2,
                "time/rollout": 2.4 + 0.4 * done + rng.random() * 0.1,
                "time/score": 0.5 + rng.random() * 0.05,
                "time/update": 3.1 + rng.random() * 0.2,
            }
        if step % max(1, steps // 10) == 0:
            row |= {"probe/score": score, "probe/kl": kl, "probe/length": 21 + 6 * done}
            if gold:
                row["probe/gold"] = 0.42 + 0.62 * done - 0.42 * done**2 + rng.gauss(0, 0.008)
        rows.append(row)
    return rows, {k: v for k, v in rows[-1].items() if k != "step"}


def _evaluation(
    rng: random.Random, stages: Sequence[StageName], names: Sequence[str], gold: bool
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    models = ["base", "sft", *(["ppo"] if "ppo" in stages else [])]
    for i, model in enumerate(models):
        measures = {
            "length/mean": (44.1, 21.3, 26.8)[i],
            "eos_rate": (0.31, 0.985, 0.99)[i],
            "empty_rate": (0.02, 0.0, 0.0)[i],
            "repetitive_rate": (0.36, 0.02, 0.045)[i],
            "kl/mean": (41.2, 0.0, 13.1)[i],
            "perplexity": (8.41, 2.47, 3.02)[i],
            "score/mean": (-2.31, -0.08, 1.94)[i],
            "score/low": (-2.5, -0.2, 1.8)[i],
            "score/high": (-2.1, 0.04, 2.07)[i],
        }
        if gold:
            mean = (0.12, 0.42, 0.61)[i]
            measures |= {"gold/mean": mean, "gold/low": mean - 0.03, "gold/high": mean + 0.03}
            for shift, name in enumerate(names):
                measures[f"gold/{name}"] = mean + (0.2, 0.1, -0.25, -0.05)[shift] * (i + 1) / 3
        metrics |= {f"{model}/{key}": value for key, value in measures.items()}
    if "ppo" in stages:
        metrics |= {"ppo/win_rate/mean": 0.712, "ppo/win_rate/low": 0.663}
        metrics["ppo/win_rate/high"] = 0.76
    if "reward" in stages:
        metrics |= {
            "reward/pairs": 812.0,
            "reward/accuracy": 0.681,
            "reward/accuracy/low": 0.654,
            "reward/accuracy/high": 0.707,
            "reward/accuracy/longer_wins": 0.54,
            "reward/calibration/ece": 0.031,
        }
        if gold:
            metrics |= {"reward/accuracy/gold": 0.794, "reward/labels/gold": 0.752}
    return metrics


def _samples(
    rng: random.Random,
    stages: Sequence[StageName],
    names: Sequence[str],
    count: int,
    gold: bool,
    answer: str,
) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        responses: dict[str, Any] = {}
        for model, text in (
            ("base", "boats boats boats"),
            ("sft", "Tom has a kite."),
            ("ppo", answer),
        ):
            if model == "ppo" and "ppo" not in stages:
                continue
            given: dict[str, Any] = {"text": text, "tokens": 9, "ended": model != "base"}
            given["score"] = rng.gauss(0, 1)
            if gold:
                given["gold"] = round(rng.random(), 2)
            responses[model] = given
        question = "Tom has a red kite and two blue boats. What does Tom have? Answer in one line."
        prompt = [{"role": "user", "content": question}]
        rows.append({"prompt": prompt, "category": names[i % len(names)], "responses": responses})
    return rows
