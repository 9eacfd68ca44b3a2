"""Frozen features against fine-tuning: classifiers by the reward stage, over seeds.

    python -m tests.benchmarks.classification --data FOLDER --out runs/classification
    python -m tests.benchmarks.classification --data FOLDER --out OUT --encoder DIR --models encoder

A small decoder and a small encoder learn language from the texts alone (and from film reviews);
then each method trains a classifier of film-review sentences (2 classes) and of bank customers'
questions (77 classes) on each, in runs of the ``align`` command on one thread: what is done already
is not done again. A decoder's classifier starts from an SFT model; here from one that a single step
has made, at a rate that moves nothing. ``--encoder`` takes an encoder from elsewhere instead of the
small one. ``FOLDER`` holds classification/{sentence_polarity,banking77,movie_reviews}.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from tests.benchmarks import common

# The keys of the recipe's adapter section, and the learning rate: set once, by the ratios between
# them in the literature.
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "head_only": ({}, 1e-2),
    "top_layers": ({"top_layers": 1}, 1e-3),
    "full": ({}, 5e-4),
}
# Training and test file, and the column of the label.
TASKS = {
    "sentence_polarity": ("train.jsonl", "test.jsonl", "label"),
    "banking77": ("train.csv", "test.csv", "category"),
}
FOLDER = "classification"
LONGEST, ANSWER = 96, 32  # tokens of a text, and of the answers that SFT is shown


def labels(data: Path, task: str) -> list[str]:
    """Return a task's labels."""
    if task == "sentence_polarity":  # its rows have their numbers
        return ["negative", "positive"]
    with (data / FOLDER / task / "train.csv").open(newline="", encoding="utf-8") as file:
        return sorted({row["category"] for row in csv.DictReader(file)})


def shared(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Return what all recipes say."""
    return {
        "name": name,
        "seed": seed,
        "base": {"id": "pretrain"},
        "tracking": {"mode": "disabled"},
        "run": {"root": str(options.out), "threads": 1},
        "data": {
            "root": str(options.data),
            "max_prompt_tokens": LONGEST,
            "max_response_tokens": ANSWER,
        },
    }


def base_recipe(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Return the recipe that makes a base: of all texts that are trained on, and of reviews."""
    files = [f"{task}/{train}" for task, (train, _, _) in TASKS.items()]
    files.append("movie_reviews/train.jsonl.gz")
    recipe = shared(options, f"base-{kind}", 0)
    recipe["tokenizer"] = {"vocab_size": 4096}
    sources = [{"path": f"{FOLDER}/{file}", "shape": "text"} for file in files]
    recipe["data"]["pretrain"] = {"train": sources}
    recipe["pretrain"] = {
        "objective": "masked" if kind == "encoder" else "causal",
        "model": {
            "hidden_size": options.width,
            "num_layers": 4,
            "num_heads": 4,
            "intermediate_size": 3 * options.width,
            "max_positions": LONGEST + ANSWER,
        },
        "sequence_length": LONGEST,
        "steps": options.base_steps,
        "batch_size": 32,
        "lr": 1e-3,
        "warmup_ratio": 0.1,
        "log_every": 50,
    }
    return recipe


def classifier_recipe(
    options: argparse.Namespace, kind: str, task: str, method: str, seed: int
) -> dict[str, Any]:
    """Return the recipe that makes a classifier."""
    recipe = shared(options, f"{task}-{kind}-{method}-{seed}", seed)
    train, test, column = TASKS[task]
    keys, lr = METHODS[method]
    adapter = {"method": method} | keys
    recipe["adapter"] = adapter
    recipe["data"]["reward"] = {
        part: [{"path": f"{FOLDER}/{task}/{file}", "columns": {"label": column}}]
        for part, file in (("train", train), ("heldout", test))
    }
    recipe["reward"] = {
        "loss": "classes",
        "classes": {"labels": labels(options.data, task)},
        "center_on": "none",
        "epochs": options.epochs,
        "batch_size": 32,
        "lr": lr,
        "schedule": "linear",
        "warmup_ratio": 0.1,
        "log_every": 50,
    }
    recipe["run"]["parents"] = {"pretrain": f"{options.out}/base-{kind}/pretrain"}
    if kind == "encoder":
        pooling, base = "mean", "pretrain"
        if options.encoder is not None:
            base = recipe["base"]["id"] = str(options.encoder)
            del recipe["run"]["parents"]
        recipe["reward"]["base"] = {"id": base, "pooling": pooling}
        return recipe
    recipe["data"]["world"] = {"demonstration_rows": 8}
    recipe["data"]["sft"] = {"train": [{"world": "demonstrations"}]}
    recipe["sft"] = {"lr": 1e-9, "batch_size": 8, "epochs": 1.0, "samples": 0}
    return recipe


def align(options: argparse.Namespace, recipe: dict[str, Any]) -> None:
    """Bring a recipe's run up to date."""
    name = recipe["name"]
    file = options.out / "recipes" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(recipe, indent=1), encoding="utf-8")  # JSON is YAML
    common.say(name)
    common.align(["run", file], options.out / "logs" / f"{name}.log")


def measure(options: argparse.Namespace, kind: str, task: str, method: str) -> dict[str, Any]:
    """Train a classifier with every seed; return a row of the table."""
    found = []
    for seed in range(options.seeds):
        recipe = classifier_recipe(options, kind, task, method, seed)
        align(options, recipe)
        manifest = options.out / recipe["name"] / "reward" / "stage.json"
        found.append(json.loads(manifest.read_text(encoding="utf-8"))["metrics"])
        common.say(f"  accuracy {found[-1]['accuracy']:.3f}")
    first = found[0]
    return {
        "task": task,
        "model": kind,
        "method": method,
        "trained %": 100 * first["trained/share"],
        "accuracy": common.mean_and_spread([metrics["accuracy"] for metrics in found]),
        "macro F1": common.mean_and_spread([metrics["f1/macro"] for metrics in found]),
        "ECE": common.mean_and_spread([metrics["calibration/ece"] for metrics in found]),
        "on training rows": common.mean_and_spread([m["accuracy/train"] for m in found]),
        "words": first["accuracy/bag_of_words"],
        "majority": first["accuracy/majority"],
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with classification/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--encoder", type=Path, help="an encoder's folder, instead of a small one")
    kinds = ("decoder", "encoder")
    parser.add_argument("--models", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=tuple(TASKS))
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--base-steps", type=int, default=1500)
    parser.add_argument("--width", type=int, default=128, help="hidden size (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, too")
    options = parser.parse_args()
    options.data, options.out = options.data.resolve(), options.out.resolve()

    for kind in options.models:
        if kind == "decoder" or options.encoder is None:
            align(options, base_recipe(options, kind))
    rows = [
        measure(options, kind, task, method)
        for task in options.tasks
        for kind in options.models
        for method in options.methods
    ]
    print(common.table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
