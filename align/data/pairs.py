"""Human data: preference pairs, and demonstrations for the helpful mix.

From a hub id, or a JSONL(.gz) or parquet file. Formats, told apart row by row:

| columns | values |
|---|---|
| prompt, chosen, rejected | texts, or message lists (TRL's plain and conversational formats) |
| chosen, rejected | whole conversations |
| text_correct, text_incorrect | whole conversations (the Constitutional AI paper's comparisons) |
| prompt, completion | texts or message lists (demonstrations) |
| messages | a whole conversation, its last turn the completion (demonstrations) |

Messages may stand in hh-rlhf's text form, `\\n\\nHuman: …\\n\\nAssistant: …`, in any column. Where `chosen` is a whole
conversation already, a `prompt` beside it is not put before it again.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from align.data.sources import (
    Row,
    is_transcript,
    merge_neighbours,
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
"""What the counts of undecided comparisons begin with in compare's manifest, before the reason."""
REMEDIES = {
    "cut": "raise `compare.sampling.max_new_tokens`",
    "identical": "raise `compare.sampling.temperature`",
    "empty": "use a larger model",
    "tie": "use another judge, or principles that tell answers apart",
}


def read_pairs(source: PairSource, counts: Counter[str] | None = None) -> list[PreferencePair]:
    """Preference pairs of a source, each content once, in the source's order.

    A pair whose conversations differ before the last turn, whose last turn is not one answer to a user, or whose
    completions are alike or empty is left out and added to `counts` under `pairs_<why>`. A `probability` column is
    taken as the soft label; without one it is 1.

    Raises:
        InputError: no such file or dataset, a malformed line, a missing column, or no pair to use in it.
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
    return _some(pairs, source, counts)


def gather_pairs(
    ai: Path | None, human: Iterable[PairSource], counts: Counter[str], human_share: float | None = None
) -> list[PreferencePair]:
    """The judge's pairs in the file `ai`, then those of the human sources, each content once.

    Args:
        human_share: the share of human pairs to mix them by, in (0, 1): of the side that has too many, the pairs whose
            ids hash lowest are kept, and the others counted. None takes all.

    Raises:
        InputError: there are none, or as for `read_pairs`.
    """
    labelled = list(read_rows(ai, PreferencePair)) if ai is not None else []
    preferred = [pair for source in human for pair in read_pairs(source, counts)]
    of_ai = {pair.id: pair for pair in labelled}
    of_people = {pair.id: pair for pair in preferred if pair.id not in of_ai}
    repeated = len(labelled) + len(preferred) - len(of_ai) - len(of_people)
    counts.update(pairs_ai=len(labelled), pairs_human=len(preferred), pairs_repeated=repeated)
    if human_share is not None:
        wanted = mix_sizes(len(of_ai), len(of_people), human_share)
        sides = [_lowest(side.values(), size) for side, size in zip((of_ai, of_people), wanted, strict=True)]
        counts.update(pairs_ai_left_out=len(of_ai) - wanted[0], pairs_human_left_out=len(of_people) - wanted[1])
    else:
        sides = [list(of_ai.values()), list(of_people.values())]
    if not any(sides):
        raise InputError(_no_pair(ai))
    return sides[0] + sides[1]


def _no_pair(ai: Path | None) -> str:
    """That there is nothing to train on, and why the judge's comparisons made no pair, as far as a manifest tells."""
    manifest = read_manifest(ai.parent) if ai is not None else None
    counts = manifest.counts if manifest is not None else {}
    reasons = {name.removeprefix(UNDECIDED): count for name, count in counts.items() if name.startswith(UNDECIDED)}
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    why = f" (comparisons left undecided: {told})" if told else ""
    remedies = [REMEDIES[reason] for reason in reasons if reason in REMEDIES] or ["give pairs of people's as `human`"]
    return f"{ai or 'human pairs'}: no pair to train on{why}; {', or '.join(remedies)}"


def mix_sizes(ai: int, human: int, human_share: float) -> tuple[int, int]:
    """The largest (AI, human) numbers of pairs, out of so many, of which `human_share` are human, to the nearest."""
    enough = round(ai * human_share / (1 - human_share))
    return (ai, enough) if enough <= human else (min(ai, round(human * (1 - human_share) / human_share)), human)


def _lowest(pairs: Iterable[PreferencePair], size: int) -> list[PreferencePair]:
    """As many of the pairs, those whose ids hash lowest, in their order: more pairs on the other side keep these."""
    every = list(pairs)
    kept = {pair.id for pair in sorted(every, key=lambda pair: digest(["mixed", pair.id]))[:size]}
    return [pair for pair in every if pair.id in kept]


def pairs_by_source(pairs: Iterable[PreferencePair]) -> dict[str, int]:
    """How many pairs come from where: 'ai', 'revision', 'human', or the names of their sources."""
    return dict(sorted(Counter(pair.source for pair in pairs).items()))


def mix_faults(stage: str, ai: bool, human: tuple[PairSource, ...], human_share: float | None) -> list[str]:
    """What is wrong with a stage's `ai`, `human` and `human_share`, each with its key."""
    if not ai and not human:
        return [f"{stage}.human: no pairs to train on; give some, or set `ai: true`"]
    if human_share is not None and not (ai and human):
        return [f"{stage}.human_share: nothing to mix; give `human` pairs and set `ai: true`, or remove it"]
    return []


def read_demonstrations(source: PairSource, counts: Counter[str] | None = None) -> list[Demonstration]:
    """Demonstrations of a source, each content once; of preference pairs, the chosen completion.

    Conversations that do not end with an answer to a user, and empty completions, are left out and added to `counts`
    under `demonstrations_<why>`.

    Raises:
        InputError: as for `read_pairs`.
    """
    counts = Counter() if counts is None else counts
    found: dict[str, Demonstration] = {}
    for place, row in source_rows(source):
        prompt, completion = _split(_demonstration(row, place))
        if not _answers(prompt, completion):
            counts["demonstrations_with_odd_turns"] += 1
        elif not completion.content.strip():
            counts["demonstrations_empty"] += 1
        else:
            key = digest([as_dicts(prompt), completion.content])
            counts["demonstrations_repeated"] += key in found
            found.setdefault(key, Demonstration(key, prompt, completion.content, source.name or source.path))
    return _some(found, source, counts)


def _pair(row: Row, place: str, name: str | None = None) -> PreferencePair | str:
    """The row's pair, or why it is left out."""
    row = _as_chosen(row)
    _require(row, ("chosen", "rejected"), place)
    prompt, chosen = _split(_conversation(row, "chosen", place))
    other_prompt, rejected = _split(_conversation(row, "rejected", place))
    if prompt != other_prompt:
        return "with_different_contexts"
    if not _answers(prompt, chosen) or not _answers(prompt, rejected):
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
    """A row of the paper's comparisons, whose `prompt` is a question to a judge about both, under the usual names."""
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
    """The whole conversation that ends with the completion in `column`."""
    completion, prompt = row[column], row.get("prompt")
    if isinstance(completion, str) and not is_transcript(completion):
        _require(row, ("prompt",), place)
        if is_transcript(prompt):
            opening = str(prompt).rstrip().removesuffix("\n\nAssistant:")
            return parse_transcript(f"{opening}\n\nAssistant: {completion}", place)
        return *_prompt(prompt, place), Message("assistant", completion)
    messages = _messages(completion, column, place)
    if prompt is None or (len(messages) > 1 and isinstance(prompt, str) and not is_transcript(prompt)):
        return messages
    before = _prompt(prompt, place)
    return messages if _starts_with(messages, before) else before + messages


def _prompt(value: object, place: str) -> Conversation:
    if isinstance(value, str) and not is_transcript(value):
        return (Message("user", value),)
    messages = _messages(value, "prompt", place)
    return messages[:-1] if messages[-1] == Message("assistant", "") else messages


def _messages(value: object, column: str, place: str) -> Conversation:
    """A column that holds messages, or hh-rlhf's text form of them."""
    if isinstance(value, str) and is_transcript(value):
        return parse_transcript(value, place)
    return parse_messages(value, column, place)


def _starts_with(messages: Conversation, before: Conversation) -> bool:
    """Whether the messages begin with those before; white space around them, which transcripts lose, does not count."""
    bare = [[(each.role, each.content.strip()) for each in some] for some in (messages, before)]
    return bare[0][: len(bare[1])] == bare[1]


def _split(conversation: Conversation) -> tuple[Conversation, Message]:
    """The prompt, in which neighbouring turns of one speaker become one, and the last turn."""
    return merge_neighbours(conversation[:-1]), conversation[-1]


def _answers(prompt: Conversation, completion: Message) -> bool:
    return bool(prompt) and prompt[-1].role == "user" and completion.role == "assistant"


def _probability(row: Row, place: str) -> float:
    value = row.get("probability", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.5 <= value <= 1:
        raise InputError(
            f"{place}: `probability` that `chosen` is better must lie in [0.5, 1], got {value!r}; "
            "swap chosen and rejected where it is lower"
        )
    return float(value)


def _require(row: Row, columns: tuple[str, ...], place: str) -> None:
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        raise InputError(f"{place}: no column {names}; the columns there are {', '.join(row) or 'none'}")


def _some(found: Mapping[str, T], source: PairSource, counts: Mapping[str, int]) -> list[T]:
    if not found:
        why = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise InputError(f"{source.path}: nothing in it can be used ({why}); each row needs an answer to a user")
    return list(found.values())
