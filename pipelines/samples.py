"""Sample answers for the report: SFT and PPO side by side, chosen by a rule and not by taste."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.run_facts import Run

FIRST, WORST = 8, 4  # examples of either kind
MAX_CHARACTERS = 1_200  # of a text; the page has to stay readable


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer, with what judged it: ``gold 0.80, score 1.2``."""

    text: str
    scores: str


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt as ``(role, text)`` turns, and the answers before and after PPO."""

    turns: tuple[tuple[str, str], ...]
    category: str
    before: Answer | None
    after: Answer | None


@dataclass(frozen=True, slots=True)
class Examples:
    """The first prompts as they come, and those where PPO lost most against SFT."""

    first: tuple[Example, ...]
    worst: tuple[Example, ...]
    judge: str  # what the losses are measured by
    source: str


def examples(run: Run) -> Examples | None:
    """Choose examples: from the evaluation, else from PPO's first and last look."""
    if "evaluate" in run and run["evaluate"].samples:
        return _choose(run["evaluate"].samples, "held-out prompts of the evaluation")
    if "ppo" in run and run["ppo"].samples:
        rows = _first_and_last(run["ppo"].samples)
        return _choose(rows, "held-out prompts that PPO looked at, first and last time")
    return None


def _choose(rows: Sequence[dict[str, Any]], source: str) -> Examples:
    judge = (
        "gold" if any("gold" in r for row in rows for r in row["responses"].values()) else "score"
    )
    losses = [(loss, i) for i, row in enumerate(rows) if (loss := _loss(row, judge)) > 0]
    worst = [rows[i] for loss, i in sorted(losses, key=lambda pair: -pair[0])[:WORST]]
    return Examples(tuple(map(_example, rows[:FIRST])), tuple(map(_example, worst)), judge, source)


def _loss(row: dict[str, Any], judge: str) -> float:
    """Return by how much PPO's answer is worse than SFT's; 0 where it cannot be told."""
    before, after = row["responses"].get("sft", {}), row["responses"].get("ppo", {})
    if judge not in before or judge not in after:
        return 0.0
    return float(before[judge] - after[judge])


def _first_and_last(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turn PPO's looks over time into before and after: at step 0 the policy is the SFT model."""
    steps = [row["step"] for row in rows]
    looks = {
        name: [row for row in rows if row["step"] == step]
        for name, step in (("sft", min(steps)), ("ppo", max(steps)))
    }
    return [
        {
            "prompt": before["prompt"],
            "responses": {
                name: {"text": row["response"]} | {k: row[k] for k in ("score", "gold") if k in row}
                for name, row in (("sft", before), ("ppo", after))
            },
        }
        for before, after in zip(looks["sft"], looks["ppo"], strict=False)
    ]


def _example(row: dict[str, Any]) -> Example:
    return Example(
        turns=tuple((turn["role"], _short(turn["content"])) for turn in row["prompt"]),
        category=row.get("category", ""),
        before=_answer(row["responses"].get("sft")),
        after=_answer(row["responses"].get("ppo")),
    )


def _answer(response: dict[str, Any] | None) -> Answer | None:
    if response is None:
        return None
    scores = [f"{key} {response[key]:.2f}" for key in ("gold", "score") if key in response]
    if response.get("ended") is False:
        scores.append("cut at the length limit")
    return Answer(_short(response["text"]), ", ".join(scores))


def _short(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} ... ({len(text) - MAX_CHARACTERS} more characters)"
