"""Keys and values of token prefixes that later prompts may begin with: shared prefixes and earlier conversations.

Shapes: K key-value heads, D features per head.
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
    """Tokens with their states. The first `offset` tokens' states are the `parent`'s; `states` holds those after."""

    tokens: Tokens
    states: States
    parent: "CachedPrefix | None" = None
    offset: int = 0

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Copy a layer's states of the first `length` tokens into (K, length, D) tensors."""
        length = keys.shape[1]
        inherited = min(self.offset, length)
        if self.parent and inherited:
            self.parent.write(layer, keys[:, :inherited], values[:, :inherited])
        if length > inherited:
            own_keys, own_values = self.states[layer]
            keys[:, inherited:] = own_keys[:, : length - inherited]
            values[:, inherited:] = own_values[:, : length - inherited]


class PrefixCache:
    """Prefixes whose own states cover at most `capacity` tokens. The oldest prefixes are evicted first.

    A parent's states are not counted again, and stay alive as long as a prefix refers to them.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._used = 0
        self._by_tokens: OrderedDict[Tokens, CachedPrefix] = OrderedDict()
        self._sorted: list[Tokens] = []

    def add(self, prefix: CachedPrefix) -> None:
        """Cache a prefix, unless it is larger than the whole capacity."""
        size = len(prefix.tokens) - prefix.offset
        if prefix.tokens in self._by_tokens or size > self._capacity:
            return
        while self._used + size > self._capacity:
            tokens, oldest = self._by_tokens.popitem(last=False)
            self._used -= len(tokens) - oldest.offset
            self._sorted.pop(bisect_left(self._sorted, tokens))
        self._by_tokens[prefix.tokens] = prefix
        insort(self._sorted, prefix.tokens)
        self._used += size

    def longest(self, prompt: Sequence[int]) -> tuple[CachedPrefix | None, int]:
        """The prefix with the most leading tokens in common with the prompt, and how many. Never the whole prompt.

        In sorted order, that prefix is next to the place where the prompt would be inserted.
        """
        place = bisect_left(self._sorted, tuple(prompt))
        neighbours = self._sorted[max(place - 1, 0) : place + 1]
        length, tokens = max(((common_prefix_length(tokens, prompt), tokens) for tokens in neighbours), default=(0, ()))
        length = min(length, len(prompt) - 1)
        return (self._by_tokens[tokens], length) if length else (None, 0)


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of leading tokens that two rows have in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(first), len(second)))
