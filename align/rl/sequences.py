"""Rows of tokens laid out for one pass through a model, with what several rows begin with taken in once.

Shapes: B rows, T completion tokens, L positions of the longest row without its opening, P of the longest opening.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from align.decoding.shared_prefixes import (
    EncodedPrefixes,
    PrefixBatch,
    SharedPrefixes,
    find_shared_prefixes,
    prefix_batch,
)
from align.models.padding import left_padded, position_ids, right_padded

WORTH_SHARING = 64
"""Positions that an opening must spare: a pass of its own reads all weights once, whatever its length."""


@dataclass(frozen=True)
class Rows:
    """What comes after each row's opening: ids and attention mask, (B, L)."""

    input_ids: Tensor
    attention_mask: Tensor
    openings: PrefixBatch

    @property
    def position_ids(self) -> Tensor:
        """(B, L) from the beginning of the opening on."""
        return position_ids(self.openings.full_mask(self.attention_mask))[:, self.openings.width :]


@dataclass(frozen=True)
class Sequences(Rows):
    """Prompts padded on the left and completions padded on the right, so that the last T positions are completion.

    `completion_mask` (B, T) is True on the tokens that count.
    """

    completion_mask: Tensor

    @property
    def targets(self) -> Tensor:
        """(B, T) the completion's tokens."""
        return self.input_ids[:, -self.completion_mask.shape[1] :]


def lay_out(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
    *,
    share: bool,
) -> Sequences:
    """Lay out prompts and their completions, token ids; with `share`, common beginnings of prompts are split off."""
    openings = worthwhile_prefixes(prompts, share)
    return lay_out_after(prefix_batch(openings, pad_id, device), rests(prompts, openings), completions, pad_id)


def lay_out_after(
    opened: PrefixBatch, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int
) -> Sequences:
    """Lay out prompts without their openings, and their completions."""
    device = opened.ids.device
    before, before_mask = left_padded(prompts, pad_id, device)
    after, after_mask = right_padded(completions, pad_id, device)
    return Sequences(
        torch.cat([before, after], dim=1),
        torch.cat([before_mask, after_mask], dim=1),
        opened,
        after_mask.bool(),
    )


def lay_out_rows(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, *, share: bool) -> Rows:
    """Lay out rows that end together, in their last position."""
    openings = worthwhile_prefixes(rows, share)
    ids, mask = left_padded(rests(rows, openings), pad_id, device)
    return Rows(ids, mask, prefix_batch(openings, pad_id, device))


def worthwhile_prefixes(rows: Sequence[Sequence[int]], share: bool) -> SharedPrefixes:
    """What rows begin with, if with `share` it spares enough to go through a model by itself."""
    openings = find_shared_prefixes(rows) if share else SharedPrefixes.none(len(rows))
    return openings if openings.positions_saved >= WORTH_SHARING else SharedPrefixes.none(len(rows))


def rests(rows: Sequence[Sequence[int]], openings: SharedPrefixes) -> list[Sequence[int]]:
    """The rows without their openings."""
    return [row[len(openings.ids[group]) :] for row, group in zip(rows, openings.of_row, strict=True)]


def hidden_states(backbone: nn.Module, rows: Rows) -> Tensor:
    """(B, L, H) a backbone's last hidden states."""
    openings = rows.openings
    cache = openings.cache_for_rows(backbone, backbone.config) if openings.width else None  # type: ignore[arg-type]
    states: Tensor = backbone(
        input_ids=rows.input_ids,
        attention_mask=openings.full_mask(rows.attention_mask),
        position_ids=rows.position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    return states


def encode_prefixes(backbone: nn.Module, openings: PrefixBatch) -> EncodedPrefixes:
    """SharedPrefixes put through a backbone, for several passes over what comes after them."""
    return EncodedPrefixes(openings.encode(backbone, DynamicCache(config=backbone.config)))  # type: ignore[arg-type]


def completion_hidden(backbone: nn.Module, sequences: Sequences) -> Tensor:
    """(B, T, H) a backbone's last hidden states at the positions that predict the completion's tokens."""
    return hidden_states(backbone, sequences)[:, -sequences.completion_mask.shape[1] - 1 : -1]
