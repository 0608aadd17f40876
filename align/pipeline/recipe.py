"""A recipe: one YAML file that says all that a run is made of.

A recipe is data: no interpolation, no import paths. It may name one parent with `extends` (relative to its own folder;
the child's keys win, lists are replaced whole, null removes a stage), and `--set a.b=value` changes a key for one call.
Every fault is reported at once, with its file, line and key. Other paths are relative to the current directory.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, ValidationError, create_model

from align.constitution.constitution import Constitution
from align.constitution.loading import load_constitution
from align.data.sources import file_fault, is_local_path
from align.errors import InputError, Problem
from align.models.sources import model_fault
from align.pipeline.prompt_checks import empty_splits, misspelt_categories
from align.pipeline.recipe_files import Written, read_written
from align.run.artefacts import SHARED_RUN
from align.run.stage import Stage
from align.settings.blocks import (
    Block,
    EngineBlock,
    Integer,
    JudgeBlock,
    ModelBlock,
    OptimizerBlock,
    PairSource,
    PromptsBlock,
    PromptSource,
    RewardSourceBlock,
    TrackingBlock,
)
from align.settings.yaml_files import MISSING, KeyPath, problems_from
from align.stages import all_stages
from align.training.trl_options import CONFIGS, option_faults


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"may hold letters, digits, `_`, `-` and `.`, and begins with none of the last two, got {name!r}"
        )
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]
Named = ModelBlock | EngineBlock | PromptSource | PairSource | RewardSourceBlock


class RecipeBlocks(Block):
    """The keys of a recipe besides the stages' own blocks."""

    name: FolderName | None = Field(None, description="names the run's folder; the file's own name by default")
    extends: str | None = Field(None, description="a recipe that this one changes")
    seed: Annotated[Integer, Field(ge=0, lt=2**63)] = Field(0, description="of everything that is drawn at random")
    output: str = Field("runs", description="the folder of all runs")
    model: ModelBlock | None = None
    constitution: str | None = Field(None, description="a constitution's file, or a folder in the paper's format")
    prompts: PromptsBlock | None = None
    judge: JudgeBlock = JudgeBlock()
    tracking: TrackingBlock = TrackingBlock()


@dataclass(frozen=True)
class Recipe:
    """A recipe without faults. `settings` holds the block of each of its stages, in the order in which they run."""

    path: Path
    overrides: tuple[str, ...]
    name: str
    seed: int
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
        return all_stages()[stage].inputs(self.settings[stage])

    def follows_constitution(self, stage: str) -> bool:
        """Whether the stage's result depends on the constitution, by itself or through what it reads."""
        if self.constitution is None:
            return False
        own = "constitution" in all_stages()[stage].shares_with(self.settings[stage])
        return own or any(self.follows_constitution(upstream) for upstream in self.inputs(stage))

    def run_directory(self, stage: str) -> Path:
        """The folder of the stage's run: its constitution's, or the one that all constitutions share."""
        follows = self.constitution is not None and self.follows_constitution(stage)
        return self.output / self.name / (self.constitution.key if follows and self.constitution else SHARED_RUN)

    def directory(self, stage: str) -> Path:
        """Where the stage's result is published."""
        return self.run_directory(stage) / stage

    def shared_with(self, stage: str) -> dict[str, Any]:
        """The common blocks that the stage asked for."""
        return {name: self.shared[name] for name in all_stages()[stage].shares_with(self.settings[stage])}

    def data(self, stage: str) -> list[str]:
        """Files and hub ids of the data that the stage's blocks name."""
        return [block.path for block in self._read_by(stage) if isinstance(block, PromptSource | PairSource)]

    def models(self, stage: str) -> list[str]:
        """The models that the stage's blocks name, those of servers left out."""
        named = [_model_key(block) for block in self._read_by(stage)]
        return [model for _, model in named if model]

    def _read_by(self, stage: str) -> list[Named]:
        blocks = [self.settings[stage], *self.shared_with(stage).values()]
        return [named for block in blocks for _, named in _named(block, ())]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file.
        overrides: `key.key=value` texts, each value in YAML; later ones win.

    Raises:
        InputError: every fault of the recipe, its parent, the overrides and the constitution.
    """
    written = read_written(Path(path), overrides)
    blocks, faulty, problems = _validated(written)
    settings = {name: block for name in all_stages() if (block := getattr(blocks, name)) is not None}
    problems += [*_path_problems(blocks, written), *_option_problems(written)]
    if written.orphaned:
        problems = [problem for problem in problems if problem.fault != MISSING]
    else:
        problems += [fault for name in settings for fault in _stage_problems(name, written, blocks, faulty)]
        if not settings and not faulty & all_stages().keys():
            problems.append(Problem("", f"has no stage to run; add one: {', '.join(all_stages())}"))
    constitution, others = _read_constitution(blocks.constitution)
    problems += _category_problems(blocks, constitution, written)
    written.raise_all(list(dict.fromkeys(problems)), others)
    return Recipe(
        path=Path(path),
        overrides=tuple(overrides),
        name=blocks.name or Path(path).stem,
        seed=blocks.seed,
        output=Path(blocks.output).expanduser(),
        shared={name: getattr(blocks, name) for name in ("model", "constitution", "prompts", "judge")},
        settings={name: settings[name] for name in _in_order(settings)},
        tracking=blocks.tracking,
        constitution=constitution,
    )


@cache
def recipe_model() -> type[RecipeBlocks]:
    """The recipe's schema: the common blocks, and one block for each stage there is."""
    stages: dict[str, Any] = {name: (stage.settings | None, None) for name, stage in all_stages().items()}
    return create_model("Recipe", __base__=RecipeBlocks, **stages)


def _validated(written: Written) -> tuple[RecipeBlocks, set[str], list[Problem]]:
    """The blocks without a fault, the names of the others, and what is wrong with those."""
    model = recipe_model()
    try:
        return model.model_validate(written.content), set(), []
    except ValidationError as error:
        faulty = {str(detail["loc"][0]) for detail in error.errors()}
        sound = {key: value for key, value in written.content.items() if isinstance(key, str) and key not in faulty}
        return model.model_validate(sound), faulty, problems_from(error, written.lines, model)


def _path_problems(blocks: RecipeBlocks, written: Written) -> list[Problem]:
    """Data files and local models that aren't there or are none. Hub ids are left to the stage that reads them."""
    found: list[tuple[KeyPath, str, str | None]] = []
    for path, block in _named(blocks, ()):
        if isinstance(block, PromptSource | PairSource):
            found.append(((*path, "path"), block.path, file_fault(block.path) if is_local_path(block.path) else None))
            continue
        key, model = _model_key(block)
        if model:
            found.append(((*path, key), model, model_fault(model)))
    if blocks.constitution and not Path(blocks.constitution).exists():
        found.append((("constitution",), blocks.constitution, f"no such file (looked in {Path.cwd()}); check the path"))
    return [written.problem(path, f"{name}: {fault}") for path, name, fault in found if fault]


def _model_key(block: Named) -> tuple[str, str | None]:
    """The key of a block that names a model to be loaded here, and the model; None where there is none."""
    if isinstance(block, ModelBlock):
        return "path", block.path
    if isinstance(block, EngineBlock):
        return ("model", block.model) if block.kind == "local" else ("tokenizer", block.tokenizer)
    return "model", block.model if isinstance(block, RewardSourceBlock) else None


def _named(value: Any, above: KeyPath) -> Iterator[tuple[KeyPath, Named]]:
    """Every block anywhere inside that names data or a model, with its key."""
    if isinstance(value, Named):
        yield above, value
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _named(getattr(value, name), (*above, name))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _named(item, (*above, index))


def _stage_problems(name: str, written: Written, blocks: RecipeBlocks, faulty: set[str]) -> list[Problem]:
    """What one stage lacks, and what it says of blocks that must fit together."""
    stage, settings = all_stages()[name], getattr(blocks, name)
    lacking = [
        f"reads the results of `{upstream}`, which this recipe lacks; add `{upstream}: {{}}`"
        for upstream in stage.inputs(settings)
        if written.content.get(upstream) is None
    ]
    shared = {key: getattr(blocks, key) for key in stage.shares_with(settings)}
    absent = [key for key in shared if shared[key] is None and key not in (*stage.optional, *faulty)]
    lacking += [f"needs `{key}`, which this recipe lacks; add it" for key in absent]
    problems = [written.problem((name,), fault) for fault in lacking]
    if name in CONFIGS:
        problems += _batch_problems(name, written, settings.optimizer)
    if absent or faulty & shared.keys():
        return problems
    upstream = {key: block for key in stage.inputs(settings) if (block := getattr(blocks, key)) is not None}
    told = [*stage.check(settings, shared), *stage.check_upstream(settings, upstream)]
    return problems + _split_problems(stage, settings, blocks, written) + [_keyed(text, written) for text in told]


def _keyed(text: str, written: Written) -> Problem:
    """A fault that names its key first, with its line."""
    key, _, fault = text.partition(": ")
    return Problem(key, fault, written.lines.of(tuple(re.findall(r"[^.\[\]]+", key))))


def _split_problems(stage: Stage, settings: Block, blocks: RecipeBlocks, written: Written) -> list[Problem]:
    """Splits that the stage would find empty; it needs one of those that it names."""
    splits = stage.splits(settings)
    empty = empty_splits(blocks.prompts, splits) if blocks.prompts else []
    if len(empty) < len(splits):
        return []
    fault = f"`{stage.name}` reads this split, and no prompt can fall into it; give it a share above 0"
    return [written.problem(("prompts", "split", split), fault) for split in empty]


def _category_problems(blocks: RecipeBlocks, constitution: Constitution | None, written: Written) -> list[Problem]:
    """Categories that the constitution misspells, where a stage goes by it."""
    if constitution is None or blocks.prompts is None:
        return []
    return [_keyed(text, written) for text in misspelt_categories(constitution, blocks.prompts)]


def _option_problems(written: Written) -> list[Problem]:
    """Faulty `trl` options, in blocks with other faults too."""
    blocks = {name: written.content.get(name) for name in CONFIGS}
    given = {name: block["trl"] for name, block in blocks.items() if isinstance(block, dict) and "trl" in block}
    return [
        written.problem((name, "trl", option), fault)
        for name, options in given.items()
        if isinstance(options, dict)
        for option, fault in option_faults(name, options).items()
    ]


def _batch_problems(name: str, written: Written, optimizer: OptimizerBlock) -> list[Problem]:
    """A batch that micro-batches cannot make up, however many processes there are."""
    if optimizer.batch_size % optimizer.micro_batch_size == 0:
        return []
    fault = (
        f"{optimizer.batch_size} is not a multiple of micro_batch_size {optimizer.micro_batch_size}; "
        "make it one, or micro_batch_size smaller"
    )
    return [written.problem((name, "optimizer", "batch_size"), fault)]


def _read_constitution(path: str | None) -> tuple[Constitution | None, list[InputError]]:
    """The constitution, or the faults of its own file. One that isn't there is a fault of the recipe."""
    if path is None or not Path(path).exists():
        return None, []
    try:
        return load_constitution(path), []
    except InputError as error:
        return None, [error]


def _in_order(recipe_stages: Mapping[str, Block]) -> list[str]:
    """The stages so that each comes after those it reads; by name where that leaves a choice."""
    ordered: list[str] = []
    while remaining := [name for name in sorted(recipe_stages) if name not in ordered]:
        ready = (n for n in remaining if all(up in ordered for up in all_stages()[n].inputs(recipe_stages[n])))
        ordered.append(next(ready))
    return ordered
