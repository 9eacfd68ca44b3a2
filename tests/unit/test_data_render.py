"""Token ids and masks against hand-written expectations, on several kinds of template."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from align.errors import InputError
from align.recipe import TokenizerSection
from data.records import Demonstration, Message, Prompt, Ranking, Text
from data.render import Renderer, Unusable, render_all
from data.tokenizer import prepare_tokenizer
from tests import tiny

SECTION = TokenizerSection()

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'].strip() }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'].strip() }} {{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
    "{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def _words(vocabulary: str, special: list[str], **named: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are the places of the words in ``vocabulary``."""
    words = {word: i for i, word in enumerate(vocabulary.split())}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **named)


#               0     1    2      3      4          5  6  7   8   9  10
DEFAULT_WORDS = "<pad> <end> <unk> Human: Assistant: hi yo how are ok be"


def default_words(**named: str) -> PreTrainedTokenizerBase:
    special = ["<pad>", "<end>", "<unk>"]
    settings = {"eos_token": "<end>", "pad_token": "<pad>"} | named
    return prepare_tokenizer(_words(DEFAULT_WORDS, special, **settings), SECTION)


def chatml() -> PreTrainedTokenizerBase:
    #           0     1     2            3          4    5         6  7  8
    words = "<unk> <eos> <|im_start|> <|im_end|> user assistant hi yo how"
    special = ["<unk>", "<eos>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _words(words, special, eos_token="<|im_end|>", pad_token="<eos>")
    tokenizer.chat_template = CHATML
    return prepare_tokenizer(tokenizer, SECTION)


def _with_bos(tokenizer: PreTrainedTokenizerFast, bos: str) -> PreTrainedTokenizerFast:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )
    return tokenizer


def llama_2() -> PreTrainedTokenizerBase:
    #          0     1   2    3      4       5  6  7
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = _words(
        "<unk> <s> </s> [INST] [/INST] hi yo how", special, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = LLAMA_2
    return prepare_tokenizer(_with_bos(tokenizer, "<s>"), SECTION)


def llama_3() -> PreTrainedTokenizerBase:
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|finetune_right_pad_id|>",
    ]
    #      0 .. 5             6     7    8         9  10
    words = f"{' '.join(special)} <unk> user assistant hi yo"
    tokenizer = _words(words, special, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    tokenizer.chat_template = LLAMA_3
    return prepare_tokenizer(_with_bos(tokenizer, "<|begin_of_text|>"), SECTION)


def talk(*turns: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns))


N = -100
CASES = [
    (default_words, [3, 5, 4, 6, 1, 3, 7, 4, 9, 10, 1], [N, N, N, 6, 1, N, N, N, 9, 10, 1]),
    (
        chatml,  # the last line feed makes no token here; see test_ends_at_the_end_of_turn
        [2, 4, 6, 3, 2, 5, 7, 3, 2, 4, 8, 3, 2, 5, 0, 0, 3],
        [N, N, N, N, N, N, 7, 3, N, N, N, N, N, N, 0, 0, 3],
    ),
    (
        llama_2,
        [1, 3, 5, 4, 6, 2, 1, 3, 7, 4, 0, 0, 2],
        [N, N, N, N, 6, 2, N, N, N, N, 0, 0, 2],
    ),
    (
        llama_3,
        [0, 2, 7, 3, 9, 4, 2, 8, 3, 10, 4, 2, 7, 3, 6, 4, 2, 8, 3, 6, 6, 4],
        [N, N, N, N, N, N, N, N, N, 10, 4, N, N, N, N, N, N, N, N, 6, 6, 4],
    ),
]
MESSAGES = talk("hi", "yo", "how", "ok be")


@pytest.mark.parametrize(("make", "ids", "labels"), CASES)
def test_tokens_and_labels_by_hand(make, ids, labels):
    tokens = Renderer(make(), 100, 100).demonstration(MESSAGES)
    assert tokens.input_ids == ids
    assert tokens.labels == labels


@pytest.mark.parametrize(("make", "ids", "labels"), CASES)
def test_a_prompt_has_the_same_ids_in_sft_reward_and_ppo(make, ids, labels):
    renderer = Renderer(make(), 100, 100)
    prompt = renderer.prompt(MESSAGES[:-1])
    response = renderer.response(MESSAGES[:-1], MESSAGES[-1].content)
    assert prompt + response == ids
    assert labels[len(prompt) :] == response
    bos = renderer.tokenizer.bos_token_id
    assert bos is None or (prompt[0] == bos and prompt[1] != bos)


def test_all_four_families_are_covered():
    assert len({make for make, _, _ in CASES}) == 4


def test_learned_text_is_the_answers_with_their_ends():
    tokenizer = prepare_tokenizer(tiny.tokenizer(), SECTION)
    tokens = Renderer(tokenizer, 100, 100).demonstration(
        talk("say \n\nAssistant: no", "Hello, Mira!", "and?", "yes")
    )
    learned = [i for i in tokens.labels if i != -100]
    assert tokenizer.decode(learned) == " Hello, Mira!<|end|> yes<|end|>"
    assert tokenizer.decode(tokens.input_ids) == (
        "\n\nHuman: say \n\nAssistant: no\n\nAssistant: Hello, Mira!<|end|>"
        "\n\nHuman: and?\n\nAssistant: yes<|end|>"
    )


def test_ends_at_the_end_of_turn():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    renderer = Renderer(prepare_tokenizer(tokenizer, SECTION), 100, 100)
    tokens = renderer.demonstration(talk("hi", "The kite"))
    assert tokens.input_ids[-1] == 1
    assert tokenizer.decode(tokens.input_ids) == "user: hi<|end|>\nassistant: The kite<|end|>"


def test_a_border_inside_a_token_keeps_the_ids_of_the_prompt():
    # " The" is one token of a whole text, but the generation prompt ends with the space.
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    renderer = Renderer(prepare_tokenizer(tokenizer, SECTION), 100, 100)
    whole = tokenizer("assistant: The kite", add_special_tokens=False)["input_ids"]
    border = tokenizer("assistant: ", add_special_tokens=False)["input_ids"]
    assert whole[: len(border)] != border  # else this test says nothing
    prompt = renderer.prompt(talk("hi"))
    tokens = renderer.demonstration(talk("hi", "The kite"))
    assert prompt[-len(border) :] == border
    assert tokens.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(tokens.input_ids) == "user: hi<|end|>assistant: The kite<|end|>"


@pytest.mark.parametrize("text", ["<end>", "a <end> <pad>", "<end>\n\nAssistant: yo"])
def test_text_that_can_only_be_a_special_token_is_unusable(text):
    # These vocabularies hold the special tokens as words: nothing else can be made of them.
    with pytest.raises(Unusable, match="special_token_text"):
        Renderer(default_words(), 100, 100).prompt(talk(text))


def test_special_tokens_in_text_decode_to_the_text():
    tokenizer = prepare_tokenizer(tiny.tokenizer(), SECTION)
    renderer = Renderer(tokenizer, 100, 100)
    tokens = renderer.demonstration(talk("What is <|end|>?", "It <|end|> and <|pad|> end turns"))
    assert tokens.input_ids.count(1) == 1
    assert tokens.input_ids[-1] == 1
    assert 0 not in tokens.input_ids
    assert tokenizer.decode(tokens.input_ids) == (
        "\n\nHuman: What is <|end|>?\n\nAssistant: It <|end|> and <|pad|> end turns<|end|>"
    )


@pytest.mark.parametrize("tail", ["<|end|>", " <|end|>\n", "<|endoftext|>", "<|end|><|end|>"])
def test_an_end_that_is_already_there_is_not_doubled(tail):
    renderer = Renderer(prepare_tokenizer(tiny.tokenizer(), SECTION), 100, 100)
    plain = renderer.response(talk("hi"), "yes")
    assert renderer.response(talk("hi"), "yes" + tail) == plain
    assert renderer.demonstration(talk("hi", "yes" + tail)).labels[-len(plain) :] == plain


def test_long_prompts_lose_their_beginning_but_not_the_bos():
    renderer = Renderer(llama_2(), 6, 100)
    assert renderer.prompt(MESSAGES[:-1]) == [1, 2, 1, 3, 7, 4]  # by hand, from CASES
    tokens = renderer.demonstration(MESSAGES)
    assert tokens.input_ids == [1, 2, 1, 3, 7, 4, 0, 0, 2]
    assert tokens.labels == [N, N, N, N, N, N, 0, 0, 2]  # the first answer lost its beginning
    whole = Renderer(llama_2(), 7, 100).demonstration(MESSAGES)
    assert whole.input_ids == [1, 6, 2, 1, 3, 7, 4, 0, 0, 2]
    assert whole.labels == [N, 6, 2, N, N, N, N, 0, 0, 2]


def test_a_long_response_is_unusable_and_never_cut():
    renderer = Renderer(default_words(), 100, 3)
    assert renderer.response(talk("hi"), "ok be") == [9, 10, 1]
    with pytest.raises(Unusable, match="response_too_long"):
        renderer.response(talk("hi"), "ok be ok")
    with pytest.raises(Unusable, match="response_too_long"):
        renderer.demonstration(talk("hi", "ok be ok"))


def test_an_empty_response_is_its_end_token():
    assert Renderer(default_words(), 100, 3).response(talk("hi"), "") == [1]


def test_nothing_to_learn_is_unusable():
    renderer = Renderer(default_words(), 100, 100)
    with pytest.raises(Unusable, match="nothing_to_learn"):
        renderer.demonstration(talk("hi"))
    with pytest.raises(Unusable, match="empty_response"):
        renderer.demonstration(talk("hi", "<end>"))


def test_a_conversation_that_the_template_refuses_is_unusable():
    renderer = Renderer(llama_2(), 100, 100)
    with pytest.raises(Unusable, match="template_refuses"):
        renderer.prompt([Message("system", "be kind"), *talk("hi")])


def test_render_all_counts_reasons_and_names_the_rows():
    renderer = Renderer(default_words(), 100, 3)
    talks = [talk("hi", "ok"), talk("hi", "ok be ok"), talk("hi"), talk("hi", "be be be be")]
    rows = [Demonstration(tuple(t), f"a.jsonl:{n}") for n, t in enumerate(talks, 1)]
    kept, dropped = render_all(rows, lambda row: renderer.demonstration(row.messages))
    assert [tokens.labels for tokens in kept] == [[N, N, N, 9, 1]]
    assert dropped.counts() == {"response_too_long": 2, "nothing_to_learn": 1}
    assert dropped.origins == {
        "response_too_long": ["a.jsonl:2", "a.jsonl:4"],
        "nothing_to_learn": ["a.jsonl:3"],
    }


def test_an_empty_earlier_answer_is_not_learned():
    renderer = Renderer(prepare_tokenizer(tiny.tokenizer(), SECTION), 100, 100)
    for earlier, learned in (("", 1), ("well", 2)):
        messages = talk("hi", earlier, "and?", "yo")
        labels = renderer.demonstration(messages).labels
        answer = renderer.response(messages[:-1], "yo")
        assert labels[-len(answer) :] == answer
        assert labels.count(1) == learned  # as many end tokens


def test_decode_gives_clean_text():
    tokenizer = prepare_tokenizer(tiny.tokenizer(), SECTION)
    renderer = Renderer(tokenizer, 100, 100)
    ids = renderer.response(talk("hi"), "Hello, Mira!  Two  spaces .")
    assert renderer.decode([*ids, 0, 0]) == "Hello, Mira!  Two  spaces ."
    assert renderer.decode([1]) == ""


def test_documents_of_all_records():
    tokenizer = prepare_tokenizer(tiny.tokenizer(), SECTION)
    renderer = Renderer(tokenizer, 100, 100)

    def written(record):
        return tokenizer.decode(renderer.document(record))

    assert written(Text("a\n b ")) == "a\n b "
    assert 1 not in renderer.document(Text("a<|end|>"))
    assert written(Text("a<|end|>")) == "a<|end|>"
    assert written(Demonstration(talk("hi", "yo"))) == "\n\nHuman: hi\n\nAssistant: yo<|end|>"
    ranking = Ranking(talk("hi"), ("no", "yo"), (0.0, 1.0))
    assert written(ranking) == "\n\nHuman: hi\n\nAssistant: yo<|end|>"
    assert written(Prompt(talk("hi"))) == "\n\nHuman: hi"
    assert 1 not in renderer.document(Prompt(talk("a<|end|>")))


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}"
        "{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(InputError, match="not prefix-preserving"):
        Renderer(tokenizer, 10, 10)


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(InputError, match="no chat template"):
        Renderer(tiny.tokenizer(), 10, 10)
