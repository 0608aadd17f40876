"""Keys and values of token prefixes that prompts may go on from: openings that many share, and conversations so far.

Shapes: K key-value heads, D features a head.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Tokens = tuple[int, ...]
States = list[tuple[Tensor, Tensor]]
"""Keys and values (K, positions, D) of each layer."""


@dataclass(frozen=True)
class CachedPrefix:
    """Tokens and the states of those from `offset` on; the states of the tokens before are the `parent`'s first."""

    tokens: Tokens
    states: States
    parent: "CachedPrefix | None" = None
    offset: int = 0

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write a layer's first states into (K, length, D) views; they say how many."""
        length = keys.shape[1]
        inherited = min(self.offset, length)
        if self.parent and inherited:
            self.parent.write(layer, keys[:, :inherited], values[:, :inherited])
        if length > inherited:
            own_keys, own_values = self.states[layer]
            keys[:, inherited:] = own_keys[:, : length - inherited]
            values[:, inherited:] = own_values[:, : length - inherited]


class PrefixCache:
    """Prefixes, at most `capacity` tokens of their own states; the oldest go first.

    What a prefix's parent holds lives as long as the prefix does.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held = 0
        self._by_tokens: OrderedDict[Tokens, CachedPrefix] = OrderedDict()
        self._sorted: list[Tokens] = []

    def add(self, prefix: CachedPrefix) -> None:
        """Keep a prefix, unless it is larger than all that may be kept."""
        size = len(prefix.tokens) - prefix.offset
        if prefix.tokens in self._by_tokens or size > self._capacity:
            return
        while self._held + size > self._capacity:
            tokens, oldest = self._by_tokens.popitem(last=False)
            self._held -= len(tokens) - oldest.offset
            self._sorted.pop(bisect_left(self._sorted, tokens))
        self._by_tokens[prefix.tokens] = prefix
        insort(self._sorted, prefix.tokens)
        self._held += size

    def longest(self, prompt: Sequence[int]) -> tuple[CachedPrefix | None, int]:
        """The prefix that has most tokens in common with the prompt's beginning, and how many; never the whole prompt.

        In sorted order it stands beside the place where the prompt itself would.
        """
        place = bisect_left(self._sorted, tuple(prompt))
        beside = self._sorted[max(place - 1, 0) : place + 1]
        length, tokens = max(((common(tokens, prompt), tokens) for tokens in beside), default=(0, ()))
        length = min(length, len(prompt) - 1)
        return (self._by_tokens[tokens], length) if length else (None, 0)


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two rows have in common at their beginnings."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(first), len(second)))
