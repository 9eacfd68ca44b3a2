"""Quantised bases: what is quantised, what it computes, and that it can carry trained adapters."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, modules
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from rich.console import Console
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl.trainer.sft_trainer import SFTTrainer

from align.adapter_methods import check_trained, lora_config
from align.errors import InputError, ParentError, TrainingError
from align.manifest import BaseFacts, check_same_origin, find_manifest
from align.models import load_causal_lm, recipe_base_facts
from align.quantization import compute_dtype, prepare_quantized
from align.recipe import Base, Recipe
from align.recipe_adapter import Adapter
from align.roles import Roles
from align.sequences import join
from data.render import Tokens
from pipelines import reward_model, reward_start, sft
from pipelines.stage import StageJob
from reward.model import load_reward_model, new_reward_model
from tests import tiny
from tests.adapters import sft_adapter
from tests.finished import finish

IDS = torch.arange(2, 22).view(2, 10)
PROMPTS, RESPONSES = [[5, 6, 7, 8], [9, 10]], [[20, 21, 22, 1], [23, 1]]
# The 4-bit NormalFloat (Dettmers et al. 2023, appendix E).
NF4 = torch.tensor(
    [
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453],
        [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0],
        [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224],
        [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    ]
).flatten()
KINDS = [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)]


def llama(**changes):
    return tiny.llama(hidden_size=64, intermediate_size=128, **changes)


def recipe(location, quantization="nf4", **base):
    base = {"id": str(location), "quantization": quantization} | base
    if quantization in ("nf4", "fp4"):
        base = {"compute_dtype": "float32"} | base
    return Recipe.model_validate({"name": "test", "base": base, "data": {}})


def load(folder, quantization="nf4", **base):
    return load_causal_lm(recipe(folder, quantization, **base), str(folder))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def to_nf4_and_back(weight):
    """Blocks of 64 numbers, each rounded to the nearest level times the block's largest number."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / scale[..., None] - NF4).abs().argmin(-1)
    return (NF4[nearest] * scale).reshape(weight.shape)


def body(model):
    """The linear layers between embeddings and head."""
    return [m for m in model.base_model.modules() if isinstance(m, nn.Linear)]


def test_nf4_is_that_of_the_paper_and_log_probabilities_follow(folder, tmp_path):
    plain = llama()
    for layer in body(plain):
        layer.weight.data = to_nf4_and_back(layer.weight.data)
    sft = sft_adapter(llama(), tmp_path / "sft")
    roles = Roles(load(folder), {"policy": sft})
    batch = join(PROMPTS, RESPONSES)
    ours = roles.logprobs("policy", batch)
    expected = PeftModel.from_pretrained(plain, sft).eval()
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            out = expected(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        wanted = torch.log_softmax(out, -1).gather(1, torch.tensor(response)[:, None])[:, 0]
        assert_close(ours[row, : len(response)], wanted, rtol=0, atol=1e-4)
    # The rounding is no small matter: the test would see its absence.
    assert (logits(llama()) - logits(load(folder))).abs().max() > 0.1


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_a_plain_model_with_the_dequantised_weights_says_the_same(folder, kind, double):
    model, plain = load(folder, kind, double_quantization=double), llama()
    for ours, theirs in zip(body(model), body(plain), strict=True):
        if kind == "int8":
            scale = ours.weight.SCB[:, None] / 127
            theirs.weight.data = ours.weight.CB.float() * scale
        else:
            state = ours.weight.quant_state
            theirs.weight.data = bnb.functional.dequantize_4bit(ours.weight.data, state).float()
    # LLM.int8 rounds the activations as well.
    atol = {"int8": 0.3}.get(kind, 1e-4)
    assert_close(logits(model), logits(plain), rtol=0, atol=atol)


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_only_the_body_is_quantised_and_all_of_it(folder, kind, double):
    model = load(folder, kind, double_quantization=double)
    layer = Linear8bitLt if kind == "int8" else Linear4bit
    assert {type(m) for m in body(model)} == {layer}
    assert len(body(model)) == 14
    assert type(model.lm_head) is nn.Linear
    whole = {n: p for n, p in model.named_parameters() if "_proj" not in n}
    assert {n.split(".")[-2] for n in whole} == {
        "embed_tokens",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
        "lm_head",
    }
    assert {p.dtype for p in whole.values()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_an_embedding_in_4_bits_is_refused(folder):
    model = load(folder)
    model.set_input_embeddings(bnb.nn.EmbeddingNF4(320, 64))
    with pytest.raises(InputError, match=r"its model\.embed_tokens is stored in nf4; heads and"):
        prepare_quantized(model, recipe(folder).base, torch.device("cpu"))


def test_a_base_that_came_in_another_precision_is_noticed(folder):
    for model, kind, expected in (
        (llama(), "nf4", "no layer was loaded in nf4"),
        (load(folder), "fp4", "q_proj was not loaded in fp4"),
        (load(folder), "int8", "q_proj was not loaded in int8"),
    ):
        with pytest.raises(TrainingError, match=expected):
            prepare_quantized(model, recipe(folder, kind).base, torch.device("cpu"))
    asked = recipe(folder, double_quantization=True).base
    with pytest.raises(TrainingError, match="was not loaded in nf4 with double quantisation"):
        prepare_quantized(load(folder), asked, torch.device("cpu"))


def test_tied_embeddings_stay_whole(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_the_compute_dtype_is_explicit_on_every_layer(folder, asked):
    layers = body(load(folder, compute_dtype=asked))
    assert {layer.compute_dtype for layer in layers} == {getattr(torch, asked)}
    # Else bitsandbytes takes that of the first input instead.
    assert all(layer.compute_type_is_set for layer in layers)


@pytest.mark.parametrize(
    ("device", "has_bf16", "expected"),
    [
        ("cpu", True, torch.bfloat16),
        ("cpu", False, torch.float32),
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),  # a T4 or V100, where float32 is several times slower
    ],
)
def test_compute_dtype_auto(monkeypatch, device, has_bf16, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert compute_dtype(Base(id="x", quantization="nf4"), torch.device(device)) == expected
    plain = Base(id="x", dtype="bfloat16")
    assert compute_dtype(plain, torch.device(device)) == torch.bfloat16


def gradients(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_an_evaluation_pass_repacks_nothing_and_costs_no_gradient(folder, monkeypatch):
    """As on a processor with bfloat16 instructions, where bitsandbytes repacks 4-bit layers."""

    def repack(*_):
        pytest.fail("a 4-bit layer was repacked: it has no gradient any more")

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", repack)
    model = load(folder)
    assert [layer.support_avx512bf16_for_cpu for layer in body(model)] == [False] * 14
    torch.manual_seed(0)
    model = get_peft_model(model, lora_config(Adapter(r=4), "CAUSAL_LM", model))
    check_trained(model, "lora")
    model.train()
    before = gradients(model)
    model.eval()
    logits(model)
    model.generate(input_ids=IDS[:1], max_new_tokens=2, do_sample=False)
    model.train()
    after = gradients(model)
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())
    assert all(gradient.any() for name, gradient in after.items() if "lora_B" in name)


def stored(folder, target, **settings):
    """Write the base as a checkpoint that is quantised already."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16
    )
    for key, value in settings.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )
    model.save_pretrained(target)
    return target


def test_a_checkpoint_that_is_quantised_already_loads_as_it_is(folder, tmp_path):
    there = stored(folder, tmp_path / "nf4")
    model = load(there)
    assert {layer.compute_dtype for layer in body(model)} == {torch.float32}  # ours, not its own
    assert not any(layer.support_avx512bf16_for_cpu for layer in body(model))
    assert {type(layer) for layer in body(model)} == {Linear4bit}
    assert type(model.lm_head) is nn.Linear
    whole = {parameter.dtype for n, parameter in model.named_parameters() if "_proj" not in n}
    assert whole == {torch.float32}  # embeddings, norms and head
    assert torch.equal(logits(model), logits(load(folder)))


@pytest.mark.parametrize(
    "base",
    [
        {"quantization": "none"},
        {"quantization": "fp4"},
        {"quantization": "int8"},
        {"quantization": "nf4", "double_quantization": True},
    ],
)
def test_a_checkpoint_in_another_precision_than_the_recipe_says_is_refused(folder, tmp_path, base):
    there = stored(folder, tmp_path / "nf4")
    with pytest.raises(InputError, match=r"base.quantization=\w+ with .* is stored in nf4 with"):
        load(there, **base)


def test_a_checkpoint_with_a_quantised_head_is_refused(folder, tmp_path):
    there = stored(folder, tmp_path / "nf4", llm_int8_skip_modules=["nothing"])
    with pytest.raises(InputError, match="its lm_head is stored in nf4; heads and embeddings"):
        load(there)


@pytest.mark.parametrize("before", [False, True])
def test_the_score_head_on_a_quantised_base_is_whole_and_trained(folder, tmp_path, before):
    there = stored(folder, tmp_path / "nf4") if before else folder
    sft = sft_adapter(llama(), tmp_path / "sft")
    reward = new_reward_model(load(there), Adapter(r=4, alpha=8.0), sft, seed=1)
    check_trained(reward.classifier, "lora")
    score = reward.classifier.get_base_model().score.modules_to_save["default"]
    assert type(score) is nn.Linear
    assert score.weight.dtype == torch.float32
    mask = torch.ones_like(IDS)
    reward(IDS, mask).sum().backward()
    assert all(p.grad is not None for p in reward.parameters() if p.requires_grad)
    reward.save(tmp_path / "reward", str(there), None)
    again = load_reward_model(load(there), tmp_path / "reward")
    assert torch.equal(again(IDS, mask), reward.eval()(IDS, mask).detach())


def test_what_is_trained_is_checked(folder):
    model = get_peft_model(load(folder), lora_config(Adapter(r=4), "CAUSAL_LM", llama()))
    check_trained(model, "lora")
    name, parameter = next((n, p) for n, p in model.named_parameters() if "lora_A" in n)
    for spoil in (
        lambda: parameter.requires_grad_(False),
        lambda: setattr(parameter, "data", parameter.data.bfloat16()),
    ):
        spoil()
        with pytest.raises(TrainingError, match=name.replace(".", r"\.")):
            check_trained(model, "lora")
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match="lm_head"):
        check_trained(model, "lora")


def training_job(folder, tmp_path):
    training = {"lr": 1e-3, "batch_size": 2}
    stages = {stage: {"train": [{"world": "pairs"}]} for stage in ("sft", "reward")}
    settings = recipe(folder).model_dump() | {"sft": training, "reward": training, "data": stages}
    made = Recipe.model_validate(settings | {"adapter": {"r": 4, "alpha": 8.0}})
    return StageJob(made, "sft", tmp_path / "sft", {}, {}, Console(quiet=True))


ROWS = [Tokens([5, 6, 7, 8], [-100, -100, 7, 8]), Tokens([4, 3, 1], [-100, 3, 1])]


# PEFT's preparation for training in few bits freezes all that is there, an adapter as well.
def test_a_library_that_freezes_an_adapter_is_noticed(folder, tmp_path, monkeypatch):
    job, sft_folder = training_job(folder, tmp_path), sft_adapter(llama(), tmp_path / "model")

    def frozen(model, config):
        return prepare_model_for_kbit_training(get_peft_model(model, config))

    def frozen_reward(*arguments):
        made = new_reward_model(*arguments)
        prepare_model_for_kbit_training(made.classifier)
        return made

    monkeypatch.setattr(sft, "get_peft_model", frozen)
    monkeypatch.setattr(reward_start, "new_reward_model", frozen_reward)
    with pytest.raises(TrainingError, match=r"lora_A.* \(torch.float32, trained: False\)"):
        sft.add_adapter(load(folder), job.recipe)
    new = partial(reward_start._new_on_sft, job.recipe, str(folder), sft_folder)
    start = SimpleNamespace(new=new, adapter=job.recipe.adapter)
    with pytest.raises(TrainingError, match=r"lora_A.* \(torch.float32, trained: False\)"):
        reward_model._new_model(job.recipe, start)


def test_the_trainer_gets_the_adapter_and_nothing_else_in_float32(folder, tmp_path, monkeypatch):
    job = training_job(folder, tmp_path)
    arguments = (job, job.recipe.sft)
    model = sft.add_adapter(load(folder), job.recipe)
    trainer = sft.make_trainer(*arguments, model, tiny.tokenizer(), ROWS)
    trained = {n: p.dtype for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 14  # A and B of every linear layer
    assert all(".lora_" in name for name in trained)
    assert set(trained.values()) == {torch.float32}

    def trains_a_norm(model, **settings):
        model.get_base_model().model.norm.weight.requires_grad_(True)
        return SFTTrainer(model=model, **settings)

    monkeypatch.setattr(sft, "SFTTrainer", trains_a_norm)
    with pytest.raises(TrainingError, match=r"model\.norm\.weight .* trained: True"):
        sft.make_trainer(*arguments, model, tiny.tokenizer(), ROWS)


def test_without_bitsandbytes_the_message_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    load(folder, "none")
    with pytest.raises(InputError, match=r"base.quantization=nf4: needs bitsandbytes.*pip install"):
        load(folder)


def test_facts_say_how_the_base_was_loaded(folder):
    plain = recipe_base_facts(recipe(folder, "none"))
    facts = recipe_base_facts(recipe(folder, double_quantization=True, compute_dtype="bfloat16"))
    assert facts.sha256 == plain.sha256
    assert (plain.precision, plain.compute_dtype) == ("none", "float32")
    assert (facts.precision, facts.compute_dtype) == ("nf4+double", "bfloat16")
    old = json.loads(plain.model_dump_json())
    for key in ("quantization", "double_quantization", "compute_dtype"):
        del old[key]
    assert BaseFacts.model_validate(old).precision == "none"


def test_stages_that_loaded_their_base_in_another_precision_do_not_fit_together(tmp_path):
    def made(stage, quantization):
        (tmp_path / stage / "model").mkdir(parents=True, exist_ok=True)
        base = BaseFacts(id="b", revision=None, sha256="b", quantization=quantization)
        finish(tmp_path / stage, stage, base=base)
        return find_manifest(tmp_path / stage)

    pretrain, sft = made("pretrain", "none"), made("sft", "nf4")
    check_same_origin({"p": pretrain, "s": sft, "r": made("reward", "nf4")})
    with pytest.raises(ParentError, match=r"s and r .* base quantization differs \(nf4 and none\)"):
        check_same_origin({"p": pretrain, "s": sft, "r": made("reward", "none")})
