"""Log-probabilities of continuations that share prefixes, with every shared prefix run through the model once.

Rows of tokens that begin alike are paths of one tree. The tree runs through the model as a single row, in which each
node attends only to its ancestors and itself, at the position given by its depth. So each path gets the same results as
when it runs alone. Prefixes may be shared at any number of levels (a conversation by several questions, a question by
its answers), and nothing is padded.

Shapes: N nodes of a tree, K nodes whose next token is scored, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from align.decoding.prefix_cache import common_prefix_length
from align.decoding.shared_prefixes import can_share_prefixes
from align.models.cpu_attention import SHORT_ROWS_ATTENTION
from align.models.logprobs import positions_at_once
from align.models.wrappers import inner_model

MASKABLE = ("sdpa", "eager", SHORT_ROWS_ATTENTION)
"""The attention implementations that take any mask."""


@dataclass(frozen=True)
class Continuation:
    """Token ids to score after a prefix of at least one token."""

    prefix: Sequence[int]
    ids: Sequence[int]

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.prefix, *self.ids)


@dataclass(frozen=True)
class Tree:
    """A prefix tree: the nodes of each row's path, and each node's token and depth."""

    paths: list[list[int]]
    tokens: list[int]
    depths: list[int]

    def attention_mask(self) -> Tensor:
        """(N, N) whether a node attends to another: to itself and its ancestors."""
        size = len(self.tokens)
        mask = torch.zeros(size, size, dtype=torch.bool)
        for path in self.paths:
            nodes = torch.tensor(path)
            mask[nodes[:, None], nodes] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
        return mask


def build_tree(rows: Sequence[Sequence[int]]) -> Tree:
    """The tree of rows in sorted order, in which no earlier row shares more with a row than the one before it."""
    paths: list[list[int]] = []
    tokens: list[int] = []
    depths: list[int] = []
    previous: Sequence[int] = ()
    for row in rows:
        shared = common_prefix_length(previous, row)
        inherited = paths[-1][:shared] if paths else []
        paths.append([*inherited, *range(len(tokens), len(tokens) + len(row) - shared)])
        tokens += row[shared:]
        depths += range(shared, len(row))
        previous = row
    return Tree(paths, tokens, depths)


def can_score_trees(model: Any) -> bool:
    """Whether all layers attend to every earlier token, with an attention implementation that takes any mask.

    Positions must be given, not read off a mask with two axes, as models with ALiBi do (Bloom, some Falcon).
    """
    inner = inner_model(model)
    takes_positions = "position_ids" in inspect.signature(inner.forward).parameters
    takes_positions = takes_positions and not getattr(inner.config, "alibi", False)
    return can_share_prefixes(inner.config) and inner.config._attn_implementation in MASKABLE and takes_positions


def tree_batches(continuations: Sequence[Continuation], max_nodes: int) -> Iterator[list[int]]:
    """Batches of indices whose continuations form a tree of at most `max_nodes`. A longer one gets its own batch."""
    rows = [each.tokens for each in continuations]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    batch, size = order[:1], len(rows[order[0]]) if order else 0
    for previous, index in pairwise(order):
        added = len(rows[index]) - common_prefix_length(rows[previous], rows[index])
        if size + added > max_nodes:
            yield batch
            batch, size, added = [], 0, len(rows[index])
        batch.append(index)
        size += added
    if batch:
        yield batch


def tree_logprobs(model: Any, continuations: Sequence[Continuation]) -> list[float]:
    """The sum of each continuation's token log-probabilities in nats, from one pass over all of them.

    Args:
        model: a causal LM, perhaps wrapped, for which `can_score_trees` is true.
        continuations: sorted by their tokens, as `tree_batches` orders them.
    """
    tree = build_tree([each.tokens for each in continuations])
    steps = [(path[len(each.prefix) - 1 : -1], each.ids) for each, path in zip(continuations, tree.paths, strict=True)]
    scored = sorted({node for nodes, ids in steps for node in nodes[: len(ids)]})
    place = {node: number for number, node in enumerate(scored)}
    which = torch.tensor([place[node] for nodes, ids in steps for node in nodes[: len(ids)]])
    targets = torch.tensor([token for _, ids in steps for token in ids])
    logprobs = _next_logprobs(model, tree, scored, which, targets)
    return [part.sum().item() for part in logprobs.double().split([len(ids) for _, ids in steps])]


def _next_logprobs(model: Any, tree: Tree, scored: Sequence[int], which: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of targets: each follows the node whose index in `scored` is in `which`."""
    device, dtype = inner_model(model).device, inner_model(model).dtype
    bias = torch.zeros(len(tree.tokens), len(tree.tokens), dtype=dtype)
    bias.masked_fill_(~tree.attention_mask(), torch.finfo(dtype).min)
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([tree.tokens], device=device),
            attention_mask=bias[None, None].to(device),
            position_ids=torch.tensor([tree.depths], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(scored, device=device),
        ).logits[0]  # (K, V)
    parts = []
    chunk = positions_at_once(which.device)
    for nodes, tokens in zip(which.split(chunk), targets.split(chunk), strict=True):
        scores = logits[nodes.to(device)].float()
        parts.append((scores.gather(-1, tokens.to(device)[:, None])[:, 0] - scores.logsumexp(-1)).cpu())
    return torch.cat(parts)
