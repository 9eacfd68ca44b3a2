"""Reward models on Anthropic's helpful and harmless pairs, beside length and words alone.

A decoder and an encoder from scratch, by the recipes ``hh-rlhf/small`` and ``hh-rlhf/encoder``, and
an encoder from a folder: one model for each kind of pair. Each is compared with two rules on the
test pairs that it can read, by a paired bootstrap over them.
"""

import json
import statistics
import sys

from data.load import load_records
from data.records import Ranking
from reward.baseline import TextPair, bag_of_words_outcomes
from tests.benchmarks.reward_bench import Bench, Scored, Trained, score_heldout
from tests.benchmarks.reward_rows import Difference, Result, paired_bootstrap

DECODER, ENCODER = "hh-rlhf/small", "hh-rlhf/encoder"
FILES = {"helpful": ("train", "test"), "harmless": ("harmless_train", "harmless_test")}
FINE_TUNING = [
    "reward.lr=5.0e-5"
]  # of an encoder that somebody has trained well (BERT, appendix A)


def hh(bench: Bench) -> list[Result]:
    """Train every model on every kind of pair; compare it with the rules on its test pairs."""
    if bench.data is None:
        sys.exit("hh needs --data, the folder that holds hh_rlhf/, sft/ and text/")
    root = f"data.root={json.dumps(str(bench.data))}"
    models = {
        "decoder": (DECODER, bench.make_parents(DECODER, "hh", [root], finished=bench.parents)),
        "encoder": (
            ENCODER,
            bench.make_parents(ENCODER, "hh-encoder", [root], stages=["pretrain"]),
        ),
    }
    if bench.encoder is not None:
        given = [f"reward.base.id={json.dumps(str(bench.encoder))}", *FINE_TUNING]
        models["given encoder"] = (ENCODER, given)
    found = []
    for name, (recipe, changes) in models.items():
        for kind, files in FILES.items():
            train, test = (
                json.dumps({"path": f"hh_rlhf/{file}.jsonl.gz", "shape": "transcript_pairs"})
                for file in files
            )
            data = [root, f"data.reward.train=[{train}]", f"data.reward.heldout=[{test}]"]
            trained = [
                bench.train(recipe, f"hh-{name.replace(' ', '-')}-{kind}", seed, [*changes, *data])
                for seed in bench.seeds
            ]
            found += compare(bench, {"pairs": kind, "model": name}, trained)
    return found


def compare(bench: Bench, setting: dict[str, str], trained: list[Trained]) -> list[Result]:
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
        for seed, accuracy in zip(bench.seeds, by_seed, strict=True)
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
