"""Reads YAML files together with the line of every key, so that faults can be reported by line."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from align.errors import FileProblems, Problem, explained_read_errors

KeyPath = tuple[str | int, ...]
TOO_DEEP = "nested too deeply; no setting is that deep"
MERGE_TAG = "tag:yaml.org,2002:merge"
MAX_BYTES = 20_000_000
"""The largest file that is read; a file of settings has a few thousand bytes."""
MAX_NODES = 1_000_000
"""Limit on a file's keys and values once aliases are expanded: a few lines of nested aliases can stand for billions."""


class Lines:
    """Maps the keys of a YAML file to their lines, from 1. `source` is the file's name in errors."""

    def __init__(self, source: str, lines: Mapping[KeyPath, int] | None = None) -> None:
        self.source = source
        self._lines = {_as_texts(path): line for path, line in (lines or {}).items()}

    def __contains__(self, path: Sequence[str | int]) -> bool:
        return _as_texts(path) in self._lines

    def of(self, path: Sequence[str | int]) -> int | None:
        """The line of the key, or of the nearest enclosing key that has one; None if there is none."""
        texts = _as_texts(path)
        prefixes = (texts[:length] for length in range(len(texts), 0, -1))
        return next((self._lines[prefix] for prefix in prefixes if prefix in self._lines), None)

    def known_prefix(self, path: Sequence[str | int]) -> KeyPath:
        """The longest prefix of `path` that is a key of the file."""
        longest = next((length for length in range(len(path), 0, -1) if tuple(path[:length]) in self), 0)
        return tuple(path[:longest])


def load_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """Like `load_yaml_with_duplicates`, but duplicate keys are an error.

    Raises:
        FileProblems: all the duplicate keys.
    """
    return _refuse_duplicates(str(path), *load_yaml_with_duplicates(path))


def load_yaml_with_duplicates(path: Path) -> tuple[dict[str, Any], Lines, list[Problem]]:
    """The content of a YAML file whose top level is a mapping, the lines of its keys, and the duplicate keys.

    Raises:
        InputError: the file is missing, unreadable or not text.
        FileProblems: it is not valid YAML.
    """
    with explained_read_errors(path, MAX_BYTES):
        text = path.read_text(encoding="utf-8")
    return _parsed(text, str(path))


def parse_yaml(text: str, source: str) -> tuple[dict[str, Any], Lines]:
    """`load_yaml` for a text; errors name `source`."""
    return _refuse_duplicates(source, *_parsed(text, source))


def key_name(path: Iterable[str | int]) -> str:
    """A key as errors spell it: `principles[0].text`."""
    name = ""
    for part in path:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name


def _refuse_duplicates(
    source: str, content: dict[str, Any], lines: Lines, duplicates: list[Problem]
) -> tuple[dict[str, Any], Lines]:
    if duplicates:
        raise FileProblems(source, duplicates)
    return content, lines


def _parsed(text: str, source: str) -> tuple[dict[str, Any], Lines, list[Problem]]:
    yaml = YAML(typ="safe", pure=True)
    # All duplicates are found below; the loader itself would stop at the first.
    yaml.allow_duplicate_keys = True
    try:
        root = yaml.compose(text)
        if root is None:
            raise FileProblems(source, [Problem("", "is empty; it must hold `key: value` settings")])
        if not isinstance(root, MappingNode):
            raise FileProblems(source, [Problem("", "must hold `key: value` settings at its top level", _line(root))])
        _check_aliases(root)
        positions = list(_positions(root))
        return yaml.load(text), Lines(source, dict(positions)), _duplicates(positions)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        fault = f"not valid YAML: {error.problem or error.context}"
        raise FileProblems(source, [Problem("", fault, mark.line + 1 if mark else None)]) from None
    except YAMLError as error:
        raise FileProblems(source, [Problem("", f"not valid YAML: {str(error).splitlines()[0]}")]) from None
    except RecursionError:
        raise FileProblems(source, [Problem("", TOO_DEEP)]) from None
    except (ValueError, TypeError, KeyError) as error:  # of a value's own type: ruamel.yaml does not place these
        raise FileProblems(source, [_misfit(yaml, root, error)]) from None


def _misfit(yaml: YAML, root: Node, error: Exception) -> Problem:
    """The first value that is not what its tag says, or not the date that it looks like."""
    for node in _scalars(root):
        try:
            yaml.constructor.construct_object(node)
        except (YAMLError, ValueError, TypeError, KeyError):
            kind = str(node.tag).rpartition(":")[2]
            return Problem("", f"not valid YAML: {node.value!r} is no {kind}; correct it, or quote it", _line(node))
    return Problem("", f"not valid YAML: {error}")


def _scalars(node: Node) -> Iterator[ScalarNode]:
    if isinstance(node, ScalarNode):
        yield node
    for child in _children(node):
        yield from _scalars(child)


def yaml_value(text: str) -> Any:
    """The value of a text in YAML, given on the command line.

    Raises:
        ValueError: it is not valid YAML; the message says why.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except (YAMLError, ValueError, TypeError, KeyError):
        raise ValueError(f"{text!r} is not valid YAML; quote it") from None


def _as_texts(path: Sequence[str | int]) -> tuple[str, ...]:
    return tuple(str(part) for part in path)


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _check_aliases(root: Node) -> None:
    """Refuse aliases that make the content endless, or too large for memory.

    Raises:
        MarkedYAMLError: marks the node that the alias refers to.
    """
    sizes: dict[int, int | None] = {}

    def size(node: Node) -> int:
        """The number of nodes that this one stands for. Each node is visited once."""
        if id(node) not in sizes:
            sizes[id(node)] = None
            sizes[id(node)] = 1 + sum(map(size, _children(node)))
        found = sizes[id(node)]
        if found is None:
            raise MarkedYAMLError(problem="an alias that contains itself", problem_mark=node.start_mark)
        if found > MAX_NODES:
            fault = f"more than {MAX_NODES:,} keys and values once its aliases are expanded"
            raise MarkedYAMLError(problem=fault, problem_mark=node.start_mark)
        return found

    size(root)


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, MappingNode):
        yield from (part for pair in node.value for part in pair)
    elif isinstance(node, SequenceNode):
        yield from node.value


def _positions(node: Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    """The path and line of every key, in file order; a duplicate key yields its path again."""
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
            fault = f"duplicate key, first on line {first[path]}; keep one"
            problems.append(Problem(key_name(path), fault, line))
        first.setdefault(path, line)
    return problems
