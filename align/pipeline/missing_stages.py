"""What follows from the stages that a recipe leaves out.

Training may start at any stage. Without `sft`, the recipe's model is the policy that the other stages start from.
Without `sample`, prompts are still split and read, but none is completed.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from align.pipeline.recipe_files import RawRecipe
from align.run.stage import Stage
from align.settings.blocks import Block
from align.stages import all_stages

Blocks = TypeVar("Blocks", bound=BaseModel)


def inputs_of(name: str, recipe_stages: Mapping[str, Block]) -> tuple[str, ...]:
    """The stages of a recipe whose results one of them reads."""
    stage, settings = all_stages()[name], recipe_stages[name]
    optional = (each for each in stage.optional_inputs(settings) if each in recipe_stages)
    return (*stage.inputs(settings), *optional)


def with_prompts(blocks: Blocks, raw: RawRecipe) -> Blocks:
    """The blocks, with a `sample` stage that completes no prompt if the recipe lacks one and only prompts are read.

    `revise` reads the samples themselves, so a recipe that has it must say how they are made.
    """
    given = {name: block for name in all_stages() if (block := getattr(blocks, name)) is not None}
    readers = [name for name in given if "sample" in all_stages()[name].inputs(given[name])]
    if "sample" in raw.content or "revise" in raw.content or not readers:
        return blocks
    raw.content["sample"] = {"splits": []}
    return blocks.model_copy(update={"sample": all_stages()["sample"].settings.model_validate({"splits": ()})})


def lacking_inputs(stage: Stage, settings: Block, content: Mapping[str, Any]) -> list[str]:
    """The inputs that the recipe lacks, each with everything else that adding it would need, and the way out."""
    faults = []
    for name in stage.inputs(settings):
        if content.get(name) is not None:
            continue
        needs = dict.fromkeys(_needs(name, content))
        more = f", with {_joined(needs)}" if needs else ""
        instead = f", or {stage.instead[name]}" if name in stage.instead else ""
        faults.append(f"reads the results of `{name}`, which this recipe lacks; add `{name}: {{}}`{more}{instead}")
    return faults


def _needs(name: str, content: Mapping[str, Any]) -> Iterator[str]:
    """What the recipe would lack if it had the stage with its default settings."""
    stage = all_stages()[name]
    settings = stage.settings()
    for upstream in stage.inputs(settings):
        if content.get(upstream) is None:
            yield f"`{upstream}: {{}}`"
            yield from _needs(upstream, content)
    for block in stage.shared_blocks(settings):
        if content.get(block) is None and block not in (*stage.optional, "judge"):
            yield f"`{block}`"


def _joined(names: Mapping[str, None]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
