"""What checkpoints cost: the time of training with them beside that without, stage by stage.

    python -m tests.benchmarks.checkpoint_overhead
    python -m tests.benchmarks.checkpoint_overhead --least-seconds 0 pretrain.steps=100

Every stage of the recipe is made ``--repeats`` times with checkpoints, as often as the recipe says
(by default once a minute, or less often), and as often without, in turn, on one thread, with
``--force``. Measured is the time from the first optimiser step (in ppo: rollout) to the last. The
table has the seconds of both sides (medians), their ratio, which holds the machine's noise as well,
and the time that writing took within training, which does not: the overhead.
``--least-seconds 0`` takes away the minute, so that a short training has checkpoints, too: then
only the rule is left that the time between two is at least 50 times what writing one took.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from align.recipe_io import find_recipe
from pipelines import checkpointing, stage
from pipelines.checkpointing import Checkpoints
from tests.benchmarks import common

STAGES = ("pretrain", "sft", "reward", "ppo")
WITHOUT = ["run.keep_checkpoints=0"]


def measure(out: Path, least_seconds: float, arguments: list[str]) -> int:
    """Run a stage in this process; write its seconds, and those of writing, to ``out``."""
    ends: list[float] = []
    writes: list[float] = []
    due, write = Checkpoints.due, Checkpoints.write

    def timed_due(self: Checkpoints, step: int) -> bool:
        ends.append(time.monotonic())
        return due(self, step)

    def timed_write(self: Checkpoints, *given: Any) -> None:
        started = time.monotonic()
        write(self, *given)
        writes.append(time.monotonic() - started)

    checkpointing._LEAST_SECONDS = least_seconds
    Checkpoints.due, Checkpoints.write = timed_due, timed_write  # type: ignore[method-assign]
    code = stage.main(arguments)
    facts = {"seconds": ends[-1] - ends[0], "writing": sum(writes), "checkpoints": len(writes)}
    out.write_text(json.dumps(facts), encoding="utf-8")
    return code


def run(options: argparse.Namespace, name: str, label: str, more: list[str]) -> dict[str, float]:
    """Make a stage in a process of its own; return what ``measure`` has written."""
    out = options.out / f"{name}-{label}.json"
    usual = [f"run.root={json.dumps(str(options.out))}", "tracking.mode=disabled", "run.threads=1"]
    module = [sys.executable, "-m", "tests.benchmarks.checkpoint_overhead"]
    stage_words = [name, str(options.recipe), *usual, *options.overrides, *more, "--force"]
    flags = ["--measure", str(out), json.dumps(stage_words)]
    flags += ["--least-seconds", str(options.least_seconds)]
    common.run([*module, *flags], out.with_suffix(".log"))
    facts: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
    return facts


def compare(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Make a stage with and without checkpoints, in turn; return its row of the table."""
    sides: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for number in range(options.repeats):
        for label, more in (("without", WITHOUT), ("with", [])):
            found = run(options, name, f"{label}-{number}", more)
            common.say(f"{name} {label}: {found}")
            sides[label].append(found)
    seconds = {
        label: statistics.median(found["seconds"] for found in runs)
        for label, runs in sides.items()
    }
    writing = statistics.median(found["writing"] for found in sides["with"])
    overhead = statistics.median(
        found["writing"] / (found["seconds"] - found["writing"]) for found in sides["with"]
    )
    return {
        "stage": name,
        "without, s": seconds["without"],
        "with, s": seconds["with"],
        "ratio": f"{seconds['with'] / seconds['without']:.3f}",
        "checkpoints": statistics.median(found["checkpoints"] for found in sides["with"]),
        "writing, s": writing,
        "overhead": f"{overhead:.2%}",
    }


def main() -> int:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--recipe", default="miniature")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--least-seconds", type=float, default=checkpointing._LEAST_SECONDS)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/checkpoints"))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.measure is not None:
        out, words = options.measure
        return measure(Path(out), options.least_seconds, json.loads(words))
    options.overrides, options.out = options.words, options.out.resolve()
    options.recipe = find_recipe(options.recipe).resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    print(common.table([compare(options, name) for name in options.stages]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
