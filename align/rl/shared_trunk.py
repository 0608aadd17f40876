"""Policy, value, reference and reward as adapters on one frozen trunk: PPO with LoRA.

The policy, value and reward adapters take turns on the trunk; with all adapters off, the trunk is the reference.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from align.models.cpu_attention import use_cpu_attention
from align.models.heads import head_output, last_attended
from align.models.loading import default_device
from align.models.logits import output_head
from align.models.lora import fuse_adapters, merged_weights
from align.models.wrappers import is_sharded
from align.rl.models import Network, PpoModels
from align.rl.sequences import Rows, Sequences, completion_hidden, hidden_states


class SharedTrunk(PpoModels):
    """A `PeftModel` whose frozen base model is the trunk.

    Its adapters: 'policy'; 'value' unless the value head sits on the policy's own hidden states; 'reward' if the reward
    model was trained on the same trunk.
    """

    # An adapter's gradients are spread over so many numbers that most are below 1e-5, which would slow them down.
    adam_epsilon = 1e-8

    def __init__(
        self,
        model: Any,
        value_head: nn.Linear | None,
        reward_head: nn.Linear | None,
        *,
        value_adapter: bool,
        temperature: float,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__(temperature, compute_dtype)
        from peft.tuners.lora import LoraLayer

        self.policy = model
        self.value_head = value_head
        self.reward_head = reward_head
        self.value_adapter = value_adapter
        self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self._fused = fuse_adapters(model)
        self._merged = False
        if default_device().type == "cpu":
            use_cpu_attention(self.causal_lm)
        with self._adapter(None):
            self.policy_head = self.reference_head = output_head(self.causal_lm)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name and (".policy." in name or ".value." in name))
        if reward_head is not None:
            reward_head.requires_grad_(False)

    def autocast(self) -> Any:
        # Fused adapters already compute in the trunk's dtype, and autocast's lookups cost as much as small operations.
        return nullcontext() if self._fused and not self.sharded else super().autocast()

    def _use(self, adapter: str | None) -> None:
        # peft's set_adapter also sets requires_grad, which would freeze the other adapter before its backward pass.
        for layer in self._layers:
            layer._disable_adapters = adapter is None
            layer._active_adapter = [adapter or "policy"]

    @contextmanager
    def _adapter(self, adapter: str | None) -> Iterator[None]:
        self._use(adapter)
        try:
            yield
        finally:
            self._use("policy")

    @property
    def value_on_policy(self) -> bool:
        return self.value_head is not None and not self.value_adapter

    def generation_states(self, **inputs: Any) -> Tensor:
        with self._adapter(None if self._merged else "policy"):
            return super().generation_states(**inputs)

    @contextmanager
    def backbone(self, network: Network) -> Iterator[Any]:
        with self._adapter("value" if network == "value" and self.value_adapter else "policy"):
            yield self.causal_lm.base_model

    def reference_hidden(self, sequences: Sequences) -> Tensor:
        with self._adapter(None):
            return completion_hidden(self.causal_lm.base_model, sequences)

    def reward_scores(self, sequences: Rows) -> Tensor:
        if self.reward_head is None:
            raise ValueError("this trunk has no reward adapter")
        with torch.no_grad(), self._adapter("reward"):
            states = hidden_states(self.causal_lm.base_model, sequences)
            return head_output(self.reward_head, last_attended(states, sequences.attention_mask))

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Merges the policy's adapter into the trunk, and restores the trunk's exact weights afterwards.

        Subtracting the adapter again would leave rounding errors, so the original weights are kept while completions
        are sampled. Sums in bf16 are dithered (`align.models.lora`). A sharded trunk is not merged, nor are experts.
        """
        layers = [layer for layer in self._layers if "policy" in layer.lora_A] if self._fused else []
        weights = [layer.get_base_layer().weight for layer in layers]
        if not weights or any(is_sharded(weight) for weight in weights):
            yield
            return
        originals = [weight.data for weight in weights]
        try:
            for weight, merged in zip(weights, merged_weights(layers, "policy"), strict=True):
                weight.data = merged
            self._merged = True
            yield
        finally:
            self._merged = False
            for weight, original in zip(weights, originals, strict=True):
                weight.data = original
