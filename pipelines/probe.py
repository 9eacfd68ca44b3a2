"""A look at the policy during PPO: the same held-out prompts, answered again and again.

The gold judge, where the recipe names one, is only asked here and in the evaluation, the held-out
reward only here: training never sees them. The score that it does see, beside one of them over the
KL, shows over-optimisation (Gao et al. 2022).
"""

import torch

from align.functions import call_score_function, load_function
from align.seeds import derive_seed
from pipelines.load_roles import LoadedRoles, usable_prompts
from pipelines.rollout import collect
from pipelines.scoring import RewardScorer
from pipelines.shaping import Outcome, outcome
from pipelines.stage import StageJob


class Probe:
    """Answers the first ``ppo.probe_prompts`` held-out prompts and records what came out.

    Raises:
        RecipeError: ``evaluate.gold`` names no function.
        DataError: too many of the prompts cannot be tokenised; see ``StageJob.check_dropped``.
    """

    def __init__(self, job: StageJob, loaded: LoadedRoles, score: RewardScorer) -> None:
        assert job.recipe.ppo is not None
        self._job, self._loaded, self._score = job, loaded, score
        self._section = job.recipe.ppo
        heldout = job.data["prompts"].heldout[: self._section.probe_prompts]
        self._prompts = usable_prompts(job, loaded, heldout)
        evaluate = job.recipe.evaluate
        self._gold_name = evaluate.gold if evaluate is not None else None
        self._gold = load_function(self._gold_name) if self._gold_name else None

    def look(self, step: int) -> tuple[dict[str, float], Outcome | None]:
        """Answer the prompts as the policy stands; append to ``samples.jsonl``.

        Always with the same sampling seed, so that two looks differ by the policy alone.

        Returns:
            What came out of each response, None without held-out prompts; and the metrics
            ``probe/score``, ``probe/kl``, ``probe/length``, ``probe/eos_rate``; with several
            rewards ``probe/score/<name>``, with a held-out one ``probe/heldout_reward``, with a
            gold judge ``probe/gold``; empty without held-out prompts.
        """
        if not self._prompts:
            return {}, None
        seed = derive_seed(self._job.recipe.seed, "probe")
        given = self._loaded, self._prompts, self._score, self._section
        rollout = collect(*given, seed=seed, alone=True)  # of a group, the first process looks
        seen = rollout.metrics()
        metrics = {
            "probe/score": seen["score/mean"],
            "probe/kl": seen["kl/mean"],
            "probe/length": seen["length/mean"],
            "probe/eos_rate": seen["eos_rate"],
        } | {f"probe/{key}": value for key, value in self._score.take_metrics().items()}
        columns = {"score": rollout.scores.tolist()}
        if self._score.heldout is not None:
            with torch.no_grad():
                heldout = self._score.heldout(rollout.prompts, rollout.responses, rollout.sequences)
            metrics["probe/heldout_reward"] = float(heldout.mean())
            columns["heldout_reward"] = heldout.tolist()
        if self._gold is not None and self._gold_name is not None:
            gold = call_score_function(
                self._gold, self._gold_name, rollout.prompts, rollout.responses
            )
            metrics["probe/gold"] = sum(gold) / len(gold)
            columns["gold"] = gold
        self._job.sample(
            [
                {"step": step, "prompt": prompt, "response": response}
                | {name: column[row] for name, column in columns.items()}
                for row, (prompt, response) in enumerate(
                    zip(rollout.prompts, rollout.responses, strict=True)
                )
            ]
        )
        return metrics, outcome(rollout)
