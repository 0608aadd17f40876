"""Splitting text into sentences and counting words, in languages with spaces and in Japanese and Chinese."""

import re

# U+FF01 to U+FF5E are the full-width forms of the characters ! to ~.
_NARROW: dict[int, str] = (
    {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    | {
        ord(wide): narrow
        for wide, narrow in {"\u3000": " ", "｡": "。", "‼": "!!", "⁇": "??", "⁈": "?!", "⁉": "!?"}.items()
    }
    | {ord(mark): "!" for mark in "❗❕"}
    | {ord(mark): "?" for mark in "❓❔"}
)

CLOSERS = "\"'”’»)]}*_`~」』）】〉》"
_OPENERS = "\"'“‘«([{*_`「『（"
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+(?:['’-][^\W_{_CJK}]+)*")
_LIST_MARKER = re.compile(r"\s*(?:[-*•·]\s+|#+\s+|>\s+|(?:\d{1,3}[.)]|\(?\w\))\s+)")
_INITIALS = re.compile(r"(?:\w\.)+\w|[A-HJ-Z]")
_NEXT_WORD = 80
_WIDE_ENDS = "。！？｡"
_END = re.compile(rf"[.!?…{_WIDE_ENDS}‼⁇⁈⁉❗❕❓❔]+[{re.escape(CLOSERS)}]*")
# A full stop after these never ends a sentence.
_TITLES = re.compile(
    r"mr|mrs|ms|dr|prof|st|vs|vol|dept|approx|e\.g|i\.e|cf|sgt|capt|mt|ave"
    r"|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec"
)
# After these it does if a capital letter follows.
_LAST_BEFORE_CAPITAL = re.compile(r"etc|no|al|fig")
# After these, and after initials and acronyms, it does if a capitalised word follows that often starts a sentence.
_LAST_BEFORE_STARTER = re.compile(r"inc|ltd|co|corp|jr|sr|est")
_STARTERS = re.compile(
    r"the|this|that|these|those|it|he|she|they|we|you|i|an?|and|but|or|so|if|in|on|at|as|when|while|however|then|there"
    r"|what|why|how|who|where|which|is|are|do|does|did|can|could|would|will|my|your|his|her|its|our|their"
)


def fold(text: str) -> str:
    """Lower-case the text, and make full-width ASCII, ideographic spaces and emoji punctuation plain characters."""
    return text.translate(_NARROW).casefold()


def count_words(text: str) -> int:
    """Count runs of letters, digits, apostrophes and hyphens. Each CJK character counts as one word."""
    return len(_WORD.findall(text))


def count_sentences(text: str) -> int:
    return len(sentences(text))


def sentences(text: str) -> list[str]:
    """The text's sentences, in order.

    A sentence ends at . ! ? … 。 ！ ？, but not inside a number, an abbreviation, initials or a quotation before lower
    case. It also ends at blank lines, list items and line breaks that are not mere wrapping. Text without any letter or
    digit is not a sentence.
    """
    return [sentence for paragraph in _paragraphs(text) for sentence in _split_paragraph(paragraph)]


def _paragraphs(text: str) -> list[str]:
    """The lines of the text, in which wrapped lines are joined."""
    paragraphs: list[str] = []
    broken = False
    for line in text.splitlines():
        marker = _LIST_MARKER.match(line)
        content = (line[marker.end() :] if marker else line).strip()
        if content and broken and not marker and content[0].islower():
            paragraphs[-1] += f" {content}"
        elif content:
            paragraphs.append(content)
        broken = bool(content) and not _END.fullmatch(content[-1])
    return paragraphs


def _split_paragraph(text: str) -> list[str]:
    found: list[str] = []
    start = 0
    for end in _END.finditer(text):
        if _is_boundary(text, start, end):
            found.append(text[start : end.end()].strip())
            start = end.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if any(character.isalnum() for character in sentence)]


def _is_boundary(text: str, start: int, end: re.Match[str]) -> bool:
    """Whether the punctuation at `end` closes the sentence that begins at `start`."""
    mark = end.group().rstrip(CLOSERS)
    closed = len(mark) < len(end.group())
    after = text[end.end() : end.end() + _NEXT_WORD]
    if not after.strip():
        return True
    if mark[-1] in _WIDE_ENDS:
        return not closed or after[0].isspace()
    if not after[0].isspace():
        return False
    following = after.split(maxsplit=1)[0].lstrip(_OPENERS)
    if following[:1].islower() and (closed or mark in {"...", "…"}):
        return False
    return mark != "." or _full_stop_ends(text[start : end.start()], following)


def _full_stop_ends(sentence: str, following: str) -> bool:
    """Whether a full stop after `sentence` ends it, and is not part of an abbreviation, initials or a list number."""
    words = sentence.split()
    if not words:
        return False
    last = words[-1].lstrip(_OPENERS)
    folded = last.casefold()
    capital = following[:1].isupper()
    if last.isdigit() and len(last) <= 2 and (len(words) == 1 or words[-2].endswith(":")):
        return False
    if _LAST_BEFORE_CAPITAL.fullmatch(folded):
        return capital
    if _LAST_BEFORE_STARTER.fullmatch(folded) or _INITIALS.fullmatch(last):
        return capital and _STARTERS.fullmatch(following.rstrip(",.!?").casefold()) is not None
    return _TITLES.fullmatch(folded) is None
