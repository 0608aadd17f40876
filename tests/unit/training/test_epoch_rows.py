"""The rows of an epoch: each once, in an order that depends only on seed and epoch."""

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given
from hypothesis import strategies as st

from align.training.epoch_rows import EpochRows, order_by_length, random_order, sequential_order


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_every_row_comes_once_and_fillers_only_behind_them(rows: int, multiple: int, epoch: int) -> None:
    sampler = EpochRows(rows, random_order(rows), 3, lambda: epoch, multiple)
    taken = list(sampler)
    assert sorted(taken[:rows]) == list(range(rows))
    assert taken[rows:] == [rows] * (len(taken) - rows)
    assert len(taken) == len(sampler) and len(taken) % multiple == 0 and len(taken) - rows < multiple


def test_the_random_order_is_accelerate_s_own_in_every_epoch() -> None:
    theirs = SeedableRandomSampler(range(17), data_seed=5)
    ours = [list(EpochRows(17, random_order(17), 5, lambda epoch=epoch: epoch)) for epoch in range(3)]
    assert [list(theirs) for _ in range(3)] == ours


def test_an_epoch_s_order_depends_on_nothing_drawn_before_it() -> None:
    sampler = EpochRows(50, order_by_length(list(range(50)), 4), 1, lambda: 2)
    first = list(sampler)
    torch.rand(7)
    assert list(sampler) == first
    assert list(EpochRows(50, order_by_length(list(range(50)), 4), 1, lambda: 3)) != first


def test_rows_of_similar_lengths_come_together() -> None:
    lengths = [number % 10 for number in range(400)]
    rows = list(EpochRows(400, order_by_length(lengths, 4), 1, lambda: 0))
    spreads = [max(some) - min(some) for some in _batches([lengths[row] for row in rows], 4)]
    assert sum(spreads) / len(spreads) < 1, "at random it would be about 6"


@pytest.mark.parametrize("epoch", [0, 1])
def test_rows_may_come_as_they_were_written(epoch: int) -> None:
    assert list(EpochRows(3, sequential_order(3), 0, lambda: epoch, 4)) == [0, 1, 2, 3]


def _batches(values: list[int], size: int) -> list[list[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
