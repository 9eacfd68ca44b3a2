"""Does an ensemble of reward models delay over-optimisation? PPO against one, and against several.

    export OMP_NUM_THREADS=1
    python -m tests.benchmarks.ensemble --json ensemble.json
    python -m tests.benchmarks.ensemble --parents runs/miniature reward.scale_on=demonstrations

    one        a single member: each of them in a run of its own, whose figures are averaged
    penalised  the members' mean less --std-penalty times their standard deviation
    mean       the members' mean

In the miniature world, on one core. Every seed has comparisons of its own, few enough for PPO to
find what the reward models got wrong; its members learn from the same ones and differ only in their
seed (adapters, score head, order). PPO runs longer than the recipe's and with a weaker tie to the
SFT model, whose copy the critic is in every arm. Base and SFT model are made once, or taken from a
finished run (``--parents``); what is finished and up to date in ``--out`` is not run again.

Prints for every arm, as mean and standard deviation over the seeds: the highest gold score of all
looks at the policy and after how many updates it was, the last gold score, how far it fell from the
highest, and how high the arm's own reward was then and at what KL. Differences are of the same
seed, to the first arm. Draws the curves. Overrides of the recipe apply to all stages.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.places import stage_directory
from align.recipe_io import load_recipe
from pipelines.process import quiet_libraries
from tests.benchmarks import common, curves
from tests.benchmarks.curves import Curve
from tests.benchmarks.reward_bench import Bench, run_stage
from tests.benchmarks.reward_rows import Result, table

RECIPE = "miniature"
ARMS = ("one", "penalised", "mean")
COMPARISONS = 6  # of a ranking of four responses
HELDOUT = 100  # rankings, for the members' accuracy
HELDOUT_PROMPTS = 400  # the recipe's own; more if the looks are at more


def make_members(
    bench: Bench, parents: Sequence[str], options: argparse.Namespace, seed: int
) -> list[Path]:
    """Train a seed's reward models unless that is done already; return their stages' folders."""
    folders = []
    for number in range(options.members):
        name = f"member-{options.comparisons}-{seed}"
        changes = [
            *parents,
            f"data.world.seed={1 + seed}",
            f"data.world.ranked_prompts={round(options.comparisons / COMPARISONS)}",
            f"data.world.heldout_rows={HELDOUT}",
            "data.world.demonstration_rows=512",  # the scores are centred on so many
            "reward.batch_size=8",
        ]
        trained = bench.train(RECIPE, name, number, changes)
        common.say(f"{trained.recipe.name}: accuracy {trained.metrics['accuracy']:.3f}")
        folders.append(stage_directory(trained.recipe, "reward"))
    return folders


def rewards_of(arm: str, members: Sequence[Path], std_penalty: float) -> dict[str, str]:
    """Return the ``ppo.reward`` of each of an arm's runs, by what their names begin with."""
    source: dict[str, Any] = {"ensemble": [str(folder) for folder in members]}
    if arm == "penalised":
        source["std_penalty"] = std_penalty
    sources = {arm: source}
    if arm == "one":
        sources = {f"{arm}-{number}": {"model": str(m)} for number, m in enumerate(members)}
    return {name: f"ppo.reward={json.dumps([found])}" for name, found in sources.items()}


def run_ppo(
    bench: Bench, changes: Sequence[str], options: argparse.Namespace, name: str, seed: int
) -> Path:
    """Run PPO unless that is done already; return its stage's folder."""
    changes = [
        *bench.settings(f"{name}-{options.comparisons}-{seed}", seed),
        *changes,
        f"ppo.steps={options.steps}",
        f"ppo.kl.coef={options.kl}",
        "ppo.kl.stop=null",
        f"ppo.probe_every={options.probe_every}",
        f"ppo.probe_prompts={options.probe_prompts}",
        f"data.world.heldout_rows={max(HELDOUT_PROMPTS, options.probe_prompts)}",
        *bench.overrides,
    ]
    run_stage("ppo", RECIPE, changes, bench.out)
    return stage_directory(load_recipe(RECIPE, changes), "ppo")


def measures(stage: Path, curve: Curve) -> dict[str, float]:
    """Return what a finished PPO stage comes to."""
    lines = (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [row for row in map(json.loads, lines) if "probe/gold" in row][-1]
    peak = max(curve.gold)
    return {
        "gold before": curve.gold[0],
        "peak gold": peak,
        "at update": float(curve.updates[curve.gold.index(peak)]),
        "final gold": curve.final,
        "decline": peak - curve.final,
        "mean gold of all looks": curve.average,
        "final reward": last["probe/score"],
        "final KL": last["probe/kl"],
        "minutes": curve.minutes[-1],
    }


def differences(found: Sequence[Result]) -> list[dict[str, str]]:
    """Return a row per other arm: its gold scores less those of the first arm, by seed."""
    first = {r.seed: r.measures for r in found if r.setting == found[0].setting}
    rows = []
    for arm in dict.fromkeys(r.setting["arm"] for r in found[len(first) :]):
        row = {"arm": f"{arm} - {found[0].setting['arm']}"}
        for key in ("peak gold", "at update", "final gold", "decline", "mean gold of all looks"):
            own = {r.seed: r.measures[key] for r in found if r.setting["arm"] == arm}
            apart = [own[seed] - first[seed][key] for seed in own]
            row[key] = f"{statistics.fmean(apart):+.3f} ({' '.join(f'{x:+.3f}' for x in apart)})"
        rows.append(row)
    return rows


def main() -> None:
    """Parse the command line, run, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--members", type=int, default=4, help="reward models per seed")
    parser.add_argument("--comparisons", type=int, default=500, help="that a member learns from")
    parser.add_argument("--std-penalty", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=64, help="rollouts of PPO")
    parser.add_argument("--kl", type=float, default=0.01, help="ppo.kl.coef")
    parser.add_argument("--probe-every", type=int, default=4, help="updates between two looks")
    parser.add_argument(
        "--probe-prompts", type=int, default=256, help="of a look: with 256 it errs by 0.03"
    )
    parser.add_argument("--json", type=Path, help="write the figures of every seed there")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/ensemble"))
    parser.add_argument("--parents", type=Path, help="a finished run with pretrain and sft")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)  # before there are others: a forked process would have none of them
    quiet_libraries()
    bench = Bench(options.out.resolve(), tuple(options.seeds), tuple(options.overrides))
    finished = options.parents and options.parents.resolve()
    parents = bench.make_parents(RECIPE, "miniature", finished=finished)

    members = {seed: make_members(bench, parents, options, seed) for seed in bench.seeds}
    found, groups = [], {}
    for arm in options.arms:
        groups[arm] = []
        for seed in bench.seeds:
            rewards = rewards_of(arm, members[seed], options.std_penalty)
            runs = []
            for name, reward in rewards.items():
                stage = run_ppo(bench, [*parents, reward], options, name, seed)
                groups[arm].append(curves.read_align(stage))
                runs.append(measures(stage, groups[arm][-1]))
            mean = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
            found.append(Result({"arm": arm}, seed, mean))
        if options.json:
            flat = [row.setting | {"seed": row.seed} | row.measures for row in found]
            options.json.write_text(json.dumps(flat, indent=1) + "\n", encoding="utf-8")
    print(table(found))
    if others := differences(found):
        print(f"\n{common.table(others)}")
    curves.draw(bench.out / "ensemble.png", groups, ("updates",))


if __name__ == "__main__":
    main()
