"""Our own variants of PPO on the same pretrained base: what each costs, and what it gives.

    align run miniature run.threads=1
    python -m tests.benchmarks.variants runs/miniature --out runs/benchmarks/variants
    python -m tests.benchmarks.variants runs/miniature ppo.probe_prompts=400 --variants plain hf

    plain         as the recipe has it
    policy-trunk  ppo.value.trunk=policy: the critic is a head on the policy's hidden states
    top-half      adapter.layers=top-half, with an sft and a reward stage of its own
    hf            ppo.rollout.engine=hf: generate of transformers, padded batches, whole logits

Each variant runs for every seed of ``--seeds``, one after the other on one thread, from the sft and
reward stages of the given run; what is finished and up to date is not run again. Minutes are those
of rollouts, scoring and updates. Prints a table (mean and standard deviation over the seeds) and
draws the curves. Overrides of the recipe apply to all variants.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from align.recipe_io import load_recipe
from tests.benchmarks import common, curves
from tests.benchmarks.curves import Curve

VARIANTS = {
    "plain": [],
    "policy-trunk": ["ppo.value.trunk=policy"],
    "top-half": ["adapter.layers=top-half"],
    "hf": ["ppo.rollout.engine=hf"],
}
OWN_PARENTS = ("top-half",)  # adapters of another shape cannot start from the run's


def make_parents(options: argparse.Namespace, variant: str) -> Path:
    """Run the sft and reward stages of a variant; return the run that holds them."""
    file, name = options.run / "recipe.yaml", f"{variant}-parents"
    overrides = [f"name={name}", f"run.root={json.dumps(str(options.out))}"]
    overrides += [*curves.stage_overrides(), *VARIANTS[variant], *options.overrides]
    if load_recipe(file).base.id == "pretrain":
        overrides.append(f"run.parents.pretrain={json.dumps(str(options.run / 'pretrain'))}")
    for stage in ("sft", "reward"):
        common.say(f"{name}: {stage}")
        common.align([stage, file, *overrides], options.out / f"{name}-{stage}.log")
    return Path(options.out / name)


def run_variant(options: argparse.Namespace, variant: str) -> list[Curve]:
    """Run PPO for every seed; return the curves."""
    file = options.run / "recipe.yaml"
    others = make_parents(options, variant) if variant in OWN_PARENTS else None
    overrides = curves.parent_overrides(load_recipe(file), options.run, others)
    overrides += [*VARIANTS[variant], *options.overrides]
    return [
        curves.run_ppo(file, options.out, f"{variant}-{seed}", seed, overrides)
        for seed in options.seeds
    ]


def compare(groups: dict[str, list[Curve]]) -> list[dict[str, Any]]:
    """Return one row per variant; the first is what the others are compared with."""
    goal = curves.mean(next(iter(groups.values()))).final
    first = next(iter(groups))
    rows = []
    for variant, group in groups.items():
        minutes = [curve.minutes[-1] for curve in group]
        rows.append(
            {
                "variant": variant,
                "gold before": statistics.fmean(curve.gold[0] for curve in group),
                "final gold": common.mean_and_spread([curve.final for curve in group]),
                "mean gold of all looks": common.mean_and_spread([c.average for c in group]),
                "final gold by seed": " ".join(f"{curve.final:.3f}" for curve in group),
                "minutes per run": common.mean_and_spread(minutes),
                f"minutes to final gold of {first}": curves.mean(group).minutes_to(goal),
            }
        )
    return rows


def main() -> None:
    """Parse the command line, run, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a finished run, with pretrain, sft and reward")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/variants"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=tuple(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_intermixed_args()
    options.run, options.out = options.run.resolve(), options.out.resolve()

    groups = {variant: run_variant(options, variant) for variant in options.variants}
    print(common.table(compare(groups)))
    curves.draw(options.out / "variants.png", groups, ("updates", "minutes"))


if __name__ == "__main__":
    main()
