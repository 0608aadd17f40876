"""What the training stages share. Importing this module loads no tensor library."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from align.data.pair_mixing import gather_pairs, mix_faults
from align.data.paths import local_files
from align.data.sources import LEFT_OUT, Intake
from align.data.token_columns import TokenColumns
from align.records import PreferencePair
from align.run import processes
from align.run.stage import Context, Stage
from align.settings.blocks import HUMAN_SHARE, Block, Fraction, Number, Positive
from align.settings.data import DataSource, PairSource

SHOWN_LENGTHS = {"median": 0.5, "95th percentile": 0.95, "longest": 1.0}
USUAL_UNUSABLE = DataSource.model_fields["max_unusable"].default
"""The share of unusable rows that is allowed where no source says otherwise."""
Epochs = Annotated[Number, Field(gt=0, description="passes over the training rows")]
MaxLength = Annotated[Positive, Field(description="tokens; longer rows are left out and counted")]


class PairMixBlock(Block):
    """Which preference pairs a stage trains on."""

    ai: bool = Field(True, description="train on the pairs that the judge labelled")
    human: tuple[PairSource, ...] = Field((), description="preference pairs that people labelled")
    human_share: Annotated[Fraction, Field(gt=0, lt=1)] | None = Field(None, description=HUMAN_SHARE)


def local_paths(sources: Iterable[PairSource]) -> tuple[str, ...]:
    """The files and folders on this machine that the sources read."""
    return tuple(file for source in sources for file in local_files(source))


def most_unusable(sources: Iterable[PairSource]) -> float:
    """The share of rows that the chat template may refuse: the largest that a source allows."""
    return max((source.max_unusable for source in sources), default=USUAL_UNUSABLE)


def tell_rows(stage: str, columns: TokenColumns, intake: Intake, max_length: int) -> None:
    """Say before training what is trained on and what is left out. No row is ever cut."""
    if not processes.is_first():
        return
    lengths = sorted(row["length"] for row in columns.rows)
    shown = ", ".join(f"{lengths[int(part * (len(lengths) - 1))]} ({name})" for name, part in SHOWN_LENGTHS.items())
    left_out = ", ".join(f"{count} {name}" for name, count in sorted(intake.left_out.items()))
    kept = f"{left_out}; {LEFT_OUT} will have them" if left_out else "none"
    print(
        f"{stage}: trains on {len(columns)} rows, none of them cut; tokens a row: {shown}; `max_length` {max_length}. "
        f"Rows left out: {kept}",
        flush=True,
    )


class PairStage(Stage):
    """A stage that trains on preference pairs: `reward` or `dpo`."""

    shares = ("model",)
    trains = True
    instead: ClassVar[Mapping[str, str]] = {
        "compare": "set `ai: false` and name your own pairs in `human`, to train on those alone"
    }

    def files(self, settings: PairMixBlock) -> tuple[str, ...]:
        return local_paths(settings.human)

    def check(self, settings: Any, shared: Mapping[str, Any]) -> list[str]:
        return mix_faults(self.name, settings.ai, settings.human, settings.human_share)

    def gather(self, context: Context, intake: Intake) -> list[PreferencePair]:
        """The pairs to train on, counted by kind."""
        settings: PairMixBlock = context.settings
        ai = context.inputs["compare"] / "pairs.jsonl" if settings.ai else None
        return gather_pairs(ai, settings.human, intake, settings.human_share)
