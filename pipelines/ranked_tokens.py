"""Rankings as token ids, and as the flat batches that the ranking losses read."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from data.records import Ranking
from data.render import Renderer, Unusable
from reward.scorer import Row, pad_rows

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class RankedTokens:
    """One ranking as token ids: the responses end with the end-of-turn id."""

    prompt: list[int]
    responses: tuple[list[int], ...]
    ranking: Ranking
    margin: float | None = None  # that the loss subtracts

    def rows(self) -> list[Row]:
        """Return a row to score for each response."""
        return [(self.prompt, response) for response in self.responses]

    @property
    def targets(self) -> tuple[float, ...]:
        """How good each response was found, higher is better."""
        return self.ranking.scores

    @property
    def best(self) -> int:
        """The number of the response that was found best; the first of several."""
        return max(range(len(self.targets)), key=self.targets.__getitem__)

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return len(self.prompt) + max(map(len, self.responses))

    @property
    def num_tokens(self) -> int:
        """Tokens of all responses, and of the prompt once."""
        return len(self.prompt) + sum(map(len, self.responses))


def ranked_tokens(renderer: Renderer, ranking: Ranking, margin: float | None) -> RankedTokens:
    """Render a ranking: the prompt as PPO will see it, each response up to its end of turn.

    Raises:
        Unusable: a response is too long, or two with different scores are the same tokens: such a
            pair teaches nothing and biases the accuracy.
    """
    responses = tuple(renderer.response(ranking.messages, text) for text in ranking.responses)
    judged = zip(responses, ranking.scores, strict=True)
    for (first, first_score), (second, second_score) in combinations(judged, 2):
        if first == second and first_score != second_score:
            raise Unusable("identical_responses")
    return RankedTokens(renderer.prompt(ranking.messages), responses, ranking, margin)


def collate(rows: Sequence[RankedTokens], pad_id: int, *, share_prompts: bool = False) -> Batch:
    """Flatten rankings to one row per response.

    Args:
        share_prompts: say which rows repeat the prompt of the row above them.

    Returns:
        ``input_ids`` and ``attention_mask`` ``[N, T]``; with ``share_prompts`` ``repeated`` ``[N]``
        as in ``reward.packing``; ``groups``, ``targets`` and ``votes``
        ``[N]`` as in ``reward.ranking``, NaN where there are no votes; ``margins`` ``[len(rows)]``,
        NaN where there is none; ``best_mask`` ``[N, T]``, True on the tokens of every prompt's best
        response.
    """
    flat = [prompt + response for row in rows for prompt, response in row.rows()]
    input_ids, attention_mask = pad_rows(flat, pad_id)
    counts = torch.tensor([len(row.responses) for row in rows])
    # Only compared; float32 would make ties of scores such as 16777216 and 16777217.
    targets = torch.tensor([t for row in rows for t in row.targets], dtype=torch.float64)
    votes = torch.tensor([row.ranking.votes for row in rows]).repeat_interleave(counts)
    best = torch.tensor([i == row.best for row in rows for i in range(len(row.responses))])
    starts = torch.tensor([len(row.prompt) for row in rows]).repeat_interleave(counts)
    in_response = torch.arange(input_ids.shape[1]) >= starts[:, None]
    is_first = torch.tensor([i == 0 for row in rows for i in range(len(row.responses))])
    shared = {"repeated": starts.masked_fill(is_first, 0)} if share_prompts else {}
    return shared | {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "groups": torch.arange(len(rows)).repeat_interleave(counts),
        "targets": targets,
        "votes": torch.where(votes, targets, torch.nan),
        "margins": torch.tensor(
            [float("nan") if row.margin is None else row.margin for row in rows]
        ),
        "best_mask": attention_mask & in_response & best[:, None],
    }
