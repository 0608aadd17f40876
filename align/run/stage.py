"""The contract of a stage: a program that reads artefacts and writes one folder of them.

A stage is one file in `align/stages/` that defines `STAGE`. Its module imports nothing heavy at the top: `run` does,
so that reading a recipe stays fast.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from align.records import Split
from align.run.tracking import Tracker, flat
from align.settings.blocks import Block, TrackingBlock


@dataclass(frozen=True)
class Outcome:
    """What a stage's manifest reports: whole-number counts, and figures (JSON-able)."""

    counts: Mapping[str, int] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """All that a stage is given.

    `settings` is its own block; `shared` the recipe's common blocks that it asked for by name; `inputs` the published
    folder of each upstream stage; `output` the folder to fill (it may hold what an interrupted run left: go on from
    it); `seed` the recipe's seed; `constitution` a file or folder, where the stage shares 'constitution'.
    """

    stage: str
    settings: Any
    shared: Mapping[str, Any]
    inputs: Mapping[str, Path]
    output: Path
    seed: int
    run_name: str
    tracking: TrackingBlock

    def tracker(self) -> Tracker:
        """Where the stage's figures go: its `metrics.jsonl`, and wandb when asked."""
        return Tracker(self.output, self.tracking, self.run_name, self.stage)

    def log_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log figures that are known at the stage's end, in the place of any that an interrupted try left.

        Each row is one step, from 1; of nested figures the numbers are logged, under their paths.
        """
        with self.tracker() as tracker:
            tracker.truncate(-1)
            for step, figures in enumerate(rows, start=1):
                tracker.log(step, flat(figures))


class Stage(ABC):
    """Base of every stage.

    `shares` names the recipe's common blocks that the stage reads (among 'model', 'constitution', 'prompts', 'judge'):
    with its own block they are its slice of the recipe, and a change in the slice makes it stale. It gets None for one
    that is among `optional` too and that the recipe lacks; without the others the recipe is at fault. `outputs` are
    the files and folders it publishes, relative to its folder; one that is not always there may be missing.
    `only_gates` names settings that only decide whether the result may be published: another value goes on with the
    work that is there.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    settings: ClassVar[type[Block]]
    shares: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    only_gates: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[tuple[str, ...]]
    uses_processes: ClassVar[bool] = True

    @abstractmethod
    def inputs(self, settings: Any) -> tuple[str, ...]:
        """The stages whose results this one reads, under these settings."""

    def shares_with(self, settings: Any) -> tuple[str, ...]:
        """The common blocks that it reads under these settings: all of `shares`, unless a stage says otherwise."""
        return self.shares

    def files(self, settings: Any) -> tuple[str, ...]:
        """Local files or folders named in the settings that the stage reads; a change in one makes it stale."""
        return ()

    def splits(self, settings: Any) -> tuple[Split, ...]:
        """The splits of the prompts without whose rows there is nothing to do."""
        return ()

    def check_upstream(self, settings: Any, upstream: Mapping[str, Any]) -> list[str]:
        """Faults that only show beside the settings of the stages that this one reads; each names its key."""
        return []

    def check(self, settings: Any, shared: Mapping[str, Any]) -> list[str]:
        """Faults that only show when blocks are read together; each names its key. Checked before anything runs."""
        return []

    @abstractmethod
    def run(self, context: Context) -> Outcome:
        """Do the work. Called in every process; only the first rank's outcome is kept.

        Raises:
            AlignError: with place, fault and remedy.
        """
