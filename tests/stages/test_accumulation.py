"""Accumulated gradients: eight passes of one row train as one pass of eight, in every stage."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults import Server

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


def trained(server: Server, stage: str, *settings: str) -> dict[str, torch.Tensor]:
    done = server.run(stage, *TWO_STEPS[stage], "adapter.dropout=0.0", *settings, "--force")
    assert done.code == 0, done.output
    return {
        f"{path.parent.name}/{name}": tensor
        for path in Path(server.folder(stage)).rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


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
    whole = trained(server, stage, *settings, f"{stage}.micro_batch_size=8")
    parts = trained(server, stage, *settings, f"{stage}.micro_batch_size=1")
    other = trained(server, stage, *settings, f"{stage}.micro_batch_size=8", f"{stage}.lr=1e-5")
    assert whole.keys() == parts.keys() == other.keys()
    worst = max(float((whole[name] - parts[name]).abs().max()) for name in whole)
    moved = max(float((whole[name] - other[name]).abs().max()) for name in whole)
    print(f"{stage}: {worst:.2g} apart, after steps that differ by {moved:.2g}")
    assert worst <= 1e-6
    assert moved > 1e-4  # or nothing was trained
