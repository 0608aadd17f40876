"""Layouts of public datasets, recognised by their columns and put into one of a few forms.

| form | columns |
|---|---|
| pair | prompt, chosen, rejected (the prompt may be implicit); score_chosen and score_rejected, or margin |
| ranked answers | prompt; a list of (text, score), the better the higher, under `RANKED` |
| rated answer | prompt, completion, score: the best and the worst of one prompt's rows make a pair |
| demonstration | prompt, completion; or messages |
| prompt | prompt |

A row's other columns (system, category, source, split, probability) stay as they are.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from align.data.conversations import is_text, is_transcript
from align.data.reading import Row
from align.errors import InputError

Convert = Callable[[Row], dict[str, Any]]
PROMPTS = ("prompt", "question", "instruction", "query")
ANSWERS = ("completion", "output", "response", "answer")
SYSTEMS = ("system", "system_prompt")
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
)
"""Names of the columns with the scores of a pair's two sides."""
_USUAL = ("prompt", "chosen", "rejected", "completion", "messages", "margin")
RANKED = "ranked answers"
"""Where a row in that form has its answers; no column is called so."""
GIVEN = "columns of the row"
"""Where a row in one of the forms keeps the names that its columns had, for messages."""
ALWAYS = ("category", "source", "split", "probability", "tools")
_HELPSTEER_TURN = re.compile(r"<extra_id_1>(User|Assistant)\n?")


@dataclass(frozen=True)
class Layout:
    """A layout by the columns that tell it: all of `columns`, and what `fits` asks of their values."""

    name: str
    columns: tuple[str, ...]
    convert: Convert
    fits: Callable[[Row], bool] = lambda row: True


def selected(row: Row, columns: Mapping[Any, str], place: str) -> Row:
    """The row as the source's `columns` say; the row itself where they say nothing.

    Raises:
        InputError: the row lacks a column that is named.
    """
    if not columns:
        return row
    found = {name: _reached(row, column) for name, column in columns.items()}
    if missing := [columns[name] for name, value in found.items() if value is _MISSING]:
        raise InputError(f"{place}: no column `{missing[0]}`; the row's columns are {', '.join(row) or 'none'}")
    return found


_MISSING = object()


def _reached(row: Row, column: str) -> Any:
    """The value of a column, or of a part of it: `answers.0.text`."""
    if column in row:
        return row[column]
    value: Any = row
    for key in column.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return _MISSING
    return value


def recognise(row: Row) -> Layout | None:
    """The first layout that the row has; None of an unknown one."""
    return next((layout for layout in LAYOUTS if _has(row, layout.columns) and layout.fits(row)), None)


def canonical(row: Row, place: str) -> dict[str, Any]:
    """The row in one of the forms; as it is, where its layout is not known.

    Raises:
        InputError: it has a layout's columns, and something else in them than the layout has.
    """
    layout = recognise(row)
    if layout is None:
        return dict(row)
    kept = {key: row[key] for key in ALWAYS if row.get(key) is not None}
    system = next((row[key] for key in SYSTEMS if row.get(key)), None)
    try:
        return {GIVEN: tuple(row), **kept, **({"system": system} if system else {}), **layout.convert(row)}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{place}: has the columns of {layout.name}, and cannot be read so ({error!r})") from None


def _has(row: Row, columns: tuple[str, ...]) -> bool:
    return all(row.get(column) is not None for column in columns)


def _is_maps(column: str, *keys: str) -> Callable[[Row], bool]:
    """Whether the column holds a list of maps that have the keys."""

    def fits(row: Row) -> bool:
        value = row[column]
        return bool(value) and isinstance(value, list) and isinstance(value[0], Mapping) and value[0].keys() >= {*keys}

    return fits


def _first(row: Row, columns: tuple[str, ...]) -> str | None:
    return next((column for column in columns if row.get(column) is not None), None)


def _instruction(row: Row) -> Any:
    """The prompt, whichever column holds it; Alpaca keeps the text that an instruction refers to in `input`."""
    column = _first(row, PROMPTS)
    if column is None:
        return None
    beside = row.get("input") or row.get("context") if column == "instruction" else None
    return f"{row[column]}\n\n{beside}" if isinstance(beside, str) and beside else row[column]


def _as_is(row: Row) -> dict[str, Any]:
    """The known columns of TRL's own layouts, each under its usual name."""
    known = {
        key: row[key] for key in ("prompt", "chosen", "rejected", "completion", "messages", "margin") if key in row
    }
    without = known.get("prompt") is None and known.get("messages") is None
    if without and (prompt := _instruction(row)) is not None:
        known["prompt"] = prompt
    return {**known, **_scores(row)}


def _scores(row: Row) -> dict[str, Any]:
    named = next((pair for pair in SCORES if _has(row, pair)), None)
    return {"score_chosen": row[named[0]], "score_rejected": row[named[1]]} if named else {}


def _paper(row: Row) -> dict[str, Any]:
    """The paper's own comparison. Its `prompt`, a judge's, is dropped."""
    return {"chosen": row["text_correct"], "rejected": row["text_incorrect"]}


def _ultrafeedback(row: Row) -> dict[str, Any]:
    """Scores are the mean of the aspects' ratings: `overall_score` has known faults."""

    def score(answer: Row) -> Any:
        return answer["overall_score"] if answer.get("fine-grained_score") is None else answer["fine-grained_score"]

    answers = [(answer["response"], score(answer)) for answer in row["completions"]]
    return {"prompt": row["instruction"], RANKED: answers}


def _nectar(row: Row) -> dict[str, Any]:
    return {"prompt": row["prompt"], RANKED: [(each["answer"], -float(each["rank"])) for each in row["answers"]]}


def _safe_rlhf(row: Row) -> dict[str, Any]:
    better = int(row["better_response_id"])
    chosen, rejected = row[f"response_{better}"], row[f"response_{1 - better}"]
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}


def _preference(prompt: str, first: str, second: str, strength: str) -> Convert:
    """HelpSteer's preferences: from -3, the first answer is much better, to 3, the second is."""

    def convert(row: Row) -> dict[str, Any]:
        answers = [(row[first], 0.0), (row[second], float(row[strength]))]
        return {"prompt": _helpsteer_prompt(row[prompt]), RANKED: answers}

    return convert


def _helpsteer_rating(row: Row) -> dict[str, Any]:
    return {"prompt": _helpsteer_prompt(row["prompt"]), "completion": row["response"], "score": row["helpfulness"]}


def _helpsteer_prompt(prompt: Any) -> Any:
    """A conversation where the text has HelpSteer's marks of turns."""
    if not isinstance(prompt, str) or "<extra_id_1>" not in prompt:
        return prompt
    first, *parts = _HELPSTEER_TURN.split(prompt)
    turns = [("user", first), *((speaker.lower(), text) for speaker, text in zip(parts[::2], parts[1::2], strict=True))]
    return [{"role": role, "content": content.strip()} for role, content in turns if content.strip()]


def _kto(row: Row) -> dict[str, Any]:
    said = _demonstration(row) if _is_answered(row) else {"messages": row["messages"]}
    return {**said, "score": float(_truth(row["label"])), "is_label": True}


def _truth(value: Any) -> bool:
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    said = {"true": True, "false": False, "1": True, "0": False}.get(str(value).strip().lower())
    if said is None:
        raise ValueError(f"`label` must be true or false, got {value!r}")
    return said


def _rated(row: Row) -> dict[str, Any]:
    return {**_demonstration(row), "score": row["score"]}


def _demonstration(row: Row) -> dict[str, Any]:
    return {"prompt": _instruction(row), "completion": row[_first(row, ANSWERS) or "completion"]}


def _alpaca(row: Row) -> dict[str, Any]:
    return _demonstration({key: value for key, value in row.items() if key != "prompt"})


def _sharegpt(row: Row) -> dict[str, Any]:
    return {"messages": row["conversations"]}


def _sharegpt_pair(row: Row) -> dict[str, Any]:
    """LLaMA-Factory's pairs: the conversation so far, and one message for each side."""
    sides = {key: [row[key]] if isinstance(row[key], Mapping) else row[key] for key in ("chosen", "rejected")}
    return {"prompt": row["conversations"], **sides, **_scores(row)}


def _capybara(row: Row) -> dict[str, Any]:
    turns = ((("user", each["input"]), ("assistant", each["output"])) for each in row["conversation"])
    return {"messages": [{"role": role, "content": content} for turn in turns for role, content in turn]}


def _is_answered(row: Row) -> bool:
    return _first(row, PROMPTS) is not None and _first(row, ANSWERS) is not None


def _is_alpaca(row: Row) -> bool:
    return is_text(row["instruction"]) and _first(row, ANSWERS[1:]) is not None


def _is_hh(row: Row) -> bool:
    return is_transcript(row["chosen"]) and row.get("prompt") is None


def _is_scored(row: Row) -> bool:
    return bool(_scores(row)) or row.get("margin") is not None


LAYOUTS = (
    Layout("the paper's comparisons", ("text_correct", "text_incorrect"), _paper, lambda row: "chosen" not in row),
    Layout(
        "UltraFeedback",
        ("instruction", "completions"),
        _ultrafeedback,
        _is_maps("completions", "response", "overall_score"),
    ),
    Layout("Nectar", ("prompt", "answers"), _nectar, _is_maps("answers", "answer", "rank")),
    Layout("PKU-SafeRLHF", ("prompt", "response_0", "response_1", "better_response_id"), _safe_rlhf),
    Layout(
        "HelpSteer 3",
        ("context", "response1", "response2", "overall_preference"),
        _preference("context", "response1", "response2", "overall_preference"),
    ),
    Layout(
        "HelpSteer 2 (preferences)",
        ("prompt", "response_1", "response_2", "preference_strength"),
        _preference("prompt", "response_1", "response_2", "preference_strength"),
    ),
    Layout("HelpSteer 2", ("prompt", "response", "helpfulness"), _helpsteer_rating),
    Layout("KTO", ("label",), _kto, lambda row: _is_answered(row) or row.get("messages") is not None),
    Layout("rated answers", ("score",), _rated, _is_answered),
    Layout("ShareGPT (pairs)", ("conversations", "chosen", "rejected"), _sharegpt_pair),
    Layout("ShareGPT", ("conversations",), _sharegpt),
    Layout("Capybara", ("conversation",), _capybara, _is_maps("conversation", "input", "output")),
    Layout("hh-rlhf", ("chosen", "rejected"), _as_is, _is_hh),
    Layout("scored pairs (UltraFeedback, binarised)", ("chosen", "rejected"), _as_is, _is_scored),
    Layout("prompt, chosen, rejected", ("chosen", "rejected"), _as_is, lambda row: _first(row, PROMPTS) is not None),
    Layout("chosen, rejected (implicit prompt)", ("chosen", "rejected"), _as_is),
    Layout("messages", ("messages",), _as_is),
    Layout("Alpaca", ("instruction",), _alpaca, _is_alpaca),
    Layout("prompt, completion", (), _demonstration, _is_answered),
    Layout("prompts", (), _as_is, lambda row: _first(row, PROMPTS) is not None),
)
"""In this order: the first that fits is taken."""
