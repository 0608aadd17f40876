"""Log-probabilities of continuations of shared beginnings, every beginning read once, by one row that holds a tree.

Rows of tokens that begin alike are paths of one tree. Its nodes go through the model as a single row in which each
sees its ancestors alone, at the position that its depth says: for every path that is what reading it alone gives. Any
number of beginnings within beginnings is shared (a conversation by several questions, a question by its answers), and
nothing is padded.

Shapes: N nodes of a tree, K of them whose next token is asked for, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from align.decoding.prefix_cache import common
from align.decoding.shared_prefixes import can_share
from align.models import cpu_attention as attention
from align.models.logprobs import CHUNK
from align.models.wrappers import inner_model

MASKABLE = ("sdpa", "eager", attention.NAME)
"""Attention that takes a mask of its own for every query."""


@dataclass(frozen=True)
class Continuation:
    """Token ids to score, and those before them, of which there is at least one."""

    before: Sequence[int]
    ids: Sequence[int]

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.before, *self.ids)


@dataclass(frozen=True)
class Tree:
    """Continuations in sorted order, each with the nodes of its path; and each node's token and depth."""

    paths: list[list[int]]
    tokens: list[int]
    depths: list[int]

    def sees(self) -> Tensor:
        """(N, N) whether a node sees another: itself and its ancestors."""
        size = len(self.tokens)
        seen = torch.zeros(size, size, dtype=torch.bool)
        for path in self.paths:
            nodes = torch.tensor(path)
            seen[nodes[:, None], nodes] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
        return seen


def tree_of(rows: Sequence[Sequence[int]]) -> Tree:
    """The tree of rows in sorted order, where a row has most in common with the one before it."""
    paths: list[list[int]] = []
    tokens: list[int] = []
    depths: list[int] = []
    before: Sequence[int] = ()
    for row in rows:
        shared = common(before, row)
        inherited = paths[-1][:shared] if paths else []
        paths.append([*inherited, *range(len(tokens), len(tokens) + len(row) - shared)])
        tokens += row[shared:]
        depths += range(shared, len(row))
        before = row
    return Tree(paths, tokens, depths)


def can_score_trees(model: Any) -> bool:
    """Whether all of a model's layers see everything before a token, through attention that takes any mask."""
    config = inner_model(model).config
    return can_share(config) and config._attn_implementation in MASKABLE


def tree_batches(continuations: Sequence[Continuation], most: int) -> Iterator[list[int]]:
    """Indices of continuations that make a tree of at most so many nodes together, or have more alone."""
    rows = [each.tokens for each in continuations]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    batch, size = order[:1], len(rows[order[0]]) if order else 0
    for previous, index in pairwise(order):
        added = len(rows[index]) - common(rows[previous], rows[index])
        if size + added > most:
            yield batch
            batch, size, added = [], 0, len(rows[index])
        batch.append(index)
        size += added
    if batch:
        yield batch


def tree_logprobs(model: Any, continuations: Sequence[Continuation]) -> list[float]:
    """The sum of each continuation's token log-probabilities in nats, all of them in one pass.

    Args:
        model: a causal LM, perhaps wrapped, that `can_score_trees`.
        continuations: in the order of their tokens, as `tree_batches` gives them.
    """
    tree = tree_of([each.tokens for each in continuations])
    steps = [(path[len(each.before) - 1 : -1], each.ids) for each, path in zip(continuations, tree.paths, strict=True)]
    asked = sorted({node for nodes, ids in steps for node in nodes[: len(ids)]})
    place = {node: number for number, node in enumerate(asked)}
    which = torch.tensor([place[node] for nodes, ids in steps for node in nodes[: len(ids)]])
    targets = torch.tensor([token for _, ids in steps for token in ids])
    logprobs = _next_logprobs(model, tree, asked, which, targets)
    return [part.sum().item() for part in logprobs.double().split([len(ids) for _, ids in steps])]


def _next_logprobs(model: Any, tree: Tree, asked: Sequence[int], which: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of targets, each after the asked node that `which` says."""
    device, dtype = inner_model(model).device, inner_model(model).dtype
    unseen = torch.zeros(len(tree.tokens), len(tree.tokens), dtype=dtype)
    unseen.masked_fill_(~tree.sees(), torch.finfo(dtype).min)
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([tree.tokens], device=device),
            attention_mask=unseen[None, None].to(device),
            position_ids=torch.tensor([tree.depths], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(asked, device=device),
        ).logits[0]  # (K, V)
    parts = []
    for nodes, tokens in zip(which.split(CHUNK), targets.split(CHUNK), strict=True):
        scores = logits[nodes.to(device)].float()
        parts.append((scores.gather(-1, tokens.to(device)[:, None])[:, 0] - scores.logsumexp(-1)).cpu())
    return torch.cat(parts)
