"""What PPO must not change is watched: the base, the reference and the reward models."""

from pathlib import Path

import pytest
import torch

from align.errors import TrainingError
from align.roles import Roles
from pipelines.frozen import Frozen
from tests import tiny
from tests.adapters import sft_adapter


@pytest.fixture
def roles(tmp_path: Path) -> Roles:
    adapter = sft_adapter(tiny.llama(), tmp_path / "sft")
    folders = dict.fromkeys(("policy", "reference"), adapter)
    return Roles(tiny.llama(), folders, trainable=("policy",))


def test_what_is_trained_may_change(roles: Roles) -> None:
    frozen = Frozen(roles)
    with torch.no_grad():
        for parameter in roles.role_parameters("policy"):
            parameter.add_(1.0)
    frozen.check(3)


@pytest.mark.parametrize("part", ["base", "reference"])
def test_a_frozen_tensor_that_changes_is_named_with_the_step_and_a_cause(
    roles: Roles, part: str
) -> None:
    frozen = Frozen(roles)
    names = dict(roles.named_parameters())
    mark = ".lora_B.reference." if part == "reference" else "v_proj.base_layer.weight"
    name = next(name for name in names if mark in name)
    with torch.no_grad():
        names[name].view(-1)[5] += 1e-3
    with pytest.raises(
        TrainingError, match=r"step 3: the base, the ref.* likely cause is"
    ) as found:
        frozen.check(3)
    assert f"1 of {len(names) - len(roles.role_parameters('policy'))} frozen" in str(found.value)
    assert name in str(found.value)


def test_weights_in_four_bits_are_watched_too() -> None:
    packed = torch.nn.Parameter(torch.full((64, 1), 255, dtype=torch.uint8), requires_grad=False)
    model = torch.nn.ParameterDict({"weight": packed})
    frozen = Frozen(model)
    frozen.check(1)
    packed.data[7] = 254
    with pytest.raises(TrainingError, match="weight"):
        frozen.check(2)
