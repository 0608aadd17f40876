"""Heads that return one number per position: the score of a reward model, and the value function of PPO.

Shapes: B rows, L positions, H hidden size.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from align.models.padding import position_ids
from align.models.wrappers import inner_model, replaced_forward

HEADS = ("score", "classifier")
"""The names that transformers gives the last layer of a sequence classifier."""


def state_width(model: PreTrainedModel) -> int:
    """H, the width of a causal LM's last hidden states; its config's `hidden_size` may be another (OPT-350m)."""
    return int(model.get_output_embeddings().weight.shape[-1])


class ValueHead(nn.Linear):
    """V(s) from a hidden state: a linear layer in float32.

    Weights start with a standard deviation of 1/√(H+1) and the bias at 0 (Stiennon et al. 2020; Huang et al. 2024).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, dtype=torch.float32)
        nn.init.normal_(self.weight, std=(hidden_size + 1) ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., H) hidden states of any float dtype to (...) float32 values, even under autocast."""
        return head_output(self, hidden)


def head_output(head: nn.Linear, hidden: Tensor) -> Tensor:
    """A head's single output for (..., H) hidden states, computed in float32 even under autocast."""
    with torch.autocast(hidden.device.type, enabled=False):
        bias = head.bias.float() if head.bias is not None else None  # FSDP2 may show parameters in another dtype
        return nn.functional.linear(hidden.float(), head.weight.float(), bias).squeeze(-1)


def pooled_scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B,) float32 scores of a sequence classifier with one output, read at each row's last attended token.

    The mask gives that position. Transformers' own pooling takes the last token that is not the pad token, so where the
    end-of-turn token is also the pad token, it reads the score too early. Padding may be on either side.

    Args:
        model: a sequence classifier with one output, perhaps wrapped by PEFT or DDP.
        input_ids: (B, L).
        attention_mask: (B, L) 1 where a token is not padding; every row has such a token.

    Raises:
        ValueError: the model has no classification head.
    """
    inner = inner_model(model)
    head = next((getattr(inner, name) for name in HEADS if hasattr(inner, name)), None)
    if head is None:
        raise ValueError(f"{type(inner).__name__} has none of the classification heads {', '.join(HEADS)}")
    kept: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        kept.append(last_attended(hidden, attention_mask))
        return hidden.new_zeros(*hidden.shape[:2], 1)

    with replaced_forward(head, keep):
        model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        )
    # In float32 whatever the model's dtype: in bf16, neighbouring numbers near 4 are 1/64 apart or more.
    parameters = {name: parameter.float() for name, parameter in head.named_parameters()}
    with torch.autocast(input_ids.device.type, enabled=False):
        return functional_call(head, parameters, (kept[-1].float(),)).squeeze(-1)


def last_attended(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, H) each row's hidden state at its last attended position, from (B, L, H) states."""
    positions = torch.arange(attention_mask.shape[1], device=hidden.device)
    last = (attention_mask * positions).argmax(-1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
