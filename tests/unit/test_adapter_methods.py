"""Adapter methods: what each trains, where it starts, and that its folder gives it back."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AlbertConfig, AlbertModel, PreTrainedModel

from align.adapter_methods import adapter_config, check_trained, trained_share
from align.adapters import WEIGHTS, save_trained, trained_method
from align.errors import InputError, ParentError, TrainingError
from align.generation import generate
from align.recipe import Recipe
from align.recipe_adapter import Adapter
from pipelines.sft import add_adapter
from reward.model import load_reward_model, new_reward_model
from tests import tiny
from tests.adapters import randomise

METHODS = {
    "lora": {"r": 4},
    "dora": {"method": "lora", "r": 4, "dora": True, "rslora": True, "init": "gaussian"},
    "full": {},
    "head_only": {},
    "top_layers": {"top_layers": 1},
    "bitfit": {},
    "houlsby": {"method": "bottleneck", "bottleneck_size": 4},
    "pfeiffer": {"method": "bottleneck", "bottleneck_size": 4, "placement": "pfeiffer"},
    "prefix": {"prefix_tokens": 5},
}
IDS = torch.tensor([[5, 9, 200, 0, 31, 7, 1, 77], [8, 6, 7, 5, 3, 0, 9, 1]])
every_method = pytest.mark.parametrize("name", METHODS)


def adapter(name: str) -> Adapter:
    return Adapter.model_validate({"method": name} | METHODS[name])


def base(name: str) -> PreTrainedModel:
    """A Llama; for BitFit a GPT-2, since Llamas have no biases."""
    return tiny.gpt2() if name == "bitfit" else tiny.llama()


def recipe(name: str) -> Recipe:
    return Recipe.model_validate(
        {"name": "x", "base": {"id": "x"}, "adapter": adapter(name).model_dump(), "data": {}}
    )


def adapted(name: str, make: Callable[[], PreTrainedModel] | None = None):
    return add_adapter(make() if make else base(name), recipe(name)).eval()


def trained(name: str):
    """A model by this method, with random values in everything that is trained."""
    model = adapted(name)
    randomise(model, seed=4)
    return model


def logits(model, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


# Llama: hidden 32, inner 64, 2 layers, keys and values of 16, vocabulary 320. Of a layer: 1024 +
# 512 + 512 + 1024 + 3 * 2048 weights and 64 in norms. GPT-2's biases: 96 + 32 + 128 + 32 + 64.
COUNTS = {
    "lora": 2 * 4 * (64 + 48 + 48 + 64 + 3 * 96),
    "dora": 2 * (4 * (64 + 48 + 48 + 64 + 3 * 96) + 32 + 16 + 16 + 32 + 64 + 64 + 32),
    "full": 2 * 320 * 32 + 2 * 9280 + 32,
    "head_only": 320 * 32,
    "top_layers": 9280 + 32,
    "bitfit": 2 * 352 + 32,
    "houlsby": 2 * 2 * (32 * 4 + 4 + 4 * 32 + 32),
    "pfeiffer": 2 * (32 * 4 + 4 + 4 * 32 + 32),
    "prefix": 5 * 2 * 2 * 16,
}


@every_method
def test_so_many_parameters_are_trained(name: str) -> None:
    share = trained_share(adapted(name), 39_072)
    assert share["trained/parameters"] == COUNTS[name]
    assert share["trained/share"] == COUNTS[name] / 39_072


@pytest.mark.parametrize("name", [name for name in METHODS if name != "prefix"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_training_starts_at_the_base(name: str, make) -> None:
    if name == "bitfit" and make is tiny.llama:
        return
    found, expected = logits(adapted(name, make)), logits(make())
    if name == "dora":  # divides by the length of its weights and multiplies with it
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(found, expected)


@every_method
def test_what_is_trained_gets_gradients_and_nothing_else(name: str) -> None:
    model = trained(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(input_ids=IDS, labels=IDS).loss.backward()
    with_gradient = {key for key, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {key for key, p in model.named_parameters() if p.requires_grad}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    after = model.state_dict()
    changed = sum(v.numel() for key, v in after.items() if not torch.equal(v, before[key]))
    assert changed == pytest.approx(COUNTS[name], rel=0.3)  # a token's embedding may have none
    assert changed <= COUNTS[name]


@every_method
def test_what_is_trained_is_checked(name: str) -> None:
    model, method = adapted(name), adapter(name).method
    check_trained(model, method)
    wanted, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    parameter.requires_grad_(False)
    with pytest.raises(TrainingError, match=wanted.replace(".", r"\.")):
        check_trained(model, method)
    parameter.requires_grad_(True)
    parameter.data = parameter.data.bfloat16()
    with pytest.raises(TrainingError, match="bfloat16"):
        check_trained(model, method)
    parameter.data = parameter.data.float()
    if name != "full":
        bare = model.get_base_model()
        bare.get_input_embeddings().weight.requires_grad_(True)
        with pytest.raises(TrainingError, match="trained: True"):
            check_trained(model, method)


FRESH = """
import sys, json, torch
from pathlib import Path
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
root = Path(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
for folder in sorted(root.iterdir()):
    if (folder / "adapter_config.json").is_file():
        if "BOTTLENECK" in (folder / "adapter_config.json").read_text():
            import align.bottleneck
        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.save(found, root / f"{folder.name}.pt")
"""


def test_every_folder_loads_exactly_in_a_fresh_process(tmp_path: Path) -> None:
    """With the libraries alone; bottlenecks need ``import align.bottleneck``."""
    expected = {}
    for name in METHODS:
        base(name).save_pretrained(tmp_path / "bases" / name)
        model = trained(name)
        there = str(tmp_path / "bases" / name)
        save_trained(model, tmp_path / "made" / name, base=there, revision=None)
        assert trained_method(tmp_path / "made" / name) == adapter(name).method
        expected[name] = logits(model)
        assert not torch.equal(expected[name], logits(base(name)))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FRESH, str(tmp_path / "made"), json.dumps(IDS.tolist())]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, value in expected.items():
        assert torch.equal(torch.load(tmp_path / "made" / f"{name}.pt"), value), name


@every_method
def test_generation_with_the_cache_is_that_without(name: str) -> None:
    model, prompts = trained(name), [[5, 9, 200, 31], [8, 6]]
    made = generate(
        model,
        prompts,
        max_new_tokens=6,
        temperature=0,
        end_ids=[1],
        pad_id=0,
        seed=0,
        engine="hf",
    )
    for prompt, response in zip(prompts, made.responses, strict=True):
        ids = list(prompt)
        for token in response:
            assert int(logits(model, torch.tensor([ids]))[0, -1].argmax()) == token
            ids.append(token)


def test_what_a_base_cannot_offer_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="bitfit: LlamaForCausalLM has no biases"):
        adapter_config(adapter("bitfit"), "CAUSAL_LM", tiny.llama())
    with pytest.raises(InputError, match=r"top_layers=3: LlamaForCausalLM has 2 layers; .* most 2"):
        adapter_config(Adapter(method="top_layers", top_layers=3), "CAUSAL_LM", tiny.llama())
    odd = tiny.llama()
    odd.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(InputError, match="bottleneck: where the sublayers of LlamaForCausalLM end"):
        adapter_config(adapter("houlsby"), "CAUSAL_LM", odd)
    sizes = {"vocab_size": 30, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    shared = AlbertModel(AlbertConfig(**sizes, num_hidden_layers=2))  # one layer, passed twice
    with pytest.raises(InputError, match="top_layers: the layers of AlbertModel are not found, or"):
        adapter_config(Adapter(method="top_layers", top_layers=1), "SEQ_CLS", shared)


def test_top_layers_are_the_uppermost() -> None:
    names = {n for n, p in adapted("top_layers").named_parameters() if p.requires_grad}
    assert all(".layers.1.modules_to_save." in n or ".norm.modules_to_save." in n for n in names)


def test_scaling_and_first_weights_of_lora() -> None:
    """alpha is 32 and r 4: 32 / 4, or 32 / sqrt(4). Gaussian A: deviation 1 / r."""
    for name, scaling in (("lora", 8.0), ("dora", 16.0)):
        layers = [m for m in adapted(name).modules() if hasattr(m, "lora_A")]
        assert len(layers) == 14
        assert {layer.scaling["default"] for layer in layers} == {scaling}
        first = torch.cat([layer.lora_A["default"].weight.flatten() for layer in layers])
        # Kaiming as in Hu et al.'s code: uniform up to 1 / sqrt(inputs), so at most 1 / sqrt(32).
        assert (first.abs().max() <= 32**-0.5) == (name == "lora")
        if name == "dora":
            assert first.std().item() == pytest.approx(1 / 4, rel=0.05)  # of 2048 draws


# Reward models.


def rewarded(name: str, folder: Path):
    save_trained(trained(name), folder / "sft", base="x", revision=None)
    start = base(name)
    if name == "full":
        start = type(start).from_pretrained(folder / "sft")
    return new_reward_model(start, adapter(name), folder / "sft", seed=3).eval()


@every_method
def test_reward_model_by_every_method(name: str, tmp_path: Path) -> None:
    model = rewarded(name, tmp_path)
    check_trained(model.classifier, adapter(name).method)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    scores = model(IDS, mask)
    assert scores.std() > 1e-3

    # It reads what the SFT model has learned, but for its output embeddings.
    plain = trained(name)
    bare = plain.get_base_model() if isinstance(plain, PeftModel) else plain
    if name == "prefix":
        states = plain(input_ids=IDS, attention_mask=mask.long(), output_hidden_states=True)
        hidden = states.hidden_states[-1][:, -1]
    else:
        hidden = bare.base_model(input_ids=IDS).last_hidden_state[:, -1]
    torch.testing.assert_close(scores, hidden @ model.head.weight[0], atol=1e-5, rtol=1e-5)

    # Padding on either side changes nothing.
    wide = torch.cat([torch.full((2, 3), 4), IDS, torch.full((2, 2), 4)], dim=1)
    seen = torch.zeros_like(wide, dtype=torch.bool)
    seen[:, 3:-2] = True
    torch.testing.assert_close(model(wide, seen), scores, atol=1e-5, rtol=1e-5)

    scores.sum().backward()
    model.save(tmp_path / "reward", "x", None)
    again = load_reward_model(None if name == "full" else base(name), tmp_path / "reward")
    assert torch.equal(again(IDS, mask), scores.detach())
    assert not any(p.requires_grad for p in again.parameters())
    assert trained_method(tmp_path / "reward") == adapter(name).method


@pytest.mark.parametrize("name", ["houlsby", "bitfit", "top_layers", "prefix"])
def test_an_sft_model_by_another_method_is_refused(name: str, tmp_path: Path) -> None:
    save_trained(trained(name), tmp_path / "sft", base="x", revision=None)
    with pytest.raises(ParentError, match=f"method={adapter(name).method}, the recipe has lora"):
        new_reward_model(base(name), Adapter(), tmp_path / "sft", seed=0)


def test_tensors_that_mean_something_else_are_refused(tmp_path: Path) -> None:
    save_trained(trained("dora"), tmp_path / "sft", base="x", revision=None)
    plain = Adapter(r=4, dora=True)
    with pytest.raises(ParentError, match="rslora=True, the recipe has False"):
        new_reward_model(tiny.llama(), plain, tmp_path / "sft", seed=0)
    assert any("magnitude" in key for key in load_file(tmp_path / "sft" / WEIGHTS))
