"""The six published files of the Constitutional AI paper, taken apart without loss: `render` gives the bytes back.

What a constitution needs of them is in `align.constitution.paper`; here is how the paper put its prompts together.
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
    render_critique_request,
    render_question,
    render_revision_request,
    unframed,
)
from align.errors import InputError
from align.records import Conversation

THOUGHTS = "RLMadisonPrecogFewShotPrompts.json"
COMPARISONS = "hhh_comparisons.jsonl"

Transcript = tuple[tuple[str, str], ...]
"""Speakers and what they say; a speaker who says nothing ends a text that is to be gone on with."""
_SPEAKER = re.compile(r"\n\n(Human|Assistant|CritiqueRequest|Critique|RevisionRequest|Revision):")
_CHOICE = re.compile(
    r"\n\nConsider the following conversation between a human and an assistant:(?P<talk>.*)"
    r"\n\n(?P<question>\n[^\n]*? Options:)\n \(A\) \[\[\[(?P<a>.*)\]\]\]\n \(B\) \[\[\[(?P<b>.*)\]\]\]"
    r"\n\nThe answer is:",
    re.DOTALL,
)
_PLACE = "{}"


class Thought(NamedTuple):
    """A worked choice with its reasoning, up to and from where the principle is put."""

    before: str
    after: str

    def about(self, question: str) -> str:
        """The text with the principle in its place. Braces elsewhere stay as they are."""
        return f"{self.before}{question}{self.after}"


class Choice(NamedTuple):
    """One row of the comparisons: a transcript, a question and two options, and the keys beside the prompt."""

    talk: Transcript
    question: str
    a: str
    b: str
    others: dict[str, Any]


class WorkedChoice(NamedTuple):
    """A transcript that ends where the assistant speaks, with right and wrong answers."""

    talk: Transcript
    corrects: tuple[str, ...]
    incorrects: tuple[str, ...]


def parse_transcript(text: str) -> Transcript:
    """The turns of a text.

    Raises:
        ValueError: it does not start with a turn, or not each speaker's words stand after a space.
    """
    first, *parts = _SPEAKER.split(text)
    turns = tuple((who, words.removeprefix(" ")) for who, words in zip(parts[::2], parts[1::2], strict=True))
    if first or render_transcript(turns) != text:
        raise ValueError(f"no transcript of the paper's form: {text[:40]!r}")
    return turns


def render_transcript(turns: Transcript) -> str:
    """The text of turns, as the paper writes it."""
    return "".join(f"\n\n{who}:{f' {words}' if words else ''}" for who, words in turns)


def render_example(
    conversation: Conversation,
    completion: str,
    critique: tuple[str, str],
    revision: tuple[str, str],
    *,
    goes_on: bool = False,
) -> str:
    """A worked example of critique and revision as the paper's text.

    Args:
        critique, revision: each the request and what answers it.
        goes_on: the next turn of the human is opened, as four of the five published texts do.
    """
    names = {"user": "Human", "assistant": "Assistant"}
    talk = [(names[turn.role], turn.content) for turn in conversation]
    steps = [("CritiqueRequest", critique[0]), ("Critique", critique[1])]
    steps += [("RevisionRequest", revision[0]), ("Revision", revision[1])]
    return render_transcript((*talk, ("Assistant", completion), *steps, *([("Human", "")] if goes_on else [])))


def render_choice(talk: Transcript, question: str, a: str, b: str) -> str:
    """A choice as the paper puts it to a model that answers with a letter."""
    return (
        f"\n\nConsider the following conversation between a human and an assistant:{render_transcript(talk)}"
        f"\n\n{render_question(question)}\n (A) [[[{a}]]]\n (B) [[[{b}]]]\n\nThe answer is:"
    )


def parse_published(path: Path) -> Any:
    """A published file, by its name, taken apart.

    Raises:
        InputError: it is none of the six, or not as it was published.
    """
    if path.name not in _FILES:
        raise InputError(f"{path}: none of the paper's files; there are {', '.join(_FILES)}")
    text = path.read_text(encoding="utf-8")
    try:
        lines = text.splitlines() if path.suffix == ".jsonl" else None
        return _FILES[path.name][0]([json.loads(line) for line in lines] if lines is not None else json.loads(text))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not as the Constitutional AI paper published it ({error!r})") from None


def render_published(name: str, content: Any) -> bytes:
    """The bytes of a published file from what `parse_published` made of it."""
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
            "prompt": [render_critique_request(critique) for critique in critiques],
            "edit_request": render_revision_request(revision),
        }
        for name, (critiques, revision) in content.items()
    }


def _parse_worked_choice(entry: Mapping[str, Any]) -> WorkedChoice:
    return WorkedChoice(parse_transcript(entry["prompt"]), tuple(entry["corrects"]), tuple(entry["incorrects"]))


def _render_worked_choice(choice: WorkedChoice) -> Any:
    prompt = render_transcript(choice.talk)
    return {"prompt": prompt, "corrects": list(choice.corrects), "incorrects": list(choice.incorrects)}


def _parse_thought(entry: Mapping[str, str]) -> Thought:
    before, after = entry["prompt"].split(_PLACE)
    return Thought(before, after)


def _parse_choice(entry: Mapping[str, Any]) -> Choice:
    found = _CHOICE.fullmatch(entry["prompt"])
    if found is None:
        raise ValueError(f"no choice of the paper's form: {entry['prompt'][:40]!r}")
    others = {key: value for key, value in entry.items() if key != "prompt"}
    question = unframed("compare", found["question"])
    return Choice(parse_transcript(found["talk"]), question, found["a"], found["b"], others)


def _render_choice(choice: Choice) -> Any:
    return {"prompt": render_choice(*choice[:4]), **choice.others}


Converter = Callable[[Any], Any]


def _each(convert: Converter) -> Converter:
    return lambda rows: [convert(row) for row in rows]


_FILES: dict[str, tuple[Converter, Converter]] = {
    CRITIQUES: (_parse_requests, _render_requests),
    EXAMPLES: (_each(parse_transcript), _each(render_transcript)),
    QUESTIONS: (_each(lambda text: unframed("compare", text)), _each(render_question)),
    PROBES: (_each(_parse_worked_choice), _each(_render_worked_choice)),
    THOUGHTS: (_each(_parse_thought), _each(lambda thought: {"prompt": thought.about(_PLACE)})),
    COMPARISONS: (_each(_parse_choice), _each(_render_choice)),
}
