"""Tiny models and tokenizers with random weights, made in seconds from a seed; no downloads."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

TEXT = [
    "\n\nHuman: What is the capital of France?\n\nAssistant: The capital of France is Paris.",
    "\n\nHuman: Say hello to Mira.\n\nAssistant: Hello, Mira! How are you today?",
    "Tom has a red kite and two blue boats. The kite is in the garden.",
]

PAD, END = "<|pad|>", "<|end|>"


def tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with a pad (id 0) and an end-of-turn token (id 1)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=END)


def llama(vocab_size: int = 320, seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Return a two-layer Llama (rotary positions, grouped-query attention) in float32."""
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.2,  # large, so that mistakes show in the outputs
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def gpt2(vocab_size: int = 320, seed: int = 0) -> GPT2LMHeadModel:
    """Return a two-layer GPT-2 (learned positions: wrong position ids show) in float32."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.2,
    )
    return GPT2LMHeadModel(config).eval()
