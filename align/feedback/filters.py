"""What makes a revision unfit to train on, whatever a judge thinks of it. Each filter is a pure function with a name.

A revision is rejected by the first filter that catches it, counted under that filter's name, and kept in
`rejected.jsonl`. 'cut' and 'empty' always apply; the others can be left out by a recipe.
"""

import difflib
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, get_args

from align.figures.sentences import fold, sentences
from align.figures.text_metrics import repetition, words
from align.records import FinishReason

FilterName = Literal["preamble", "no_critique", "critique", "copy", "example", "refusal", "repetition", "emoji"]
OPTIONAL: tuple[FilterName, ...] = get_args(FilterName)

MAX_REPETITION = 0.3
"""Share of repeated 4-grams above which a text counts as going round in circles."""
MIN_REPETITION_WORDS = 12
SAME_TEXT = 0.8
"""Similarity (difflib's ratio of words) from which a revision counts as a text that was shown, given once more."""


@dataclass(frozen=True)
class Revised:
    """A revision with what it was made from; `criticised` says whether a critique was asked for.

    `examples` are the completions and revisions of the worked examples that were shown.
    """

    original: str
    critique: str
    text: str
    finish_reason: FinishReason
    examples: tuple[str, ...] = ()
    criticised: bool = False


def is_cut(revised: Revised) -> bool:
    """The length limit ended it."""
    return revised.finish_reason == "length"


def is_empty(revised: Revised) -> bool:
    """It has no letter and no digit."""
    return not any(character.isalnum() for character in revised.text)


def has_preamble(revised: Revised) -> bool:
    """It talks about itself before it begins, or after it has ended."""
    text = _plain(revised.text)
    return bool(_PREAMBLE.match(text) or _LABEL.match(text) or _AFTERWORD.search(text))


def lacks_critique(revised: Revised) -> bool:
    """The critique that was asked for is empty, or is the answer that it should judge, given once more."""
    if not revised.criticised:
        return False
    return not any(map(str.isalnum, revised.critique)) or _is_nearly(revised.original, revised.critique)


def is_critique(revised: Revised) -> bool:
    """It judges the answer instead of giving one, or repeats the critique."""
    return bool(_ABOUT_THE_ANSWER.match(_plain(revised.text))) or _is_nearly(revised.critique, revised.text)


def is_copy(revised: Revised) -> bool:
    """It has the original's words and punctuation and nothing else."""
    return words(fold(revised.text)) == words(fold(revised.original))


def is_example(revised: Revised) -> bool:
    """It answers a worked example's prompt instead of its own, which small models do."""
    return any(_is_nearly(example, revised.text) for example in revised.examples)


def is_bare_refusal(revised: Revised) -> bool:
    """It declines and says nothing else."""
    return only_refuses(revised.text)


def only_refuses(text: str) -> bool:
    """Every sentence of it declines, and nothing is explained or offered instead."""
    found = sentences(text)
    return bool(found) and all(_REFUSAL.search(_plain(sentence)) for sentence in found)


def refuses(text: str) -> bool:
    """Its first sentence declines, whatever is explained or offered after it."""
    found = sentences(text)
    return bool(found) and bool(_REFUSAL.search(_plain(found[0])))


def has_emoji(text: str) -> bool:
    """A pictograph, flag or the like is in it."""
    return bool(_EMOJI.search(text))


def adds_emoji(revised: Revised) -> bool:
    """It has emoji, and the original has none."""
    return has_emoji(revised.text) and not has_emoji(revised.original)


def is_repetitive(revised: Revised) -> bool:
    """It says the same over and over."""
    return goes_in_circles(revised.text)


def goes_in_circles(text: str) -> bool:
    """More of a text that is long enough to tell is repeated than `MAX_REPETITION`."""
    return len(words(text)) >= MIN_REPETITION_WORDS and repetition(text) > MAX_REPETITION


FILTERS: dict[str, Callable[[Revised], bool]] = {
    "cut": is_cut,
    "empty": is_empty,
    "preamble": has_preamble,
    "no_critique": lacks_critique,
    "critique": is_critique,
    "copy": is_copy,
    "example": is_example,
    "refusal": is_bare_refusal,
    "repetition": is_repetitive,
    "emoji": adds_emoji,
}


def caught_by(revised: Revised, optional: Collection[str] = OPTIONAL) -> str:
    """The name of the first filter that catches the revision, or an empty text.

    Args:
        optional: which of the filters besides 'cut' and 'empty' apply.
    """
    applying = (name for name in FILTERS if name in {"cut", "empty", *optional})
    return next((name for name in applying if FILTERS[name](revised)), "")


def without_preamble(text: str) -> str:
    """The text without an announcement on a line of its own before it, and without quotes around the whole of it.

    'Sure, here is the revised answer:' on a first line is no part of an answer; what follows it is. Anything less
    clear is left for `has_preamble`.
    """
    stripped = text.strip()
    first, _, rest = stripped.partition("\n")
    announcement = _plain(first).rstrip("*_ ")
    if rest.strip() and announcement.endswith(":") and (_PREAMBLE.match(announcement) or _LABEL.match(announcement)):
        stripped = rest.strip()
    if len(stripped) > 2 and (stripped[0], stripped[-1]) in _QUOTES and stripped.count(stripped[0]) <= 2:
        stripped = stripped[1:-1].strip()
    return stripped


def _is_nearly(shown: str, text: str) -> bool:
    if not shown:
        return False
    # By words: by characters it takes milliseconds, more than all else that is done to a row.
    matcher = difflib.SequenceMatcher(None, words(_plain(shown)), words(_plain(text)), autojunk=False)
    return all(ratio() >= SAME_TEXT for ratio in (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio))


def _plain(text: str) -> str:
    """The text in lower case, with straight apostrophes and without marks of emphasis or headings around it."""
    return fold(text).translate(_STRAIGHT).strip().lstrip("*_# ")


_EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\u231a\u231b\u23e9-\u23fa\u2b1b\u2b1c\u2b50\u2b55\ufe0f]")
_STRAIGHT = {0x2019: "'"}
_QUOTES = {('"', '"'), ("“", "”"), ("「", "」")}
_NEW = r"(?:revised|rewritten|re-written|improved|updated|corrected|edited|modified|better|new|possible|suggested)"
_ANSWER = r"(?:response|answer|version|reply|revision|rewrite)"
_REVISED = r"(?:revised|rewritten|re-written|improved|updated|corrected|edited|modified)"
_REVISE = r"(?:rewrite|re-write|revise|rephrase|edit|modify)"
_PREAMBLE = re.compile(
    r"(?:(?:sure|certainly|of course|ok|okay|absolutely|yes|great|thank you|thanks)\b[^\n]{0,30}?\b)?"
    rf"(?:(?:here's|here is|this is|below is) (?:\w+ ){{0,3}}?(?:{_NEW}(?: \w+){{0,2}} {_ANSWER}|revision|rewrite)\b"
    rf"|(?:here's|here is|below is) (?:an?|the|my|your) (?:\w+ ){{0,2}}{_ANSWER}\b[^.!?\n]{{0,60}}:"
    rf"|here(?:'s| is) how i(?:'d| would| might) {_REVISE}\b"
    rf"|(?:the|my) {_REVISED} {_ANSWER} (?:is|reads|would be|could be)\b"
    rf"|i(?:'d| would| can| will|'ll)(?: be (?:happy|glad) to)? {_REVISE} (?:the|my|this|that) (?:\w+ )?{_ANSWER}\b"
    rf"|(?:{_REVISE}|point out|identify|critique)\b[^.\n]{{0,20}} (?:the|your) assistant's\b"
    rf"|(?:{_REVISE}|critique) the (?:last |previous )?{_ANSWER}\b"
    rf"|i(?:'ve| have) (?:revised|rewritten|updated|modified|edited) (?:the|your|my|this)(?: \w+)? {_ANSWER}\b)"
    r"|(?:以下|こちら|下記)(?:は|が|に)[^。\n]{0,20}(?:書き直|修正|改訂|改善)"
    r"|(?:はい|承知しました|わかりました)[、。][^。\n]{0,20}(?:書き直|修正|改訂|改善)(?:した|しました|いたしました)"
)
_LABEL = re.compile(
    rf"{_REVISED} {_ANSWER}\b[^.!?\n]{{0,40}}(?::|\n)|"
    rf"(?:(?:{_NEW} )?{_ANSWER}|{_NEW}|assistant|(?:書き直した|修正した|改訂した)?(?:回答|返答)|修正版|改訂版)[*_\s]*:"
)
_AFTERWORD = re.compile(
    r"\n\s*[*_(\[]*(?:note|explanation|changes(?: made)?|critique|revisionrequest|critiquerequest)[*_]*:"
    r"|\n\s*[*_(\[]*(?:i(?:'ve| have)? |this |the )(?:revised|rewrote|rewritten|revision|rewrite|changed|removed)\b"
    r"|\n\s*[*_(\[]*(?:this|the) (?:response|answer|reply) (?:is now|now|no longer|avoids|removes)\b"
)
_GIVEN = r"(?:the|this|your) (?:(?:last|previous|preceding|original|above) )?(?:assistant|response|reply|answer)"
_ABOUT_THE_ANSWER = re.compile(
    r"(?:the|this|your) assistant(?:'s)?\b"
    r"|(?:the|this|your) (?:(?:last|previous|preceding|original|above) )?(?:response|reply|revision|answer) (?:\w+ )?"
    r"(?:does|did|could|should|would|may|might|contains?|fails?|lacks?|needs?|follows?|uses?|ends?|includes?|provides?"
    r"|violates?|breaks?|has|is (?:not|too|very|quite|harm|help|un|in|good|clear|polite|missing))"
    rf"|(?:one|another) (?:way|problem|issue|thing) (?:with |in |about |that )?{_GIVEN}\b"
    rf"|there (?:is|are)\b[^.\n]{{0,40}}\b(?:problem|issue|fault|flaw|harm)\w* (?:with|in) {_GIVEN}\b"
    r"|in (?:the|its|this|your) (?:last|previous|preceding|above) (?:response|reply|answer)\b"
    r"|i (?:think|believe|feel)(?: that)? (?:the|this|your) (?:assistant|(?:last |previous )?response)\b"
    r"|my (?:last|previous|original|earlier) (?:response|reply|answer)\b"
    r"|(?:critique|criticism|feedback)[*_]*:"
    r"|(?:直前の|この|上の|その|アシスタントの)?(?:回答|返答)(?:は|に|には|が)"
)
_REFUSAL = re.compile(
    r"\b(?:i'm|i am) (?:\w+ )?sorry(?!\w| to hear| for your| you)|\bsorry, (?:but )?i\b|\b(?:i|my) apologi[sz]e\b"
    r"|\bi (?:can't|can ?not|won't|will not|am (?:not able|unable) to|must decline to|refuse to) (?:\w+ )?"
    r"(?:help|assist|provide|do|fulfil|answer|support|give|share|comply|engage|discuss|respond|offer|write|tell|continue)"
    r"|\bi'm (?:not able|unable) to\b|\bi must decline\b"
    r"|\bi(?:'m| am) not comfortable\b|\bi (?:don't|do not) feel comfortable\b|\bi(?:'d| would) rather not\b"
    r"|^no,? i (?:won't|will not|can't|cannot)\b"
    r"|(?:申し訳|お手伝いできません|お答えできません|お応えできません|できかねます)"
)
