"""The logits of a causal LM as a function of its last hidden states, as the model itself computes them.

Most models multiply their last hidden states by the output embedding. Some then scale or cap the products (Cohere,
Granite, Gemma 2), add a bias (Phi), or have further layers before the output embedding. What a model does is found out
by one forward pass: no list of architectures is needed.

Shapes: N positions, H hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.errors import InputError
from align.models.wrappers import eval_mode, replaced_forward

PROBE_TOKENS = 8
STRETCH = 16.0
"""The probe's states are also tried this many times as large, because a cap hardly changes small logits."""


class _States:
    """A backbone's output that has last hidden states and nothing else."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class OutputHead:
    """How a model gets from the last hidden states of `backbone` to its logits.

    `is_plain`: by a product with the output embedding, and nothing else.
    """

    model: PreTrainedModel
    backbone: nn.Module
    is_plain: bool

    @property
    def weight(self) -> Tensor:
        """(V, H) the output embedding."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def logits(self, states: Tensor) -> Tensor:
        """(N, V) the model's logits of (N, H) last hidden states."""
        if self.is_plain:
            return nn.functional.linear(states, self.weight)
        return own_logits(self.model, self.backbone, states)


def own_logits(model: PreTrainedModel, backbone: nn.Module, states: Tensor) -> Tensor:
    """(N, V) logits by the model's own forward pass, in which the backbone returns (N, H) given states."""
    output = _States(states[None])
    # Inputs of some kind are needed, though nothing reads them.
    ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
    with replaced_forward(backbone, lambda *_, **__: output):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


_PROBED: WeakKeyDictionary[nn.Module, tuple[str, bool] | None] = WeakKeyDictionary()
"""Of models seen before: how to get their backbone, and whether their head is plain."""


def output_head(model: PreTrainedModel) -> OutputHead:
    """A model's head.

    Raises:
        InputError: its logits depend on more than its last hidden states.
    """
    if head := find_head(model):
        return head
    raise InputError(
        f"model {model.config.name_or_path}: {type(model).__name__} computes its logits from more than its last hidden "
        "states, which ppo does not support; use dpo for this model, or another model"
    )


def find_head(model: PreTrainedModel) -> OutputHead | None:
    """Find out by one short forward pass how a model computes its logits; None where its last hidden states do not
    suffice. The answer is kept for the next call."""
    if model not in _PROBED:
        _PROBED[model] = _probe(model)
    if (found := _PROBED[model]) is None:
        return None
    return OutputHead(model, _backbone(model, found[0]), found[1])


def _backbone(model: PreTrainedModel, kind: str) -> nn.Module:
    backbone: nn.Module = model.base_model if kind == "base_model" else model.get_decoder()
    return backbone


def _probe(model: PreTrainedModel) -> tuple[str, bool] | None:
    vocabulary = model.get_output_embeddings().weight.shape[0]
    ids = torch.arange(1, PROBE_TOKENS + 1, device=model.device)[None] % vocabulary
    with torch.no_grad(), eval_mode(model):
        own = model(input_ids=ids, use_cache=False).logits[0]
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        for kind in ("base_model", "decoder"):
            head = OutputHead(model, _backbone(model, kind), is_plain=False)
            if _same(_try_logits(head, states), own, states.dtype):
                return kind, _is_plain(head, states)
    return None


def _try_logits(head: OutputHead, states: Tensor) -> Tensor | None:
    try:
        return head.logits(states)
    except Exception:  # whatever a forward pass raises that misses something in a backbone's output
        return None


def _is_plain(head: OutputHead, states: Tensor) -> bool:
    product = OutputHead(head.model, head.backbone, is_plain=True)
    return all(_same(product.logits(each), head.logits(each), each.dtype) for each in (states, STRETCH * states))


def _same(found: Tensor | None, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits agree up to rounding in this dtype."""
    if found is None or found.shape != expected.shape:
        return False
    difference: Any = (found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-6)
    return bool(difference <= 8 * torch.finfo(dtype).eps)
