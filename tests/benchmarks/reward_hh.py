"""Reward models on Anthropic's helpful and harmless pairs, beside length and words alone.

    python -m tests.benchmarks.reward_quality hh --data DATA --models decoder encoder
    python -m tests.benchmarks.reward_quality hh --data DATA --models given --encoder MINILM \\
        --pairs harmless
    python -m tests.benchmarks.reward_hh runs/hh-rlhf-small

The first two train: a decoder and an encoder from scratch, by the recipes ``hh-rlhf/small`` and
``hh-rlhf/encoder``, or an encoder from a folder, one model for each kind of pair. The last takes
finished runs, seeds of the same recipe. Each model is compared with two rules on the held-out pairs
that it can read, by a paired bootstrap over them.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from align.recipe_io import load_recipe
from data.load import load_records
from data.records import Ranking
from reward.baseline import TextPair, bag_of_words_outcomes
from tests.benchmarks.reward_bench import Bench, Scored, Trained, read_trained, score_heldout
from tests.benchmarks.reward_rows import Difference, Result, paired_bootstrap, table

DECODER, ENCODER = "hh-rlhf/small", "hh-rlhf/encoder"
FILES = {"helpful": ("train", "test"), "harmless": ("harmless_train", "harmless_test")}
FINE_TUNING = [
    "reward.lr=5.0e-5"
]  # of an encoder that somebody has trained well (BERT, appendix A)


def hh(bench: Bench) -> list[Result]:
    """Train the models on each kind of pair; compare them with the rules on its test pairs."""
    if bench.data is None:
        sys.exit("hh needs --data, the folder that holds hh_rlhf/, sft/ and text/")
    root = f"data.root={json.dumps(str(bench.data))}"
    found = []
    for name in bench.models:
        recipe, start = _start(bench, name, root)
        for kind in bench.pairs:
            train, test = (
                json.dumps({"path": f"hh_rlhf/{file}.jsonl.gz", "shape": "transcript_pairs"})
                for file in FILES[kind]
            )
            changes = [root, f"data.reward.train=[{train}]", f"data.reward.heldout=[{test}]"]
            trained = [
                bench.train(recipe, f"hh-{name}-{kind}", seed, [*start, *changes])
                for seed in bench.seeds
            ]
            found += compare(bench.seeds, {"pairs": kind, "model": name}, trained)
    return found


def _start(bench: Bench, model: str, root: str) -> tuple[str, list[str]]:
    """Return a model's recipe, and the overrides that say what it starts from."""
    if model == "decoder":
        return DECODER, bench.make_parents(DECODER, "hh", [root], finished=bench.parents)
    if model == "encoder":
        own = bench.make_parents(ENCODER, "hh-encoder", [root], stages=["pretrain"])
        return ENCODER, own
    if bench.encoder is None:
        sys.exit("--models given needs --encoder, a folder with an encoder and its tokenizer")
    return ENCODER, [f"reward.base.id={json.dumps(str(bench.encoder))}", *FINE_TUNING]


def compare(
    seeds: Sequence[int], setting: dict[str, str], trained: Sequence[Trained]
) -> list[Result]:
    """Return a result per seed; the setting has the rules' accuracy, and the gain on them."""
    scored = [score_heldout(one) for one in trained]
    outcomes = [one.outcomes(_targets(one)) for one in scored]
    by_seed = [statistics.fmean(values) for values in outcomes]
    means = [statistics.fmean(values) for values in zip(*outcomes, strict=True)]
    test = _texts([ranking.ranking for ranking in scored[0].rankings])
    records = load_records(trained[0].recipe, "reward")["reward"].train
    words = bag_of_words_outcomes(
        _texts([record for record in records if isinstance(record, Ranking)]), test
    ).tolist()
    full = setting | {"test pairs": len(test)}
    for rule, theirs in {"longer wins": longer_wins(test), "words": words}.items():
        full[rule] = statistics.fmean(theirs)
        full[f"gain on {rule}"] = _written(paired_bootstrap(means, theirs))
    return [
        Result(full, seed, {"accuracy": accuracy})
        for seed, accuracy in zip(seeds, by_seed, strict=True)
    ]


def longer_wins(pairs: list[TextPair]) -> list[float]:
    """Say of each pair, better response first, if it is the longer one in characters."""
    return [(len(a) > len(b)) + 0.5 * (len(a) == len(b)) for a, b in pairs]


def _targets(scored: Scored) -> list[float]:
    return [target for ranking in scored.rankings for target in ranking.targets]


def _texts(rankings: list[Ranking]) -> list[TextPair]:
    """Return the pairs' responses, the better one first."""
    pairs = []
    for ranking in rankings:
        (_, worse), (_, better) = sorted(zip(ranking.scores, ranking.responses, strict=True))
        pairs.append((better, worse))
    return pairs


def _written(gain: Difference) -> str:
    return f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"


def main() -> None:
    """Compare the reward models of finished runs with the rules."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs with a reward stage")
    parser.add_argument("--data", type=Path, help="data.root, if it is another now")
    options = parser.parse_args()
    torch.set_num_threads(1)
    moved = [f"data.root={json.dumps(str(options.data.resolve()))}"] if options.data else []
    trained = []
    for run in options.runs:
        place = [f"name={run.name}", f"run.root={json.dumps(str(run.resolve().parent))}"]
        trained.append(read_trained(load_recipe(run / "recipe.yaml", [*place, *moved])))
    seeds = [one.recipe.seed for one in trained]
    print(table(compare(seeds, {"runs": ", ".join(run.name for run in options.runs)}, trained)))


if __name__ == "__main__":
    main()
