"""What completions look like, counted: variety, repetition, length, how they ended. No model is asked."""

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
    """Figures of one policy's completions.

    `distinct_1` and `distinct_2` fall as there is more text, so they compare policies on the same prompts only, beside
    their lengths; `repetition` is the mean over completions; `same_ending` is the share of the commonest last sentence;
    `stopped` is the share that a stop token ended rather than the limit.
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
    """The figures of completions, their token counts (stop token included) and how each ended.

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
    """Lower-cased words and punctuation marks, one by one; kana and Han characters, unspaced, each count as a word."""
    return _WORD.findall(text.lower())


def distinct_share(completions: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of all completions (distinct-n, Li et al. 2016); 0 where there are none."""
    grams = [gram for completion in completions for gram in _ngrams(completion, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(completion: str, n: int = 4) -> float:
    """Share of a completion's n-grams that stood in it before (seq-rep-n, Welleck et al. 2020, section 6)."""
    grams = _ngrams(completion, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def same_ending_share(completions: Sequence[str]) -> float:
    """Share of completions that end with the commonest last sentence: near 1, the policy closes every answer alike."""
    endings = Counter(_last_sentence(completion) for completion in completions)
    return max(endings.values()) / len(completions) if completions else 0.0


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}")
    tokens = words(text)
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def _last_sentence(text: str) -> str:
    return fold(found[-1]) if (found := sentences(text)) else ""
