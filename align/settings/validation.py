"""Turns pydantic's validation errors into problems with a line, plain words and the nearest valid key."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from align.errors import Problem
from align.settings.yaml_files import KeyPath, Lines, key_name

MISSING = "is missing"
BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "`key: value` settings",
    "model": "`key: value` settings",
}


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice that `word` most likely misspells, or None if nothing is close."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def problems_from(error: ValidationError, lines: Lines, model: type[BaseModel]) -> list[Problem]:
    """One problem for each faulty key: its line, what is wrong in plain words, and the nearest valid key or value.

    Pydantic reports each alternative of a union; they are joined into one problem.
    """
    faults: dict[KeyPath, list[str]] = {}
    details = error.errors(include_url=False)
    for detail in details:
        location = detail["loc"]
        if detail["type"] == "too_short" and any(_is_inside(other["loc"], location) for other in details):
            # pydantic does not count faulty entries: the list is too short only because of them.
            continue
        if detail["type"] == "invalid_key":
            location = (*location[:-1], _as_yaml(detail["input"]))
        if detail["type"] == "missing":
            path = (*lines.known_prefix(location[:-1]), location[-1])
        else:
            path = lines.known_prefix(location) or location
        fault = _in_plain_words(detail, location, model)
        if fault not in faults.setdefault(path, []):
            faults[path].append(fault)
    return [Problem(key_name(path), ", or ".join(found), lines.of(path)) for path, found in faults.items()]


def _is_inside(location: KeyPath, outer: KeyPath) -> bool:
    return len(location) > len(outer) and location[: len(outer)] == outer


def _in_plain_words(detail: Mapping[str, Any], location: KeyPath, model: type[BaseModel]) -> str:
    """Pydantic's error in this program's words, or pydantic's own message for the rarer types of error."""
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "missing":
        return MISSING
    if kind in {"extra_forbidden", "invalid_key"}:
        return _unknown_key(str(location[-1]), _fields_at(model, location[:-1]))
    if kind in BOUNDS:
        word, limit = BOUNDS[kind]
        return f"must be {word} {_number(context[limit])}, got {_shown(given)}"
    if kind == "literal_error":
        return f"must be {context['expected']}, got {_shown(given)}"
    if kind == "finite_number":
        return f"must be a finite number, got {_shown(given)}"
    if kind == "too_short":
        return f"must have at least {context['min_length']}, got {context['actual_length']}"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_type" and isinstance(given, int | float):
        return f"expected text, got {_shown(given)}; put it in quotes"
    expected = TYPES.get(kind.split("_")[0])
    if expected and (kind.endswith(("_type", "_parsing")) or kind == "int_from_float"):
        return f"expected {expected}, got {_shown(given)}{_block_hint(kind, given, location, model)}"
    return f"{detail['msg']}, got {_shown(given)}"


def _block_hint(kind: str, given: Any, location: KeyPath, model: type[BaseModel]) -> str:
    """How to write a text as a block, if the block expected at `location` has exactly one required key."""
    if kind != "model_type" or not isinstance(given, str):
        return ""
    models = models_at(model, location)
    required = [name for found in models for name, field in found.model_fields.items() if field.is_required()]
    return f"; write {{{required[0]}: {given}}}" if len(required) == 1 else ""


def _as_yaml(key: Any) -> str:
    """A key that YAML does not read as text, as it is written there."""
    return "null" if key is None else str(key).lower() if isinstance(key, bool) else str(key)


def _number(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def _unknown_key(key: str, fields: Sequence[str]) -> str:
    match = nearest(key, fields)
    if match:
        return f"no such setting; did you mean `{match}`?"
    return f"no such setting; there are: {', '.join(fields)}" if fields else "no such setting"


def _fields_at(model: type[BaseModel], path: KeyPath) -> list[str]:
    """The keys that the model accepts at `path`."""
    return [name for found in models_at(model, path) for name in found.model_fields]


def models_at(model: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    """The models that are accepted at `path`; its union tags and list indices are skipped."""
    models = [model]
    for part in path:
        named = [found.model_fields[str(part)] for found in models if str(part) in found.model_fields]
        if named:
            models = [inner for field in named for inner in _models_in(field.annotation)]
    return models


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _shown(value: Any, width: int = 60) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping | list | tuple):
        return "settings" if isinstance(value, Mapping) else "a list"
    text = repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"
