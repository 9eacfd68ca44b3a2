"""The layers of a base that two gloo processes share out: the same numbers, fewer of them held."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from align import group
from align.engine import Engine
from align.recipe_distributed import Distributed, Offload
from align.recipe_ppo import Ppo
from align.roles import Roles
from align.sequences import join
from align.zero import deepspeed_settings
from align.zero_layers import ZeroLayers
from tests import adapters, tiny
from tests.two_processes import run_in_two
from tests.unit.test_roles import PROMPTS, RESPONSES, head

SECTION = Ppo(
    reward="align.functions:none", lr=1.0, batch_size=4, minibatch_size=4, steps=1, max_new_tokens=4
)
LAYERS = ("LlamaDecoderLayer", "GPT2Block")
KINDS = {"llama": tiny.llama, "gpt2": tiny.gpt2}
CASES: tuple[tuple[str, str, Offload, bool], ...] = (  # the last: activations are recomputed
    ("llama", "all", "none", True),
    ("llama", "top-half", "none", False),
    ("gpt2", "all", "none", False),
    ("gpt2", "all", "all", True),
)


def test_shared_layers_give_what_whole_ones_do(tmp_path: Path) -> None:
    for number, (kind, layers, _, _) in enumerate(CASES):
        adapters.sft_adapter(KINDS[kind](), tmp_path / str(number), layers=layers)
    run_in_two(__name__, str(tmp_path))


def process(folder: str) -> None:
    """What each of the two does."""
    group.join(deepspeed=True, timeout=120.0)
    for number, (kind, _, offload, recompute) in enumerate(CASES):
        same_numbers(kind, Path(folder) / str(number), offload, recompute=recompute)
        same_training(kind, Path(folder) / str(number), offload, recompute=recompute)
    group.leave()


def make_roles(kind: str, adapter: Path, *, recompute: bool) -> Roles:
    return Roles(
        KINDS[kind](),
        {"policy": adapter, "reference": adapter, "value": adapter},
        heads={"value": head(0)},
        trainable=("policy", "value"),
        recompute=recompute,
    )


def same_numbers(kind: str, adapter: Path, offload: Offload, *, recompute: bool) -> None:
    plain, roles = (make_roles(kind, adapter, recompute=recompute) for _ in range(2))
    distributed = Distributed(processes=2, zero=3, offload=offload)
    shared = ZeroLayers([roles.base], trained(roles), deepspeed_settings(distributed, SECTION))
    layers = [m for m in roles.base.modules() if type(m).__name__ in LAYERS]
    assert len(layers) == roles.base.config.num_hidden_layers
    assert_whole(roles, plain)

    expected = numbers(plain)
    assert_close(numbers(roles), expected, rtol=0, atol=0)  # whole: as if nothing were
    seen: list[list[bool]] = []
    watches = [watch(layer, layers, seen) for layer in layers]
    with shared.parted():
        assert not any(map(is_whole, layers))
        assert_close(numbers(roles), expected, rtol=0, atol=0)
        assert not any(map(is_whole, layers))
        assert all(p.numel() > 0 for p in trained(roles))  # adapters stay
    for handle in watches:
        handle.remove()
    assert seen
    assert all(sum(whole) == 1 for whole in seen)  # the one that computes
    assert_whole(roles, plain)


def same_training(kind: str, adapter: Path, offload: Offload, *, recompute: bool) -> None:
    """Policy and critic are models of their own, all of whose weights are trained."""
    plain, roles = (own_models(kind, adapter, recompute=recompute) for _ in range(2))
    distributed = Distributed(processes=2, zero=3, offload=offload)
    models = [roles.base, roles.model("policy"), roles.model("value")]
    shared = ZeroLayers(models, trained(roles), deepspeed_settings(distributed, SECTION))
    whole, parted = (
        Engine([(trained(one), 1e-2)], SECTION, 9, way, layers)
        for one, way, layers in ((plain, Distributed(), None), (roles, distributed, shared))
    )
    layers = [m for model in models[1:] for m in model.modules() if type(m).__name__ in LAYERS]
    most = {"weights": 0, "gradients": 0}
    for weight in trained(roles):
        weight.register_post_accumulate_grad_hook(lambda _: count(most, roles, parted))
    for _ in range(2):
        norm = pytest.approx(one_step(plain, whole, layers=[]), rel=1e-5)
        with shared.parted():
            assert one_step(roles, parted, layers=layers) == norm
            assert not any(map(is_whole, layers))
        for (name, ours), theirs in zip(roles.named_parameters(), plain.parameters(), strict=True):
            assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n} {m}")
    check_memory(most, roles, parted, layers)
    before = trained(own_models(kind, adapter, recompute=recompute))
    assert not any(torch.equal(ours, old) for ours, old in zip(trained(roles), before, strict=True))


def check_memory(
    most: dict[str, int], roles: Roles, engine: Engine, layers: list[nn.Module]
) -> None:
    """As the plan counts: a part of all layers and one whole; of the rest the whole, and a part."""
    of_layer = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    outside = sum(p.numel() for p in trained(roles) if id(p) not in in_layers)
    parts = sum(part.numel() for part in engine.optimizer.holders(engine.parameters))
    assert parts <= sum(p.numel() for p in trained(roles)) / 2 + len(trained(roles))  # filled up
    frozen = sum(p.numel() for p in roles.parameters() if not hasattr(p, "ds_tensor"))
    base = [p.ds_tensor for p in roles.base.parameters() if hasattr(p, "ds_tensor")]
    shared = sum(part.numel() for part in base)
    assert most["weights"] == 4 * (shared + parts + frozen + outside + of_layer)
    assert 4 * of_layer < most["gradients"] <= 4 * (parts + outside + of_layer)


def count(most: dict[str, int], roles: Roles, engine: Engine) -> None:
    """Note the most bytes that weights and their gradients take in this process."""
    parts = engine.optimizer._parts
    shared = [p for p in roles.parameters() if hasattr(p, "ds_tensor")]
    weights = [*roles.parameters(), *(p.ds_tensor for p in shared)]
    gradients = [p.grad for p in (*roles.parameters(), *parts.values()) if p.grad is not None]
    for kind, tensors in (("weights", weights), ("gradients", gradients)):
        places = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        most[kind] = max(most[kind], sum(places.values()))


def own_models(kind: str, adapter: Path, *, recompute: bool) -> Roles:
    return Roles(
        KINDS[kind](),
        {"reference": adapter},
        models={"policy": KINDS[kind](), "value": KINDS[kind]().base_model},
        heads={"value": head(0)},
        trainable=("policy", "value"),
        recompute=recompute,
    )


def one_step(roles: Roles, engine: Engine, *, layers: list[nn.Module]) -> float:
    """Two passes of both roles, in each process over other texts first, and a step of all."""
    for number in (group.rank(), 1 - group.rank()):
        row = slice(number, number + 1)
        batch = join(PROMPTS[row], RESPONSES[row])
        for output in (roles.logprobs("policy", batch), roles.values(batch)):
            engine.backward(output.square().sum())
            assert all(p.grad is None for one in layers for p in one.parameters())  # none is whole
    return engine.step(trained(roles))


def watch(
    layer: nn.Module, layers: list[nn.Module], seen: list[list[bool]]
) -> torch.utils.hooks.RemovableHandle:
    """Note which layers are whole whenever the first norm of this one computes."""
    norm = next(m for m in layer.modules() if "Norm" in type(m).__name__)
    return norm.register_forward_hook(lambda *_: seen.append([is_whole(one) for one in layers]))


def numbers(roles: Roles) -> list[torch.Tensor]:
    """What policy and critic say of the same texts, and their gradients."""
    roles.zero_grad(set_to_none=True)
    batch = roles.with_trunk(join(PROMPTS, RESPONSES))
    logprobs = roles.logprobs("policy", batch)
    logprobs.square().sum().backward()
    values = roles.values(batch)
    values.square().sum().backward()
    gradients = [p.grad for p in trained(roles) if p.grad is not None]
    assert len(gradients) == len(trained(roles))
    return [logprobs.detach(), values.detach(), roles.logprobs("reference", batch).detach()] + [
        gradient.clone() for gradient in gradients
    ]


def trained(roles: Roles) -> list[nn.Parameter]:
    return [p for role in ("policy", "value") for p in roles.role_parameters(role)]


def is_whole(layer: nn.Module) -> bool:
    own = [p.numel() > 0 for name, p in layer.named_parameters() if "lora_" not in name]
    assert any(own) == all(own)
    return all(own)


def assert_whole(roles: Roles, plain: Roles) -> None:
    for (name, ours), theirs in zip(roles.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
