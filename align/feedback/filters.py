"""Filters that reject revisions which are unfit to train on, whatever a judge thinks of them.

Each filter is a pure function with a name. The first that catches a revision rejects it; the revision is counted under
that filter's name and kept in `rejected.jsonl`. 'cut' and 'empty' always apply; a recipe can leave the others out.
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
"""Share of repeated 4-grams above which a text counts as repetitive."""
MIN_REPETITION_WORDS = 12
SAME_TEXT = 0.8
"""Similarity (difflib's ratio over words) from which a text counts as a repetition of one that the model was shown."""


@dataclass(frozen=True)
class RevisionCandidate:
    """A revision to filter, with the texts that it was made from.

    `examples` has the completions and revisions of the worked examples that were shown. `criticised` says whether a
    critique was asked for.
    """

    original: str
    critique: str
    text: str
    finish_reason: FinishReason
    examples: tuple[str, ...] = ()
    criticised: bool = False


def is_empty(candidate: RevisionCandidate) -> bool:
    """It has no letters and no digits."""
    return not any(character.isalnum() for character in candidate.text)


def has_preamble(candidate: RevisionCandidate) -> bool:
    """It announces or labels the revision before it begins, or comments on it at the end."""
    text = _plain(candidate.text)
    return bool(_PREAMBLE.match(text) or _LABEL.match(text) or _AFTERWORD.search(text))


def lacks_critique(candidate: RevisionCandidate) -> bool:
    """The critique that was asked for is empty, or repeats the answer that it should criticise."""
    if not candidate.criticised:
        return False
    return not any(map(str.isalnum, candidate.critique)) or _is_nearly(candidate.original, candidate.critique)


def is_critique(candidate: RevisionCandidate) -> bool:
    """It criticises the answer instead of giving one, or repeats the critique."""
    return bool(_ABOUT_THE_ANSWER.match(_plain(candidate.text))) or _is_nearly(candidate.critique, candidate.text)


def is_copy(candidate: RevisionCandidate) -> bool:
    """It has the same words and punctuation as the original."""
    return words(fold(candidate.text)) == words(fold(candidate.original))


def is_example(candidate: RevisionCandidate) -> bool:
    """It repeats a worked example instead of answering its own prompt, as small models do."""
    return any(_is_nearly(example, candidate.text) for example in candidate.examples)


def only_refuses(text: str) -> bool:
    """Every sentence refuses; nothing is explained or offered instead."""
    found = sentences(text)
    return bool(found) and all(_REFUSAL.search(_plain(sentence)) for sentence in found)


def refuses(text: str) -> bool:
    """The first sentence refuses, whatever is explained or offered after it."""
    found = sentences(text)
    return bool(found) and bool(_REFUSAL.search(_plain(found[0])))


def has_emoji(text: str) -> bool:
    """The text has an emoji: a pictograph, a flag or the like."""
    return bool(_EMOJI.search(text))


def repeats_itself(text: str) -> bool:
    """The share of repeated 4-grams is above `MAX_REPETITION`. Texts too short to tell never repeat themselves."""
    return len(words(text)) >= MIN_REPETITION_WORDS and repetition(text) > MAX_REPETITION


FILTERS: dict[str, Callable[[RevisionCandidate], bool]] = {
    "cut": lambda candidate: candidate.finish_reason == "length",
    "empty": is_empty,
    "preamble": has_preamble,
    "no_critique": lacks_critique,
    "critique": is_critique,
    "copy": is_copy,
    "example": is_example,
    "refusal": lambda candidate: only_refuses(candidate.text),
    "repetition": lambda candidate: repeats_itself(candidate.text),
    "emoji": lambda candidate: has_emoji(candidate.text) and not has_emoji(candidate.original),
}


def rejecting_filter(candidate: RevisionCandidate, optional: Collection[str] = OPTIONAL) -> str:
    """The name of the first filter that catches the revision; empty if none does.

    Args:
        optional: the filters that apply besides 'cut' and 'empty'.
    """
    applying = (name for name in FILTERS if name in {"cut", "empty", *optional})
    return next((name for name in applying if FILTERS[name](candidate)), "")


def without_preamble(text: str) -> str:
    """The text without an announcement on a separate first line, and without quotation marks around all of it.

    Only a clear announcement such as 'Sure, here is the revised answer:' is removed. `has_preamble` catches the rest.
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
    # Compared by words: by characters it would take milliseconds, longer than all other filters together.
    matcher = difflib.SequenceMatcher(None, words(_plain(shown)), words(_plain(text)), autojunk=False)
    return all(ratio() >= SAME_TEXT for ratio in (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio))


def _plain(text: str) -> str:
    """The text in lower case, with straight apostrophes and without leading Markdown emphasis or heading marks."""
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
