"""Loading models and saving adapters."""

import json
import shutil

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from align.adapter_methods import linear_names, lora_config
from align.adapters import save_adapter
from align.errors import InputError
from align.models import base_facts, load_causal_lm, new_llama
from align.recipe import Recipe
from align.recipe_adapter import Adapter
from align.recipe_pretrain import SmallModel
from tests import tiny

LLAMA_LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
IDS = torch.arange(2, 22).view(2, 10)


def recipe(location, **base):
    return Recipe.model_validate({"name": "test", "base": {"id": str(location)} | base, "data": {}})


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def folder(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def small(**changes):
    settings = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 64,
        "max_positions": 64,
    }
    return SmallModel.model_validate(settings | changes)


def test_new_llama_follows_section_and_seed():
    tokenizer = tiny.tokenizer()
    state = torch.get_rng_state()
    model = new_llama(small(), tokenizer, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model), logits(new_llama(small(), tokenizer, seed=3)))
    assert not torch.equal(logits(model), logits(new_llama(small(), tokenizer, seed=4)))
    # 320 tokens x 32, shared with the head; per layer q, o (32 x 32), k, v (32 x 16), three
    # 32 x 64 matrices and two norms of 32; a last norm.
    assert (
        sum(p.numel() for p in model.parameters())
        == 320 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
    )
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 1)


def test_loaded_model_is_the_saved_one_in_evaluation_mode(folder):
    model = load_causal_lm(recipe(folder), str(folder))
    assert not model.training
    assert torch.equal(logits(model), logits(tiny.llama()))


def test_dtype_is_the_recipes(folder):
    model = load_causal_lm(recipe(folder, dtype="bfloat16"), str(folder))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_dropout_is_off_everywhere(tmp_path):
    config = GPT2Config(
        vocab_size=320, n_embd=32, n_layer=1, n_head=2, attn_pdrop=0.5, resid_pdrop=0.5
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load_causal_lm(recipe(tmp_path), str(tmp_path)).train()
    assert torch.equal(logits(model), logits(model))


def test_hostile_generation_config_has_no_effect(folder):
    hostile = {
        "do_sample": True,
        "temperature": 0.01,
        "top_k": 1,
        "repetition_penalty": 5.0,
        "min_new_tokens": 30,
        "forced_eos_token_id": 7,
        "bad_words_ids": [[5]],
    }
    (folder / "generation_config.json").write_text(json.dumps(hostile))
    model = load_causal_lm(recipe(folder), str(folder))
    assert model.generation_config.to_diff_dict().keys() - {"transformers_version"} == {
        "eos_token_id",
        "pad_token_id",
    }
    expected = tiny.llama().generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=8), expected)


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load_causal_lm(recipe(folder), str(folder))
    with pytest.raises(InputError, match="safetensors"):
        base_facts(str(folder), None)


def test_missing_base_is_the_users_mistake(tmp_path):
    with pytest.raises(InputError, match="no-such-org/no-such-model"):
        base_facts("no-such-org/no-such-model", None)
    with pytest.raises(InputError, match="no-such"):
        load_causal_lm(recipe(tmp_path / "no-such"), str(tmp_path / "no-such"))


def test_base_facts_depend_on_content_not_on_place(folder, tmp_path):
    facts = base_facts(str(folder), None)
    elsewhere = tmp_path / "elsewhere" / "base"
    shutil.copytree(folder, elsewhere)
    assert base_facts(str(elsewhere), None).sha256 == facts.sha256
    tiny.llama(seed=1).save_pretrained(elsewhere)
    assert base_facts(str(elsewhere), None).sha256 != facts.sha256


def test_all_linear_is_spelled_out_without_heads(folder):
    assert linear_names(tiny.llama()) == LLAMA_LINEAR
    assert linear_names(tiny.gpt2()) == ["c_attn", "c_fc", "c_proj"]
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    config = lora_config(Adapter(), "SEQ_CLS", classifier)
    assert sorted(config.target_modules) == LLAMA_LINEAR
    assert config.modules_to_save == ["score"]


def test_unknown_target_is_refused():
    with pytest.raises(InputError, match=r"adapter.targets=query: .* it has down_proj"):
        lora_config(Adapter(targets=("q_proj", "query")), "CAUSAL_LM", tiny.llama())


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_saved_adapter_loads_as_it_was(make, tmp_path):
    model = get_peft_model(make(), lora_config(Adapter(r=4), "CAUSAL_LM", make()), "policy")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path / "a", "policy", base="org/model", revision=None)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/model"
    assert settings["target_modules"] == sorted(settings["target_modules"])
    again = PeftModel.from_pretrained(make(), tmp_path / "a")
    assert torch.equal(logits(model.eval()), logits(again.eval()))
    assert not torch.equal(logits(again), logits(make()))


def test_base_made_by_a_stage_is_stored_by_its_relative_path(tmp_path):
    base = tmp_path / "run" / "pretrain" / "model"
    base.mkdir(parents=True)
    model = get_peft_model(tiny.llama(), lora_config(Adapter(), "CAUSAL_LM", tiny.llama()))
    save_adapter(model, tmp_path / "one", base=str(base), revision=None)
    (base.parent / "stage.json").touch()
    save_adapter(model, tmp_path / "run" / "sft" / "model", base=str(base), revision=None)
    stored = [
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        for folder in (tmp_path / "one", tmp_path / "run" / "sft" / "model")
    ]
    assert stored == [str(base), "../../pretrain/model"]


def test_adapter_is_not_written_over_another(tmp_path):
    model = get_peft_model(tiny.llama(), lora_config(Adapter(), "CAUSAL_LM", tiny.llama()))
    save_adapter(model, tmp_path / "a", base="org/model", revision=None)
    with pytest.raises(FileExistsError, match="holds an adapter already"):
        save_adapter(model, tmp_path / "a", base="org/model", revision=None)


@pytest.mark.parametrize("revision", ["0123abcd", None])
def test_an_adapter_names_the_revision_of_its_base(tmp_path, revision):
    model = get_peft_model(tiny.llama(), lora_config(Adapter(), "CAUSAL_LM", tiny.llama()))
    save_adapter(model, tmp_path / "a", base="org/model", revision=revision)
    config = PeftConfig.from_pretrained(str(tmp_path / "a"))
    assert (config.base_model_name_or_path, config.revision) == ("org/model", revision)
