"""Policy and value trained in all their weights, beside a frozen reference: PPO without LoRA."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from align.rl.models import Network, PpoModels
from align.rl.sequences import Sequences, completion_hidden


class SeparateModels(PpoModels):
    """A causal LM as the policy, a value backbone unless the head sits on the policy (both fp32), and the reference.

    The reward model is not among them: its scores come from outside.
    """

    # As in Ouyang et al.'s code: it keeps early steps small (Huang et al. 2024, "The N+ implementation details").
    adam_epsilon = 1e-5

    def __init__(
        self,
        policy: Any,
        value_backbone: nn.Module | None,
        value_head: nn.Linear | None,
        reference: Any,
        *,
        temperature: float,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__(temperature, compute_dtype)
        self.policy = policy.requires_grad_(True)
        self.value_backbone = value_backbone.requires_grad_(True) if value_backbone is not None else None
        self.value_head = value_head
        self.reference = reference.requires_grad_(False)

    @property
    def value_on_policy(self) -> bool:
        return self.value_head is not None and self.value_backbone is None

    def backbone(self, network: Network) -> AbstractContextManager[Any]:
        value_backbone = self.value_backbone if network == "value" else None
        return nullcontext(self.policy.base_model if value_backbone is None else value_backbone)

    def reference_hidden(self, sequences: Sequences) -> Tensor:
        return completion_hidden(self.reference.base_model, sequences)

    def reference_output_weight(self) -> Tensor:
        return self.reference.get_output_embeddings().weight
