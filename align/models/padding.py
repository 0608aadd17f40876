"""Padding rows of token ids into batches, and the position ids that make a model ignore the padding."""

from collections.abc import Sequence

import torch
from torch import Tensor


def left_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, L) token ids padded on the left, and the mask that tells padding from a stop token with the same id."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids.long(), mask.long()


def right_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, L) token ids padded on the right, and their attention mask."""
    ids, mask = left_padded([row[::-1] for row in rows], pad_id, device)
    return ids.flip(-1), mask.flip(-1)


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, L) position ids that count from 0 at each row's first attended token."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)
