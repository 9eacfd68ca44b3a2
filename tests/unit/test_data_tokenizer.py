"""Templates, pad tokens, ends of turns and hashes of tokenizers."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from align.errors import InputError
from align.recipe import TokenizerSection
from data.records import Demonstration, Message, Text
from data.tokenizer import (
    end_ids,
    prepare_tokenizer,
    stop_ids,
    template_sha256,
    tokenizer_sha256,
    train_tokenizer,
    training_text,
)
from tests import tiny

SECTION = TokenizerSection()
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]


def _byte_level(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, the special tokens before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def test_default_template():
    tokenizer = prepare_tokenizer(tiny.tokenizer(), SECTION)
    text = tokenizer.apply_chat_template(
        [*CHAT, {"role": "assistant", "content": "yo"}, CHAT[1]],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == "Be kind.\n\nHuman: hi\n\nAssistant: yo<|end|>\n\nHuman: hi\n\nAssistant:"
    assert end_ids(tokenizer) == (1,)


def test_own_template_is_kept_and_the_recipe_overrides_it(tmp_path):
    own = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = own
    assert prepare_tokenizer(tokenizer, SECTION).chat_template == own
    file = tmp_path / "template.jinja"
    file.write_text("Chat: " + own, encoding="utf-8")
    section = TokenizerSection(chat_template=str(file))
    assert prepare_tokenizer(tokenizer, section).chat_template == "Chat: " + own


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "never stop"),
        ("{% for m in messages %}", "the chat template fails"),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ eos_token }}",
            "not prefix-preserving",
        ),
        (
            "{% for m in messages %}{{ m['content'] }}{% if loop.last and m['role'] =="
            " 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
            "without an end token",
        ),
    ],
)
def test_templates_that_cannot_be_learned_from_are_refused(template, message):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=message):
        prepare_tokenizer(tokenizer, SECTION)


def test_a_doubled_bos_is_refused():
    tokenizer = _byte_level("<s>", "</s>", "<unk>", bos_token="<s>", eos_token="</s>")
    body = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + body
    with pytest.raises(InputError, match="beginning-of-text token twice"):
        prepare_tokenizer(tokenizer, SECTION)


def test_a_missing_template_file_is_named(tmp_path):
    section = TokenizerSection(chat_template=str(tmp_path / "none.jinja"))
    with pytest.raises(InputError, match=r"none\.jinja: cannot be read"):
        prepare_tokenizer(tiny.tokenizer(), section)


def test_no_template_and_no_end_is_refused():
    with pytest.raises(InputError, match="neither a chat template nor an end-of-text token"):
        prepare_tokenizer(_byte_level("<unk>"), SECTION)


@pytest.mark.parametrize(
    ("special", "named", "pad"),
    [
        (("<pad>", "</s>"), {"eos_token": "</s>", "pad_token": "<pad>"}, "<pad>"),
        # pad == eos, as many published tokenizers have it
        (
            ("</s>", "<unk>"),
            {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"},
            "<unk>",
        ),
        (("</s>", "<|padding|>"), {"eos_token": "</s>", "pad_token": "</s>"}, "<|padding|>"),
        (("</s>", "<|reserved_0|>"), {"eos_token": "</s>"}, "<|reserved_0|>"),
        # GPT-2 has nothing else: a byte that no UTF-8 text holds
        (("</s>",), {"eos_token": "</s>", "unk_token": "</s>"}, "\u00ff"),
    ],
)
def test_the_pad_token_never_ends_a_turn(special, named, pad):
    tokenizer = prepare_tokenizer(_byte_level(*special, **named), SECTION)
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id not in end_ids(tokenizer)
    assert len(tokenizer) == 256 + len(special)  # nothing was added


def test_the_recipe_names_the_pad_token():
    def prepare(pad_token):
        tokenizer = _byte_level("</s>", "<x>", eos_token="</s>")
        return prepare_tokenizer(tokenizer, TokenizerSection(pad_token=pad_token))

    assert prepare("<x>").pad_token_id == 1
    with pytest.raises(InputError, match="pad_token=</s>: ends a turn"):
        prepare("</s>")
    with pytest.raises(InputError, match="pad_token=<y>: the vocabulary has no such token"):
        prepare("<y>")


def test_end_ids_are_the_templates_and_the_end_of_text():
    tokenizer = _byte_level("<eos>", "<|im_end|>", "<|im_start|>", "<unk>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert end_ids(tokenizer) == (1, 0)


def test_t28_a_response_ends_where_the_template_the_tokenizer_or_the_base_says():
    tokenizer = prepare_tokenizer(tiny.tokenizer(), TokenizerSection())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom|>", "<|text|>"]})
    (eom, text), word = tokenizer.convert_tokens_to_ids(["<|eom|>", "<|text|>"]), 40
    ends = end_ids(tokenizer)
    assert ends == (1,)
    assert stop_ids(tokenizer, None) == stop_ids(tokenizer, 1) == ends
    assert stop_ids(tokenizer, eom) == (1, eom)
    assert stop_ids(tokenizer, [text, 1, word, eom, text, 10**6]) == (1, text, eom)


def test_train_tokenizer():
    tokenizer = train_tokenizer(tiny.TEXT, TokenizerSection(vocab_size=300))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 300)
    text = "any bytes: caf\u00e9 \u4f60\u597d"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    again = train_tokenizer(tiny.TEXT, TokenizerSection(vocab_size=300))
    assert tokenizer_sha256(again) == tokenizer_sha256(tokenizer)
    with pytest.raises(InputError, match="at least 258"):
        train_tokenizer(tiny.TEXT, TokenizerSection(vocab_size=257))


def test_training_text():
    messages = (Message("user", "hi"), Message("assistant", "yo"))
    assert training_text(Demonstration(messages)) == "\n\nHuman: hi\n\nAssistant: yo"
    assert training_text(Text("plain")) == "plain"


def test_hashes_survive_saving_and_use_but_see_changes(tmp_path):
    tokenizer = prepare_tokenizer(tiny.tokenizer(), SECTION)
    before = tokenizer_sha256(tokenizer), template_sha256(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded(["a", "bc"], padding=True, truncation=True, max_length=2)
    assert (tokenizer_sha256(loaded), template_sha256(loaded)) == before
    loaded.chat_template = loaded.chat_template.replace("Human", "User")
    assert tokenizer_sha256(loaded) == before[0]
    assert template_sha256(loaded) != before[1]
    loaded.pad_token = "<|end|>"
    assert tokenizer_sha256(loaded) != before[0]
    assert tokenizer_sha256(prepare_tokenizer(tiny.tokenizer(300), SECTION)) != before[0]


def test_hash_of_a_padding_byte_survives_saving(tmp_path):
    tokenizer = prepare_tokenizer(_byte_level("</s>", eos_token="</s>"), SECTION)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_sha256(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_sha256(tokenizer)
