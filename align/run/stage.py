"""The contract of a stage, which reads the artefacts of earlier stages and writes one folder of its own.

A stage is one file in `align/stages/` that defines `STAGE`. Only its `run` imports heavy libraries, so that reading a
recipe stays fast.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from align.records import Split
from align.run.tracking import Tracker, flatten_figures
from align.settings.blocks import Block, ModelBlock, TrackingBlock


@dataclass(frozen=True)
class Outcome:
    """What the stage reports in its manifest: counts (whole numbers) and figures (anything that JSON can hold)."""

    counts: Mapping[str, int] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """Everything that a stage is given.

    `settings` is its own block. `shared` maps the names of the shared blocks that it reads to those blocks; the
    'constitution' is a path. `inputs` maps each upstream stage to its published folder. `output` is the folder to fill;
    it may hold what an interrupted run left, and the stage then resumes from that. `seed` is the recipe's.
    """

    stage: str
    settings: Any
    shared: Mapping[str, Any]
    inputs: Mapping[str, Path]
    output: Path
    seed: int
    run_name: str
    tracking: TrackingBlock

    @property
    def policy(self) -> tuple[str, str | None]:
        """Path and revision of the policy to start from: the SFT stage's, or the recipe's model if it has no `sft`."""
        model: ModelBlock = self.shared["model"]
        return (str(self.inputs["sft"] / "model"), None) if "sft" in self.inputs else (model.path, model.revision)

    def tracker(self) -> Tracker:
        """A tracker that writes to the stage's `metrics.jsonl` and, if the recipe asks for it, to wandb."""
        return Tracker(self.output, self.tracking, self.run_name, self.stage)

    def log_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log figures that are known only at the stage's end, replacing any that an interrupted run logged.

        Each row is one step, from 1. Nested figures are flattened; only numbers are logged.
        """
        with self.tracker() as tracker:
            tracker.truncate(-1)
            for step, figures in enumerate(rows, start=1):
                tracker.log(step, flatten_figures(figures))


class Stage(ABC):
    """Base class of every stage.

    `shares` names the shared blocks of the recipe that the stage reads, among 'model', 'constitution', 'prompts' and
    'judge'. They and the stage's own block are its slice of the recipe; a change in the slice makes its result stale.
    A block named in `optional` too may be absent from the recipe, and is then None; the others are required.
    `outputs` are the files and folders that the stage publishes, relative to its folder; it need not write all of them.
    `gate_settings` names the settings that only decide whether the result may be published: after a change of one, an
    unpublished stage resumes from its finished work.
    `trains` says that the result is a trained model: it depends on `model.lora`, and is only replaced by force.
    `instead` says, for an input that a recipe may lack, how to do without it.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    settings: ClassVar[type[Block]]
    shares: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    gate_settings: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[tuple[str, ...]]
    uses_processes: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    instead: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def inputs(self, settings: Any) -> tuple[str, ...]:
        """The stages whose results this one reads with these settings."""

    def optional_inputs(self, settings: Any) -> tuple[str, ...]:
        """The stages whose results this one reads too if the recipe has them."""
        return ()

    def shared_blocks(self, settings: Any) -> tuple[str, ...]:
        """The shared blocks that the stage reads with these settings: by default all of `shares`."""
        return self.shares

    def files(self, settings: Any) -> tuple[str, ...]:
        """Local files or folders that the settings name and the stage reads; a change in one makes the result stale."""
        return ()

    def splits(self, settings: Any) -> tuple[Split, ...]:
        """The splits of the prompts that the stage reads; at least one of them must have rows."""
        return ()

    def check_upstream(self, settings: Any, upstream: Mapping[str, Any]) -> list[str]:
        """Conflicts with the settings of the upstream stages, each as `key: fault`."""
        return []

    def check(self, settings: Any, shared: Mapping[str, Any]) -> list[str]:
        """Conflicts between the stage's own block and the shared ones, each as `key: fault`. Runs before any stage."""
        return []

    @abstractmethod
    def run(self, context: Context) -> Outcome:
        """Do the work. Every process calls this; only the first rank's outcome is kept.

        Raises:
            AlignError: names the place, the fault and the remedy.
        """
