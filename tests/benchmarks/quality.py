"""Quality per wall-clock: gold score over training minutes, Align beside TRL 1.12.

    align run miniature run.threads=1
    python -m tests.benchmarks.quality runs/miniature --trl-python ENV/bin/python \\
        --variants ppo.value.trunk=policy

Both programs start from the SFT model, the reward model and the prompts of a finished run, with the
hyper-parameters of its recipe's ``ppo`` section, and run for the same number of updates, seed by
seed, one after the other, on one thread. TRL gets SFT and reward model merged, in float32, and new
LoRA adapters of the same size, since it wants to merge before it trains. Every ``ppo.probe_every``
updates the policy answers held-out prompts, for the gold judge of ``data.judge``; the clock counts
training alone. Each of ``--variants`` is run as well: Align with this one change. What is finished
is not run again. Prints a table and draws gold over minutes. TRL's final score counts as reached
``--within`` so much of it: a look errs by its standard error, 0.01 with 2,000 prompts.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from align.models import base_location, load_causal_lm
from align.recipe import Recipe
from align.recipe_adapter import Adapter
from align.recipe_io import load_recipe
from align.recipe_ppo import Ppo
from data.judge import gold
from data.load import load_records
from data.records import Prompt, Ranking
from data.render import Renderer, render_all
from pipelines.process import quiet_libraries
from pipelines.rollout import as_chat
from reward.model import load_reward_model
from reward.scorer import Row, score_rows
from tests.benchmarks import common, curves
from tests.benchmarks.curves import Curve

NUM_SCORED = 64  # responses on which the scores of both programs are compared


def trl_settings(ppo: Ppo, adapter: Adapter, renderer: Renderer) -> dict[str, Any]:
    """Return what TRL needs to know; refuse what its trainer has no counterpart of."""
    missing = None if ppo.missing_eos is None else ppo.missing_eos.value
    foreign = {
        "ppo.reward": ppo.reward == "model",
        "ppo.schedule": ppo.schedule == "constant",
        "ppo.value_lr": ppo.value_lr in (None, ppo.lr),
        "ppo.value_clip": ppo.value_clip is not None,
        "ppo.kl.target": ppo.kl.target is None,
        "ppo.kl.estimator": ppo.kl.estimator in ("k1", "k3"),
        "ppo.missing_eos": ppo.missing_eos is None or ppo.missing_eos.mode == "subtract",
        "the stop tokens": len(renderer.end_ids) == 1,
    }
    if wrong := [key for key, possible in foreign.items() if not possible]:
        sys.exit(f"TRL's trainer cannot do what the recipe says in {', '.join(wrong)}")
    return {
        **{key: getattr(ppo, key) for key in ("batch_size", "minibatch_size", "epochs", "steps")},
        **{key: getattr(ppo, key) for key in ("lr", "weight_decay", "gamma", "lam", "clip")},
        **{key: getattr(ppo, key) for key in ("value_clip", "value_coef", "temperature")},
        "adam_epsilon": 1e-5,  # align.engine's
        "kl_coef": ppo.kl.coef,
        "kl_estimator": ppo.kl.estimator,
        "missing_eos": missing,
        "max_new_tokens": ppo.max_new_tokens,
        "probe_every": ppo.probe_every,
        "r": adapter.r,
        "alpha": adapter.alpha,
        "pad_id": renderer.tokenizer.pad_token_id,
        "end_id": renderer.end_ids[0],
    }


def export(recipe: Recipe, run: Path, folder: Path) -> tuple[Renderer, list[Prompt]]:
    """Write ``policy/``, ``reward/``, ``prompts.json`` and ``settings.json``.

    Returns:
        The renderer and the held-out prompts.
    """
    assert recipe.ppo is not None
    tokenizer = AutoTokenizer.from_pretrained(run / "sft" / "model")
    limits = recipe.data
    renderer = Renderer(tokenizer, limits.max_prompt_tokens, limits.max_response_tokens)
    data = load_records(recipe, "ppo")["prompts"]
    train, _ = render_all(
        [row for row in data.train if isinstance(row, Prompt)],
        lambda prompt: renderer.prompt(prompt.messages),
    )
    heldout = [r for r in data.heldout[: recipe.ppo.probe_prompts] if isinstance(r, Prompt)]
    targets = _export_policy(recipe, run, folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    prompts = {
        "train": train,
        "heldout": [renderer.prompt(prompt.messages) for prompt in heldout],
        "scored": _export_reward(recipe, run, folder / "reward", renderer),
    }
    settings = trl_settings(recipe.ppo, recipe.adapter, renderer)
    _write(folder / "settings.json", settings | {"targets": targets})
    _write(folder / "prompts.json", prompts)
    return renderer, heldout


def _export_policy(recipe: Recipe, run: Path, folder: Path) -> list[str]:
    """Write the SFT model, merged; return the names of the layers that carried its adapter."""
    base = load_causal_lm(recipe, base_location(recipe)).float()
    model: Any = PeftModel.from_pretrained(base, str(run / "sft" / "model")).eval()
    targets = sorted(model.peft_config["default"].target_modules)
    ids = torch.arange(32)[None]  # any tokens will do
    with torch.no_grad():
        before = model(ids).logits
        merged = model.merge_and_unload()
        error = float((merged(ids).logits - before).abs().max())
    merged.save_pretrained(folder)
    common.say(f"merging the SFT model has changed its logits by at most {error:.1e}")
    return targets


def _export_reward(
    recipe: Recipe, run: Path, folder: Path, renderer: Renderer
) -> list[dict[str, Any]]:
    """Write the reward model, merged, with shift and scale in its head; score some responses.

    Returns:
        Prompts, responses and scores by ``reward.model``, to compare TRL's with. Every third
        response has lost its end, like one that ran into the limit.
    """
    base = load_causal_lm(recipe, base_location(recipe)).float()
    model = load_reward_model(base, run / "reward" / "model")
    rankings = load_records(recipe, "reward")["reward"].heldout[:NUM_SCORED]
    rows: list[Row] = []
    for number, ranking in enumerate(rankings):
        assert isinstance(ranking, Ranking)
        response = renderer.response(ranking.messages, ranking.responses[0])
        cut = response if number % 3 else response[: max(1, len(response) // 2)]
        rows.append((renderer.prompt(ranking.messages), cut))
    pad_id = renderer.tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    scores = score_rows(model, rows, batch_size=len(rows), pad_id=pad_id).tolist()

    shift, scale = model.head.shift.item(), model.head.scale.item()
    classifier: Any = model.classifier.merge_and_unload()
    head = torch.nn.Linear(classifier.score.in_features, 1)
    head.weight.data = classifier.score.weight.data / scale
    head.bias.data.fill_(-shift / scale)
    classifier.score = head
    classifier.save_pretrained(folder)
    return [
        {"prompt": prompt, "response": response, "score": score}
        for (prompt, response), score in zip(rows, scores, strict=True)
    ]


def run_trl(options: argparse.Namespace, seed: int, judge: "Judge") -> Curve:
    """Train with TRL unless that is done already; return the curve."""
    parents, out = options.out / "parents", options.out / f"trl-{seed}.jsonl"
    settings = json.loads((parents / "settings.json").read_text(encoding="utf-8"))
    rows = _read(out)
    done = rows and rows[0]["settings"] == settings and rows[-1].get("update") == settings["steps"]
    if not done:
        script = common.ROOT / "tests" / "benchmarks" / "quality_trl.py"
        command = [options.trl_python, script, parents, "--seed", str(seed), "--out", out]
        common.run(command, options.out / f"trl-{seed}.log")
        rows = _read(out)
    common.say(f"trl-{seed}: its scores and Align's differ by at most {rows[0]['score_error']:.1e}")
    looks = [row | {"gold": judge(row["responses"])} for row in rows[1:]]
    with (options.out / f"trl-{seed}-gold.jsonl").open("w", encoding="utf-8") as file:
        for look in looks:
            kept = {key: look[key] for key in ("update", "minutes", "gold")}
            file.write(json.dumps(kept) + "\n")
    curve = Curve(
        [look["update"] for look in looks],
        [look["minutes"] for look in looks],
        [look["gold"] for look in looks],
    )
    common.say(f"trl-{seed}: gold {curve.final:.3f} after {curve.minutes[-1]:.2f} minutes")
    return curve


class Judge:
    """The gold judge's mean score of answers to the held-out prompts."""

    def __init__(self, renderer: Renderer, prompts: Sequence[Prompt]) -> None:
        self._renderer = renderer
        self._chats = [as_chat(prompt) for prompt in prompts]

    def __call__(self, responses: list[list[int]]) -> float:
        scores = gold(self._chats, [self._renderer.decode(ids) for ids in responses])
        return sum(scores) / len(scores)


def compare(
    theirs: Curve, ours: Curve, program: str, name: str, *, within: float
) -> dict[str, Any]:
    """Return a row: how long each takes until it is first as good as TRL is at its end."""
    goal = theirs.final - within
    needed, own = theirs.minutes_to(goal), ours.minutes_to(goal)
    return {
        "Align": program,
        "seed": name,
        "gold before": ours.gold[0],
        "TRL final gold": theirs.final,
        "Align final gold": ours.final,
        "TRL minutes": theirs.minutes[-1],
        "Align minutes": ours.minutes[-1],
        "TRL minutes to its final gold": needed,
        "Align minutes to TRL's final gold": own,
        "share of that": own / needed if own is not None and needed else None,
        "of TRL's whole time": own / theirs.minutes[-1] if own is not None else None,
    }


def main() -> None:
    """Parse the command line, run both, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a finished run, with sft and reward")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    common.add_trl_options(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/quality"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", metavar="key=value", default=[])
    parser.add_argument("--within", type=float, default=0.0, metavar="GOLD")
    options = parser.parse_intermixed_args()
    options.run, options.out = options.run.resolve(), options.out.resolve()
    quiet_libraries()

    file = options.run / "recipe.yaml"
    parents = curves.parent_overrides(load_recipe(file), options.run)
    recipe = load_recipe(file, [*parents, *options.overrides])
    renderer, heldout = export(recipe, options.run, options.out / "parents")
    judge = Judge(renderer, heldout)
    variants = {"as it is": [], **{change: [change] for change in options.variants}}
    theirs: list[Curve] = []
    ours: dict[str, list[Curve]] = {program: [] for program in variants}
    for seed in options.seeds:
        theirs.append(run_trl(options, seed, judge))
        for number, (program, changes) in enumerate(variants.items()):
            name = f"align-{seed}" if number == 0 else f"align-{number}-{seed}"
            changes = [*parents, *options.overrides, *changes]
            ours[program].append(curves.run_ppo(file, options.out, name, seed, changes))
    rows = []
    for program, found in ours.items():
        names = [str(seed) for seed in options.seeds]
        pairs = list(zip(theirs, found, names, strict=True))
        if len(names) > 1:
            pairs.append((curves.mean(theirs), curves.mean(found), "mean curve"))
        rows += [compare(t, o, program, name, within=options.within) for t, o, name in pairs]
    print(common.table(rows))
    _write(options.out / "quality.json", rows)
    drawn = {"TRL 1.12": theirs} | {f"Align, {program}": found for program, found in ours.items()}
    curves.draw(options.out / "quality.png", drawn, ("minutes",))


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
