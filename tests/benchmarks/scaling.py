"""How the cost of a PPO update grows with response length, batch and vocabulary.

    python -m tests.benchmarks.scaling --mode lora --dtype float32
    python -m tests.benchmarks.scaling --size xs --lengths 16 32 --batches 16 --vocabularies 2048

One axis varies at a time around the workload's shape; every run is a process of its own on one
thread. Lengths are fixed, so that the cost per token can be read off: where it stays, the cost
is linear. The first update of a run is warm-up and is not counted. Linux only.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.benchmarks import common


def settings(options: argparse.Namespace, vocab: int) -> list[dict[str, Any]]:
    """Return what is measured: the shape in the middle, and one row per other value."""
    middle = {
        "max_new_tokens": options.max_new_tokens,
        "batch": options.batch,
        "vocab": vocab,
    }
    axes = {
        "max_new_tokens": options.lengths,
        "batch": options.batches,
        "vocab": options.vocabularies,
    }
    rows = [middle | {key: value} for key, values in axes.items() for value in values]
    return [dict(row) for row in dict.fromkeys(tuple(row.items()) for row in [middle, *rows])]


def measure(
    options: argparse.Namespace, workload: ModuleType, setting: dict[str, Any]
) -> dict[str, Any]:
    """Run one setting; return its row of the table."""
    vocab = setting["vocab"]
    # The workload takes its shapes from this table.
    workload.SIZES["scaled"] = dataclasses.replace(workload.SIZES[options.size], vocab=vocab)
    shape = workload.Workload(
        size="scaled",
        scenario="fixed",
        seed=options.seed,
        updates=options.updates,
        batch=setting["batch"],
        max_new_tokens=setting["max_new_tokens"],
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        workload.export(shape, str(folder / "workload"))
        command = [sys.executable, "-m", "tests.benchmarks.align_ppo", str(folder / "workload")]
        command += ["--mode", options.mode, "--dtype", options.dtype]
        common.run([*command, "--out", folder / "result.json"], folder / "log")
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    found = result["summary"]
    tokens = setting["batch"] * setting["max_new_tokens"]
    row = {
        "response tokens": setting["max_new_tokens"],
        "batch": setting["batch"],
        "vocabulary": vocab,
        "s/update": found["seconds_per_update"],
        "rollout s": found["rollout_s"],
        "score s": found["score_s"],
        "update s": found["update_s"],
        "ms/response token": 1000 * found["seconds_per_update"] / tokens,
        "peak MB": found["peak_rss_mb"] - found["rss_after_import_mb"],
    }
    common.say(" ".join(f"{key} {value:.4g}" for key, value in row.items()))
    return row


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_workload_options(parser)
    parser.add_argument("--mode", default="lora", help="as in align_ppo (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="as in align_ppo")
    parser.add_argument("--lengths", type=int, nargs="*", default=[32, 64, 128, 256])
    parser.add_argument("--batches", type=int, nargs="*", default=[16, 32, 64, 128])
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[2048, 8192, 32768])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    options = parser.parse_args()

    workload = common.load_workload(options.bench)
    planned = settings(options, workload.SIZES[options.size].vocab)
    rows = [measure(options, workload, setting) for setting in planned]
    print(common.table(rows))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
