"""Null in a recipe that extends another, or in an override, unsets a key."""

from collections.abc import Iterator
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel

from align.pipeline.recipe_files import RawRecipe
from align.settings.validation import models_at
from align.settings.yaml_files import KeyPath


def unset_nulls(raw: RawRecipe, model: type[BaseModel]) -> None:
    """Remove each null that replaced another value, unless null is a value of that setting, as of `model.lora`.

    The key then has its default again; a key without a type of its own, such as an option of `trl`, is gone.
    """
    for path in raw.nulled:
        *above, key = path
        if not _accepts_null(model, path):
            place: Any = raw.content
            for part in above:
                place = place[part] if isinstance(place, dict) else place[int(part)]
            if isinstance(place, dict):
                place.pop(key, None)


def _accepts_null(model: type[BaseModel], path: KeyPath) -> bool:
    *above, key = path
    fields = [found.model_fields[str(key)] for found in models_at(model, tuple(above)) if key in found.model_fields]
    return any(NoneType in _members(field.annotation) for field in fields)


def _members(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _members(inner)
