"""Reads human data, preference pairs and demonstrations, and mixes human pairs with the AI judge's.

Sources are hub datasets and JSONL(.gz) or parquet files. The format is recognised row by row:

| columns | values |
|---|---|
| prompt, chosen, rejected | texts, or message lists (TRL's standard and conversational formats) |
| chosen, rejected | whole conversations |
| text_correct, text_incorrect | whole conversations (the Constitutional AI paper's comparisons) |
| prompt, completion | texts or message lists (demonstrations) |
| messages | a whole conversation whose last turn is the completion (demonstrations) |

In all columns but `messages`, a message list may have hh-rlhf's text form, `\\n\\nHuman: …\\n\\nAssistant: …`. If
`chosen` is a whole conversation, it is not prefixed with `prompt` again.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from align.data.sources import (
    Row,
    is_transcript,
    merge_turns,
    parse_conversation,
    parse_messages,
    parse_transcript,
    source_rows,
)
from align.errors import InputError
from align.records import Conversation, Demonstration, Message, PreferencePair, as_dicts, digest, pair_id, read_rows
from align.run.artefacts import read_manifest
from align.settings.blocks import PairSource

T = TypeVar("T")
UNDECIDED = "undecided: "
"""Prefix of the counts of undecided comparisons in the manifest of `compare`; the reason follows."""
REMEDIES = {
    "cut": "raise `compare.sampling.max_new_tokens`",
    "identical": "raise `compare.sampling.temperature`",
    "empty": "use a larger model",
    "tie": "use another judge, or principles that discriminate better between answers",
}


def read_pairs(source: PairSource, counts: Counter[str] | None = None) -> list[PreferencePair]:
    """The distinct preference pairs of a source, in its order.

    A pair is left out if its conversations differ before the last turn, if the last turn does not answer a user, or if
    its completions are equal or empty; `counts` counts it under `pairs_<reason>`. The soft label is the `probability`
    column, or 1 without one.

    Raises:
        InputError: the file or dataset is missing, a line is malformed, a column is missing, or no pair is usable.
    """
    counts = Counter() if counts is None else counts
    pairs: dict[str, PreferencePair] = {}
    for place, row in source_rows(source):
        pair = _pair(row, place, source.name)
        if isinstance(pair, str):
            counts[f"pairs_{pair}"] += 1
        elif pair.id in pairs:
            counts["pairs_repeated"] += 1
        else:
            pairs[pair.id] = pair
    return _usable(pairs, source, counts)


def gather_pairs(
    ai: Path | None, human: Iterable[PairSource], counts: Counter[str], human_share: float | None = None
) -> list[PreferencePair]:
    """The distinct pairs of the judge in the file `ai`, followed by those of the human sources.

    Args:
        human_share: the share of human pairs in the mix, in (0, 1). Of the side that has too many, the pairs whose ids
            hash lowest are kept and the others counted. None takes all pairs.

    Raises:
        InputError: there is no pair, or as for `read_pairs`.
    """
    from_ai = list(read_rows(ai, PreferencePair)) if ai is not None else []
    from_humans = [pair for source in human for pair in read_pairs(source, counts)]
    ai_pairs = {pair.id: pair for pair in from_ai}
    human_pairs = {pair.id: pair for pair in from_humans if pair.id not in ai_pairs}
    repeated = len(from_ai) + len(from_humans) - len(ai_pairs) - len(human_pairs)
    counts.update(pairs_ai=len(from_ai), pairs_human=len(from_humans), pairs_repeated=repeated)
    if human_share is not None:
        sizes = mix_sizes(len(ai_pairs), len(human_pairs), human_share)
        sides = [_lowest_hashes(side.values(), size) for side, size in zip((ai_pairs, human_pairs), sizes, strict=True)]
        counts.update(pairs_ai_left_out=len(ai_pairs) - sizes[0], pairs_human_left_out=len(human_pairs) - sizes[1])
    else:
        sides = [list(ai_pairs.values()), list(human_pairs.values())]
    if not any(sides):
        raise InputError(_no_pair(ai))
    return sides[0] + sides[1]


def _no_pair(ai: Path | None) -> str:
    """The error that there is no pair, with the reasons for undecided comparisons if the judge's manifest has them."""
    manifest = read_manifest(ai.parent) if ai is not None else None
    counts = manifest.counts if manifest is not None else {}
    reasons = {name.removeprefix(UNDECIDED): count for name, count in counts.items() if name.startswith(UNDECIDED)}
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    why = f" (undecided comparisons: {listed})" if listed else ""
    remedies = [REMEDIES[reason] for reason in reasons if reason in REMEDIES] or ["give human pairs as `human`"]
    return f"{ai or 'human pairs'}: no pair to train on{why}; {', or '.join(remedies)}"


def mix_sizes(ai: int, human: int, human_share: float) -> tuple[int, int]:
    """The largest (AI, human) numbers of pairs, out of those available, with about the given share of human pairs."""
    enough = round(ai * human_share / (1 - human_share))
    return (ai, enough) if enough <= human else (min(ai, round(human * (1 - human_share) / human_share)), human)


def _lowest_hashes(pairs: Iterable[PreferencePair], size: int) -> list[PreferencePair]:
    """The `size` pairs whose ids hash lowest, in their order. So a larger size extends a smaller one's selection."""
    every = list(pairs)
    kept = {pair.id for pair in sorted(every, key=lambda pair: digest(["mixed", pair.id]))[:size]}
    return [pair for pair in every if pair.id in kept]


def pairs_by_source(pairs: Iterable[PreferencePair]) -> dict[str, int]:
    """The number of pairs by their `source`: 'ai', 'revision', 'human', or the name of a human source."""
    return dict(sorted(Counter(pair.source for pair in pairs).items()))


def mix_faults(stage: str, ai: bool, human: tuple[PairSource, ...], human_share: float | None) -> list[str]:
    """What is wrong with a stage's `ai`, `human` and `human_share`, starting with the key at fault."""
    if not ai and not human:
        return [f"{stage}.human: no pairs to train on; give some, or set `ai: true`"]
    if human_share is not None and not (ai and human):
        return [f"{stage}.human_share: nothing to mix; give `human` pairs and set `ai: true`, or remove it"]
    return []


def read_demonstrations(source: PairSource, counts: Counter[str] | None = None) -> list[Demonstration]:
    """The distinct demonstrations of a source. A preference pair gives its chosen completion.

    Conversations that do not end with an answer to a user, and empty completions, are left out; `counts` counts them
    under `demonstrations_<reason>`.

    Raises:
        InputError: as for `read_pairs`.
    """
    counts = Counter() if counts is None else counts
    found: dict[str, Demonstration] = {}
    for place, row in source_rows(source):
        prompt, completion = _split(_demonstration(row, place))
        if not _is_answered(prompt, completion):
            counts["demonstrations_with_odd_turns"] += 1
        elif not completion.content.strip():
            counts["demonstrations_empty"] += 1
        else:
            key = digest([as_dicts(prompt), completion.content])
            counts["demonstrations_repeated"] += key in found
            found.setdefault(key, Demonstration(key, prompt, completion.content, source.name or source.path))
    return _usable(found, source, counts)


def _pair(row: Row, place: str, name: str | None = None) -> PreferencePair | str:
    """The row's pair, or the reason to leave it out."""
    row = _as_chosen(row)
    _require(row, ("chosen", "rejected"), place)
    prompt, chosen = _split(_conversation(row, "chosen", place))
    other_prompt, rejected = _split(_conversation(row, "rejected", place))
    if prompt != other_prompt:
        return "with_different_contexts"
    if not _is_answered(prompt, chosen) or not _is_answered(prompt, rejected):
        return "with_odd_turns"
    if not chosen.content.strip() or not rejected.content.strip():
        return "with_empty_completion"
    if chosen == rejected:
        return "with_equal_completions"
    return PreferencePair(
        id=pair_id(prompt, chosen, rejected),
        prompt=prompt,
        chosen=(chosen,),
        rejected=(rejected,),
        probability=_probability(row, place),
        source=name or str(row.get("source") or "human"),
        category=str(row.get("category") or ""),
    )


def _as_chosen(row: Row) -> Row:
    """The row with a comparison of the paper renamed to the usual columns. Its `prompt`, a judge's, is dropped."""
    if "chosen" in row or not {"text_correct", "text_incorrect"} <= row.keys():
        return row
    return {"chosen": row["text_correct"], "rejected": row["text_incorrect"]}


def _demonstration(row: Row, place: str) -> Conversation:
    row = _as_chosen(row)
    if "messages" in row:
        return parse_messages(row["messages"], "messages", place)
    if "chosen" in row:
        return _conversation(row, "chosen", place)
    _require(row, ("prompt", "completion"), place)
    return _conversation(row, "completion", place)


def _conversation(row: Row, column: str, place: str) -> Conversation:
    """The whole conversation, which ends with the completion in `column`."""
    completion, prompt = row[column], row.get("prompt")
    if isinstance(completion, str) and not is_transcript(completion):
        _require(row, ("prompt",), place)
        if is_transcript(prompt):
            opening = str(prompt).rstrip().removesuffix("\n\nAssistant:")
            return parse_transcript(f"{opening}\n\nAssistant: {completion}", place)
        return *_prompt(prompt, place), Message("assistant", completion)
    messages = parse_conversation(completion, column, place)
    if prompt is None or (len(messages) > 1 and isinstance(prompt, str) and not is_transcript(prompt)):
        return messages
    before = _prompt(prompt, place)
    return messages if _starts_with(messages, before) else before + messages


def _prompt(value: object, place: str) -> Conversation:
    if isinstance(value, str) and not is_transcript(value):
        return (Message("user", value),)
    messages = parse_conversation(value, "prompt", place)
    return messages[:-1] if messages[-1] == Message("assistant", "") else messages


def _starts_with(messages: Conversation, prompt: Conversation) -> bool:
    """Whether the messages begin with the prompt, apart from outer white space, which transcripts do not keep."""
    whole, start = ([(each.role, each.content.strip()) for each in some] for some in (messages, prompt))
    return whole[: len(start)] == start


def _split(conversation: Conversation) -> tuple[Conversation, Message]:
    """The prompt, with consecutive turns of the same role merged, and the last turn."""
    return merge_turns(conversation[:-1]), conversation[-1]


def _is_answered(prompt: Conversation, completion: Message) -> bool:
    return bool(prompt) and prompt[-1].role == "user" and completion.role == "assistant"


def _probability(row: Row, place: str) -> float:
    value = row.get("probability", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.5 <= value <= 1:
        raise InputError(
            f"{place}: `probability`, that `chosen` is better, must lie in [0.5, 1], got {value!r}; "
            "if it is lower, swap `chosen` and `rejected`"
        )
    return float(value)


def _require(row: Row, columns: tuple[str, ...], place: str) -> None:
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        raise InputError(f"{place}: no column {names}; the row's columns are {', '.join(row) or 'none'}")


def _usable(found: Mapping[str, T], source: PairSource, counts: Mapping[str, int]) -> list[T]:
    if not found:
        why = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise InputError(f"{source.path}: no usable row ({why}); each row needs an answer to a user")
    return list(found.values())
