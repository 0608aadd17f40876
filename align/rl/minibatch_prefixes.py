"""What the prompts of a minibatch begin with, taken in once for all its micro-batches, gradient and all."""

from collections.abc import Sequence
from dataclasses import replace

from align.decoding.shared_prefixes import EncodedPrefixes
from align.rl.batches import MicroBatch, common_prefixes
from align.rl.models import Reader
from align.rl.sequences import Sequences
from align.rl.updates import Updates


class MinibatchPrefixes:
    """Common openings as policy and value read them; nothing where the micro-batches have none in common.

    The activations of the openings stay until `backward`, those of the micro-batches don't.
    """

    def __init__(self, updates: Updates, batches: Sequence[MicroBatch]) -> None:
        self._updates = updates
        self._common = common_prefixes(batches)
        self._taken_in: dict[Reader, EncodedPrefixes] = {}

    def before(self, batch: MicroBatch, reader: Reader) -> Sequences:
        """The micro-batch's sequences, after openings that need not go through the model again."""
        if self._common is None:
            return batch.sequences
        if reader not in self._taken_in:
            self._taken_in[reader] = self._updates.wrapped("openings", openings=self._common, reader=reader)
        return replace(batch.sequences, openings=self._taken_in[reader].attach(batch.sequences.openings))

    def backward(self) -> None:
        """Add the openings' part of the gradient, after the backward passes of all micro-batches."""
        for encode_prefixes in self._taken_in.values():
            encode_prefixes.backward()
