"""The files of a judge's labels, which `compare` and `align relabel` write."""

from collections.abc import Sequence
from pathlib import Path

from align.feedback.records import Comparison, OpinionScores
from align.feedback.tallies import ComparisonTally
from align.records import PreferencePair
from align.run.streaming import RowFiles, SeenOnDisk


class LabelFiles(RowFiles):
    """Writes a folder's comparisons.jsonl, opinions.jsonl and pairs.jsonl row by row, and tallies the comparisons.

    Of pairs with the same texts only the first is written; `repeated` counts the others.
    """

    def __init__(self, folder: Path, tally: ComparisonTally) -> None:
        super().__init__(folder, "comparisons.jsonl", "opinions.jsonl", "pairs.jsonl")
        self._comparisons, self._opinions, self._pairs = self._files
        self._tally = tally
        self._seen = SeenOnDisk()
        self.repeated = 0

    def add(self, row: Comparison, scores: Sequence[OpinionScores]) -> None:
        """Add a comparison and the scores behind its verdict."""
        self._comparisons.add(row)
        self._tally.add(row, scores)
        for each in scores:
            self._opinions.add(each)

    def add_pair(self, pair: PreferencePair) -> bool:
        """Add a pair to train on, unless it is a repetition; returns whether it was written."""
        is_new = self._seen.is_new(pair.id)
        if is_new:
            self._pairs.add(pair)
        self.repeated += not is_new
        return is_new
