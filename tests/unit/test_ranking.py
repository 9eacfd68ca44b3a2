"""Ranking losses and accuracies against hand arithmetic and naive loops."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reward import ranking
from reward.ranking import (
    centering_penalty,
    count_rankings,
    listwise_loss,
    mean_margin,
    pair_losses,
    pair_outcomes,
    ranking_loss,
    ranking_metrics,
    share_with_interval,
    strict_pairs,
)

LN2 = math.log(2)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def naive_loss(
    scores: list[float], groups: list[int], targets: list[float], margins: dict[int, float]
) -> float:
    """InstructGPT's loss as its formula reads: loop over prompts, then over their pairs."""
    means = []
    for group in sorted(set(groups)):
        members = [i for i in range(len(groups)) if groups[i] == group]
        top = max(targets[i] for i in members)
        losses = []
        for i, j in itertools.permutations(members, 2):
            if targets[i] > targets[j]:
                margin = margins.get(group, 0.0) if targets[i] == top else 0.0
                losses.append(softplus(-(scores[i] - scores[j] - margin)))
        if losses:
            means.append(sum(losses) / len(losses))
    return sum(means) / len(means) if means else 0.0


def random_groups(seed: int) -> tuple[list[float], list[int], list[float]]:
    generator = torch.Generator().manual_seed(seed)
    groups = [g for g, k in enumerate((2, 9, 1, 4, 3)) for _ in range(k)]
    scores = torch.randn(len(groups), generator=generator).tolist()
    targets = torch.randint(0, 4, (len(groups),), generator=generator).float().tolist()
    return scores, groups, targets


def test_t33_one_pair_by_hand() -> None:
    # sigmoid(1) = 0.7310585786; -ln of it = 0.3132616875
    loss = pair_losses(torch.tensor([2.0]), torch.tensor([1.0]))
    assert loss.item() == pytest.approx(0.3132616875, abs=1e-7)


def test_margin_moves_the_difference() -> None:
    # 2 - 1 - 1 = 0: ln 2
    loss = pair_losses(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([1.0]))
    assert loss.item() == pytest.approx(LN2, abs=1e-7)


def test_t33_equal_inputs_give_ln_2_and_no_gradient() -> None:
    # The same response on both sides, so one score enters twice.
    score = torch.tensor([0.7], requires_grad=True)
    loss = pair_losses(score, score).sum()
    loss.backward()
    assert loss.item() == pytest.approx(LN2, abs=1e-7)
    assert score.grad is not None
    assert score.grad.item() == 0.0


def test_far_apart_scores_neither_overflow_nor_lose_the_gradient() -> None:
    scores = torch.tensor([-200.0, 200.0], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
    loss.backward()
    assert loss.item() == 400.0
    assert scores.grad is not None
    assert scores.grad.tolist() == [-1.0, 1.0]


def test_half_precision_scores_are_computed_in_float32() -> None:
    scores = torch.tensor([1.0, 0.5], dtype=torch.bfloat16)
    loss = ranking_loss(scores, torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(softplus(-0.5), abs=1e-7)


def test_three_responses_by_hand() -> None:
    # targets 2 > 1 > 0, scores 1, 0, -1: differences 1, 2, 1
    loss = ranking_loss(
        torch.tensor([1.0, 0.0, -1.0]), torch.zeros(3).long(), torch.tensor([2.0, 1.0, 0.0])
    )
    assert loss.item() == pytest.approx((0.3132616875 + 0.1269280110 + 0.3132616875) / 3, abs=1e-7)


def test_margin_counts_in_the_pairs_of_the_best_response_only() -> None:
    # As above with margin 1: the pairs (1,2) and (1,3) become 0 and 1, the pair (2,3) stays 1.
    loss = ranking_loss(
        torch.tensor([1.0, 0.0, -1.0]),
        torch.zeros(3).long(),
        torch.tensor([2.0, 1.0, 0.0]),
        margins=torch.tensor([1.0]),
    )
    assert loss.item() == pytest.approx((LN2 + 0.3132616875 + 0.3132616875) / 3, abs=1e-7)


def test_a_missing_margin_is_zero() -> None:
    arguments = (torch.tensor([1.0, 0.0]), torch.zeros(2).long(), torch.tensor([1.0, 0.0]))
    with_nan = ranking_loss(*arguments, margins=torch.tensor([math.nan]))
    assert with_nan.item() == ranking_loss(*arguments).item()


@pytest.mark.parametrize("seed", range(5))
def test_unequal_groups_agree_with_the_loop(seed: int) -> None:
    scores, groups, targets = random_groups(seed)
    margins = {0: 0.5, 1: 1.0, 2: 3.0, 3: 0.0, 4: 0.25}
    loss = ranking_loss(
        torch.tensor(scores),
        torch.tensor(groups),
        torch.tensor(targets),
        margins=torch.tensor([margins[g] for g in range(5)]),
    )
    assert loss.item() == pytest.approx(naive_loss(scores, groups, targets, margins), abs=1e-6)


def test_an_all_tied_prompt_changes_nothing() -> None:
    pair = ranking_loss(torch.tensor([1.0, 0.0]), torch.zeros(2).long(), torch.tensor([1.0, 0.0]))
    scores = torch.tensor([1.0, 0.0, 5.0, -3.0], requires_grad=True)
    both = ranking_loss(scores, torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 0.0, 2.0, 2.0]))
    both.backward()
    assert both.item() == pytest.approx(pair.item(), abs=1e-7)
    assert scores.grad is not None
    assert scores.grad[2:].tolist() == [0.0, 0.0]


def test_only_ties_give_zero_and_a_zero_gradient() -> None:
    scores = torch.tensor([1.0, 0.0], requires_grad=True)
    loss = ranking_loss(scores, torch.zeros(2).long(), torch.tensor([1.0, 1.0]))
    loss.backward()
    assert loss.item() == 0.0
    assert scores.grad is not None
    assert scores.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(3))
def test_a_constant_shift_changes_nothing(seed: int) -> None:
    scores, groups, targets = (torch.tensor(x) for x in random_groups(seed))
    shifted = ranking_loss(scores + 3.0, groups, targets)
    assert shifted.item() == pytest.approx(ranking_loss(scores, groups, targets).item(), abs=1e-6)


def test_parts_add_up_to_the_whole() -> None:
    scores, groups, targets = (torch.tensor(x) for x in random_groups(1))
    whole_scores = scores.clone().requires_grad_()
    whole = ranking_loss(whole_scores, groups, targets)
    whole.backward()
    count = count_rankings(groups, targets)
    parts_scores = scores.clone().requires_grad_()
    total = 0.0
    for members in (groups < 1, groups == 1, groups > 1):
        local = torch.unique(groups[members], return_inverse=True)[1]
        part = ranking_loss(parts_scores[members], local, targets[members], num_rankings=count)
        part.backward()
        total += part.item()
    assert total == pytest.approx(whole.item(), abs=1e-6)
    torch.testing.assert_close(parts_scores.grad, whole_scores.grad)


def test_t33_swapping_a_pair_negates_the_margin() -> None:
    groups, scores = torch.tensor([0, 0]), torch.tensor([1.5, 0.25])
    assert mean_margin(scores, groups, torch.tensor([1.0, 0.0])) == 1.25
    assert mean_margin(scores, groups, torch.tensor([0.0, 1.0])) == -1.25


def test_strict_pairs_skip_ties_and_other_prompts() -> None:
    better, worse = strict_pairs(torch.tensor([0, 1, 0, 0]), torch.tensor([3.0, 0.0, 1.0, 3.0]))
    assert sorted(zip(better.tolist(), worse.tolist(), strict=True)) == [(0, 2), (3, 2)]


def many_groups(seed: int, prompts: int, mixed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of one to six responses and their targets, of which many are equal."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 7, (prompts,), generator=generator)
    groups = torch.arange(prompts).repeat_interleave(sizes)
    if mixed:
        groups = groups[torch.randperm(len(groups), generator=generator)]
    return groups, torch.randint(0, 4, groups.shape, generator=generator).double()


# A handful of responses, and more than are compared all with all.
@pytest.mark.parametrize("prompts", [1, 5, 40, 120])
@pytest.mark.parametrize("mixed", [False, True])
def test_strict_pairs_come_in_the_order_of_the_loop(prompts: int, mixed: bool) -> None:
    for seed in range(5):
        groups, targets = many_groups(seed, prompts, mixed)
        g, t = groups.tolist(), targets.tolist()
        expected = [
            (i, j) for i in range(len(g)) for j in range(len(g)) if g[i] == g[j] and t[i] > t[j]
        ]
        better, worse = strict_pairs(groups, targets)
        assert list(zip(better.tolist(), worse.tolist(), strict=True)) == expected
        assert better.dtype == worse.dtype == torch.long


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that is made."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return found


def test_twice_the_prompts_take_twice_the_memory() -> None:
    # All against all would be 2,000 x 2,000 and 4,000 x 4,000.
    for prompts in (1000, 2000):
        groups, targets = torch.arange(prompts).repeat_interleave(2), torch.arange(2 * prompts)
        with Largest() as largest:
            better, _ = strict_pairs(groups, targets)
        assert len(better) == prompts
        assert largest.elements <= 2 * (2 * prompts)


def test_the_metrics_look_for_the_pairs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(groups: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(groups))
        return strict_pairs(groups, targets)

    monkeypatch.setattr(ranking, "strict_pairs", counted)
    scores = torch.tensor([2.0, 1.0, 0.0, 0.0, 3.0])
    groups, targets = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1.0, 0, 2, 1, 1])
    found = ranking_metrics(scores, groups, targets, torch.tensor([4, 5, 6, 2, 2]))
    assert calls == [5]
    # Differences 1; 0 and -3. The longer one is the worse in the first pair alone.
    of_second = (LN2 + softplus(3.0)) / 2
    assert found["loss"] == pytest.approx((softplus(-1.0) + of_second) / 2, abs=1e-6)
    assert found["accuracy"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["accuracy/longer_wins"] == pytest.approx(2 / 3)
    assert found["margin/mean"] == pytest.approx((1 + 0 - 3) / 3)


def test_outcomes_count_equal_scores_half() -> None:
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    targets = torch.tensor([1.0, 0.0] * 3)
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0])
    outcomes, owners = pair_outcomes(scores, groups, targets)
    assert outcomes.tolist() == [1.0, 0.0, 0.5]
    assert owners.tolist() == [0, 1, 2]


def test_longer_wins_is_the_outcome_of_the_lengths() -> None:
    outcomes, _ = pair_outcomes(
        torch.tensor([7, 3]), torch.tensor([0, 0]), torch.tensor([0.0, 1.0])
    )
    assert outcomes.tolist() == [0.0]


def test_interval_of_independent_pairs_is_wilsons() -> None:
    # 70 of 100 right, one pair per prompt. Wilson by hand with z = 1.6448536: center
    # (0.7 + 2.705543/200) / 1.02705543 = 0.694732, half width
    # 1.6448536/1.02705543 * sqrt(0.21/100 + 2.705543/40000) = 0.074564.
    outcomes = torch.tensor([1.0] * 70 + [0.0] * 30)
    interval = share_with_interval(outcomes, torch.arange(100))
    assert interval.mean == pytest.approx(0.7)
    assert interval.low == pytest.approx(0.694732 - 0.074564, abs=2e-6)
    assert interval.high == pytest.approx(0.694732 + 0.074564, abs=2e-6)


def test_copies_of_a_pair_add_no_certainty() -> None:
    outcomes = torch.tensor([1.0] * 70 + [0.0] * 30)
    once = share_with_interval(outcomes, torch.arange(100))
    six_times = share_with_interval(outcomes.repeat(6), torch.arange(100).repeat(6))
    assert six_times == pytest.approx(once, abs=1e-12)


def test_all_right_is_not_certain() -> None:
    # Wilson at p = 1: low = n / (n + z^2), here with n = 10 prompts of 3 pairs.
    interval = share_with_interval(torch.ones(30), torch.arange(10).repeat(3))
    assert interval == pytest.approx((1.0, 10 / 12.705543, 1.0), abs=1e-6)


def test_rounding_does_not_decide_how_much_equal_shares_tell() -> None:
    # The bounds x of Wilson's interval solve (x - p)^2 = z^2 x (1 - x) / n: n is read off them.
    def effective(*prompts: tuple[int, int]) -> list[float]:
        outcomes = torch.tensor([float(i < k) for k, m in prompts for i in range(m)])
        owners = torch.tensor([g for g, (_, m) in enumerate(prompts) for _ in range(m)])
        p, *bounds = share_with_interval(outcomes, owners)
        return [2.705543 * x * (1 - x) / (x - p) ** 2 for x in bounds]

    # As many as there are prompts, where all have the same share of right pairs.
    assert effective((5, 6)) == pytest.approx([1, 1], rel=1e-6)
    for prompts in (1, 3, 10, 200):
        for right, pairs in ((1, 2), (2, 3), (1, 6), (5, 6), (3, 10), (7, 36)):
            found = effective(*[(right, pairs)] * prompts)
            assert found == pytest.approx([prompts, prompts], rel=1e-6), (prompts, right, pairs)
    # One of 100 is another: the sums are 0.99 and 99 of -0.01, n = p (1 - p) 300^2 / 0.99 > 300.
    assert effective(*[(2, 3)] * 99, (3, 3)) == pytest.approx([300, 300], rel=1e-6)
    # Sums of 0.5 and -0.5, n = 0.25 * 6^2 / 0.5 > 6; of 1.5 and -1.5, n = 0.25 * 6^2 / 4.5.
    assert effective((2, 3), (1, 3)) == pytest.approx([6, 6], rel=1e-6)
    assert effective((3, 3), (0, 3)) == pytest.approx([2, 2], rel=1e-6)
    # One pair of each prompt, which the formula counts one by one.
    assert effective(*[(1, 1)] * 7, *[(0, 1)] * 3) == pytest.approx([10, 10], rel=1e-6)


def test_no_pair_gives_nan() -> None:
    interval = share_with_interval(torch.zeros(0), torch.zeros(0).long())
    assert all(math.isnan(value) for value in interval)


def test_interval_covers_the_truth_about_nine_times_in_ten() -> None:
    # 60 prompts of 6 pairs that mostly agree within a prompt (beta(2, 1) accuracy per prompt,
    # true mean 2/3); an interval that takes the 360 pairs as independent covers 73 %.
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(60).repeat_interleave(6)
    covered = 0
    for _ in range(300):
        share = torch.rand(60, generator=generator).sqrt()[owners]
        outcomes = (torch.rand(360, generator=generator) < share).float()
        interval = share_with_interval(outcomes, owners)
        covered += interval.low <= 2 / 3 <= interval.high
    assert 0.86 <= covered / 300 <= 0.94


def one_prompt(*values: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores whose exponentials are these values, all of one prompt."""
    return torch.tensor(values).log(), torch.zeros(len(values)).long()


# -0.75 ln 0.75 - 0.25 ln 0.25
THREE_OF_FOUR = 0.562335


def test_label_smoothing_is_least_where_the_scores_say_the_share() -> None:
    scores, groups = one_prompt(3.0, 1.0)  # sigmoid of the difference is 3 / 4
    scores.requires_grad_()
    loss = ranking_loss(scores, groups, torch.tensor([1.0, 0.0]), label_smoothing=0.25)
    loss.backward()
    assert loss.item() == pytest.approx(THREE_OF_FOUR, abs=1e-6)
    assert scores.grad is not None
    assert scores.grad.abs().max().item() < 1e-7


def test_votes_are_shares_of_a_pair() -> None:
    targets = torch.tensor([6.0, 2.0])  # three of four
    for votes in (targets, targets / 8):
        scores, groups = one_prompt(3.0, 1.0)
        loss = ranking_loss(scores, groups, targets, votes=votes)
        assert loss.item() == pytest.approx(THREE_OF_FOUR, abs=1e-6)
    # Without votes, and where all agree, the better one always wins: -ln 0.75.
    for votes in (torch.tensor([math.nan, math.nan]), torch.tensor([5.0, 0.0])):
        loss = ranking_loss(scores, groups, targets, votes=votes)
        assert loss.item() == pytest.approx(0.287682, abs=1e-6)


def test_smoothing_with_a_margin_of_three_responses_by_hand() -> None:
    # Differences 1, 2, 1 of scores 1, 0, -1, smoothed by 0.1: softplus(-d) + 0.1 d.
    loss = ranking_loss(
        torch.tensor([1.0, 0.0, -1.0]),
        torch.zeros(3).long(),
        torch.tensor([2.0, 1.0, 0.0]),
        label_smoothing=0.1,
    )
    expected = (2 * (0.3132616875 + 0.1) + 0.1269280110 + 0.2) / 3
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        # 6 of 6 + 3 + 1, then 3 of 3 + 1: -(ln 0.6 + ln 0.75) / 2
        ([2.0, 1.0, 0.0], 0.399254),
        # Two best, each against the third: -(ln 6/7 + ln 3/4) / 2
        ([1.0, 1.0, 0.0], 0.220916),
        # One best against both: -ln 0.6
        ([1.0, 0.0, 0.0], 0.510826),
        ([1.0, 1.0, 1.0], 0.0),
    ],
)
def test_listwise_by_hand(targets: list[float], expected: float) -> None:
    scores, groups = one_prompt(6.0, 3.0, 1.0)
    scores.requires_grad_()
    loss = listwise_loss(scores, groups, torch.tensor(targets))
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert scores.grad is not None
    assert bool(scores.grad.any()) == (expected > 0)


def test_listwise_likelihoods_of_all_orders_add_up_to_one() -> None:
    scores, groups = torch.tensor([0.3, -1.2, 2.0, 0.7]), torch.zeros(4).long()
    losses = [
        listwise_loss(scores, groups, torch.tensor(order)).item()
        for order in itertools.permutations([0.0, 1.0, 2.0, 3.0])
    ]
    assert sum(math.exp(-3 * loss) for loss in losses) == pytest.approx(1.0, abs=1e-5)


def test_listwise_of_a_pair_is_bradley_terry_and_prompts_share_their_weight() -> None:
    groups = torch.tensor([0, 0, 1, 1, 1])
    targets = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0])
    scores = torch.tensor([2.0, 1.0, *torch.tensor([6.0, 3.0, 1.0]).log().tolist()])
    loss = listwise_loss(scores, groups, targets)
    assert loss.item() == pytest.approx((0.3132616875 + 0.399254) / 2, abs=1e-6)
    shifted = listwise_loss(scores + 100.0, groups, targets)
    assert shifted.item() == pytest.approx(loss.item(), abs=1e-5)


def test_centering_penalty_by_hand() -> None:
    # Sums of pairs: 1 of (2, -1); 1, 0 and -1 of (1, 0, -1).
    scores = torch.tensor([2.0, -1.0, 1.0, 0.0, -1.0, 9.0, 9.0])
    groups, targets = torch.tensor([0, 0, 1, 1, 1, 2, 2]), torch.tensor([1.0, 0, 2, 1, 0, 5, 5])
    penalty = centering_penalty(scores, groups, targets)
    assert penalty.item() == pytest.approx((1 + 2 / 3) / 2, abs=1e-6)
