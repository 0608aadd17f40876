"""The six published files of the Constitutional AI paper, parsed without loss: rendering gives back the same bytes.

This module shows how the paper put its prompts together. What a constitution needs is in `align.constitution.paper`.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from align.constitution.paper import (
    CRITIQUES,
    EXAMPLES,
    PROBES,
    QUESTIONS,
    REASONED,
    SPEAKER,
    framed,
    unframed,
)
from align.errors import InputError, explained_read_errors
from align.records import Conversation
from align.settings.yaml_files import MAX_BYTES

COMPARISONS = "hhh_comparisons.jsonl"

Transcript = tuple[tuple[str, str], ...]
"""Pairs of a speaker and a text. An empty last text is an open turn, which a model is to continue."""
_CHOICE = re.compile(
    r"\n\nConsider the following conversation between a human and an assistant:(?P<talk>.*)"
    r"\n\n(?P<question>\n[^\n]*? Options:)\n \(A\) \[\[\[(?P<a>.*)\]\]\]\n \(B\) \[\[\[(?P<b>.*)\]\]\]"
    r"\n\nThe answer is:",
    re.DOTALL,
)
_PLACEHOLDER = "{}"


class ReasonedChoice(NamedTuple):
    """A worked choice with its reasoning: the text before and after the place of the principle."""

    before: str
    after: str

    def with_question(self, question: str) -> str:
        """The text with a principle's question in its place. Braces elsewhere stay as they are."""
        return f"{self.before}{question}{self.after}"


class Choice(NamedTuple):
    """One row of the comparisons: a transcript, a question, two options, and the row's keys other than the prompt."""

    transcript: Transcript
    question: str
    a: str
    b: str
    other_keys: dict[str, Any]


class WorkedChoice(NamedTuple):
    """A transcript that ends with the assistant's open turn, with right and wrong answers."""

    transcript: Transcript
    corrects: tuple[str, ...]
    incorrects: tuple[str, ...]


def parse_transcript(text: str) -> Transcript:
    """Parse a text into turns.

    Raises:
        ValueError: the text does not start with a turn, or a turn's text does not follow a single space.
    """
    first, *parts = SPEAKER.split(text)
    turns = tuple((who, words.removeprefix(" ")) for who, words in zip(parts[::2], parts[1::2], strict=True))
    if first or render_transcript(turns) != text:
        raise ValueError(f"not a transcript in the paper's form: {text[:40]!r}")
    return turns


def render_transcript(turns: Transcript) -> str:
    """The turns as a text in the paper's form."""
    return "".join(f"\n\n{who}:{f' {words}' if words else ''}" for who, words in turns)


def render_example(
    conversation: Conversation,
    completion: str,
    critique: tuple[str, str],
    revision: tuple[str, str],
    *,
    open_turn: bool = False,
) -> str:
    """A worked example of critique and revision as a text in the paper's form.

    Args:
        critique, revision: pairs of a request and its answer.
        open_turn: end with the human's next turn, open, as four of the five published texts do.
    """
    names = {"user": "Human", "assistant": "Assistant"}
    talk = [(names[turn.role], turn.content) for turn in conversation]
    steps = [("CritiqueRequest", critique[0]), ("Critique", critique[1])]
    steps += [("RevisionRequest", revision[0]), ("Revision", revision[1])]
    return render_transcript((*talk, ("Assistant", completion), *steps, *([("Human", "")] if open_turn else [])))


def render_choice(talk: Transcript, question: str, a: str, b: str) -> str:
    """A choice in the paper's form, to be answered with a letter."""
    return (
        f"\n\nConsider the following conversation between a human and an assistant:{render_transcript(talk)}"
        f"\n\n{framed('compare', question)}\n (A) [[[{a}]]]\n (B) [[[{b}]]]\n\nThe answer is:"
    )


def parse_published(path: Path) -> Any:
    """Parse a published file, which its name identifies.

    Raises:
        InputError: it is not one of the six, or it does not have the published form.
    """
    if path.name not in _FILES:
        raise InputError(f"{path}: not one of the paper's files, which are {', '.join(_FILES)}")
    with explained_read_errors(path, MAX_BYTES):
        text = path.read_text(encoding="utf-8")
    try:
        lines = text.splitlines() if path.suffix == ".jsonl" else None
        return _FILES[path.name][0]([json.loads(line) for line in lines] if lines is not None else json.loads(text))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not in the form that the Constitutional AI paper published ({error!r})") from None


def render_published(name: str, content: Any) -> bytes:
    """The bytes of a published file from the result of `parse_published`."""
    value = _FILES[name][1](content)
    if name == COMPARISONS:
        return "".join(json.dumps(row) + "\n" for row in value).encode()
    return json.dumps(value).encode()


def _parse_requests(content: Mapping[str, Any]) -> dict[str, tuple[tuple[str, ...], str]]:
    return {
        name: (
            tuple(unframed("critique", prompt) for prompt in entry["prompt"]),
            unframed("revision", entry["edit_request"]),
        )
        for name, entry in content.items()
    }


def _render_requests(content: Mapping[str, tuple[tuple[str, ...], str]]) -> Any:
    return {
        name: {
            "prompt": [framed("critique", critique) for critique in critiques],
            "edit_request": framed("revision", revision),
        }
        for name, (critiques, revision) in content.items()
    }


def _parse_worked_choice(entry: Mapping[str, Any]) -> WorkedChoice:
    return WorkedChoice(parse_transcript(entry["prompt"]), tuple(entry["corrects"]), tuple(entry["incorrects"]))


def _render_worked_choice(choice: WorkedChoice) -> Any:
    prompt = render_transcript(choice.transcript)
    return {"prompt": prompt, "corrects": list(choice.corrects), "incorrects": list(choice.incorrects)}


def _parse_reasoned_choice(entry: Mapping[str, str]) -> ReasonedChoice:
    before, after = entry["prompt"].split(_PLACEHOLDER)
    return ReasonedChoice(before, after)


def _parse_choice(entry: Mapping[str, Any]) -> Choice:
    found = _CHOICE.fullmatch(entry["prompt"])
    if found is None:
        raise ValueError(f"not a choice in the paper's form: {entry['prompt'][:40]!r}")
    other_keys = {key: value for key, value in entry.items() if key != "prompt"}
    question = unframed("compare", found["question"])
    return Choice(parse_transcript(found["talk"]), question, found["a"], found["b"], other_keys)


def _render_choice(choice: Choice) -> Any:
    return {"prompt": render_choice(*choice[:4]), **choice.other_keys}


Converter = Callable[[Any], Any]


def _each(convert: Converter) -> Converter:
    return lambda rows: [convert(row) for row in rows]


_FILES: dict[str, tuple[Converter, Converter]] = {
    CRITIQUES: (_parse_requests, _render_requests),
    EXAMPLES: (_each(parse_transcript), _each(render_transcript)),
    QUESTIONS: (_each(lambda text: unframed("compare", text)), _each(lambda text: framed("compare", text))),
    PROBES: (_each(_parse_worked_choice), _each(_render_worked_choice)),
    REASONED: (
        _each(_parse_reasoned_choice),
        _each(lambda choice: {"prompt": choice.with_question(_PLACEHOLDER)}),
    ),
    COMPARISONS: (_each(_parse_choice), _each(_render_choice)),
}
