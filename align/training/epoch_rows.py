"""The order of the training rows in each epoch, which depends on neither the number of processes nor a resumption."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

Order = Callable[[torch.Generator], list[int]]


class EpochRows(Sampler[int]):
    """The row indices of an epoch, in an order that depends only on the seed and the epoch's number.

    So the order is the same in every process, whatever else each has drawn at random, and the same when a run resumes.
    The epoch is padded to a multiple of `multiple` with the index `rows`, the filler's: a row that adds nothing
    to the loss. Otherwise accelerate would repeat the epoch's first rows there.

    Args:
        rows: the number of rows, without the filler.
        order: makes a permutation of the row indices from a generator.
        epoch: returns the number of the current epoch; called at the beginning of each one.
        multiple: the number of rows that all processes take at once.
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
    """All rows in random order."""
    return lambda generator: torch.randperm(rows, generator=generator).tolist()


def order_by_length(lengths: Sequence[int], batch_size: int) -> Order:
    """Batches of rows of similar lengths, otherwise in random order.

    Args:
        batch_size: rows per optimizer step, over all processes.
    """
    return lambda generator: get_length_grouped_indices(list(lengths), batch_size, generator=generator)


def sequential_order(rows: int) -> Order:
    """The rows in the order of the data set."""
    return lambda generator: list(range(rows))


class EpochOrderMixin:
    """Has a trainer of transformers take its rows as `EpochRows` orders them, under any `train_sampling_strategy`."""

    has_filler: Any = False

    def add_filler(self: Any) -> None:
        """Append a row that adds nothing to the loss, to fill up the last batches of several processes."""
        lengths = self._lengths(self.train_dataset)
        shortest = self.train_dataset[lengths.index(min(lengths))]
        self.train_dataset = self.train_dataset.add_item(self.as_filler(shortest))
        self.has_filler = True

    def as_filler(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row, changed so that it adds nothing to the loss."""
        raise NotImplementedError

    def _lengths(self, rows: Dataset) -> list[int]:
        return list(rows["length"]) if "length" in rows.column_names else [len(ids) for ids in rows["input_ids"]]

    def _get_train_sampler(self: Any, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        rows = data.select(range(len(data) - self.has_filler))
        args, at_once = self.args, self.args.train_batch_size * self.args.world_size
        if args.train_sampling_strategy == "batch_rebalance":  # divides batches among the processes by itself
            return super()._get_train_sampler(rows)  # type: ignore[misc]
        order = random_order(len(rows))
        if args.train_sampling_strategy == "group_by_length":
            order = order_by_length(self._lengths(rows), at_once * args.gradient_accumulation_steps)
        elif args.train_sampling_strategy == "sequential":
            order = sequential_order(len(rows))
        return EpochRows(
            len(rows), order, args.seed, lambda: int(self.state.epoch or 0), at_once if self.has_filler else 1
        )
