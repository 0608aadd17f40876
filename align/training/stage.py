"""What the training stages share. Importing this module loads no tensor library."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from align.data.pairs import gather_pairs, mix_faults
from align.records import PreferencePair
from align.run.stage import Context, Stage
from align.settings.blocks import HUMAN_SHARE, Block, Fraction, Number, PairSource, Positive

Epochs = Annotated[Number, Field(gt=0, description="passes over the training rows")]
MaxLength = Annotated[Positive, Field(description="tokens; longer rows are left out and counted")]


class PairMixBlock(Block):
    """Which preference pairs a stage trains on."""

    ai: bool = Field(True, description="train on the pairs that the judge labelled")
    human: tuple[PairSource, ...] = Field((), description="preference pairs that people labelled")
    human_share: Annotated[Fraction, Field(gt=0, lt=1)] | None = Field(None, description=HUMAN_SHARE)


def local_paths(sources: Iterable[PairSource]) -> tuple[str, ...]:
    """The sources that are files or folders on this machine, rather than data sets of the hub."""
    return tuple(source.path for source in sources if Path(source.path).expanduser().exists())


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

    def gather(self, context: Context, counts: Counter[str]) -> list[PreferencePair]:
        """The pairs to train on, counted by kind."""
        settings: PairMixBlock = context.settings
        ai = context.inputs["compare"] / "pairs.jsonl" if settings.ai else None
        return gather_pairs(ai, settings.human, counts, settings.human_share)
