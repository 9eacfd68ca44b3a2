"""What reward models learn, and what their reports say of it: seven experiments on one core.

    export OMP_NUM_THREADS=1
    python -m tests.benchmarks.reward_quality comparisons --seeds 0,1,2 --json comparisons.json
    python -m tests.benchmarks.reward_quality hh --data DATA --models decoder

    comparisons   accuracy on held-out pairs after 250, 1,000, 4,000 and 16,000 comparisons
    size          three sizes of model, each with a base and an SFT model of its own
    noise         annotators who err on 0, 10, 20 and 30 % of the comparisons
    kwise         rankings of 4 to 9 responses as one element, against their pairs one by one
    length_bias   half of the rankings ordered by length alone: does the report name it?
    calibration   calibration error before and after the temperature, also of a model too sure
    hh            Anthropic's pairs, against "longer wins" and the words alone

All but ``hh`` are in the miniature world. Base and SFT model are made once (or taken from a
finished run, ``--parents``) and are the same for all seeds; a seed moves the score head, the order
of training, and which rankings the world holds. Trained are ``reward`` stages of the shipped
recipes; what is finished and up to date in ``--out`` is not trained again. Prints means and
standard deviations over the seeds.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from align.recipe import World
from pipelines.process import quiet_libraries
from reward.analysis import warnings
from tests.benchmarks import common
from tests.benchmarks.reward_bench import Bench, Trained, gold_agreement
from tests.benchmarks.reward_hh import FILES, hh
from tests.benchmarks.reward_rows import (
    RankingRow,
    Result,
    prefer_length,
    single_pairs,
    table,
    world_rankings,
    write_rows,
)

RECIPE = "miniature"
HELDOUT = 200  # rankings of four responses: 1,200 pairs
RANKINGS = {250: 42, 1_000: 167, 4_000: 667, 16_000: 2667}  # of four responses: six comparisons
USUAL = 4_000  # comparisons, where an experiment varies something else
NOISE = (0.0, 0.1, 0.2, 0.3)
PLANTED = 0.5  # the share of rankings ordered by length
SIZES = ((32, 2, 4), (64, 2, 4), (128, 3, 8))  # width, layers, heads; the last is the recipe's
KWISE, KWISE_OF_EACH, KWISE_BATCH, EPOCHS = range(4, 10), 12, 4, 3


def comparisons(bench: Bench) -> list[Result]:
    """Train on more and more comparisons, once through each."""
    parents = _parents(bench)
    found = []
    for count in RANKINGS:
        for seed in bench.seeds:
            trained = _usual(bench, parents, seed, count)
            found.append(Result({"comparisons": count}, seed, _accuracies(trained)))
    return found


def size(bench: Bench) -> list[Result]:
    """Train on the same rankings with three sizes of model."""
    found = []
    for width, layers, heads in SIZES:
        shape = [
            f"pretrain.model.hidden_size={width}",
            f"pretrain.model.num_layers={layers}",
            f"pretrain.model.num_heads={heads}",
            f"pretrain.model.num_kv_heads={heads // 2}",
            f"pretrain.model.intermediate_size={3 * width}",
        ]
        own = (width, layers, heads) != SIZES[-1]
        name = f"size-{width}"
        parents = bench.make_parents(RECIPE, name, shape) if own else _parents(bench)
        for seed in bench.seeds:
            changes = [*parents, *shape, *_world(seed, RANKINGS[USUAL])]
            trained = bench.train(RECIPE, name, seed, changes)
            metrics = trained.metrics
            parameters = round(metrics["trained/parameters"] / metrics["trained/share"])
            setting = {"width": width, "layers": layers, "parameters of the base": parameters}
            found.append(Result(setting, seed, _accuracies(trained)))
    return found


def noise(bench: Bench) -> list[Result]:
    """Train on annotators of different reliability, on the same responses."""
    parents = _parents(bench)
    found = []
    for share in NOISE:
        for seed in bench.seeds:
            agreement = f"data.world.annotator_agreement={1 - share}"
            changes = [*parents, *_world(seed, RANKINGS[USUAL]), agreement]
            trained = bench.train(RECIPE, f"noise-{share:g}", seed, changes)
            found.append(Result({"noise": share}, seed, _accuracies(trained)))
    return found


def kwise(bench: Bench) -> list[Result]:
    """Train on rankings as a whole, and on their pairs in one shuffle, epoch by epoch.

    Both see the same pairs in as many optimiser steps, at a constant rate, so that the end of each
    epoch could be the end of a training; each is followed by a look at the held-out rankings.
    """
    parents = _parents(bench)
    found = []
    for seed in bench.seeds:
        world = World(seed=seed, ranked_prompts=KWISE_OF_EACH, heldout_rows=HELDOUT // len(KWISE))
        rankings = world_rankings(world, "train", KWISE)
        heldout = _source(bench, f"kwise-heldout-{seed}", world_rankings(world, "heldout", KWISE))
        pairs = single_pairs(rankings)
        steps = -(-len(rankings) // KWISE_BATCH)
        for name, rows, batch in (
            ("rankings", rankings, KWISE_BATCH),
            ("pairs", pairs, -(-len(pairs) // steps)),
        ):
            changes = [
                *parents,
                *_world(seed, 1, batch),
                f"data.reward.train=[{_source(bench, f'kwise-{name}-{seed}', rows)}]",
                f"data.reward.heldout=[{heldout}]",
                f"reward.epochs={EPOCHS}.0",
                f"reward.heldout_every={steps}",
                "reward.schedule=constant",
            ]
            trained = bench.train(RECIPE, f"kwise-{name}", seed, changes)
            looks = [row for row in trained.log if "heldout/loss" in row]
            assert [look["step"] for look in looks] == [steps * (n + 1) for n in range(EPOCHS)]
            read = sum(len(row.get("responses", ("chosen", "rejected"))) for row in rows)
            for epoch, look in enumerate(looks, 1):
                setting = {"elements": name, "epoch": epoch, "responses read": read * epoch}
                measures = {"accuracy": look["heldout/accuracy"], "NLL": look["heldout/loss"]}
                found.append(Result(setting, seed, measures))
    return found


def length_bias(bench: Bench) -> list[Result]:
    """Plant a liking for length in the annotators, of training and held-out rankings alike."""
    parents = _parents(bench)
    found = []
    for share in (0.0, PLANTED):
        for seed in bench.seeds:
            trained = (_planted if share else _usual)(bench, parents, seed)
            metrics = trained.metrics
            named = [text for text in warnings(metrics) if text.startswith("length bias")]
            common.say(f"{trained.recipe.name}: {named or 'no word of length'}")
            measures = {
                "accuracy": metrics["accuracy"],
                "labels prefer longer": metrics["length/labels_prefer_longer"],
                "model prefers longer": metrics["length/prefers_longer"],
                "correlation": metrics["length/correlation"],
                "named": float(bool(named)),
            }
            found.append(Result({"ordered by length": share}, seed, measures))
    return found


def _planted(bench: Bench, parents: list[str], seed: int) -> Trained:
    count = RANKINGS[USUAL]
    world = World(seed=seed, ranked_prompts=count, heldout_rows=HELDOUT)
    train, heldout = (
        _source(
            bench,
            f"length-{split}-{seed}",
            prefer_length(world_rankings(world, split, [4]), PLANTED, seed),
        )
        for split in ("train", "heldout")
    )
    data = [f"data.reward.train=[{train}]", f"data.reward.heldout=[{heldout}]"]
    return bench.train(RECIPE, "length", seed, [*parents, *_world(seed, count), *data])


def calibration(bench: Bench) -> list[Result]:
    """Calibrate a model that has seen much once, and one that has seen little many times."""
    parents = _parents(bench)
    found = []
    for label, train in (("4,000, once", _usual), ("240, eight times", _too_often)):
        for seed in bench.seeds:
            metrics = train(bench, parents, seed).metrics
            keys = ("temperature", "ece", "ece_scaled", "brier", "brier_scaled")
            measures = {"accuracy": metrics["accuracy"]}
            measures |= {key: metrics[f"calibration/{key}"] for key in keys}
            found.append(Result({"comparisons": label}, seed, measures))
    return found


def _too_often(bench: Bench, parents: list[str], seed: int) -> Trained:
    changes = [*parents, *_world(seed, 40), "reward.epochs=8.0"]
    return bench.train(RECIPE, "sure", seed, changes)


def _usual(bench: Bench, parents: list[str], seed: int, count: int = USUAL) -> Trained:
    """Train on so many comparisons, once through; several experiments have this one in common."""
    changes = [*parents, *_world(seed, RANKINGS[count])]
    return bench.train(RECIPE, f"comparisons-{count}", seed, changes)


def _parents(bench: Bench) -> list[str]:
    return bench.make_parents(RECIPE, "miniature", finished=bench.parents)


def _world(seed: int, rankings: int, batch: int = 8) -> list[str]:
    """Return what the reward stages share: less is held out than in the recipe, to be quicker."""
    return [
        f"data.world.seed={seed}",
        f"data.world.ranked_prompts={rankings}",
        f"data.world.heldout_rows={HELDOUT}",
        "data.world.demonstration_rows=512",  # the scores are centred on so many
        f"reward.batch_size={batch}",
    ]


def _source(bench: Bench, name: str, rows: Sequence[RankingRow]) -> str:
    path = write_rows(bench.out / "rows" / f"{name}.jsonl", rows)
    return json.dumps({"path": str(path)})


def _accuracies(trained: Trained) -> dict[str, float]:
    """Return what most experiments in the miniature world tell of a model."""
    return {
        "accuracy": trained.metrics["accuracy"],
        "words alone": trained.metrics["accuracy/bag_of_words"],
        "as gold": gold_agreement(trained),
        "NLL": trained.metrics["loss"],
        "ECE": trained.metrics["calibration/ece"],
        "ECE scaled": trained.metrics["calibration/ece_scaled"],
    }


EXPERIMENTS: dict[str, Callable[[Bench], list[Result]]] = {
    "comparisons": comparisons,
    "size": size,
    "noise": noise,
    "kwise": kwise,
    "length_bias": length_bias,
    "calibration": calibration,
    "hh": hh,
}


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--seeds", type=_seeds, default=(0, 1, 2))
    parser.add_argument("--json", type=Path, help="write the figures of every seed there")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/reward_quality"))
    parser.add_argument("--parents", type=Path, help="a finished run with pretrain and sft")
    parser.add_argument("--data", type=Path, help="hh: the folder that holds hh_rlhf/")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=("decoder", "encoder", "given"),
        default=("decoder", "encoder"),
        help="hh: which to train (default: %(default)s)",
    )
    parser.add_argument(
        "--pairs",
        nargs="+",
        choices=tuple(FILES),
        default=tuple(FILES),
        help="hh: which to learn from (default: %(default)s)",
    )
    parser.add_argument("--encoder", type=Path, help="hh: the folder of the encoder `given`")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)  # before there are others: a forked process would have none of them
    quiet_libraries()
    bench = Bench(
        options.out.resolve(),
        options.seeds,
        tuple(options.overrides),
        options.parents and options.parents.resolve(),
        options.data and options.data.resolve(),
        tuple(options.models),
        tuple(options.pairs),
        options.encoder and options.encoder.resolve(),
    )
    found = EXPERIMENTS[options.experiment](bench)
    if options.json:
        flat = [row.setting | {"seed": row.seed} | row.measures for row in found]
        options.json.write_text(json.dumps(flat, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
