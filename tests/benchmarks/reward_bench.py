"""What the experiments on reward models share: stages run in turn, and their held-out scores."""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from align.models import base_location, load_causal_lm
from align.places import stage_directory
from align.recipe import Recipe, StageName
from align.recipe_io import load_recipe
from data.judge import gold
from data.load import load_records
from data.records import Ranking, as_prompt
from data.render import Renderer, render_all
from pipelines.encoder_base import read_encoder
from pipelines.ranked_tokens import RankedTokens, ranked_tokens
from pipelines.rollout import as_chat
from pipelines.stage import main
from reward.encoder import load_encoder_reward
from reward.model import load_reward_model
from reward.ranking import pair_outcomes
from reward.scorer import score_rows
from tests.benchmarks import common

SCORED_AT_ONCE = 32


@dataclass(frozen=True)
class Bench:
    """Where the stages are made, from which parents, and for which seeds."""

    out: Path
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]  # of the recipes, for all that is run
    parents: Path | None = None  # a finished run with pretrain and sft; None: made here
    data: Path | None = None  # the folder with the published files
    models: tuple[str, ...] = ()  # of the published pairs
    pairs: tuple[str, ...] = ()  # which of them
    encoder: Path | None = None  # a folder with an encoder

    def settings(self, name: str, seed: int) -> list[str]:
        """Return what every stage runs with."""
        return [
            f"name={name}",
            f"seed={seed}",
            f"run.root={json.dumps(str(self.out))}",
            "run.threads=1",
            "run.keep_checkpoints=0",
            "tracking.mode=disabled",
        ]

    def make_parents(
        self,
        recipe: str,
        name: str,
        overrides: Sequence[str] = (),
        *,
        stages: Sequence[StageName] = ("pretrain", "sft"),
        finished: Path | None = None,
    ) -> list[str]:
        """Return the overrides that build on stages made once for all seeds.

        Args:
            finished: a run that has them already.
        """
        for stage in () if finished else stages:
            changes = [*self.settings(name, 0), *overrides, *self.overrides]
            run_stage(stage, recipe, changes, self.out)
        folder = finished or self.out / name
        return [f"run.parents.{stage}={json.dumps(str(folder / stage))}" for stage in stages]

    def train(self, recipe: str, name: str, seed: int, overrides: Sequence[str]) -> "Trained":
        """Train a reward model unless that is done already."""
        changes = [*self.settings(f"{name}-{seed}", seed), *overrides, *self.overrides]
        run_stage("reward", recipe, changes, self.out)
        return read_trained(load_recipe(recipe, changes))


@dataclass(frozen=True)
class Trained:
    """A finished reward stage: its recipe, final metrics, and the rows of its log."""

    recipe: Recipe
    metrics: dict[str, float]
    log: list[dict[str, float]]


def run_stage(stage: StageName, recipe: str, overrides: Sequence[str], out: Path) -> None:
    """Run a stage as `align` does, in a process that need not load the libraries again."""
    target = load_recipe(recipe, overrides)
    log = out / f"{target.name}-{stage}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = main([stage, recipe, *overrides])
        except Exception:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-20:])
        sys.exit(f"{target.name}: {stage} failed with code {code}\n{end}\n(all of it: {log})")
    common.say(f"{target.name}: {stage} done")


def read_trained(recipe: Recipe) -> Trained:
    """Read what a finished reward stage says of itself."""
    folder = stage_directory(recipe, "reward")
    manifest = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Trained(recipe, manifest["metrics"], [json.loads(line) for line in lines])


@dataclass(frozen=True)
class Scored:
    """Held-out rankings with the scores that a reward model gives to their responses, flat."""

    rankings: list[RankedTokens]
    scores: Tensor

    @property
    def groups(self) -> Tensor:
        """The ranking of each response, ``[N]``."""
        counts = torch.tensor([len(ranking.responses) for ranking in self.rankings])
        return torch.arange(len(self.rankings)).repeat_interleave(counts)

    def outcomes(self, targets: Sequence[float]) -> list[float]:
        """Return for each pair that ``targets`` (one per response) order if the scores agree."""
        found, _ = pair_outcomes(self.scores, self.groups, torch.tensor(targets).double())
        return found.tolist()


def score_heldout(trained: Trained) -> Scored:
    """Score a finished reward stage's held-out rankings, as its own report did."""
    recipe = trained.recipe
    assert recipe.reward is not None
    folder, limits = stage_directory(recipe, "reward") / "model", recipe.data
    model: Any
    if recipe.reward.base is not None:
        encoder = read_encoder(recipe, recipe.reward.base)
        model = load_encoder_reward(folder, encoder.location, encoder.settings)
        tokenizer, prompt = encoder.tokenizer, encoder.form.max_prompt_tokens
    else:
        model = load_reward_model(load_causal_lm(recipe, base_location(recipe)), folder)
        tokenizer, prompt = AutoTokenizer.from_pretrained(folder), limits.max_prompt_tokens
    renderer = Renderer(tokenizer, prompt, limits.max_response_tokens)
    records = [
        r for r in load_records(recipe, "reward")["reward"].heldout if isinstance(r, Ranking)
    ]
    rankings, _ = render_all(records, lambda record: ranked_tokens(renderer, record, None))
    rows = [row for ranking in rankings for row in ranking.rows()]
    pad_id = tokenizer.pad_token_id
    return Scored(rankings, score_rows(model, rows, batch_size=SCORED_AT_ONCE, pad_id=pad_id))


def gold_agreement(trained: Trained) -> float:
    """Return the share of held-out pairs of the miniature world ordered as the gold judge does."""
    scored = score_heldout(trained)
    asked = [
        (as_chat(as_prompt(ranking.ranking)), text)
        for ranking in scored.rankings
        for text in ranking.ranking.responses
    ]
    judged = gold([chat for chat, _ in asked], [text for _, text in asked])
    outcomes = scored.outcomes(judged)
    return sum(outcomes) / len(outcomes)
