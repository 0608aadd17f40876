"""What the prompts of a minibatch begin with, taken in once for all its micro-batches, gradient and all."""

from collections.abc import Sequence
from dataclasses import replace

from align.models.openings import TakenIn
from align.models.ppo_models import Reader
from align.models.sequences import Sequences
from align.rl.batches import MicroBatch, common_openings
from align.rl.updates import Updates


class SharedOpenings:
    """Common openings as policy and value read them; nothing where the micro-batches have none in common.

    The activations of the openings stay until `backward`, those of the micro-batches don't.
    """

    def __init__(self, updates: Updates, batches: Sequence[MicroBatch]) -> None:
        self._updates = updates
        self._common = common_openings(batches)
        self._taken_in: dict[Reader, TakenIn] = {}

    def before(self, batch: MicroBatch, reader: Reader) -> Sequences:
        """The micro-batch's sequences, after openings that need not go through the model again."""
        if self._common is None:
            return batch.sequences
        if reader not in self._taken_in:
            self._taken_in[reader] = self._updates.wrapped("openings", openings=self._common, reader=reader)
        return replace(batch.sequences, openings=self._taken_in[reader].before(batch.sequences.openings))

    def backward(self) -> None:
        """Add the openings' part of the gradient, after the backward passes of all micro-batches."""
        for taken_in in self._taken_in.values():
            taken_in.backward()
