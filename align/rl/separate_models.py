"""Policy and value trained in all their weights, beside a frozen reference: PPO without LoRA."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from align.models.logits import output_head
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
        self.policy_head, self.reference_head = output_head(self.causal_lm), output_head(reference)

    @property
    def value_on_policy(self) -> bool:
        return self.value_head is not None and self.value_backbone is None

    @property
    def language_models(self) -> list[Any]:
        return [each for each in (self.policy, self.value_backbone, self.reference) if each is not None]

    @contextmanager
    def generation(self) -> Iterator[None]:
        """On a GPU, half-precision copies of the weights, which autocast would otherwise cast anew for every token."""
        if self.causal_lm.device.type != "cuda" or self.compute_dtype == torch.float32 or self.sharded:
            yield
            return
        parameters = [parameter for parameter in self.policy.parameters() if parameter.ndim > 1]
        originals = [parameter.data for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.data = parameter.data.to(self.compute_dtype)
            yield
        finally:
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.data = original

    def backbone(self, network: Network) -> AbstractContextManager[Any]:
        value_backbone = self.value_backbone if network == "value" else None
        return nullcontext(self.policy.base_model if value_backbone is None else value_backbone)

    def reference_hidden(self, sequences: Sequences) -> Tensor:
        return completion_hidden(self.reference.base_model, sequences)
