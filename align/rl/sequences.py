"""Rows of token ids laid out as tensors for one pass through a model, their shared prefixes apart.

Shapes: B rows, T completion tokens, L positions of the longest row without its prefix, P of the longest prefix.
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
    without_prefixes,
)
from align.models.packed_attention import packed_states, takes_packed_rows
from align.models.padding import left_padded, position_ids, right_padded

WORTH_SHARING = 64
"""Positions that sharing must save, because a separate prefill reads all weights once, however short it is."""


@dataclass(frozen=True)
class Rows:
    """The tokens that follow each row's prefix: ids and attention mask, (B, L)."""

    input_ids: Tensor
    attention_mask: Tensor
    prefixes: PrefixBatch

    @property
    def position_ids(self) -> Tensor:
        """(B, L) counted from the start of the prefix."""
        return position_ids(self.prefixes.full_mask(self.attention_mask))[:, self.prefixes.width :]


@dataclass(frozen=True)
class Sequences(Rows):
    """Prompts padded on the left and completions padded on the right: the completions are the last T positions.

    `completion_mask` (B, T) is False on padding.
    """

    completion_mask: Tensor

    @property
    def targets(self) -> Tensor:
        """(B, T) the completions' tokens."""
        return self.input_ids[:, -self.completion_mask.shape[1] :]


def lay_out(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
    *,
    share: bool,
) -> Sequences:
    """Lay out prompts and their completions, as token ids; with `share`, the prompts' common prefixes are split off."""
    shared = worthwhile_prefixes(prompts, share)
    prefixes = prefix_batch(shared, pad_id, device)
    return lay_out_after_prefixes(prefixes, without_prefixes(prompts, shared), completions, pad_id)


def lay_out_after_prefixes(
    prefixes: PrefixBatch, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int
) -> Sequences:
    """Lay out prompts, from which their prefixes have been removed, and their completions."""
    device = prefixes.ids.device
    prompt_ids, prompt_mask = left_padded(prompts, pad_id, device)
    completion_ids, completion_mask = right_padded(completions, pad_id, device)
    return Sequences(
        torch.cat([prompt_ids, completion_ids], dim=1),
        torch.cat([prompt_mask, completion_mask], dim=1),
        prefixes,
        completion_mask.bool(),
    )


def lay_out_rows(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, *, share: bool) -> Rows:
    """Lay out whole rows, padded on the left; with `share`, their common prefixes are split off."""
    shared = worthwhile_prefixes(rows, share)
    ids, mask = left_padded(without_prefixes(rows, shared), pad_id, device)
    return Rows(ids, mask, prefix_batch(shared, pad_id, device))


def worthwhile_prefixes(rows: Sequence[Sequence[int]], share: bool) -> SharedPrefixes:
    """The rows' shared prefixes; none without `share`, or if they would save fewer than `WORTH_SHARING` positions."""
    prefixes = find_shared_prefixes(rows) if share else SharedPrefixes.none(len(rows))
    return prefixes if prefixes.positions_saved >= WORTH_SHARING else SharedPrefixes.none(len(rows))


def hidden_states(backbone: nn.Module, rows: Rows) -> Tensor:
    """(B, L, H) a backbone's last hidden states."""
    prefixes = rows.prefixes
    if takes_packed_rows(backbone) and not prefixes.width:
        return packed_states(backbone, rows.input_ids, rows.attention_mask)
    cache = prefixes.cache_for_rows(backbone, backbone.config) if prefixes.width else None  # type: ignore[arg-type]
    states: Tensor = backbone(
        input_ids=rows.input_ids,
        attention_mask=prefixes.full_mask(rows.attention_mask),
        position_ids=rows.position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    return states


def encode_prefixes(backbone: nn.Module, prefixes: PrefixBatch) -> EncodedPrefixes:
    """Prefill shared prefixes once, for several passes over the tokens that follow them."""
    return EncodedPrefixes(prefixes.encode(backbone, DynamicCache(config=backbone.config)))  # type: ignore[arg-type]


def completion_hidden(backbone: nn.Module, sequences: Sequences) -> Tensor:
    """(B, T, H) a backbone's last hidden states at the positions that predict the completion's tokens."""
    return hidden_states(backbone, sequences)[:, -sequences.completion_mask.shape[1] - 1 : -1]
