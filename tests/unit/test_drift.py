"""Drift between two models: against hand arithmetic and torch's own divergence."""

import math

import pytest
import torch
import torch.nn.functional as F

from align.drift import logit_drift, score_drift


def test_by_hand() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): KL = ln(2)/2 + ln(2/3)/2; the second position is equal."""
    ours = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    theirs = torch.tensor([[0.0, math.log(3)], [3.0, 1.0]])
    drift = logit_drift([(ours, theirs)])
    kl = (math.log(2) + math.log(2 / 3)) / 2
    assert drift == pytest.approx(
        {"kl/mean": kl / 2, "kl/max": kl, "logits/mean": math.log(3) / 4, "logits/max": math.log(3)}
    )


def test_parts_of_any_size_give_what_torch_gives_for_all() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(11, 7, generator=generator) for _ in range(2))
    inputs = [torch.log_softmax(x, -1) for x in (theirs, ours)]
    kl = F.kl_div(*inputs, log_target=True, reduction="none").sum(-1)
    for size in (1, 4, 11):
        drift = logit_drift(zip(ours.split(size), theirs.split(size), strict=True))
        assert drift["kl/mean"] == pytest.approx(kl.mean().item(), rel=1e-5)
        assert drift["kl/max"] == pytest.approx(kl.max().item(), rel=1e-5)
        assert drift["logits/mean"] == pytest.approx((ours - theirs).abs().mean().item(), rel=1e-5)
        assert drift["logits/max"] == pytest.approx((ours - theirs).abs().max().item(), rel=1e-5)


def test_a_constant_moves_the_logits_and_no_probability() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    drift = logit_drift([(logits, logits + 2)])
    assert drift["kl/max"] == pytest.approx(0, abs=1e-6)
    assert drift["logits/mean"] == pytest.approx(2)


def test_what_is_not_a_number_stays_so() -> None:
    logits = torch.zeros(2, 3)
    broken = torch.tensor([[0.0, math.nan, 0.0], [0.0, 0.0, 0.0]])
    assert math.isnan(logit_drift([(logits, broken)])["kl/mean"])
    assert math.isnan(score_drift(logits[:, 0], broken[0, :2])["score/mean"])


def test_scores() -> None:
    drift = score_drift(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.75]))
    assert drift == {"score/mean": 0.375, "score/max": 0.5}
