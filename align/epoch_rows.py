"""Which rows each epoch of training takes, and in which order: alike in one process and in several, killed or not."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

Order = Callable[[torch.Generator], list[int]]


class EpochRows(Sampler[int]):
    """The row numbers of an epoch, in an order that follows from the seed and the epoch's number alone.

    So it is the same in every process, whatever else each has drawn at random, and the same after a kill. At the end
    stands the row behind the last one, a filler that counts for nothing, until there is a multiple of `multiple`: the
    rows that all processes take at once. Left to itself, accelerate would repeat the epoch's first rows there.

    Args:
        rows: how many rows there are, the filler left out.
        order: the rows' numbers, shuffled by a generator.
        epoch: the number of the epoch that begins, asked each time that one does.
    """

    def __init__(self, rows: int, order: Order, seed: int, epoch: Callable[[], int], multiple: int = 1) -> None:
        self.rows = rows
        self.order = order
        self.seed = seed
        self.epoch = epoch
        self.multiple = multiple

    def __len__(self) -> int:
        return math.ceil(self.rows / self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        yield from self.order(generator)
        yield from [self.rows] * (len(self) - self.rows)


def random_order(rows: int) -> Order:
    """Every row at a random place."""
    return lambda generator: torch.randperm(rows, generator=generator).tolist()


def order_by_length(lengths: Sequence[int], batch_size: int) -> Order:
    """Rows of like lengths in one batch, all else at random.

    Args:
        batch_size: rows an optimizer step, over all processes.
    """
    return lambda generator: get_length_grouped_indices(list(lengths), batch_size, generator=generator)


def written_order(rows: int) -> Order:
    """The rows as they come."""
    return lambda generator: list(range(rows))
