"""Cuts the rows of a rollout, or of demonstrations, into minibatches and micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.decoding.shared_prefixes import PrefixBatch, prefix_batch, without_prefixes
from align.rl.rollout import Completion, permutation
from align.rl.sequences import Sequences, lay_out, lay_out_after_prefixes, worthwhile_prefixes
from align.run import processes
from align.run.reproducibility import derive_seed
from align.settings.blocks import OptimizerBlock

ROWS_WITHOUT_GRADIENT = 4
"""How many times a micro-batch's rows a pass without a gradient takes, since it keeps no activations."""


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one pass: their indices in the rollout, and their tokens."""

    rows: Tensor
    sequences: Sequences


def micro_batches(
    completions: Sequence[Completion],
    rows: Sequence[int],
    size: int,
    pad_id: int,
    device: torch.device,
    *,
    share: bool,
) -> list[MicroBatch]:
    """Cut rows into passes of at most `size`, sorted by length so that little of them is padding.

    With `share`, each pass encodes its prompts' common prefixes once.
    """
    batches = []
    for group in _by_length(completions, rows, size):
        prompts = [completions[row].prompt.ids for row in group]
        tokens = [completions[row].tokens for row in group]
        batches.append(MicroBatch(torch.tensor(group), lay_out(prompts, tokens, pad_id, device, share=share)))
    return batches


def with_common_prefixes(
    completions: Sequence[Completion], rows: Sequence[int], size: int, pad_id: int, device: torch.device
) -> list[MicroBatch]:
    """Like `micro_batches`, with the same shared prefixes for all passes.

    If there would be more of these prefixes than rows in a pass, each pass gets its own.
    """
    groups = _by_length(completions, rows, size)
    prompts = {row: completions[row].prompt.ids for group in groups for row in group}
    shared = worthwhile_prefixes(list(prompts.values()), share=True)
    if len(groups) < 2 or not shared.positions_saved or len(shared.ids) > size:
        return micro_batches(completions, rows, size, pad_id, device, share=True)
    prefixes = prefix_batch(shared, pad_id, device)
    of_row = dict(zip(prompts, shared.of_row, strict=True))
    remaining = dict(zip(prompts, without_prefixes(list(prompts.values()), shared), strict=True))
    return [
        MicroBatch(
            torch.tensor(group),
            lay_out_after_prefixes(
                prefixes.for_rows([of_row[row] for row in group]),
                [remaining[row] for row in group],
                [completions[row].tokens for row in group],
                pad_id,
            ),
        )
        for group in groups
    ]


def common_prefixes(batches: Sequence[MicroBatch]) -> PrefixBatch | None:
    """The prefixes that several passes have in common; None if each pass has its own, or none."""
    first = batches[0].sequences.prefixes if len(batches) > 1 else None
    if first is None or not first.width or any(batch.sequences.prefixes.ids is not first.ids for batch in batches):
        return None
    return first


def position_counts(batches: Sequence[MicroBatch]) -> tuple[int, int]:
    """Positions that these passes compute, and how many of them are padding. Common prefixes count once."""
    prefixes = {id(batch.sequences.prefixes.ids): batch.sequences.prefixes for batch in batches}.values()
    masks = [batch.sequences.attention_mask for batch in batches] + [each.mask for each in prefixes]
    return sum(mask.numel() for mask in masks), sum(int((mask == 0).sum()) for mask in masks)


def _by_length(completions: Sequence[Completion], rows: Sequence[int], size: int) -> list[list[int]]:
    ordered = sorted(rows, key=lambda row: (completions[row].length, row))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


@dataclass(frozen=True)
class Batches:
    """Cuts this process's rows. The minibatches are the same for any number of processes.

    With `share`, prompts of a pass share the prefill of their common prefixes.
    """

    options: OptimizerBlock
    seed: int
    pad_id: int
    device: torch.device
    share: bool

    def epoch(self, completions: Sequence[Completion], iteration: int, epoch: int) -> Iterator[list[MicroBatch]]:
        """Yields this process's micro-batches of each minibatch; rows are shuffled anew in each epoch."""
        ranks = processes.rank(), processes.world_size()
        seed = self._epoch_seed(iteration, epoch)
        for rows in minibatch_rows(len(completions), self.options.batch_size, seed, *ranks):
            yield self.cut(completions, rows)

    def draw(self, rows: Sequence[Completion], iteration: int, epoch: int, number: int) -> list[MicroBatch]:
        """Draw `batch_size` rows at random for one optimizer step, the `number`th of its epoch.

        Returns:
            this process's micro-batches of them.
        """
        seed = derive_seed(self.seed, "demonstrations", iteration, epoch, number)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(rows), (self.options.batch_size,), generator=generator).tolist()
        return self.cut(rows, list(processes.shard(chosen)))

    def cut(
        self, completions: Sequence[Completion], rows: Sequence[int], *, with_gradient: bool = True
    ) -> list[MicroBatch]:
        """Cut the given rows into micro-batches, larger ones if the passes need no gradient."""
        if with_gradient and self.share:
            return with_common_prefixes(completions, rows, self.options.micro_batch_size, self.pad_id, self.device)
        size = self.options.micro_batch_size * (1 if with_gradient else ROWS_WITHOUT_GRADIENT)
        return micro_batches(completions, rows, size, self.pad_id, self.device, share=self.share)

    def later_rows(self, count: int, iteration: int) -> list[int]:
        """All processes' rows outside the first minibatch of an iteration's first epoch, ascending."""
        first, *_ = minibatch_rows(count, self.options.batch_size, self._epoch_seed(iteration, 0), 0, 1)
        return sorted(set(range(count)) - set(first))

    def _epoch_seed(self, iteration: int, epoch: int) -> int:
        return derive_seed(self.seed, "minibatches", iteration, epoch)


def minibatch_rows(count: int, batch_size: int, seed: int, rank: int, world_size: int) -> list[list[int]]:
    """This process's rows of each minibatch of an epoch. The minibatches are the same for any number of processes."""
    order = permutation(count, seed)
    minibatches = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    return [minibatch[rank::world_size] for minibatch in minibatches]
