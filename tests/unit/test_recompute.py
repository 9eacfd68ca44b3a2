"""Gradient checkpointing: the same numbers and gradients, and no effect on rollouts."""

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers.modeling_layers import GradientCheckpointingLayer

from align.generation import generate
from align.models import recompute_activations
from align.roles import Roles
from align.sequences import join
from reward.head import ScoreHead
from tests import adapters, tiny

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]
RESPONSES = [[20, 21, 22, 1], [23, 1], [24, 25, 26]]
MODELS = {"llama": lambda: tiny.llama(num_hidden_layers=3), "gpt2": tiny.gpt2}


@pytest.fixture(params=MODELS)
def make_base(request):
    return MODELS[request.param]


def head():
    made = ScoreHead(32)
    made.weight.data = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    return made


def make_roles(make_base, tmp_path, *, kind="own", layers="all", **settings):
    sft, reward = tmp_path / f"sft-{layers}", tmp_path / f"reward-{layers}"
    if not sft.exists():
        adapters.sft_adapter(make_base(), sft, seed=1, layers=layers)
        adapters.sft_adapter(make_base(), reward, seed=2, layers=layers)
    folders = {"policy": sft, "reference": sft}
    models = {}
    if kind == "own":
        folders["value"] = reward
    if kind == "separate":
        models = {"value": make_base().base_model}
    return Roles(
        make_base(),
        folders,
        models=models,
        heads={"value": head()},
        trainable=("policy", "value"),
        **settings,
    )


def gradients(roles, batch):
    """Policy and critic in one backward pass, after both have gone forward."""
    policy = roles.policy(batch, 0.7, with_entropy=True)
    values = policy.values if policy.values is not None else roles.values(batch)
    loss = policy.logprobs.sum() + 0.3 * policy.entropy.sum() + (values**2).sum()
    loss.backward()
    return {name: p.grad for name, p in roles.named_parameters() if p.requires_grad}


def layers_of(roles):
    return [m for m in roles.modules() if isinstance(m, GradientCheckpointingLayer)]


def count_passes(roles):
    passes = []
    for layer in layers_of(roles):
        norm = next(m for n, m in layer.named_modules() if "norm" in n or n == "ln_1")
        norm.register_forward_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize(
    ("kind", "layers", "engine"),
    [
        ("own", "all", "native"),
        ("own", "all", "hf"),
        ("own", "top-half", "native"),
        ("policy", "all", "native"),
        ("policy", "top-half", "native"),
        ("separate", "all", "native"),
    ],
)
def test_recomputed_gradients_are_the_same(make_base, tmp_path, kind, layers, engine):
    batch = join(PROMPTS, RESPONSES)
    results = []
    for recompute in (False, True):
        roles = make_roles(
            make_base, tmp_path, kind=kind, layers=layers, engine=engine, recompute=recompute
        )
        assert (roles.trunk is not None) == (layers == "top-half")
        sequences = roles.with_trunk(batch)
        passes = count_passes(roles)
        results.append((gradients(roles, sequences), len(passes)))
        assert not any(layer.training for layer in layers_of(roles))
    (expected, once), (actual, twice) = results
    assert twice == 2 * once
    assert len(expected) > 8
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n} {m}")


def test_passes_without_gradients_are_not_repeated(make_base, tmp_path):
    batch = join(PROMPTS, RESPONSES)
    roles = make_roles(make_base, tmp_path, recompute=True)
    plain = make_roles(make_base, tmp_path)
    with torch.no_grad():
        old = roles.logprobs("policy", batch)
    assert torch.equal(old, plain.logprobs("policy", batch))
    assert torch.equal(roles.logprobs("policy", batch), old)  # the ratio stays 1


# T9: with the layers in training mode the cache would be thrown away, and tokens be wrong.
@pytest.mark.parametrize("engine", ["native", "hf"])
def test_t9_greedy_with_cache_is_greedy_without_when_activations_are_recomputed(
    make_base, tmp_path, engine
):
    roles = make_roles(make_base, tmp_path, engine=engine, recompute=True).train()
    settings = {"max_new_tokens": 16, "temperature": 0, "end_ids": [1], "pad_id": 0, "seed": 0}
    sampled = roles.generate("policy", PROMPTS, **settings).responses
    expected = PeftModel.from_pretrained(make_base(), tmp_path / "sft-all").eval()
    check_greedy(expected, sampled)


def test_t9_greedy_sampling_from_a_trainers_model(make_base, tmp_path):
    """As the sft stage samples: from a model that a trainer has left in training mode."""
    adapters.sft_adapter(make_base(), tmp_path / "sft", seed=1)
    model = PeftModel.from_pretrained(make_base(), tmp_path / "sft", is_trainable=True)
    recompute_activations(model.get_base_model())
    model.train()
    sampled = generate(
        model,
        PROMPTS,
        max_new_tokens=16,
        temperature=0,
        end_ids=[1],
        pad_id=0,
        seed=0,
        engine="hf",
    ).responses
    assert model.training
    check_greedy(PeftModel.from_pretrained(make_base(), tmp_path / "sft").eval(), sampled)


@torch.no_grad()
def check_greedy(model, sampled):
    for prompt, response in zip(PROMPTS, sampled, strict=True):
        ids = list(prompt)
        for token in response:
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert int(logits.argmax()) == token
            ids.append(token)
