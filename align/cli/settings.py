"""`align settings`: every key of a recipe as a Markdown page, made from the schema that recipes are checked by."""

import inspect
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from align.pipeline.recipe import RecipeBlocks, recipe_model
from align.settings.blocks import Block
from align.stages import all_stages

HEAD = """\
# Settings

Every key of a recipe, as `--set` takes it. Written by `align settings > docs/settings.md`; what the blocks are for
stands in [recipes.md](recipes.md). `[]` is each entry of a list. Defaults hold key by key: to name one key of a block
leaves the others as they are.
"""
WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", dict: "`key: value` settings"}
BOUNDS = {Gt: ("above", "gt"), Ge: ("at least", "ge"), Lt: ("below", "lt"), Le: ("at most", "le")}


@dataclass(frozen=True)
class Setting:
    """One key of a recipe, all in words."""

    key: str
    type: str
    default: str
    what: str


def settings_page() -> str:
    """The whole page."""
    top = [name for name, field in RecipeBlocks.model_fields.items() if not _blocks(field.annotation)]
    named = [name for name in recipe_model().model_fields if name not in top]
    return "\n".join([HEAD, _section("The recipe", "", top), *(_block_section(name) for name in named)])


def settings_of(names: list[str]) -> Iterator[Setting]:
    """The settings under these keys of a recipe."""
    for name in names:
        field = recipe_model().model_fields[name]
        yield from _settings(field, field.get_default(call_default_factory=True), name)


def _block_section(name: str) -> str:
    stage = all_stages().get(name)
    [block] = _blocks(recipe_model().model_fields[name].annotation)
    about = inspect.getdoc(block) or ""
    return _section(f"`{name}`", f"Stage: {stage.help}.\n\n{about}" if stage else about, [name])


def _section(title: str, about: str, names: list[str]) -> str:
    rows = [(setting.key, setting.type, setting.default, setting.what) for setting in settings_of(names)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    intro = f"{about}\n\n" if about else ""
    return f"## {title}\n\n{intro}| key | type | default | what |\n|---|---|---|---|\n{table}\n"


def _settings(field: FieldInfo, default: Any, key: str) -> Iterator[Setting]:
    """A field's own setting, then those inside its blocks. What is a block and nothing else has no line of its own."""
    blocks = _blocks(field.annotation)
    is_block = field.annotation in blocks or (blocks and "." not in key)
    if not is_block:
        kind = _type(field.annotation, tuple(field.metadata))
        yield Setting(f"`{key}`", kind, _shown(default), field.description or "")
    for block in blocks:
        inside = key + "[]" * (typing.get_origin(field.annotation) is tuple)
        for name, inner in block.model_fields.items():
            own = inner.get_default(call_default_factory=True)
            given = getattr(default, name) if isinstance(default, Block) else own
            yield from _settings(inner, given, f"{inside}.{name}")


def _blocks(annotation: Any) -> list[type[Block]]:
    """The blocks that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, Block):
        return [annotation]
    return [block for argument in typing.get_args(annotation) for block in _blocks(argument)]


def _type(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """A type in words, with its bounds."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], (*arguments[1:], *metadata))
    if origin in (Union, types.UnionType):
        return _either([_type(argument, metadata) for argument in arguments])
    if origin is Literal:
        return _either([f"`{value}`" for value in arguments])
    if origin is tuple:
        return f"list of {_type(arguments[0])}" + (", not empty" if MinLen in map(type, _flat(metadata)) else "")
    if annotation is type(None):
        return "null"
    if _blocks(annotation):
        return WORDS[dict]
    bounds = [each for each in _flat(metadata) if type(each) in BOUNDS]
    told = [_tightest([each for each in bounds if type(each) in side]) for side in ((Ge, Gt), (Lt, Le))]
    return " ".join([WORDS[origin or annotation], " and ".join(filter(None, told))]).strip()


def _flat(metadata: tuple[Any, ...]) -> Iterator[Any]:
    """The bounds among an annotation's metadata, those inside pydantic's own fields too."""
    for each in metadata:
        yield from each.metadata if isinstance(each, FieldInfo) else (each,)


def _tightest(bounds: list[Any]) -> str:
    """The last bound of one side in words: an annotation's own comes after that of the type that it narrows."""
    if not bounds:
        return ""
    word, name = BOUNDS[type(bounds[-1])]
    bound = getattr(bounds[-1], name)
    return f"{word} {bound}" if isinstance(bound, int) else f"{word} {bound:g}"


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _shown(default: Any) -> str:
    if default is PydanticUndefined:
        return "must be given"
    if isinstance(default, tuple):
        plain = [each.model_dump(exclude_defaults=True) if isinstance(each, Block) else each for each in default]
        return f"`{json.dumps(plain)}`" if plain else "none"
    if isinstance(default, Block):
        return "as below"
    if isinstance(default, dict):
        return "none" if not default else f"`{json.dumps(default)}`"
    if isinstance(default, float):
        return f"`{default:g}`"
    return f"`{json.dumps(default)}`" if not isinstance(default, str) else f"`{default}`"
