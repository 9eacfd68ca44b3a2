"""Evaluation: base, SFT and PPO answer the same held-out prompts; the reward model ranks pairs.

Nothing here decides a training: the gold judge and held-out rankings were seen by no stage, and
held-out prompts by PPO's probes only. Where those select a policy (``ppo.keep: best``) or end the
training (``ppo.stop.divergence``), other prompts come first, and how many of the probes' had to be
taken is said. Shares come with 90 % intervals.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.errors import DataError, ParentError, RecipeError
from align.functions import call_score_function, load_function
from align.recipe import Evaluate
from align.roles import Role
from align.seeds import derive_seed
from align.sequences import join
from data.records import Demonstration, Prompt, Ranking, as_prompt
from data.render import Renderer, Tokens, render_all
from pipelines.answers import (
    Answers,
    GoldJudge,
    answer,
    answer_metrics,
)
from pipelines.benchmark import RenderedRanking, measure_benchmark
from pipelines.heldout import perplexity, role_loss
from pipelines.load_roles import LoadedRoles, load_roles, usable_prompts
from pipelines.rollout import Scorer, as_chat
from pipelines.scoring import RewardScorer, own_scorer, ppo_scorer, reads_text, reward_roles
from pipelines.stage import StageJob, StageResult
from pipelines.win_rate import bootstrap, wins
from reward.ranking import pair_outcomes, share_with_interval
from reward.reliability import calibration_error

# Metrics of a model stand under its name; these would be mistaken for a category's.
_RESERVED = {"mean", "low", "high"}
_SCORED_AT_ONCE = 256  # rankings' responses given to a scorer, which makes its own passes of them


def run(job: StageJob) -> StageResult:
    """Measure every finished model on held-out data; see the module's docstring."""
    recipe, section = job.recipe, job.recipe.evaluate
    assert section is not None
    prompts, num_selected_on = _heldout_prompts(job, section)
    gold = _gold_judge(section)
    loaded = load_roles(job, _adapters(job), max_new_tokens=section.max_new_tokens)
    prompts = usable_prompts(job, loaded, prompts)
    categories = _categories(section, prompts)
    own = own_scorer(job, loaded, section.batch_size) if _has_reward_model(job) else None
    scorer = ppo_scorer(job, recipe.ppo, loaded) if recipe.ppo is not None else own
    demonstrations = _demonstrations(job, loaded.renderer, section)
    rankings = _rankings(job, loaded.renderer, section)
    models: dict[str, Role] = {"base": "base", "sft": "reference"}
    if "ppo" in job.parents:
        models["ppo"] = "policy"
    job.log.start(len(models) + bool(rankings))

    seed = derive_seed(recipe.seed, "evaluate")
    metrics: dict[str, float] = {}
    answers: dict[str, Answers] = {}
    for number, (name, role) in enumerate(models.items(), 1):
        job.log.note(f"evaluate  {name} answers {len(prompts)} held-out prompts")
        answers[name] = answer(loaded, role, prompts, section, seed=seed, scorer=scorer, gold=gold)
        measured = answer_metrics(answers[name], categories, resamples=section.bootstrap, seed=seed)
        if isinstance(scorer, RewardScorer):
            measured |= scorer.take_metrics()
        if demonstrations:
            loss = role_loss(loaded.roles, role, demonstrations, section.batch_size)
            measured["perplexity"] = perplexity(loss)
        metrics |= {f"{name}/{key}": value for key, value in measured.items()}
        job.log.advance(number)
    metrics |= _win_rate(answers, section.bootstrap, seed)
    if own is not None:
        score = partial(_score, own, loaded)
        if rankings:
            metrics |= _reward_accuracy(score, rankings, gold)
        found = measure_benchmark(job, loaded.renderer, score)
        metrics |= {f"reward/{key}": value for key, value in found.items()}
    if num_selected_on:
        job.log.note(
            f"evaluate  PPO has selected its policy on {num_selected_on} of the prompts; give more"
            " in data.prompts.heldout"
        )
        metrics["prompts/selected_on"] = float(num_selected_on)

    job.log.log(0, metrics)
    job.sample(_sample_rows(prompts, answers, categories))
    return StageResult(metrics, ("samples.jsonl", "metrics.jsonl"), loaded.tokenizer, loaded.facts)


def _heldout_prompts(job: StageJob, section: Evaluate) -> tuple[list[Prompt], int]:
    """Return the prompts to answer, and on how many of them PPO has selected its policy."""
    data = job.data.get("prompts")
    prompts = [p for p in data.heldout if isinstance(p, Prompt)] if data is not None else []
    if not prompts:
        raise DataError(
            "evaluate needs held-out prompts: give data.prompts.heldout one or more sources"
        )
    ppo = job.recipe.ppo if "ppo" in job.parents else None
    seen = min(ppo.selected_on, len(prompts)) if ppo is not None else 0
    chosen = (prompts[seen:] + prompts[:seen])[: section.prompts]
    return chosen, max(0, len(chosen) - (len(prompts) - seen))


def _has_reward_model(job: StageJob) -> bool:
    """Return whether the recipe's own reward stage has made one that ranks, no classifier."""
    return "reward" in job.parents and job.parents["reward"].classifier is None


def _adapters(job: StageJob) -> dict[Role, Path]:
    if "sft" not in job.parents:
        raise ParentError("evaluate compares with the SFT model; the recipe has no sft section")
    adapters: dict[Role, Path] = {"reference": job.parent_folder("sft") / "model"}
    if "ppo" in job.parents:
        adapters["policy"] = job.parent_folder("ppo") / "policy"
    if _has_reward_model(job) and not reads_text(job):
        adapters["reward"] = job.parent_folder("reward") / "model"
    if job.recipe.ppo is not None:
        adapters |= reward_roles(job)
    return adapters


def _gold_judge(section: Evaluate) -> GoldJudge | None:
    if section.gold is None:
        return None
    name, function = section.gold, load_function(section.gold)
    return lambda prompts, responses: call_score_function(function, name, prompts, responses)


def _categories(section: Evaluate, prompts: Sequence[Prompt]) -> list[str] | None:
    """Return each prompt's category by ``evaluate.category``.

    Raises:
        RecipeError: there is no such function, or it does not return one name per prompt.
    """
    if section.category is None:
        return None
    function = load_function(section.category)
    chats = [as_chat(prompt) for prompt in prompts]
    try:
        categories = list(function(chats))
    except Exception as error:
        raise RecipeError(
            f"{section.category}: fails with {type(error).__name__}: {error}"
        ) from error
    wrong = [c for c in categories if not isinstance(c, str) or c in _RESERVED]
    if len(categories) != len(prompts) or wrong:
        found = f"{wrong[0]!r}" if wrong else f"{len(categories)} for {len(prompts)} prompts"
        raise RecipeError(
            f"{section.category}: has to return one text per prompt, none of"
            f" {', '.join(sorted(_RESERVED))}; returned {found}"
        )
    return categories


def _demonstrations(job: StageJob, renderer: Renderer, section: Evaluate) -> list[Tokens]:
    """Return held-out demonstrations; nothing is sampled for them, so as many as pairs."""
    data = job.data.get("sft")
    rows = data.heldout[: section.pairs] if data is not None else ()
    demonstrations = [row for row in rows if isinstance(row, Demonstration)]
    kept, dropped = render_all(demonstrations, lambda row: renderer.demonstration(row.messages))
    job.check_dropped("sft", len(kept), dropped)
    return kept


def _rankings(job: StageJob, renderer: Renderer, section: Evaluate) -> list[RenderedRanking]:
    """Return the first held-out rankings, up to ``evaluate.pairs`` pairs, and their tokens.

    Only for a reward model: without one there is nothing to be accurate.
    """
    data = job.data.get("reward")
    if data is None or not _has_reward_model(job):
        return []
    rows: list[Ranking] = []
    pairs = 0
    for row in data.heldout:
        assert isinstance(row, Ranking)
        if pairs >= section.pairs:
            break
        rows.append(row)
        pairs += len(row.scores) * (len(row.scores) - 1) // 2
    kept, dropped = render_all(
        rows, lambda row: (row, [renderer.response(row.messages, r) for r in row.responses])
    )
    job.check_dropped("reward", len(kept), dropped)
    return kept


def _win_rate(answers: dict[str, Answers], resamples: int, seed: int) -> dict[str, float]:
    """Compare PPO's answers with SFT's: by gold if there is such a judge, else by the reward."""
    if "ppo" not in answers:
        return {}
    ppo, sft = answers["ppo"], answers["sft"]
    ours, theirs = (ppo.gold, sft.gold) if ppo.gold is not None else (ppo.scores, sft.scores)
    if ours is None or theirs is None:
        return {}
    return bootstrap(wins(ours, theirs), resamples=resamples, seed=seed).metrics("ppo/win_rate")


def _reward_accuracy(
    score: Callable[[Sequence[RenderedRanking]], Tensor],
    rankings: Sequence[RenderedRanking],
    gold: GoldJudge | None,
) -> dict[str, float]:
    """Return how often the reward model orders held-out pairs as labels and gold judge do."""
    scores = score(rankings)
    groups = torch.tensor([i for i, (_, ids) in enumerate(rankings) for _ in ids])
    labels = torch.tensor(
        [score for row, _ in rankings for score in row.scores], dtype=torch.float64
    )
    lengths = torch.tensor([float(len(answer)) for _, ids in rankings for answer in ids])
    outcomes, owners = pair_outcomes(scores, groups, labels)
    if not len(outcomes):
        return {}
    share = share_with_interval(outcomes, owners)
    longer, _ = pair_outcomes(lengths, groups, labels)
    metrics = {
        "reward/pairs": float(len(outcomes)),
        "reward/accuracy": share.mean,
        "reward/accuracy/low": share.low,
        "reward/accuracy/high": share.high,
        "reward/accuracy/longer_wins": longer.mean().item(),
        "reward/calibration/ece": calibration_error(scores, groups, labels),
    }
    if gold is not None:
        chats = [as_chat(as_prompt(row)) for row, ids in rankings for _ in ids]
        judged = torch.tensor(gold(chats, [text for row, _ in rankings for text in row.responses]))
        agreed, _ = pair_outcomes(scores, groups, judged)
        labelled, _ = pair_outcomes(labels, groups, judged)
        if len(agreed):
            metrics["reward/accuracy/gold"] = agreed.mean().item()
            metrics["reward/labels/gold"] = labelled.mean().item()
    return metrics


@torch.no_grad()
def _score(scorer: Scorer, loaded: LoadedRoles, rankings: Sequence[RenderedRanking]) -> Tensor:
    """Return the reward model's scores of all responses, flat, ``[N]``."""
    rows = [
        (row, text, ids) for row, a in rankings for text, ids in zip(row.responses, a, strict=True)
    ]
    scores = []
    for start in range(0, len(rows), _SCORED_AT_ONCE):
        part = rows[start : start + _SCORED_AT_ONCE]
        prompts = [as_prompt(row) for row, _, _ in part]
        ids = [loaded.renderer.prompt(prompt.messages) for prompt in prompts]
        sequences = join(ids, [answer for _, _, answer in part]).to(loaded.roles.device)
        texts = [text for _, text, _ in part]
        scores.append(scorer([as_chat(prompt) for prompt in prompts], texts, sequences).cpu())
    return torch.cat(scores)


def _sample_rows(
    prompts: Sequence[Prompt], answers: dict[str, Answers], categories: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Return one row per prompt: its messages, and every model's answer with its scores."""
    rows: list[dict[str, Any]] = []
    for i, prompt in enumerate(prompts):
        row: dict[str, Any] = {"prompt": as_chat(prompt), "responses": {}}
        if categories is not None:
            row["category"] = categories[i]
        for name, given in answers.items():
            response: dict[str, Any] = {
                "text": given.texts[i],
                "tokens": len(given.ids[i]),
                "ended": given.ended[i],
            }
            if given.scores is not None:
                response["score"] = given.scores[i]
            if given.gold is not None:
                response["gold"] = given.gold[i]
            row["responses"][name] = response
        rows.append(row)
    return rows
