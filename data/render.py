"""Records to token ids: the only place where a conversation becomes numbers.

Every stage renders here, so that a prompt has the same ids in all of them. Which tokens are an
answer is known from construction (a prompt's ids are the beginning of its conversation's ids), not
from searching for markers. Text from data never becomes a control token, whatever it holds.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from align.errors import InputError
from data.lost import LostRows
from data.records import Labelled, Message, Prompt, Record, Text, as_demonstration
from data.tokenizer import check_template, end_ids, render_text, special_tokens

Row = TypeVar("Row", bound=Record)
Rendered = TypeVar("Rendered")

IGNORED = -100  # torch's cross entropy leaves such labels out

# Stands for a special token's text inside a message while the template is applied.
_PRIVATE = 0xF0000
_HELD_BACK = re.compile("[\U000f0000-\U000ffffd]")


class Unusable(Exception):
    """A row that cannot be learned from. ``reason`` is the word it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Tokens:
    """One conversation: ``labels`` are the ids where they are learned, else -100."""

    input_ids: list[int]
    labels: list[int]


class Renderer:
    """Renders conversations by the tokenizer's chat template, within two lengths in tokens.

    A prompt that is too long loses its beginning (not its beginning-of-text or [CLS] token); a
    response is never cut, because a model that sees cut answers does not learn to stop: such rows
    are Unusable.

    Raises:
        InputError: the tokenizer's template cannot be used (``data.tokenizer.check_template``).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        max_response_tokens: int,
    ) -> None:
        check_template(tokenizer)
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.end_ids = end_ids(tokenizer)
        self._special = special_tokens(tokenizer)
        self._control_ids = set(self._special.values()) - {tokenizer.unk_token_id}
        self._control_ids |= set(self.end_ids)
        longest_first = sorted(self._special, key=len, reverse=True)
        self._literal = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._held_back = {text: chr(_PRIVATE + i) for i, text in enumerate(longest_first)}
        self._literals = {char: text for text, char in self._held_back.items()}
        # Some published answers end with GPT-2's end of text, written out.
        endings = {*tokenizer.convert_ids_to_tokens(list(self.end_ids)), "<|endoftext|>"}
        # Responses to one prompt come one after another: its turns are written and encoded once.
        self._write = lru_cache(maxsize=256)(self._write_turns)
        self._encode = lru_cache(maxsize=256)(self._encode_text)
        ending = "|".join(map(re.escape, sorted(endings)))
        self._ending = re.compile(rf"(?:\s*(?:{ending}))+\s*\Z")

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids after which the model answers, the last ``max_prompt_tokens`` of them.

        Raises:
            Unusable: the template cannot write the conversation.
        """
        assert messages[-1].role != "assistant", "a prompt ends before the answer"
        ids, _ = self._ids(tuple(messages))
        return self._cut(ids)

    def demonstration(self, messages: Sequence[Message]) -> Tokens:
        """Return the conversation up to its last end-of-turn token.

        Learned are all assistant turns, each with the token that ends it, except empty ones and
        those whose beginning was cut off. The ids before the last answer are those of ``prompt``.

        Raises:
            Unusable: ``nothing_to_learn``, ``empty_response`` or ``response_too_long`` (of the last
                answer), or the template cannot write the conversation.
        """
        if not messages or messages[-1].role != "assistant":
            raise Unusable("nothing_to_learn")
        if not self._ending.sub("", messages[-1].content).strip():
            raise Unusable("empty_response")
        ids, turns = self._ids(tuple(messages))
        last, end = turns[-1]
        answer = ids[last:end]
        self._check_length(answer)
        prompt = self._cut(ids[:last])
        labels = [IGNORED] * last
        answers = [message.content for message in messages if message.role == "assistant"]
        for (start, stop), text in zip(turns[:-1], answers[:-1], strict=True):
            if text and start >= last - len(prompt) + self._leading(ids):
                labels[start:stop] = ids[start:stop]
        return Tokens(prompt + answer, labels[last - len(prompt) :] + answer)

    def response(self, messages: Sequence[Message], response: str) -> list[int]:
        """Return the ids that follow ``prompt(messages)``, the end-of-turn id last.

        Raises:
            Unusable: ``response_too_long``, or the template cannot write the conversation.
        """
        ids, turns = self._ids((*messages, Message("assistant", response)))
        start, stop = turns[-1]
        self._check_length(ids[start:stop])
        return ids[start:stop]

    def labelled(self, record: Labelled) -> tuple[list[int], list[int]]:
        """Return the ids of a labelled row: two texts', or prompt's and response's; the second may
        be none.

        Texts stand as a tokenizer for pairs of texts has them, BERT's for one: what begins a text,
        then each with the id that ends a turn (an encoder's separator). The first is cut like a
        prompt, the second never.

        Raises:
            Unusable: ``special_token_text``, or see ``response``.
        """
        if record.messages:
            return self.prompt(record.messages), self.response(record.messages, *record.texts)
        first, *second = [[*self._split_up(text), self.end_ids[0]] for text in record.texts]
        for ids in second:
            self._check_length(ids)
        begins = self.tokenizer.cls_token_id, self.tokenizer.bos_token_id
        start = [i for i in begins if i is not None][:1]
        return self._cut(start + first), [i for ids in second for i in ids]

    def document(self, record: Record) -> list[int]:
        """Return the ids of any record, to model as language.

        Text is not cut, nor is a prompt, which stands without what asks for an answer; of a ranking
        it is the demonstration with the best response.

        Raises:
            Unusable: ``special_token_text``, or see ``demonstration``.
        """
        assert not isinstance(record, Labelled)
        if isinstance(record, Text):
            return self._split_up(record.text)
        if isinstance(record, Prompt):
            return self._encode(self._write(record.messages))[:]
        return self.demonstration(as_demonstration(record).messages).input_ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return a response's text: no special tokens, no white space at its ends."""
        kept = [i for i in ids if i not in self.end_ids and i != self.tokenizer.pad_token_id]
        text = self.tokenizer.decode(
            kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text.strip()

    def _ids(self, messages: tuple[Message, ...]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return all ids, and start and stop of every assistant turn's answer in them."""
        turns = [k for k, message in enumerate(messages) if message.role == "assistant"]
        prompts = [self._write(messages[:k], generation_prompt=True) for k in turns]
        answered = bool(messages) and messages[-1].role == "assistant"
        ids: list[int] = []
        known = ""
        starts: list[int] = []
        for text in [*prompts, self._write(messages, generation_prompt=not answered)]:
            ids = self._extend(ids, known, text)
            known = text
            starts.append(len(ids))
        bos = self.tokenizer.bos_token_id
        assert bos is None or ids[:2] != [bos, bos], "the beginning-of-text token is doubled"
        spans = []
        for start, limit in pairwise(starts):
            stop = next((i for i in range(start, limit) if ids[i] in self.end_ids), None)
            if stop is None:
                raise Unusable("answer_without_end")
            spans.append((start, stop + 1))
        return ids, spans

    def _extend(self, ids: list[int], known: str, text: str) -> list[int]:
        """Return the ids of ``text``, whose beginning ``known`` has the ids ``ids``."""
        if not text.startswith(known):
            raise Unusable("template_rewrites_turns")
        whole = self._encode(text)
        if whole[: len(ids)] == ids:
            return whole
        # The tokenizer merges across the border; what the model is given at sampling ends there.
        joined = ids + self._encode(text[len(known) :])
        decoded = self.tokenizer.decode(
            joined, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if decoded != self._restore(text):
            raise Unusable("prompt_not_a_token_prefix")
        return joined

    def _write_turns(self, messages: tuple[Message, ...], generation_prompt: bool = False) -> str:
        rows = [{"role": m.role, "content": self._hold_back(m)} for m in messages]
        try:
            return render_text(self.tokenizer, rows, generation_prompt)
        except InputError:
            raise Unusable("template_refuses") from None

    def _hold_back(self, message: Message) -> str:
        content = message.content
        if message.role == "assistant":
            content = self._ending.sub("", content)
        if _HELD_BACK.search(content):
            raise Unusable("private_use_characters")
        return self._literal.sub(lambda match: self._held_back[match[0]], content)

    def _restore(self, text: str) -> str:
        return _HELD_BACK.sub(lambda match: self._literals[match[0]], text)

    def _encode_text(self, text: str) -> list[int]:
        if not _HELD_BACK.search(text):
            return self._tokenize(text, split_special=False)
        # Only the template's own special tokens are in ``text``; those of the data are split up.
        ids: list[int] = []
        for piece in self._literal.split(text):
            if piece in self._special:
                ids.append(self._special[piece])
            elif piece:
                ids += self._split_up(self._restore(piece))
        return ids

    def _split_up(self, text: str) -> list[int]:
        ids = self._tokenize(text, split_special=True)
        # Some vocabularies list their special tokens among the words, so that splitting fails.
        if self._control_ids.intersection(ids):
            raise Unusable("special_token_text")
        return ids

    def _tokenize(self, text: str, *, split_special: bool) -> list[int]:
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=split_special, verbose=False
        )["input_ids"]
        return ids

    def _cut(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.max_prompt_tokens:
            return ids[:]  # a copy: the original stays cached
        kept = self._leading(ids)
        return ids[:kept] + ids[len(ids) - self.max_prompt_tokens + kept :]

    def _leading(self, ids: list[int]) -> int:
        first = {self.tokenizer.bos_token_id, self.tokenizer.cls_token_id} - {None}
        return int(not first.isdisjoint(ids[:1]))

    def _check_length(self, response: list[int]) -> None:
        if len(response) > self.max_response_tokens:
            raise Unusable("response_too_long")


def render_all(
    rows: Iterable[Row], render: Callable[[Row], Rendered]
) -> tuple[list[Rendered], LostRows]:
    """Render rows one by one; returns those that could be, and the others by reason."""
    kept: list[Rendered] = []
    dropped = LostRows()
    for row in rows:
        try:
            kept.append(render(row))
        except Unusable as error:
            dropped.add(error.reason, row.origin)
    return kept, dropped
