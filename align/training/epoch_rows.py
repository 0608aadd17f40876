"""Which rows each epoch of training takes, and in which order: alike in one process and in several, killed or not."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
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


class TakesRowsInOrder:
    """For a trainer of transformers': takes its rows as `EpochRows` does, whichever order the recipe asks for."""

    has_filler: Any = False

    def add_filler(self: Any) -> None:
        """Put a row that counts for nothing behind the others, to fill up the last batches of several processes."""
        lengths = self._lengths(self.train_dataset)
        shortest = self.train_dataset[lengths.index(min(lengths))]
        self.train_dataset = self.train_dataset.add_item(self.uncounted(shortest))
        self.has_filler = True

    def uncounted(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row as one that adds nothing to the loss."""
        raise NotImplementedError

    def _lengths(self, rows: Dataset) -> list[int]:
        return list(rows["length"]) if "length" in rows.column_names else [len(ids) for ids in rows["input_ids"]]

    def _get_train_sampler(self: Any, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        rows = data.select(range(len(data) - self.has_filler))
        args, at_once = self.args, self.args.train_batch_size * self.args.world_size
        if args.train_sampling_strategy == "batch_rebalance":  # knows the processes, and cuts its batches by itself
            return super()._get_train_sampler(rows)  # type: ignore[misc]
        order = random_order(len(rows))
        if args.train_sampling_strategy == "group_by_length":
            order = order_by_length(self._lengths(rows), at_once * args.gradient_accumulation_steps)
        elif args.train_sampling_strategy == "sequential":
            order = written_order(len(rows))
        return EpochRows(
            len(rows), order, args.seed, lambda: int(self.state.epoch or 0), at_once if self.has_filler else 1
        )
