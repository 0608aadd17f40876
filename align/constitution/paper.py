"""The Constitutional AI paper's published JSON (supplement of Bai et al. 2022, arXiv 2212.08073) as a constitution.

| file | becomes |
|---|---|
| CritiqueRevisionInstructions.json | principles with `critique` and `revision` |
| RLMadisonInstructions.json | principles with `compare` |
| CritiqueRevisionFewShotPrompts.json | worked examples |
| RLMadisonFewShotPrompts.json | probes and worked choices, dealt out in turn to the principles with `compare` |
| RLMadisonPrecogFewShotPrompts.json | worked choices with a chain of thought |

The paper revises by one list of principles and compares by another; they stay separate here. `framed` undoes
`unframed` byte for byte.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align.errors import InputError, explained_read_errors
from align.settings.yaml_files import MAX_BYTES

CRITIQUES = "CritiqueRevisionInstructions.json"
EXAMPLES = "CritiqueRevisionFewShotPrompts.json"
QUESTIONS = "RLMadisonInstructions.json"
PROBES = "RLMadisonFewShotPrompts.json"
REASONED = "RLMadisonPrecogFewShotPrompts.json"

_FRAMES = {
    "critique": ("\n\nCritiqueRequest: ", "\n\nCritique:"),
    "revision": ("\n\nRevisionRequest: ", "\n\nRevision:"),
    "compare": ("\n", " Options:"),
}
SPEAKER = re.compile(r"\n\n(Human|Assistant|CritiqueRequest|Critique|RevisionRequest|Revision):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_SHORT_SPEAKER = re.compile(r"\n\n(H|A):")
_CHOICE = re.compile(
    r"\s*\(A\) \[\[\[(?P<A>.*)\]\]\]\s*\(B\) \[\[\[(?P<B>.*)\]\]\]"
    r"\s*Assistant: Let's think step by step:(?P<reasoning>.*)Human:\s*So the answer is: \((?P<answer>[AB])\)\s*",
    re.DOTALL,
)


def paper_content(path: Path) -> dict[str, Any]:
    """The content of a constitution from the paper's folder, or from one of its two files of principles.

    Raises:
        InputError: there is no such file, it is not the paper's JSON, or it contains no principles.
    """
    files = {file.name: file for file in path.iterdir()} if path.is_dir() else {_kind(path): path}
    read = {name: _parsed(files[name], parse) for name, parse in _PARSERS.items() if name in files}
    principles = [*read.get(CRITIQUES, ()), *_with_probes(read.get(QUESTIONS, []), read.get(PROBES, []))]
    if not principles:
        raise InputError(
            f"{path}: contains no principles; give a YAML file or a folder with {CRITIQUES} or {QUESTIONS}"
        )
    return {
        "title": "Principles of the Constitutional AI paper",
        "version": "2212.08073",
        "source": "supplement of Bai et al. 2022, arXiv 2212.08073",
        "principles": principles,
        "examples": read.get(EXAMPLES, []),
        "comparisons": read.get(REASONED, []),
    }


def _kind(path: Path) -> str:
    """The name of the paper's file that this file corresponds to, judged by its own name or else by its content."""
    if path.name in _PARSERS:
        return path.name
    return CRITIQUES if isinstance(_json(path), dict) else QUESTIONS


def _json(path: Path) -> Any:
    try:
        with explained_read_errors(path, MAX_BYTES):
            return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def _parsed(path: Path, parse: Callable[[Any], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    try:
        return parse(_json(path))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not in the form that the Constitutional AI paper published ({error!r}); "
            "write your own principles as YAML"
        ) from None


def framed(kind: str, text: str) -> str:
    """A `critique`, `revision` or `compare` in the frame that it has in the paper's file."""
    before, after = _FRAMES[kind]
    return f"{before}{text}{after}"


def unframed(kind: str, text: str) -> str:
    """The text inside the frame.

    Raises:
        ValueError: the text does not have this frame.
    """
    before, after = _FRAMES[kind]
    if not (text.startswith(before) and text.endswith(after)):
        raise ValueError(f"expected {before!r} … {after!r}, found {text[:40]!r}")
    return text[len(before) : len(text) - len(after)]


def _critiques(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "id": name,
            "critique": unframed("critique", "".join(entry["prompt"])),
            "revision": unframed("revision", entry["edit_request"]),
        }
        for name, entry in content.items()
    ]


def _questions(content: list[str]) -> list[dict[str, Any]]:
    return [{"id": f"choice{number}", "compare": unframed("compare", text)} for number, text in enumerate(content)]


def _examples(content: list[str]) -> list[dict[str, Any]]:
    return [_example(text) for text in content]


def _example(text: str) -> dict[str, Any]:
    """A conversation whose last answer is criticised and revised. A `Human:` left open at the end is dropped."""
    _, *parts = SPEAKER.split(text)
    turns = [(speaker, words.strip()) for speaker, words in zip(parts[::2], parts[1::2], strict=True)]
    conversation = [{"role": _ROLES[who], "content": words} for who, words in turns if who in _ROLES and words]
    later = dict(turns[len(conversation) :])
    return {
        "prompt": conversation[:-1],
        "completion": conversation[-1]["content"],
        "critique_request": later["CritiqueRequest"],
        "critique": later["Critique"],
        "revision_request": later["RevisionRequest"],
        "revision": later["Revision"],
    }


def _probes(content: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": entry["prompt"].removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:"),
            "better": entry["corrects"][0],
            "worse": entry["incorrects"][0],
        }
        for entry in content
    ]


def _reasoned(content: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [_reasoned_choice(entry["prompt"]) for entry in content]


def _reasoned_choice(text: str) -> dict[str, Any]:
    """A conversation, the place for the principle (a literal `{}`), two completions, the reasoning and the answer."""
    before, _, after = text.partition("{}")
    _, *parts = _SHORT_SPEAKER.split(before)
    turns = zip(parts[::2], parts[1::2], strict=True)
    found = _CHOICE.fullmatch(after)
    if found is None:
        raise ValueError(f"expected (A) [[[…]]] (B) [[[…]]], reasoning and an answer, found {after[:40]!r}")
    answer = found["answer"]
    return {
        "prompt": [{"role": "user" if who == "H" else "assistant", "content": words.strip()} for who, words in turns],
        "better": found[answer].strip(),
        "worse": found["A" if answer == "B" else "B"].strip(),
        "reasoning": found["reasoning"].strip(),
        "answer": answer,
    }


def _with_probes(principles: list[dict[str, Any]], probes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The principles, each with its share of the probes, which also serve as worked choices."""
    shares = [probes[number :: len(principles)] for number in range(len(principles))]
    return [{**each, "probes": own, "comparisons": own} for each, own in zip(principles, shares, strict=True)]


_PARSERS: dict[str, Callable[[Any], list[dict[str, Any]]]] = {
    CRITIQUES: _critiques,
    EXAMPLES: _examples,
    QUESTIONS: _questions,
    PROBES: _probes,
    REASONED: _reasoned,
}
