"""Accumulated gradients: eight passes of one row train as one pass of eight, in every stage."""

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

from tests.faults import Server, facts

PAIRWISE = ("data.world.responses_per_ranking=2",)  # else rankings of three
# Two optimiser steps of eight rows, blocks, rankings or responses, of different lengths.
TWO_STEPS = {
    "pretrain": ("pretrain.steps=2", "pretrain.batch_size=8", "pretrain.warmup_ratio=0.0"),
    "sft": ("sft.epochs=0.25", "sft.batch_size=8", "sft.warmup_ratio=0.0"),
    "reward": ("reward.epochs=0.3", "reward.batch_size=8", "reward.warmup_ratio=0.0"),
    "ppo": ("ppo.steps=1", "ppo.minibatch_size=8", "ppo.value.warmup_steps=0", "ppo.ema=null"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("accumulation"))
    for stage in ("pretrain", "sft", "reward"):
        assert server.run(stage).code == 0
    yield server
    server.close()


def trained(server: Server, stage: str, *settings: str) -> tuple[dict[str, torch.Tensor], list]:
    """Return the weights of a stage, and its log of steps without the clock."""
    # Adam divides a gradient by its size: of one that is nearly 0 the rounding counts, up to 1 % of
    # the learning rate.
    words = (*TWO_STEPS[stage], f"{stage}.lr=1e-4", "adapter.dropout=0.0", *settings)
    done = server.run(stage, *words, f"{stage}.log_every=1", "--force")
    assert done.code == 0, done.output
    weights = {
        f"{path.parent.name}/{name}": tensor
        for path in server.folder(stage).rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    log = facts(server.folder(stage))["metrics.jsonl"]
    return weights, [line for line in log if "grad_norm" in line]


# In this order: a stage is made again after those that start from it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("ppo", ()),
        ("reward", PAIRWISE),
        ("reward", ("reward.loss=pairs",)),
        ("reward", ("reward.loss=listwise",)),
        ("sft", ()),
        ("pretrain", ()),
    ],
    ids=["ppo", "reward-pairwise", "reward-k-wise", "reward-listwise", "sft", "pretrain"],
)
def test_eight_passes_of_one_are_one_pass_of_eight(
    server: Server, stage: str, settings: tuple[str, ...]
) -> None:
    """By the weights, and by the log: Adam's steps are the same if all gradients are doubled."""
    whole, log = trained(server, stage, *settings, f"{stage}.micro_batch_size=8")
    parts, other_log = trained(server, stage, *settings, f"{stage}.micro_batch_size=1")
    assert whole.keys() == parts.keys()
    worst = max(float((whole[name] - parts[name]).abs().max()) for name in whole)
    assert worst <= 1e-6
    assert len(log) == len(other_log) == (1 if stage == "ppo" else 2)
    assert all(line["grad_norm"] > 0 for line in log)
    for line, other in zip(log, other_log, strict=True):
        assert other == pytest.approx(line, rel=1e-4, abs=1e-6)
