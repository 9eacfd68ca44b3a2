"""Adapters in the weights, taken out again, swapped, and several in one batch."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from align.errors import InputError
from align.merging import merged, merged_in
from align.models import load_causal_lm
from align.quantization import dequantize, is_quantized
from align.recipe import Recipe
from tests import tiny
from tests.adapters import sft_adapter

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2}
SCALING = 8.0 / 4  # alpha / r of tests.adapters
IDS = torch.arange(2, 22).view(2, 10)


@pytest.fixture(params=MODELS)
def make_base(request):
    return MODELS[request.param]


@pytest.fixture(params=[*MODELS, "llama-nf4", "gpt2-nf4"])
def base_and_folders(request, tmp_path):
    """A function that gives the base, and the folders of two adapters that were made on it."""
    name, _, kind = request.param.partition("-")
    MODELS[name]().save_pretrained(tmp_path / "base")

    def load():
        return load_base(tmp_path / "base", kind or "none")

    return load, [sft_adapter(load(), tmp_path / f"sft{seed}", seed=seed) for seed in (1, 2)]


def load_base(folder, quantization):
    base = {"id": str(folder), "quantization": quantization}
    if quantization == "nf4":
        base["compute_dtype"] = "float32"
    recipe = Recipe.model_validate({"name": "test", "base": base, "data": {}})
    return load_causal_lm(recipe, str(folder))


@torch.no_grad()
def logits(model, ids=IDS, **arguments):
    return model(input_ids=ids, use_cache=False, **arguments).logits


def weights(model):
    """Every parameter of the model without adapters, by name."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): parameter.detach()
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    }


def by_hand(base, folder):
    """W + s B A in float64, transposed where the layer is; other weights as they are."""
    lora = load_file(folder / "adapter_model.safetensors")
    result = dict(weights(base))
    for key, a in lora.items():
        if ".lora_A." not in key:
            continue
        name = key.removeprefix("base_model.model.").replace("lora_A.", "")
        delta = SCALING * lora[key.replace("lora_A", "lora_B")].double() @ a.double()
        layer = base.get_submodule(name.removesuffix(".weight"))
        result[name] = result[name].double() + (delta.T if isinstance(layer, Conv1D) else delta)
    return result


def test_the_sum_is_that_of_the_paper(make_base, tmp_path):
    folder = sft_adapter(make_base(), tmp_path / "sft")
    expected, found = by_hand(make_base(), folder), weights(merged(make_base(), folder))
    changed = [name for name, value in found.items() if not value.equal(weights(make_base())[name])]
    assert len(changed) == {"llama": 14, "gpt2": 8}[make_base.__name__]
    for name, value in expected.items():
        assert_close(found[name], value.float(), rtol=1e-6, atol=1e-7, msg=name)


def test_it_is_rounded_once(tmp_path):
    """bfloat16 has 8 bits: a number is off by 2^-8 of itself at most, if it is rounded once."""
    folder = sft_adapter(tiny.llama(), tmp_path / "sft")
    expected = by_hand(tiny.llama().bfloat16(), folder)
    found = weights(merged(tiny.llama().bfloat16(), folder, torch.bfloat16))
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    for name, value in expected.items():
        error = (found[name].double() - value.double()).abs()
        assert (error <= value.double().abs() * 2**-8 * 1.001 + 1e-7).all(), name


def test_merged_and_adapter_say_the_same(base_and_folders):
    load, (folder, _) = base_and_folders
    adapted = logits(PeftModel.from_pretrained(load(), folder).eval())
    plain = merged(dequantize(load()), folder)
    assert_close(logits(plain), adapted, rtol=0, atol=1e-4)
    assert (logits(dequantize(load())) - adapted).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_taken_out_again_the_base_is_what_it_was_bit_for_bit(make_base, tmp_path, dtype):
    folder = sft_adapter(make_base(), tmp_path / "sft")
    model = PeftModel.from_pretrained(make_base().to(dtype), folder).eval()
    before, adapted = {n: p.clone() for n, p in weights(model).items()}, logits(model)
    for _ in range(3):
        with merged_in(model, "default"):
            changed = [n for n, p in weights(model).items() if not p.equal(before[n])]
            inside = logits(model)
        assert len(changed) == {"llama": 14, "gpt2": 8}[make_base.__name__]
        if dtype == torch.float32:
            assert_close(inside, adapted, rtol=0, atol=1e-4)
    after = weights(model)
    assert [name for name, value in before.items() if not value.equal(after[name])] == []
    assert torch.equal(logits(model), adapted)


def test_peft_alone_does_not_restore_the_base(tmp_path):
    """What ``merged_in`` is for: the library subtracts what it has added."""
    folder = sft_adapter(tiny.llama(), tmp_path / "sft")
    model = PeftModel.from_pretrained(tiny.llama(), folder)
    before = {name: parameter.clone() for name, parameter in weights(model).items()}
    model.merge_adapter()
    model.unmerge_adapter()
    drift = max((weights(model)[name] - value).abs().max() for name, value in before.items())
    assert 0 < drift < 1e-6


def test_it_is_taken_out_when_something_fails(tmp_path):
    model = PeftModel.from_pretrained(
        tiny.llama(), sft_adapter(tiny.llama(), tmp_path / "sft")
    ).eval()
    before = logits(model)
    with pytest.raises(KeyError), merged_in(model, "default"):
        raise KeyError
    assert torch.equal(logits(model), before)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs"), merged_in(model, "default"):
        pass
    assert all(torch.equal(p, q) for p, q in _pairs(weights(model), weights(tiny.llama())))


def _pairs(ours, theirs):
    assert set(ours) == set(theirs)
    return [(ours[name], theirs[name]) for name in ours]


def test_never_into_quantised_weights(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    folder = sft_adapter(tiny.llama(), tmp_path / "sft")
    base = load_base(tmp_path / "base", "nf4")
    with pytest.raises(InputError, match="cannot be merged into weights in 4 or 8 bits"):
        merged(base, folder)
    model = PeftModel.from_pretrained(base, folder)
    with pytest.raises(InputError, match="cannot be merged"), merged_in(model, "default"):
        pass
    with pytest.raises(InputError, match="no such adapter; it has default"):
        merged_in(PeftModel.from_pretrained(tiny.llama(), folder), "policy").__enter__()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_dequantised_model_is_a_plain_one(make_base, kind, tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    quantized = load_base(tmp_path / "base", kind)
    expected = logits(quantized)
    plain = dequantize(quantized)
    assert not is_quantized(plain)
    ours, theirs = plain.state_dict(), make_base().state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert {type(m) for m in plain.modules()} == {type(m) for m in make_base().modules()}
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert getattr(again.config, "quantization_config", None) is None
    # LLM.int8 rounds the activations as well.
    assert_close(logits(again), expected, rtol=0, atol=0.5 if kind == "int8" else 1e-4)
    assert (logits(again) - logits(make_base())).abs().max() > 1e-2


def test_a_model_that_is_whole_stays_as_it_is():
    model = tiny.llama()
    assert dequantize(model) is model
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


# README: swapping adapters, with PEFT's own methods on our folders.
def test_swapping_is_exact(base_and_folders):
    load, folders = base_and_folders
    alone = [logits(PeftModel.from_pretrained(load(), folder).eval()) for folder in folders]
    bare = logits(load())
    assert (alone[0] - alone[1]).abs().max() > 0.1
    model = PeftModel.from_pretrained(load(), folders[0], adapter_name="sft").eval()
    model.load_adapter(folders[1], adapter_name="policy")
    for _ in range(3):
        for name, expected in (("policy", alone[1]), ("sft", alone[0])):
            model.set_adapter(name)
            assert torch.equal(logits(model), expected)
            with model.disable_adapter():
                assert torch.equal(logits(model), bare)


# README: rows of one batch under different adapters.
def test_rows_of_a_batch_may_have_their_own_adapters(base_and_folders):
    load, folders = base_and_folders
    model = PeftModel.from_pretrained(load(), folders[0], adapter_name="sft").eval()
    model.load_adapter(folders[1], adapter_name="policy")
    names = ["policy", "__base__", "sft", "policy"]
    # Prompts of different lengths, padded on the left.
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [5, 6, 7, 8]]
    ids = torch.tensor([[0] * (4 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (4 - len(p)) + [1] * len(p) for p in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    mixed = logits(model, ids, attention_mask=mask, position_ids=positions, adapter_names=names)
    sampled = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **settings)
    for row, name in enumerate(names):
        one = {"input_ids": torch.tensor([prompts[row]])}
        model.set_adapter("sft" if name == "__base__" else name)
        if name == "__base__":
            with model.disable_adapter():
                alone, answer = logits(model, one["input_ids"]), model.generate(**one, **settings)
        else:
            alone, answer = logits(model, one["input_ids"]), model.generate(**one, **settings)
        assert_close(mixed[row, -1], alone[0, -1], rtol=0, atol=1e-4)
        answer = answer[0, len(prompts[row]) :]
        assert sampled[row, 4 : 4 + len(answer)].tolist() == answer.tolist()
    assert (mixed[0, -1] - mixed[2, -1]).abs().max() > 0.1
