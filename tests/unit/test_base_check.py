"""Which bases are taken: those whose own log-probabilities our passes reproduce."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from align.attention import can_be_packed, is_packed, why_not_packed
from align.base_check import check_base, own_logprobs, probe_texts
from align.errors import InputError
from align.roles import Roles
from tests import tiny

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
GPT_NEO = {"attention_types": [[["global"], 2]], "num_layers": 2, "num_heads": 4}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32}
KINDS = {
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "opt": OPTConfig(**SIZES, **OPT),
    "gpt_neo": GPTNeoConfig(**(SIZES | GPT_NEO)),
    "stablelm": StableLmConfig(**SIZES),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
    "gemma2": Gemma2Config(**SIZES, final_logit_softcapping=5.0),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
}


def make(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(KINDS[kind])).eval()


def check(base, engine):
    texts = probe_texts(320)
    expected = own_logprobs(base, texts)
    check_base(Roles(base, {}, engine=engine), texts, expected)


@pytest.mark.parametrize("engine", ["native", "hf"])
@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "gpt_neox"])
def test_both_engines_know_the_usual_bases(kind, engine):
    check(make(kind), engine)


@pytest.mark.parametrize("make_base", [tiny.llama, tiny.gpt2])
def test_a_wrong_number_is_seen(make_base):
    base, texts = make_base(), probe_texts(320)
    expected = own_logprobs(base, texts)
    by_hand = base(input_ids=torch.tensor([texts[1]])).logits.log_softmax(-1)
    assert expected[1][2] == pytest.approx(by_hand[0, 2, texts[1][3]].item(), abs=1e-5)
    roles = Roles(base, {})
    check_base(roles, texts, expected)
    expected[1][4] += 0.01
    with pytest.raises(InputError, match=r"differ from the model's own by up to 0\.01"):
        check_base(roles, texts, expected)


def test_attention_that_is_not_transformers_own_is_refused():
    with pytest.raises(InputError, match=r"native .*: its attention is not .*; allowed for it: hf"):
        check(make("gpt_neo"), "native")
    check(make("gpt_neo"), "hf")


@pytest.mark.parametrize("engine", ["native", "hf"])
@pytest.mark.parametrize("kind", ["granite", "cohere", "gemma2"])
def test_scaled_and_capped_logits_are_refused(kind, engine):
    base = make(kind)
    if engine == "native" and why_not_packed(base.config):
        pytest.skip("refused before")
    with pytest.raises(InputError, match="differ from the model's own"):
        check(base, engine)


@pytest.mark.parametrize("kind", ["stablelm", "gpt_neo"])
def test_a_base_that_cannot_have_our_attention_keeps_its_own(kind):
    base = make(kind)
    before = base.config._attn_implementation
    expected = base(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert not can_be_packed(base)
    assert base.config._attn_implementation == before
    assert base(input_ids=torch.tensor([[5, 6, 7]])).logits.equal(expected)
    llama = tiny.llama()
    assert can_be_packed(llama)
    assert not is_packed(llama)


def test_attention_that_takes_our_name_but_no_layout_is_refused():
    with pytest.raises(InputError, match=r"native .*: its attention is not told .* for it: hf"):
        check(make("stablelm"), "native")
    check(make("stablelm"), "hf")


def test_opt_whose_layers_lie_deeper_is_known_to_hf():
    check(make("opt"), "hf")
