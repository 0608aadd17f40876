"""Reading YAML so that every fault can be reported with its line, its key and the nearest right key."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from align.errors import FileProblems, InputError, Problem

KeyPath = tuple[str | int, ...]
MISSING = "is missing"
MERGE_TAG = "tag:yaml.org,2002:merge"
MOST_NODES = 1_000_000
"""Keys and values of a file, its aliases written out: a few lines of aliases to aliases can stand for any number."""


class Lines:
    """Which line (1-based) each key of a YAML file stands on. `source` is the file's name for errors."""

    def __init__(self, source: str, lines: Mapping[KeyPath, int] | None = None) -> None:
        self.source = source
        self._lines = {_normal(path): line for path, line in (lines or {}).items()}

    def __contains__(self, path: Sequence[str | int]) -> bool:
        return _normal(path) in self._lines

    def of(self, path: Sequence[str | int]) -> int | None:
        """The key's line, or that of the nearest enclosing key that has one; None where there is none."""
        normal = _normal(path)
        enclosing = (normal[:length] for length in range(len(normal), 0, -1))
        return next((self._lines[part] for part in enclosing if part in self._lines), None)

    def known(self, path: Sequence[str | int]) -> KeyPath:
        """The longest beginning of `path` that the file holds."""
        longest = next((length for length in range(len(path), 0, -1) if tuple(path[:length]) in self), 0)
        return tuple(path[:longest])


def load_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """`load_yaml_with_duplicates`, where a key written twice is an error at once.

    Raises:
        FileProblems: duplicate keys (every one of them).
    """
    content, lines, duplicates = load_yaml_with_duplicates(path)
    if duplicates:
        raise FileProblems(str(path), duplicates)
    return content, lines


def load_yaml_with_duplicates(path: Path) -> tuple[dict[str, Any], Lines, list[Problem]]:
    """The plain content of a YAML file whose top is a mapping, the lines of its keys, and keys written twice.

    Raises:
        InputError: no such file, one that this user may not read, or not text.
        FileProblems: bad YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (looked in {Path.cwd()}); check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, expected a YAML file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable for this user") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return _parsed(text, str(path))


def parse_yaml(text: str, source: str) -> tuple[dict[str, Any], Lines]:
    """`load_yaml` for text; `source` names it in errors."""
    content, lines, duplicates = _parsed(text, source)
    if duplicates:
        raise FileProblems(source, duplicates)
    return content, lines


def _parsed(text: str, source: str) -> tuple[dict[str, Any], Lines, list[Problem]]:
    yaml = YAML(typ="safe", pure=True)
    # Duplicates are found below, all at once; the loader itself would stop at the first.
    yaml.allow_duplicate_keys = True
    try:
        root = yaml.compose(text)
        if root is None:
            raise FileProblems(source, [Problem("", "is empty; it must hold `key: value` settings")])
        if not isinstance(root, MappingNode):
            raise FileProblems(source, [Problem("", "must hold `key: value` settings at its top", _line(root))])
        _require_readable(root)
        positions = list(_positions(root))
        return yaml.load(text), Lines(source, dict(positions)), _duplicates(positions)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        fault = f"not valid YAML: {error.problem or error.context}"
        raise FileProblems(source, [Problem("", fault, mark.line + 1 if mark else None)]) from None
    except YAMLError as error:
        raise FileProblems(source, [Problem("", f"not valid YAML: {str(error).splitlines()[0]}")]) from None
    except RecursionError:
        raise FileProblems(source, [Problem("", "nested too deeply; no setting lies that deep")]) from None


def key_name(path: Iterable[str | int]) -> str:
    """A key as errors spell it: `principles[0].text`."""
    name = ""
    for part in path:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice that `word` is most likely a misspelling of, or None where nothing is close."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def problems_from(error: ValidationError, lines: Lines, model: type[BaseModel]) -> list[Problem]:
    """One problem a faulty key: where it stands, what is wrong in plain words, and the nearest right key or value.

    The alternatives of a union, which pydantic reports one by one, are joined into one problem.
    """
    faults: dict[KeyPath, list[str]] = {}
    details = error.errors(include_url=False)
    for detail in details:
        location = detail["loc"]
        if detail["type"] == "too_short" and any(_inside(other["loc"], location) for other in details):
            # Entries with a fault of their own are not counted: the list is as short as they are many.
            continue
        if detail["type"] == "invalid_key":
            location = (*location[:-1], _as_written(detail["input"]))
        if detail["type"] == "missing":
            path = (*lines.known(location[:-1]), location[-1])
        else:
            path = lines.known(location) or location
        fault = _plain_words(detail, location, model)
        if fault not in faults.setdefault(path, []):
            faults[path].append(fault)
    return [Problem(key_name(path), ", or ".join(found), lines.of(path)) for path, found in faults.items()]


def _inside(location: KeyPath, outer: KeyPath) -> bool:
    return len(location) > len(outer) and location[: len(outer)] == outer


def _normal(path: Sequence[str | int]) -> tuple[str, ...]:
    return tuple(str(part) for part in path)


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _require_readable(root: Node) -> None:
    """Refuse aliases that make the file endless, or so long that nobody could read it.

    Raises:
        MarkedYAMLError: where the alias leads.
    """
    sizes: dict[int, int | None] = {}

    def size(node: Node) -> int:
        """How many nodes this one stands for; every node is looked at once."""
        if id(node) not in sizes:
            sizes[id(node)] = None
            sizes[id(node)] = 1 + sum(map(size, _parts(node)))
        found = sizes[id(node)]
        if found is None:
            raise MarkedYAMLError(problem="an alias that contains itself", problem_mark=node.start_mark)
        if found > MOST_NODES:
            fault = f"more than {MOST_NODES:,} keys and values, its aliases written out"
            raise MarkedYAMLError(problem=fault, problem_mark=node.start_mark)
        return found

    size(root)


def _parts(node: Node) -> Iterator[Node]:
    if isinstance(node, MappingNode):
        yield from (part for pair in node.value for part in pair)
    elif isinstance(node, SequenceNode):
        yield from node.value


def _positions(node: Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    """Every key's path and line, in the file's order; a path comes twice where a mapping has a key twice."""
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if key.tag == MERGE_TAG:
                continue
            yield (*path, str(key.value)), _line(key)
            yield from _positions(value, (*path, str(key.value)))
    elif isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            yield (*path, index), _line(value)
            yield from _positions(value, (*path, index))


def _duplicates(positions: Iterable[tuple[KeyPath, int]]) -> list[Problem]:
    first: dict[KeyPath, int] = {}
    problems = []
    for path, line in positions:
        if path in first:
            fault = f"written twice, first on line {first[path]}; keep one"
            problems.append(Problem(key_name(path), fault, line))
        first.setdefault(path, line)
    return problems


BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "`key: value` settings",
    "model": "`key: value` settings",
}


def _plain_words(detail: Mapping[str, Any], location: KeyPath, model: type[BaseModel]) -> str:
    """Pydantic's error in the words of this program; its own message where there is no better one."""
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
    family = kind.split("_")[0]
    if family in KINDS and (kind.endswith(("_type", "_parsing")) or kind == "int_from_float"):
        return f"expected {KINDS[family]}, got {_shown(given)}{_as_block(kind, given, location, model)}"
    return f"{detail['msg']}, got {_shown(given)}"


def _as_block(kind: str, given: Any, location: KeyPath, model: type[BaseModel]) -> str:
    """What a text was to be, where the settings that stand there have one key that must be given."""
    if kind != "model_type" or not isinstance(given, str):
        return ""
    models = _models_at(model, location)
    needed = [name for found in models for name, field in found.model_fields.items() if field.is_required()]
    return f"; write {{{needed[0]}: {given}}}" if len(needed) == 1 else ""


def _as_written(key: Any) -> str:
    """A key that YAML does not take for text."""
    return "null" if key is None else str(key).lower() if isinstance(key, bool) else str(key)


def _number(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def _unknown_key(key: str, fields: Sequence[str]) -> str:
    match = nearest(key, fields)
    if match:
        return f"no such setting; did you mean `{match}`?"
    return f"no such setting; there are: {', '.join(fields)}" if fields else "no such setting"


def _fields_at(model: type[BaseModel], path: KeyPath) -> list[str]:
    """The keys that the model takes at `path`."""
    return [name for found in _models_at(model, path) for name in found.model_fields]


def _models_at(model: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    """The models that may stand at `path`, where union tags and list indices are passed over."""
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
