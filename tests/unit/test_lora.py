"""The fused LoRA layer: PEFT's own forward and autograd say what it has to give."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from align import lora
from tests import tiny
from tests.adapters import randomise


class Two(nn.Module):
    """Two layers, so that the gradient goes through the first one's output too."""

    def __init__(self, bias):
        super().__init__()
        self.first, self.second = nn.Linear(8, 12, bias=bias), nn.Linear(12, 5, bias=bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def pair(model, **settings):
    """The model with random adapters as PEFT has it, and the same one fused."""
    config = LoraConfig(r=3, lora_alpha=7, **settings)
    theirs = get_peft_model(model, config)
    randomise(theirs, seed=0)
    ours = copy.deepcopy(theirs)
    lora.fuse(ours)
    return theirs, ours


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4, 8), (2, 2, 8), (2, 30, 8)])  # from 5 rows on: summed first
def test_output_and_gradients_are_pefts(bias, shape):
    torch.manual_seed(0)
    theirs, ours = pair(Two(bias), target_modules=["first", "second"])
    x = torch.randn(shape)
    weights = torch.randn(*shape[:-1], 5)
    found = []
    for model in (theirs, ours):
        inputs = x.clone().requires_grad_()
        output = model(inputs)
        (output * weights).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        found.append((output, inputs.grad, gradients))
    assert len(found[0][2]) == 4
    assert_close(found[1][:2], found[0][:2], rtol=1e-5, atol=1e-6)
    assert_close(found[1][2], found[0][2], rtol=1e-5, atol=1e-6)


def test_the_fused_layer_is_what_runs(monkeypatch):
    _, ours = pair(Two(True), target_modules=["first", "second"])
    monkeypatch.setattr(lora.Linear, "forward", lambda *_: pytest.fail("PEFT's own was called"))
    ours(torch.randn(2, 8))


def test_with_and_without_gradients_it_gives_the_same_bits():
    theirs, ours = pair(tiny.llama(), target_modules=["q_proj", "up_proj", "down_proj"])
    ids = torch.arange(2, 14).view(2, 6)
    with torch.no_grad():
        expected = ours(ids).logits
    assert torch.equal(ours(ids).logits, expected)
    assert_close(expected, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.5}, {}])
def test_what_is_not_plain_goes_the_way_of_peft(settings):
    theirs, ours = pair(Two(False), target_modules=["first", "second"], **settings)
    dtype = torch.float32 if settings else torch.bfloat16
    for model in (theirs, ours):
        for name, parameter in model.named_parameters():
            if "lora" not in name:
                parameter.data = parameter.data.to(dtype)
    x = torch.randn(3, 8, dtype=dtype)
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        outputs.append(model.train()(x))
    assert torch.equal(*outputs)


def test_a_switched_off_adapter_leaves_the_layer_bare():
    theirs, ours = pair(Two(True), target_modules=["first", "second"])
    x = torch.randn(2, 8)
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(x), theirs(x))
    for model in (theirs, ours):
        for module in model.modules():
            if isinstance(module, lora.Linear):
                module._active_adapter = []
    assert torch.equal(ours(x), theirs(x))


def test_summed_weights_give_the_same_in_one_product(monkeypatch):
    theirs, ours = pair(Two(True), target_modules=["first"])
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = theirs(x)
        with lora.summed(ours), monkeypatch.context() as patch:
            patch.setattr(lora._LoraLinear, "apply", lambda *_: pytest.fail("not summed"))
            assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)
        assert "summed" not in vars(ours.base_model.model.first)
    assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)


def test_summed_weights_are_those_of_the_adapter_that_is_on():
    model = get_peft_model(Two(False), LoraConfig(r=3, target_modules=["first", "second"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["second"]))
    randomise(model, seed=0)
    lora.fuse(model)
    x = torch.randn(3, 8)
    outputs = []
    for name in ("default", "other"):
        model.set_adapter(name)
        with torch.no_grad(), lora.summed(model):
            outputs.append(model(x))
        assert_close(outputs[-1], model(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(*outputs)


def test_an_error_while_summed_leaves_the_layers_as_they_were():
    _, ours = pair(Two(True), target_modules=["first", "second"])
    with pytest.raises(KeyError), lora.summed(ours):
        raise KeyError
    ours.base_model.model.first.lora_B["default"].weight.data.zero_()
    assert_close(
        ours.base_model.model.first(torch.ones(1, 8)),
        ours.base_model.model.first.base_layer(torch.ones(1, 8)),
    )


def test_what_is_not_plain_is_not_summed():
    theirs, ours = pair(Two(False), target_modules=["first", "second"], use_dora=True)
    x = torch.randn(3, 8)
    with torch.no_grad(), lora.summed(ours):
        assert torch.equal(ours(x), theirs(x))
