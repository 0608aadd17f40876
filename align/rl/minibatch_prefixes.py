"""The shared prefixes of a minibatch's prompts, prefilled once for all its micro-batches, with their gradient."""

from collections.abc import Sequence
from dataclasses import replace

from align.decoding.shared_prefixes import EncodedPrefixes
from align.rl.batches import MicroBatch, common_prefixes
from align.rl.models import Network
from align.rl.sequences import Sequences
from align.rl.updates import Updates


class MinibatchPrefixes:
    """The prefixes common to a minibatch's micro-batches, encoded by policy and value; without common ones, nothing.

    The prefixes' activations are held until `backward`; those of a micro-batch only for its own backward pass.
    """

    def __init__(self, updates: Updates, batches: Sequence[MicroBatch]) -> None:
        self._updates = updates
        self._common = common_prefixes(batches)
        self._encoded: dict[Network, EncodedPrefixes] = {}

    def sequences(self, batch: MicroBatch, network: Network) -> Sequences:
        """The micro-batch's sequences, with prefixes that the network has already encoded."""
        if self._common is None:
            return batch.sequences
        if network not in self._encoded:
            self._encoded[network] = self._updates.wrapped("prefixes", prefixes=self._common, network=network)
        return replace(batch.sequences, prefixes=self._encoded[network].attach(batch.sequences.prefixes))

    def backward(self) -> None:
        """Backpropagate through the prefixes. Call after the backward passes of all micro-batches."""
        for encoded in self._encoded.values():
            encoded.backward()
