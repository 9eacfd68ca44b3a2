"""The tokenizer of all stages: its chat template, its pad token, what ends a turn, its hashes.

One tokenizer with one template serves every stage of a run, so that a prompt is the same ids in
supervised tuning, in the reward model and in PPO.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from align.errors import InputError
from align.recipe import TokenizerSection
from data.records import Record, Text

PAD, END = "<|pad|>", "<|end|>"

# The format of the Anthropic transcripts. An answer starts with the space after the colon.
_TURNS = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% else %}{{ '\\n\\nAssistant: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
DEFAULT_TEMPLATE = _TURNS
DEFAULT_TEMPLATE_WITH_BOS = "{{ bos_token }}" + _TURNS

# For encoders: as above, with each answer, and so the last one, between two separators.
ENCODER_TEMPLATE = (
    "{{ cls_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% else %}{{ '\\n\\nAssistant:' + sep_token + message['content'] + sep_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' + sep_token }}{% endif %}"
)

# Byte values that never occur in UTF-8, as byte-level vocabularies write them: no text holds them.
_UNUSED_BYTES = ("\u00ff", "\u00fe", "\u00c0", "\u00c1")


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, section: TokenizerSection
) -> PreTrainedTokenizerBase:
    """Give the tokenizer a chat template and a pad token of its own; changes and returns it.

    The template is the recipe's, else the tokenizer's own, else ``DEFAULT_TEMPLATE``. The pad token
    is the recipe's, else the tokenizer's own, else an unused one; it never ends a turn, because
    libraries that look for padding by id would then lose the end of every answer.

    Raises:
        InputError: the template cannot be used (see ``check_template``) or no token is left to pad
            with.
    """
    if section.chat_template is not None:
        tokenizer.chat_template = _read_template(section.chat_template)
    elif not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise InputError(
                "the tokenizer has neither a chat template nor an end-of-text token; give"
                " tokenizer.chat_template, a jinja file that ends answers with a special token"
            )
        with_bos = tokenizer.bos_token_id is not None and (
            tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        )
        tokenizer.chat_template = DEFAULT_TEMPLATE_WITH_BOS if with_bos else DEFAULT_TEMPLATE
    check_template(tokenizer)
    tokenizer.add_special_tokens({"pad_token": _pad_token(tokenizer, section.pad_token)})
    return tokenizer


def prepare_encoder_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give an encoder's tokenizer ``ENCODER_TEMPLATE`` if it has no template; changes, returns it.

    Raises:
        InputError: it is no encoder's: it has no token that classifies, separates or pads; or its
            own template cannot be used.
    """
    named = ("cls_token", "sep_token", "pad_token")
    missing = [name for name in named if getattr(tokenizer, name, None) is None]
    if missing:
        raise InputError(
            f"its tokenizer has no {' and no '.join(missing)}; allowed: encoders, BERT and its like"
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = ENCODER_TEMPLATE
    check_template(tokenizer)
    return tokenizer


def train_tokenizer(texts: Iterable[str], section: TokenizerSection) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: pad id 0, end-of-turn id 1, then bytes and merges.

    Raises:
        InputError: ``vocab_size`` leaves no room for the 256 bytes and the two special tokens.
    """
    bpe = _train_bpe(texts, section, [PAD, END])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=END)
    prepare_tokenizer(tokenizer, section)
    return tokenizer


def train_encoder_tokenizer(
    texts: Iterable[str], section: TokenizerSection
) -> PreTrainedTokenizerFast:
    """Train the same for an encoder, with BERT's special tokens: ids 0 to 3, then bytes and merges.

    Raises:
        InputError: ``vocab_size`` leaves no room for the 256 bytes and the special tokens.
    """
    special = {"pad_token": PAD, "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    bpe = _train_bpe(texts, section, [*special.values()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    prepare_encoder_tokenizer(tokenizer)
    return tokenizer


def _train_bpe(texts: Iterable[str], section: TokenizerSection, special: list[str]) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(special)
    if section.vocab_size is None or section.vocab_size < smallest:
        raise InputError(
            f"tokenizer.vocab_size={section.vocab_size}: a byte-level tokenizer needs at least"
            f" {smallest} (256 bytes and {len(special)} special tokens)"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=section.vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def training_text(record: Record) -> str:
    """Return what a tokenizer is trained on: the record's words in the default template's turns."""
    if isinstance(record, Text):
        return record.text
    marker = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    return "".join(marker[message.role] + message.content for message in record.messages)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the tokens that steer the model, ``{text: id}``; text from data must not make them."""
    special = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return special | dict(named)


def end_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that end an answer: the template's first, then the end of text if it differs.

    Raises:
        InputError: the template ends an assistant turn with no special token, so that a model
            trained on it would never stop.
    """
    answer = "quartz"
    text = render_text(tokenizer, [*_QUESTION, {"role": "assistant", "content": answer}])
    tail = text[text.rfind(answer) + len(answer) :]
    special = set(special_tokens(tokenizer).values())
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    found = [i for i in ids if i in special][:1]
    if answer not in text or not found:
        raise InputError(
            f"the chat template ends an assistant turn with {tail!r}, which holds no special token;"
            " a model trained on it would never stop: end the turn with the end-of-text token"
        )
    eos = tokenizer.eos_token_id
    return (*found, eos) if eos is not None and eos not in found else tuple(found)


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, named: int | Sequence[int] | None
) -> tuple[int, ...]:
    """Return the ids at which a sampled response ends: ``end_ids``, and those that the base names.

    Models like Llama 3 have several; an answer that one of them ends goes on as garbage else.

    Args:
        named: ``eos_token_id`` of the base's configuration. What is no special token of the
            tokenizer is left out: an ordinary word must not end an answer.
    """
    ends = end_ids(tokenizer)
    others = [named] if isinstance(named, int) else list(named or ())
    special = set(special_tokens(tokenizer).values())
    return (*ends, *(i for i in dict.fromkeys(others) if i in special and i not in ends))


_QUESTION = [{"role": "user", "content": "granite"}]
_PROBE = [
    *_QUESTION,
    {"role": "assistant", "content": "basalt"},
    {"role": "user", "content": "marble"},
    {"role": "assistant", "content": "quartz"},
]


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check on a conversation of two exchanges that the template can be learned from.

    Raises:
        InputError: it fails, writes the beginning-of-text token twice, leaves an answer without an
            end token, or writes a conversation differently once it goes on (then no prompt is the
            beginning of its own conversation, and nothing says which tokens are the answer).
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; prepare_tokenizer gives it one")
    full = render_text(tokenizer, _PROBE)
    ends = set(end_ids(tokenizer))
    ids = tokenizer(full, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise InputError(
            "the chat template writes the beginning-of-text token twice; write it once"
        )
    for k in (1, 3):
        prompt = render_text(tokenizer, _PROBE[:k], generation_prompt=True)
        answer = _PROBE[k]["content"]
        if not full.startswith(prompt) or answer not in full[len(prompt) :]:
            raise InputError(
                "the chat template is not prefix-preserving: a prompt with its generation prompt,"
                f" {prompt!r}, and then its answer do not begin the conversation {full!r};"
                " give another one in tokenizer.chat_template"
            )
        turn = full[len(prompt) :].partition(answer)[2].partition("marble")[0]
        if not ends.intersection(tokenizer(turn, add_special_tokens=False)["input_ids"]):
            raise InputError(
                f"the chat template ends answer {k // 2 + 1} of 2 with {turn!r}, without an end"
                " token; end every assistant turn with it"
            )


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    generation_prompt: bool = False,
) -> str:
    """Write a conversation by the chat template.

    Raises:
        InputError: the template refuses the conversation or is broken.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            return_dict=False,
        )
    except TemplateError as error:
        raise InputError(f"the chat template fails: {error}") from None
    assert isinstance(text, str)
    return text


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what decides ids: vocabulary, merges, splitting rules, special tokens. Not the template.

    Padding and truncation settings and the post-processor are left out: calls change the first two,
    and we never let the tokenizer add tokens of its own.
    """
    facts: dict[str, Any] = {
        "special": special_tokens(tokenizer),
        "ids": [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id],
        "vocabulary": tokenizer.get_vocab(),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        parts = ("model", "normalizer", "pre_tokenizer", "decoder")
        facts |= {name: state[name] for name in parts}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash the chat template."""
    template: str = tokenizer.get_chat_template()
    return hashlib.sha256(template.encode()).hexdigest()


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"tokenizer.chat_template={path}: cannot be read: {error}") from None


def _pad_token(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> str:
    ends = end_ids(tokenizer)
    vocabulary = tokenizer.get_vocab()
    if wanted is not None:
        if wanted not in vocabulary:
            raise InputError(f"tokenizer.pad_token={wanted}: the vocabulary has no such token")
        if vocabulary[wanted] in ends:
            raise InputError(
                f"tokenizer.pad_token={wanted}: ends a turn, so it cannot pad; leave it out to have"
                " one chosen"
            )
        return wanted
    special = sorted(special_tokens(tokenizer), key=vocabulary.__getitem__)
    candidates = [
        tokenizer.pad_token,
        *(token for token in special if "pad" in token.lower()),
        *(token for token in special if "reserved" in token.lower()),
        tokenizer.unk_token,
        *_UNUSED_BYTES,
    ]
    for token in candidates:
        if token is not None and token in vocabulary and vocabulary[token] not in ends:
            return str(token)
    raise InputError(
        "the tokenizer has no token to pad with besides those that end a turn"
        f" ({tokenizer.convert_ids_to_tokens(list(ends))}); name an existing, rare token in"
        " tokenizer.pad_token"
    )
