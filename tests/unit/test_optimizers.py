"""The optimisers that a recipe can name, against Adam written out."""

import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from align.engine import Engine
from align.errors import InputError
from align.recipe_types import Optimisation
from pipelines.trainer_log import training_arguments

LR, EPS, DECAY = 1e-2, 1e-5, 0.1
# Per number and five steps: 8-bit states are rough, but no step is far off.
TOLERANCE = {"adamw": 1e-6, "paged_adamw": 1e-6, "adamw_8bit": 5e-3, "paged_adamw_8bit": 5e-3}


def section(name):
    return Optimisation(
        optimizer=name,
        lr=LR,
        batch_size=1,
        schedule="constant",
        warmup_ratio=0.0,
        weight_decay=DECAY,
        max_grad_norm=1e9,
    )


def adam_by_hand(start, gradients):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2), number by number."""
    weight, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t, gradient in enumerate(gradients, 1):
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + EPS)
        weight = weight - LR * (step + DECAY * weight)
    return weight


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.filterwarnings("ignore:.*[Pp]aged")
def test_five_steps_of_every_optimiser(name):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 128, generator=generator)
    drawn = [torch.randn(64, 128, generator=generator) for _ in range(5)]
    parameter = nn.Parameter(start.clone())
    engine = Engine([([parameter], LR)], section(name), num_steps=5)
    for gradient in drawn:
        engine.backward((parameter * gradient).sum())
        engine.step([parameter])
    assert_close(parameter.detach(), adam_by_hand(start, drawn), rtol=0, atol=TOLERANCE[name])
    states = engine.optimizer.optimizer.state[parameter]
    large = {t.dtype for t in states.values() if isinstance(t, torch.Tensor) and t.numel() > 4096}
    assert large == ({torch.uint8} if name.endswith("8bit") else {torch.float32})
    made = engine.optimizer.optimizer.optimizer
    assert getattr(made, "is_paged", False) == name.startswith("paged")


@pytest.mark.parametrize(
    ("name", "bits", "paged"),
    [
        ("adamw", None, None),
        ("adamw_8bit", 8, False),
        ("paged_adamw", 32, True),
        ("paged_adamw_8bit", 8, True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*[Pp]aged")
def test_a_trainer_makes_the_one_that_the_recipe_names(tmp_path, name, bits, paged):
    arguments = training_arguments(TrainingArguments, section(name), tmp_path, steps=1, seed=0)
    layer = nn.Linear(2, 2)
    made = Trainer(layer, arguments).create_optimizer()
    assert isinstance(made, torch.optim.AdamW) == (bits is None)
    assert getattr(made, "is_paged", None) is paged
    assert getattr(getattr(made, "args", None), "optim_bits", None) == bits


def test_without_bitsandbytes_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    parameter = nn.Parameter(torch.zeros(2))
    Engine([([parameter], LR)], section("adamw"), num_steps=1)
    with pytest.raises(InputError, match=r"optimizer=adamw_8bit: needs bitsandbytes.*pip install"):
        Engine([([parameter], LR)], section("adamw_8bit"), num_steps=1)
