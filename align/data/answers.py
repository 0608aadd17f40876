"""Which part of what a model wrote is its answer: what it says after its thought (docs/thinking.md).

Thinking models write a thought first, between two marks. Channel models such as gpt-oss write every message to a
channel; what they write to the channel `final` is the answer, and all before it counts as thought.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PROMPT_TAIL = 24
"""The tokens at a prompt's end in which the template may have opened the thought."""


@dataclass(frozen=True)
class Marks:
    """What a thought begins with, and what its answer follows."""

    opening: str
    closing: str


MARKS = (
    Marks("<think>", "</think>"),
    Marks("<|channel|>", "<|channel|>final<|message|>"),
    Marks("<|channel>", "<channel|>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    Marks("<seed:think>", "</seed:think>"),
)
"""Qwen3, DeepSeek-R1, GLM-4.5, SmolLM3 and others; gpt-oss; Gemma 4; Magistral; Command A Reasoning; Seed-OSS."""


@dataclass(frozen=True)
class Answer:
    """A completion in its two parts.

    Args:
        text: the answer without special tokens; empty if there is none.
        thought: what was written before it, as it was written, with its marks.
        given: False if the completion ended, or was cut, before an answer began.
    """

    text: str
    thought: str = ""
    given: bool = True


class AnswerReader:
    """Reads the answers in the completions of models that use a tokenizer.

    Marks count if the chat template or the tokenizer's added tokens have them. All text of other models is answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        template = str(tokenizer.chat_template or "")
        self._marks = [each for each in MARKS if each.opening in template or each.opening in _added_tokens(tokenizer)]

    @property
    def thinks(self) -> bool:
        """Whether completions may hold a thought."""
        return bool(self._marks)

    def read(self, prompt_ids: Sequence[int], tokens: Sequence[int]) -> Answer:
        """The answer in a completion's tokens, given without the stop token."""
        tokens = list(tokens)
        if not self._marks:
            return Answer(self._words(tokens))
        written = self._tokenizer.decode(tokens)
        before = self._tokenizer.decode(list(prompt_ids)[-PROMPT_TAIL:])
        length = thought_length(written, self._marks, before)
        if length is None:
            return Answer("", written, given=False)
        if length == 0:
            return Answer(self._words(tokens))
        count = bisect_left(range(len(tokens)), length, key=lambda count: len(self._tokenizer.decode(tokens[:count])))
        words = self._words(tokens[count:]).lstrip()
        return Answer(words, self._tokenizer.decode(tokens[:count]), given=bool(words))

    def _words(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def answer_in_text(text: str) -> Answer:
    """The answer in a text whose model is not known, such as a server's reply."""
    length = thought_length(text, MARKS)
    if length is None:
        return Answer("", text, given=False)
    words = text[length:].lstrip() if length else text
    return Answer(words, text[:length], given=bool(words) or not length)


def thought_length(written: str, marks: Sequence[Marks], before: str = "") -> int | None:
    """How many characters of a completion come before its answer; None if the thought does not end.

    A thought begins where the completion does, or in the template's text before it. A closing mark without an opening
    one ends a thought too: some templates open it in a place that only they know.
    """
    for each in marks:
        closing = written.find(each.closing)
        opened = _ends_in(before, each.opening) or (closing >= 0 and each.opening not in written[:closing])
        end = 0
        while opened or written[end:].lstrip().startswith(each.opening):
            closing = written.find(each.closing, end)
            if closing < 0:
                return None
            end, opened = closing + len(each.closing), False
        if end:
            return end
    return 0


def _ends_in(before: str, opening: str) -> bool:
    """Whether a prompt ends in an opened thought; Gemma 4 names the channel after its mark."""
    return re.search(re.escape(opening) + r"\w*\s*$", before) is not None


def _added_tokens(tokenizer: Any) -> Sequence[str]:
    return tuple(getattr(tokenizer, "added_tokens_encoder", ()))
