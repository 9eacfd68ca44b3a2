"""Tiny models and tokenizers with random weights, made in seconds from a seed; no downloads."""

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
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


def bert(vocab_size: int = 160, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Return a two-layer BERT (learned positions, two segments) without a pooler, in float32."""
    return _encoder(BertConfig, BertForMaskedLM, vocab_size, seed, changes)


def roberta(vocab_size: int = 160, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Return a two-layer RoBERTa (positions counted from the pad id, one segment) in float32."""
    settings = {"max_position_embeddings": 257, "type_vocab_size": 1}
    return _encoder(RobertaConfig, RobertaForMaskedLM, vocab_size, seed, settings | changes)


def _encoder(
    config: type, model: type, vocab_size: int, seed: int, changes: dict[str, object]
) -> PreTrainedModel:
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    made: PreTrainedModel = model(config(**(settings | changes))).eval()
    return made


def wordpiece(vocab_size: int = 160) -> PreTrainedTokenizerFast:
    """Return a lower-casing WordPiece tokenizer with BERT's special tokens, ids 0 to 4."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False
    )
    pieces.train_from_iterator(TEXT, trainer)
    pad, unknown, first, separator, mask = special
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token=pad,
        unk_token=unknown,
        cls_token=first,
        sep_token=separator,
        mask_token=mask,
    )
