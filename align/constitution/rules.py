"""Rules: checks on a completion that a program can make without asking a model.

Comparisons ignore case, and full-width characters count as their ordinary forms.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from align.figures.sentences import CLOSERS, count_sentences, count_words, fold
from align.settings.blocks import Block, Positive

Text = Annotated[str, Field(min_length=1)]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_compiles)]


class Rule(Block):
    """Exactly one check. Patterns are Python's and may match anywhere; `^` and `$` match at the ends of every line."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    ends_with: Text | None = Field(None, description="the text must end with this")
    not_ends_with: Text | None = Field(None, description="the text must not end with this")
    contains: Text | None = Field(None, description="the text must contain this")
    excludes: Text | None = Field(None, description="the text must not contain this")
    max_sentences: Positive | None = Field(None, description="the largest number of sentences")
    min_sentences: Positive | None = Field(None, description="the smallest number of sentences")
    max_words: Positive | None = Field(None, description="the largest number of words")
    min_words: Positive | None = Field(None, description="the smallest number of words")
    matches: Pattern | None = Field(None, description="a regular expression that must match somewhere in the text")
    excludes_regex: Pattern | None = Field(None, description="a regular expression that must match nowhere in the text")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise ValueError(f"needs exactly one check, got {found}; write one principle for each check")
        return self

    @property
    def check(self) -> tuple[str, str | int]:
        """The check's name and its value."""
        return next((name, value) for name, value in self if value is not None)

    def holds(self, text: str) -> bool:
        """Whether the text passes the check."""
        name, value = self.check
        return CHECKS[name](text, value)

    def __str__(self) -> str:
        name, value = self.check
        # `repr` escapes unprintable characters, but it also doubles the backslashes of a pattern.
        return f"{name} {value!r}".replace("\\\\", "\\")


def ends_with(text: str, ending: str) -> bool:
    """Whether the text ends with `ending`, ignoring white space and closing quotes, brackets and emphasis after it."""
    stripped = fold(text).rstrip()
    return stripped.endswith(fold(ending)) or stripped.rstrip(CLOSERS + " \t\n").endswith(fold(ending))


CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "ends_with": ends_with,
    "not_ends_with": lambda text, ending: not ends_with(text, ending),
    "contains": lambda text, part: fold(part) in fold(text),
    "excludes": lambda text, part: fold(part) not in fold(text),
    "max_sentences": lambda text, limit: count_sentences(text) <= limit,
    "min_sentences": lambda text, limit: count_sentences(text) >= limit,
    "max_words": lambda text, limit: count_words(text) <= limit,
    "min_words": lambda text, limit: count_words(text) >= limit,
    "matches": lambda text, pattern: re.search(pattern, text, re.MULTILINE) is not None,
    "excludes_regex": lambda text, pattern: re.search(pattern, text, re.MULTILINE) is None,
}
