"""What two processes train beside what one does: every stage, by every way of ZeRO, in float32.

    python -m tests.benchmarks.zero_equivalence
    python -m tests.benchmarks.zero_equivalence base.quantization=nf4 --stages sft reward
    python -m tests.benchmarks.zero_equivalence ppo.layout=separate --stages ppo

Two gloo processes on the CPU with real DeepSpeed against one without, each stage from the same
parents, on the tiny Llama and data of the tests (``tests/stages/test_several_processes.py``,
``test_ppo_group.py``). A line has the loss of the last step (in ppo: the value loss, over the same
rollouts), by how much of it one process differs, and the distance of all saved weights from those
of one process, relative to their norm. ``-`` where the recipe refuses the way.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from align.recipe import StageName
from tests.stages import test_ppo_group
from tests.stages.test_llama2_recipes import base
from tests.stages.test_several_processes import (
    LORA,
    LORA_IN_FLOAT32,
    WAYS,
    alone,
    metrics,
    parent,
    run,
)

STAGES: tuple[StageName, ...] = ("sft", "reward", "ppo")
LOSS = {"sft": "loss", "reward": "loss", "ppo": "ppo/value_loss"}


def last_loss(stage: StageName, folder: Path) -> float:
    """Return the loss of the last step; behind it sft and reward log what they measure."""
    lines = [line for line in metrics(folder) if "lr" in line]
    return float(lines[-1][LOSS[stage]])


def distance(ours: Path, theirs: Path) -> float:
    """Return how far all weights that one stage has saved are from another's, relatively."""
    apart, size = 0.0, 0.0
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*.safetensors"))
    for file in files:
        found, expected = load_file(ours / file), load_file(theirs / file)
        for key, tensor in expected.items():
            apart += float((found[key] - tensor).double().square().sum())
            size += float(tensor.double().square().sum())
    return math.sqrt(apart / size)


def table(root: Path, stages: list[StageName], overrides: list[str]) -> None:
    """Make every stage by one process and by every way of two; print a line for each."""
    base(root, 4)
    parents = [word for word in overrides if not word.startswith("ppo.")]
    common = [*LORA_IN_FLOAT32, *parents]
    one = alone(root, "one", LORA, ("sft", "reward"), *common)
    given: dict[StageName, list[str]] = {"sft": common, "reward": [*common, *parent(one)]}
    places = [*parent(one), f"run.parents.reward={one / 'reward'}"]
    given["ppo"] = [*test_ppo_group.SETTINGS, *overrides, *places]
    print(f"{'stage':<8}{'processes, way':<34}{'final loss':>12}{'differs by':>12}{'weights':>12}")
    for stage in stages:
        expected = one / stage
        if stage == "ppo":
            expected = alone(root, "ppo", LORA, ("ppo",), *given["ppo"]) / "ppo"
        whole = last_loss(stage, expected)
        print(f"{stage:<8}{'1':<34}{whole:>12.7g}")
        for number, way in enumerate(WAYS):
            words = "2, " + " ".join(word.removeprefix("distributed.") for word in way)
            name = f"{stage}-{number}"
            done = run(root, stage, LORA, name, *given[stage], *way, "--nproc", "2")
            line = f"{stage:<8}{words:<34}"
            if done.returncode == 2:
                print(f"{line}{'-':>12}", flush=True)
                continue
            if done.returncode:
                sys.exit(done.stderr)
            found = root / "runs" / name / stage
            loss = last_loss(stage, found)
            apart = abs(loss - whole) / abs(whole)
            print(
                f"{line}{loss:>12.7g}{apart:>12.1e}{distance(found, expected):>12.1e}", flush=True
            )


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    options, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        table(Path(folder), options.stages, overrides)


if __name__ == "__main__":
    main()
