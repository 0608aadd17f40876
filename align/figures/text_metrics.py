"""Metrics of completions that need no model: diversity, repetition, length, and how they ended."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from align.figures.sentences import fold, sentences
from align.records import FinishReason

_KANA_OR_HAN = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_KANA_OR_HAN}]|[^\W{_KANA_OR_HAN}]+|[^\w\s]")


@dataclass(frozen=True)
class TextFigures:
    """Metrics of one policy's completions.

    `distinct_1` and `distinct_2` decrease with the amount of text, so compare policies on the same prompts only, and
    together with their lengths. `repetition` is the mean over completions. `same_ending` is the share of completions
    with the most common last sentence. `stopped` is the share that ended with a stop token rather than at the limit.
    """

    mean_tokens: float
    mean_words: float
    distinct_1: float
    distinct_2: float
    repetition: float
    same_ending: float
    stopped: float


def text_figures(
    completions: Sequence[str], tokens: Sequence[int], finish_reasons: Sequence[FinishReason]
) -> TextFigures:
    """The metrics of completions, given their token counts (stop token included) and how each ended.

    Raises:
        ValueError: no completions.
    """
    if not completions:
        raise ValueError("there are no completions to describe")
    count = len(completions)
    return TextFigures(
        mean_tokens=sum(tokens) / count,
        mean_words=sum(len(words(completion)) for completion in completions) / count,
        distinct_1=distinct_share(completions, 1),
        distinct_2=distinct_share(completions, 2),
        repetition=sum(repetition(completion) for completion in completions) / count,
        same_ending=same_ending_share(completions),
        stopped=sum(reason == "stop" for reason in finish_reasons) / count,
    )


def words(text: str) -> list[str]:
    """The lower-cased words and punctuation marks. Each kana or Han character counts as a word."""
    return _WORD.findall(text.lower())


def distinct_share(completions: Sequence[str], n: int) -> float:
    """The share of distinct n-grams among those of all completions (distinct-n, Li et al. 2016); 0 without any."""
    grams = [gram for completion in completions for gram in _ngrams(completion, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(completion: str, n: int = 4) -> float:
    """The share of a completion's n-grams that repeat an earlier one (seq-rep-n, Welleck et al. 2020, section 6)."""
    grams = _ngrams(completion, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def same_ending_share(completions: Sequence[str]) -> float:
    """The share of completions with the most common last sentence. Near 1, all of the policy's answers end alike."""
    endings = Counter(_last_sentence(completion) for completion in completions)
    return max(endings.values()) / len(completions) if completions else 0.0


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}")
    tokens = words(text)
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def _last_sentence(text: str) -> str:
    return fold(found[-1]) if (found := sentences(text)) else ""
