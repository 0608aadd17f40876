"""A recipe: one YAML file that determines a whole run.

A recipe is plain data, without interpolation. It may name one parent with `extends`: the child's keys override the
parent's, lists are replaced as a whole, and null removes a stage. `--set a.b=value` overrides a key for one command.
All faults are reported together, each with its file, line and key. The path after `extends` is relative to the
recipe's own folder, other paths to the current directory.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, create_model

from align.constitution.constitution import Constitution
from align.constitution.loading import load_constitution
from align.data.paths import local_files
from align.errors import InputError, Problem
from align.pipeline.missing_stages import inputs_of, lacking_inputs, with_prompts
from align.pipeline.named_sources import DataOrModelBlock, data_and_model_blocks, model_key, path_problems
from align.pipeline.option_checks import option_problems
from align.pipeline.prompt_checks import empty_splits, misspelt_categories
from align.pipeline.recipe_files import RawRecipe, read_raw_recipe
from align.pipeline.unset_keys import unset_nulls
from align.run.artefacts import SHARED_RUN
from align.run.stage import Stage
from align.settings.blocks import (
    Block,
    Integer,
    JudgeBlock,
    ModelBlock,
    OptimizerBlock,
    TrackingBlock,
)
from align.settings.data import DataSource, PromptsBlock
from align.settings.validation import MISSING, problems_from
from align.stages import all_stages
from align.training.trl_options import CONFIGS


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"may hold letters, digits, `_`, `-` and `.`, but not begin with `-` or `.`, got {name!r}")
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]


class RecipeBlocks(Block):
    """The keys of a recipe besides the stages' own blocks."""

    name: FolderName | None = Field(None, description="name of the run's folder; null is the recipe's file name")
    extends: str | None = Field(None, description="another recipe, whose keys this one overrides")
    seed: Annotated[Integer, Field(ge=0, lt=2**63)] = Field(0, description="seed of everything random")
    deterministic: bool = Field(False, description="give the same results each time on a GPU too, at a lower speed")
    output: str = Field("runs", description="folder of all runs")
    model: ModelBlock | None = None
    constitution: str | None = Field(
        None, description="path of a YAML file, or of the JSON published with the Constitutional AI paper"
    )
    prompts: PromptsBlock | None = None
    judge: JudgeBlock = JudgeBlock()
    tracking: TrackingBlock = TrackingBlock()


@dataclass(frozen=True)
class Recipe:
    """A valid recipe. `settings` holds the block of each of its stages, in the order in which they run."""

    path: Path
    overrides: tuple[str, ...]
    name: str
    seed: int
    deterministic: bool
    output: Path
    shared: Mapping[str, Any]
    settings: Mapping[str, Block]
    tracking: TrackingBlock
    constitution: Constitution | None

    @property
    def override_options(self) -> list[str]:
        """The overrides as words of a command line."""
        return [word for override in self.overrides for word in ("--set", override)]

    def inputs(self, stage: str) -> tuple[str, ...]:
        """The stages whose results this one reads."""
        return inputs_of(stage, self.settings)

    def depends_on_constitution(self, stage: str) -> bool:
        """Whether the stage's result depends on the constitution, directly or through its inputs."""
        if self.constitution is None:
            return False
        own = "constitution" in all_stages()[stage].shared_blocks(self.settings[stage])
        return own or any(self.depends_on_constitution(upstream) for upstream in self.inputs(stage))

    def run_directory(self, stage: str) -> Path:
        """The run folder that holds the stage: the constitution's, or the one that all constitutions share."""
        depends = self.constitution is not None and self.depends_on_constitution(stage)
        return self.output / self.name / (self.constitution.key if depends and self.constitution else SHARED_RUN)

    def directory(self, stage: str) -> Path:
        """The folder in which the stage's result is published."""
        return self.run_directory(stage) / stage

    def shared_blocks(self, stage: str) -> dict[str, Any]:
        """The shared blocks that the stage reads, by name."""
        return {name: self.shared[name] for name in all_stages()[stage].shared_blocks(self.settings[stage])}

    def data(self, stage: str) -> list[str]:
        """The data files and folders on this machine that the blocks read by the stage name."""
        blocks = self._inner_blocks(stage)
        return [file for block in blocks if isinstance(block, DataSource) for file in local_files(block)]

    def sources(self) -> list[DataSource]:
        """Every source of data in the recipe."""
        blocks = [*self.settings.values(), *self.shared.values()]
        inner = [block for outer in blocks for _, block in data_and_model_blocks(outer)]
        return [block for block in inner if isinstance(block, DataSource)]

    def models(self, stage: str) -> list[str]:
        """The models, except those of servers, that the blocks read by the stage name."""
        named = [model_key(block) for block in self._inner_blocks(stage)]
        return [model for _, model in named if model]

    def _inner_blocks(self, stage: str) -> list[DataOrModelBlock]:
        blocks = [self.settings[stage], *self.shared_blocks(stage).values()]
        return [inner for block in blocks for _, inner in data_and_model_blocks(block)]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file.
        overrides: `key.key=value` texts, each value in YAML; later ones take precedence.

    Raises:
        InputError: lists all faults of the recipe, its parent, the overrides and the constitution.
    """
    raw = read_raw_recipe(Path(path), overrides)
    found = _checked(raw)
    if found.problems and raw.parent is not None:
        raw.place_in_parent(_checked(raw.parent).problems)
    raw.raise_all(list(dict.fromkeys(found.problems)), found.others)
    blocks = found.blocks
    return Recipe(
        path=Path(path),
        overrides=tuple(overrides),
        name=blocks.name or Path(path).stem,
        seed=blocks.seed,
        deterministic=blocks.deterministic,
        output=Path(blocks.output).expanduser(),
        shared={name: getattr(blocks, name) for name in ("model", "constitution", "prompts", "judge")},
        settings={name: found.settings[name] for name in _in_order(found.settings)},
        tracking=blocks.tracking,
        constitution=found.constitution,
    )


@dataclass(frozen=True)
class _Checked:
    """What a recipe says, as far as it is valid, and its faults; `others` are those of the constitution's file."""

    blocks: RecipeBlocks
    settings: dict[str, Block]
    constitution: Constitution | None
    problems: list[Problem]
    others: list[InputError]


def _checked(raw: RawRecipe) -> _Checked:
    unset_nulls(raw, recipe_model())
    blocks, faulty, problems = _validated(raw)
    blocks = with_prompts(blocks, raw)
    settings = {name: block for name in all_stages() if (block := getattr(blocks, name)) is not None}
    problems += [*path_problems(blocks, blocks.constitution, raw), *option_problems(raw)]
    if raw.orphaned:
        problems = [problem for problem in problems if problem.fault != MISSING]
    else:
        problems += [fault for name in settings for fault in _stage_problems(name, raw, blocks, faulty)]
        if not settings and not faulty & all_stages().keys():
            problems.append(Problem("", f"has no stage to run; add one: {', '.join(all_stages())}"))
    constitution, others = _read_constitution(blocks.constitution)
    problems += _category_problems(blocks, constitution, raw)
    return _Checked(blocks, settings, constitution, problems, others)


@cache
def recipe_model() -> type[RecipeBlocks]:
    """The recipe's schema: the shared blocks, and one block for each stage."""
    stages: dict[str, Any] = {name: (stage.settings | None, None) for name, stage in all_stages().items()}
    return create_model("Recipe", __base__=RecipeBlocks, **stages)


def _validated(raw: RawRecipe) -> tuple[RecipeBlocks, set[str], list[Problem]]:
    """The valid blocks, the names of the faulty ones, and the problems of those."""
    model = recipe_model()
    try:
        return model.model_validate(raw.content), set(), []
    except ValidationError as error:
        faulty = {str(detail["loc"][0]) for detail in error.errors()}
        sound = {key: value for key, value in raw.content.items() if isinstance(key, str) and key not in faulty}
        return model.model_validate(sound), faulty, problems_from(error, raw.lines, model)


def _stage_problems(name: str, raw: RawRecipe, blocks: RecipeBlocks, faulty: set[str]) -> list[Problem]:
    """The inputs and blocks that one stage lacks, and the conflicts that it finds between blocks."""
    stage, settings = all_stages()[name], getattr(blocks, name)
    lacking = lacking_inputs(stage, settings, raw.content)
    shared = {key: getattr(blocks, key) for key in stage.shared_blocks(settings)}
    absent = [key for key in shared if shared[key] is None and key not in (*stage.optional, *faulty)]
    lacking += [f"needs `{key}`, which this recipe lacks; add it" for key in absent]
    problems = [raw.problem((name,), fault) for fault in lacking]
    if name in CONFIGS:
        problems += _batch_problems(name, raw, settings.optimizer)
    if absent or faulty & shared.keys():
        return problems
    read = (*stage.inputs(settings), *stage.optional_inputs(settings))
    upstream = {key: block for key in read if (block := getattr(blocks, key)) is not None}
    conflicts = [*stage.check(settings, shared), *stage.check_upstream(settings, upstream)]
    return problems + _split_problems(stage, settings, blocks, raw) + [_parsed_fault(text, raw) for text in conflicts]


def _parsed_fault(text: str, raw: RawRecipe) -> Problem:
    """A `key: fault` text as a problem, with its line."""
    key, _, fault = text.partition(": ")
    return Problem(key, fault, raw.lines.of(tuple(re.findall(r"[^.\[\]]+", key))))


def _split_problems(stage: Stage, settings: Block, blocks: RecipeBlocks, raw: RawRecipe) -> list[Problem]:
    """The splits that the stage reads, if no prompt can belong to any of them."""
    splits = stage.splits(settings)
    empty = empty_splits(blocks.prompts, splits) if blocks.prompts else []
    if len(empty) < len(splits):
        return []
    fault = f"`{stage.name}` reads this split, but no prompt can belong to it; give it a share above 0"
    return [raw.problem(("prompts", "split", split), fault) for split in empty]


def _category_problems(blocks: RecipeBlocks, constitution: Constitution | None, raw: RawRecipe) -> list[Problem]:
    """Categories of the prompts that the constitution misspells."""
    if constitution is None or blocks.prompts is None:
        return []
    return [_parsed_fault(text, raw) for text in misspelt_categories(constitution, blocks.prompts)]


def _batch_problems(name: str, raw: RawRecipe, optimizer: OptimizerBlock) -> list[Problem]:
    """A batch size that is not a multiple of the micro-batch size, whatever the number of processes."""
    if optimizer.batch_size % optimizer.micro_batch_size == 0:
        return []
    fault = f"{optimizer.batch_size} is not a multiple of micro_batch_size {optimizer.micro_batch_size}; change either"
    return [raw.problem((name, "optimizer", "batch_size"), fault)]


def _read_constitution(path: str | None) -> tuple[Constitution | None, list[InputError]]:
    """The constitution, or the faults of its file. A missing file is a fault of the recipe, reported elsewhere."""
    if path is None or not os.path.exists(path):
        return None, []
    try:
        return load_constitution(path), []
    except InputError as error:
        return None, [error]


def _in_order(recipe_stages: Mapping[str, Block]) -> list[str]:
    """The stages in an order in which each comes after its inputs; ties are broken by name."""
    ordered: list[str] = []
    while remaining := [name for name in sorted(recipe_stages) if name not in ordered]:
        ready = (n for n in remaining if all(up in ordered for up in inputs_of(n, recipe_stages)))
        ordered.append(next(ready))
    return ordered
