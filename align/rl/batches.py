"""How the rows of a rollout, or of demonstrations, are cut into minibatches and micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.decoding.shared_prefixes import PrefixBatch, prefix_batch
from align.rl.rollout import Completion, permutation
from align.rl.sequences import Sequences, lay_out, lay_out_after, rests, worthwhile_prefixes
from align.run import processes
from align.run.reproducibility import derive_seed
from align.settings.blocks import OptimizerBlock

ROWS_WITHOUT_GRADIENT = 4
"""Times a micro-batch's rows that a pass without a gradient takes: it keeps no activations."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of the rollout that one pass takes."""

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

    With `share`, what prompts of a pass begin with goes through it once.
    """
    groups = _by_length(completions, rows, size)
    return [_micro_batch(completions, group, pad_id, device, share) for group in groups]


def with_common_prefixes(
    completions: Sequence[Completion], rows: Sequence[int], size: int, pad_id: int, device: torch.device
) -> list[MicroBatch]:
    """The same with one set of openings for all passes, if that is no more rows than a pass may have.

    Otherwise each pass has its own.
    """
    groups = _by_length(completions, rows, size)
    prompts = {row: completions[row].prompt.ids for group in groups for row in group}
    openings = worthwhile_prefixes(list(prompts.values()), share=True)
    if len(groups) < 2 or not openings.spared or len(openings.ids) > size:
        return micro_batches(completions, rows, size, pad_id, device, share=True)
    opened = prefix_batch(openings, pad_id, device)
    of_row = dict(zip(prompts, openings.of_row, strict=True))
    after = dict(zip(prompts, rests(list(prompts.values()), openings), strict=True))
    return [
        MicroBatch(
            torch.tensor(group),
            lay_out_after(
                opened.for_rows([of_row[row] for row in group]),
                [after[row] for row in group],
                [completions[row].tokens for row in group],
                pad_id,
            ),
        )
        for group in groups
    ]


def common_prefixes(batches: Sequence[MicroBatch]) -> PrefixBatch | None:
    """The openings that several passes have in common; None where each has its own, or none."""
    first = batches[0].sequences.openings if len(batches) > 1 else None
    if first is None or not first.width or any(batch.sequences.openings.ids is not first.ids for batch in batches):
        return None
    return first


def positions(batches: Sequence[MicroBatch]) -> tuple[int, int]:
    """Positions that go through a model in these passes, and how many of them are padding; common openings once."""
    openings = {id(batch.sequences.openings.ids): batch.sequences.openings for batch in batches}.values()
    masks = [batch.sequences.attention_mask for batch in batches] + [opened.mask for opened in openings]
    return sum(mask.numel() for mask in masks), sum(int((mask == 0).sum()) for mask in masks)


def _by_length(completions: Sequence[Completion], rows: Sequence[int], size: int) -> list[list[int]]:
    ordered = sorted(rows, key=lambda row: (completions[row].length, row))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _micro_batch(
    completions: Sequence[Completion], rows: Sequence[int], pad_id: int, device: torch.device, share: bool
) -> MicroBatch:
    prompts = [completions[row].prompt.ids for row in rows]
    tokens = [completions[row].tokens for row in rows]
    return MicroBatch(torch.tensor(rows), lay_out(prompts, tokens, pad_id, device, share=share))


@dataclass(frozen=True)
class Batches:
    """Draws and cuts this process's rows; the same minibatches whatever the number of processes.

    `share` lets prompts of a pass go through it once for what they begin with.
    """

    options: OptimizerBlock
    seed: int
    pad_id: int
    device: torch.device
    share: bool

    def epoch(self, completions: Sequence[Completion], iteration: int, epoch: int) -> Iterator[list[MicroBatch]]:
        """This process's micro-batches of each minibatch of an epoch; reshuffled each epoch."""
        ranks = processes.rank(), processes.world_size()
        seed = self._epoch_seed(iteration, epoch)
        for rows in minibatch_rows(len(completions), self.options.batch_size, seed, *ranks):
            yield self.cut(completions, rows)

    def drawn(self, rows: Sequence[Completion], iteration: int, epoch: int, number: int) -> list[MicroBatch]:
        """This process's micro-batches of as many rows as a minibatch has, drawn at random for one optimizer step."""
        seed = derive_seed(self.seed, "demonstrations", iteration, epoch, number)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(rows), (self.options.batch_size,), generator=generator).tolist()
        return self.cut(rows, list(processes.shard(chosen)))

    def cut(
        self, completions: Sequence[Completion], rows: Sequence[int], *, with_gradient: bool = True
    ) -> list[MicroBatch]:
        """Micro-batches of some rows."""
        if with_gradient and self.share:
            return with_common_prefixes(completions, rows, self.options.micro_batch_size, self.pad_id, self.device)
        size = self.options.micro_batch_size * (1 if with_gradient else ROWS_WITHOUT_GRADIENT)
        return micro_batches(completions, rows, size, self.pad_id, self.device, share=self.share)

    def later_rows(self, count: int, iteration: int) -> list[int]:
        """All processes' rows that are not in the first minibatch of an iteration's first epoch, in ascending order."""
        first, *_ = minibatch_rows(count, self.options.batch_size, self._epoch_seed(iteration, 0), 0, 1)
        return sorted(set(range(count)) - set(first))

    def _epoch_seed(self, iteration: int, epoch: int) -> int:
        return derive_seed(self.seed, "minibatches", iteration, epoch)


def minibatch_rows(count: int, batch_size: int, seed: int, rank: int, world_size: int) -> list[list[int]]:
    """This process's rows of each minibatch of one epoch: the same minibatches whatever the number of processes."""
    order = permutation(count, seed)
    minibatches = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    return [minibatch[rank::world_size] for minibatch in minibatches]
