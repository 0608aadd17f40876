"""The files of a judge's labels, which `compare` writes and `align relabel` writes again."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align.feedback.records import Comparison, OpinionScores
from align.records import PreferencePair
from align.run.streaming import RowFiles, SeenOnDisk

if TYPE_CHECKING:
    from align.feedback.tallies import ComparisonTally


class LabelFiles(RowFiles):
    """comparisons.jsonl, opinions.jsonl and pairs.jsonl of a folder, row by row, and the tally of what they hold.

    Of several pairs of the same two texts the first is written; `repeated` counts the others.
    """

    def __init__(self, folder: Path, tally: "ComparisonTally") -> None:
        super().__init__(folder, "comparisons.jsonl", "opinions.jsonl", "pairs.jsonl")
        self._comparisons, self._opinions, self._pairs = self._files
        self._tally = tally
        self._seen = SeenOnDisk()
        self.repeated = 0

    def add(self, row: Comparison, scores: Sequence[OpinionScores]) -> None:
        """A comparison, and what its verdict was made of."""
        self._comparisons.add(row)
        self._tally.add(row, scores)
        for each in scores:
            self._opinions.add(each)

    def add_pair(self, pair: PreferencePair) -> bool:
        """Whether the pair is written, to be trained on."""
        is_new = self._seen.is_new(pair.id)
        if is_new:
            self._pairs.add(pair)
        self.repeated += not is_new
        return is_new
