"""The gold reward of overoptimisation.yaml: whether a completion keeps the constitution's rules and answers the prompt.

One half is the weighted share of `style-asking`'s rules that the completion keeps; the proxy's pairs are labelled by
these rules. The other half is what people take for granted and no label covers: that the completion is about the prompt
and does not merely repeat it.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from align.constitution.constitution import Constitution
from align.constitution.loading import load_constitution
from align.figures.text_metrics import words

CONSTITUTION = Path(__file__).parents[1] / "constitutions" / "style-asking.yaml"
STEM = 5
"""Words count as forms of the same word if they agree in this many first letters, without a plural's s."""
NEW_SHARE = 0.5
"""The share of a completion's content words that must be new, not the prompt's, for the full score."""
FUNCTION_WORDS = frozenset(
    "about also and any are been before being but can could did does doing done for from had has have having "
    "how into it its just like made make more most much must not off one only other our out over own same "
    "should some such than that the their them then there these they this those too very was way were what "
    "when where which while who why will with without would you your".split()
)

Messages = Sequence[Mapping[str, str]]


def gold(prompts: Sequence[Messages], completions: Sequence[str]) -> list[float]:
    """The gold reward of each completion, from 0 to 1."""
    return [
        (followed(completion) + answered(prompt[-1]["content"], completion)) / 2
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def followed(completion: str) -> float:
    """The weighted share of the constitution's rules that the completion keeps."""
    principles = _constitution().principles
    kept = sum(principle.weight for principle in principles if principle.keeps_rule(completion))
    return kept / sum(principle.weight for principle in principles)


def answered(prompt: str, completion: str) -> float:
    """The share of the prompt's content words that the completion uses, reduced if it says little else."""
    asked, said = content_words(prompt), content_words(completion)
    if not asked or not said:
        return 0.0
    about = len(asked & said) / len(asked)
    return about * min(1.0, len(said - asked) / len(said) / NEW_SHARE)


def content_words(text: str) -> set[str]:
    """The stems of a text's distinct words, without function words and words of one or two letters."""
    told = (word for word in words(text) if len(word) > 2 and word not in FUNCTION_WORDS)
    return {word.removesuffix("s")[:STEM] for word in told}


@cache
def _constitution() -> Constitution:
    return load_constitution(CONSTITUTION)
