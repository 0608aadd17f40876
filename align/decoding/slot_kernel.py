"""The attention of one decoding step over a slot cache as a Triton kernel: every key and value is read once.

Flash attention works on tiles of 128 queries and takes as long for the one query of a decoding step. Here a program
has a row and a key-value head, and goes over the row's positions in blocks with a running softmax (Milakov and
Gimelshein 2018; Dao et al. 2022), so that the time is that of reading the cache.

Shapes: R rows, S positions of a slot, H heads, K key-value heads, G = H / K, D features of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_QUERIES = 16
"""Rows that a matrix product on tensor cores takes at least."""

BLOCK = 64
"""Positions read at a time."""


@triton.jit
def _attend(  # type: ignore[no-untyped-def]  # Triton takes no other annotations
    query,
    keys,
    values,
    lengths,
    result,
    scale,
    capacity,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row)
    features, members = tl.arange(0, SIZE), tl.arange(0, QUERIES)
    of_query = (row * HEADS * GROUP + head * GROUP + members[:, None]) * SIZE + features[None, :]
    is_member = members[:, None] < GROUP
    queries = tl.load(query + of_query, mask=is_member, other=0.0)  # (QUERIES, SIZE)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    weighted = tl.zeros((QUERIES, SIZE), tl.float32)
    for start in range(0, length, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        is_written = position < length
        place = ((row * capacity + position[:, None]) * HEADS + head) * SIZE + features[None, :]
        key = tl.load(keys + place, mask=is_written[:, None], other=0.0)  # (POSITIONS, SIZE)
        scores = tl.dot(queries, tl.trans(key)) * scale  # (QUERIES, POSITIONS)
        scores = tl.where(is_written[None, :], scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - now[:, None])
        before = tl.exp(largest - now)
        value = tl.load(values + place, mask=is_written[:, None], other=0.0)
        weighted = weighted * before[:, None] + tl.dot(weights.to(value.dtype), value)
        total = total * before + tl.sum(weights, 1)
        largest = now
    tl.store(result + of_query, (weighted / total[:, None]).to(result.dtype.element_ty), mask=is_member)


def attend(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Attention of (R, H, 1, D) queries to the first `lengths` (R,) positions of (R * S, K, D) slots; (R, 1, H, D)."""
    rows, heads, _, size = query.shape
    shared = keys.shape[1]
    query = query.reshape(rows, heads, size).contiguous()
    result = torch.empty_like(query)
    _attend[(rows, shared)](
        query,
        keys,
        values,
        lengths,
        result,
        scale,
        keys.shape[0] // rows,
        HEADS=shared,
        GROUP=heads // shared,
        QUERIES=max(LEAST_QUERIES, triton.next_power_of_2(heads // shared)),
        SIZE=size,
        POSITIONS=BLOCK,
        num_warps=4,
        num_stages=3,
    )
    return result[:, None]
