"""Passes over rows of different lengths without padding: the rows stand one after the other in a single row.

Attention keeps them apart by where each begins (flash attention for variable lengths, Dao 2023); every other layer of a
decoder works on each position alone. On a GPU this saves what padding costs, a third of the positions of a usual PPO
micro-batch, and needs no mask.

Shapes: B rows, L positions of the longest, N positions of all rows together, H heads, K key-value heads, D features of
a head.
"""

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "packed"

HALF_PRECISION = (torch.bfloat16, torch.float16)

LARGEST_ERROR = 0.05
"""Relative error of bf16 states up to which packed rows and single ones count as the same computation."""

_IS_PACKED: ContextVar[bool] = ContextVar("packed rows", default=False)


def use_packed_attention(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Let a model on a GPU that uses PyTorch's attention take packed rows; whether it then computes the same.

    If it does not, it is left as it was.

    Args:
        dtype: of its computation, under the autocast around this call.
    """
    if model.config._attn_implementation != "sdpa" or dtype not in HALF_PRECISION:
        return False
    model.set_attn_implementation(NAME)
    if _computes_the_same(model):
        return True
    model.set_attn_implementation("sdpa")
    return False


def takes_packed_rows(backbone: Any) -> bool:
    """Whether `use_packed_attention` succeeded with the model."""
    return bool(backbone.config._attn_implementation == NAME)


def packed_states(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, L, H) a decoder's last hidden states, zero at padding, of rows that are padded on either side.

    Args:
        backbone: has `use_packed_attention` behind it.
        input_ids: (B, L).
        attention_mask: (B, L) 1 where a token counts; each row's tokens are consecutive.
    """
    rows, columns = attention_mask.nonzero(as_tuple=True)  # (N,) each
    starts = nn.functional.pad(attention_mask.sum(-1).cumsum(0), (1, 0)).to(torch.int32)  # (B + 1,)
    positions = torch.arange(len(rows), device=rows.device) - starts.long()[rows]
    token = _IS_PACKED.set(True)
    try:
        # The names by which transformers' own models hand such lengths down to attention.
        states = backbone(
            input_ids=input_ids[rows, columns][None],
            position_ids=positions[None],
            use_cache=False,
            cu_seq_lens_q=starts,
            cu_seq_lens_k=starts,
            max_length_q=input_ids.shape[1],
            max_length_k=input_ids.shape[1],
        ).last_hidden_state[0]
    finally:
        _IS_PACKED.reset(token)
    return states.new_zeros(*input_ids.shape, states.shape[-1]).index_put((rows, columns), states)


def _computes_the_same(model: PreTrainedModel) -> bool:
    """Whether two packed rows get the states that each gets by itself."""
    backbone: Any = model.base_model
    ids = torch.arange(1, 15, device=model.device).view(2, 7) % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    try:
        with torch.no_grad():
            packed = packed_states(backbone, ids, mask)
            alone = torch.cat([backbone(input_ids=ids[:1]).last_hidden_state[0], *backbone(input_ids=ids[1:, :4])[0]])
    except (RuntimeError, TypeError, ValueError):  # a model of another kind may refuse the arguments in any way
        return False
    packed = torch.cat([packed[0], packed[1, :4]])
    return bool((packed - alone).float().norm() <= LARGEST_ERROR * alone.float().norm())


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed row, and PyTorch's own attention for rows that are not packed.

    Takes (1, H, N, D) queries and (1, K, N, D) keys, and returns (1, N, H, D).
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            s_aux=s_aux,
            **options,
        )
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("flash attention in PyTorch has neither capped scores nor attention sinks")
    window = {} if sliding_window is None else {"window_size_left": sliding_window - 1, "window_size_right": 0}
    # By its operator, as the arguments of torch's public function for it change from release to release.
    result = torch.ops.aten._flash_attention_forward(
        *(states[0].transpose(0, 1) for states in (query, key, value)),
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        0.0,
        True,
        False,
        scale=scaling,
        **window,
    )[0]
    return result[None], None


def _mask(*args: Any, **options: Any) -> Tensor | None:
    return None if _IS_PACKED.get() else sdpa_mask(*args, **options)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _mask)
