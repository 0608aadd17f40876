"""The data and models that a recipe names, wherever its blocks name them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from align.data.paths import file_fault, is_local_path
from align.errors import Problem, name_fault
from align.models.sources import model_fault
from align.pipeline.recipe_files import MAX_SHOWN, RawRecipe
from align.settings.blocks import EngineBlock, ModelBlock, RewardSourceBlock
from align.settings.data import DataSource
from align.settings.yaml_files import KeyPath

DataOrModelBlock = ModelBlock | EngineBlock | DataSource | RewardSourceBlock


def path_problems(blocks: BaseModel, constitution: str | None, raw: RawRecipe) -> list[Problem]:
    """Data files and local models that are missing or unusable. Hub ids are checked by the stage that reads them."""
    found: list[tuple[KeyPath, str, str | None]] = []
    for path, block in data_and_model_blocks(blocks):
        if isinstance(block, DataSource):
            found += [((*path, "path"), name, name_fault(name) or _data_fault(name)) for name in block.paths]
            continue
        key, model = model_key(block)
        if model:
            found.append(((*path, key), model, model_fault(model)))
    if constitution and not os.path.exists(constitution):
        found.append((("constitution",), constitution, f"no such file (looked in {Path.cwd()}); check the path"))
    folders = ((key, getattr(blocks, key, None)) for key in ("output", "name"))
    found += [((key,), name, name_fault(name)) for key, name in folders if name]
    return [raw.problem(path, f"{name[:MAX_SHOWN]}: {fault}") for path, name, fault in found if fault]


def _data_fault(path: str) -> str | None:
    return file_fault(path) if is_local_path(path) else None


def model_key(block: DataOrModelBlock) -> tuple[str, str | None]:
    """The key of a block that names a model or tokenizer to load on this machine, and that name, or None if unset."""
    if isinstance(block, ModelBlock):
        return "path", block.path
    if isinstance(block, EngineBlock):
        return ("model", block.model) if block.kind == "local" else ("tokenizer", block.tokenizer)
    return "model", block.model if isinstance(block, RewardSourceBlock) else None


def data_and_model_blocks(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, DataOrModelBlock]]:
    """All blocks inside `value`, at any depth, that name data or a model, each with its path."""
    if isinstance(value, DataOrModelBlock):
        yield path, value
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from data_and_model_blocks(getattr(value, name), (*path, name))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from data_and_model_blocks(item, (*path, index))
