"""The models of a PPO run behind one module: policy, value, reference and reward.

With LoRA they are one frozen trunk: the policy, value and reward adapters take turns on it, and the reference is the
trunk with its adapters off. With full fine-tuning they are separate models. Either way there is one module to hand to
accelerate, whose forward takes a role, so that DDP and FSDP2 see every pass.

Shapes: B completions, T completion tokens, V vocabulary, H hidden size.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.decoding.shared_prefixes import EncodedPrefixes, PrefixBatch, can_share_prefixes
from align.models.cpu_attention import use_cpu_attention
from align.models.heads import head_output, last_attended
from align.models.logprobs import gather_logprobs
from align.models.lora import fuse_adapters, merged_weights
from align.models.wrappers import inner_model, is_sharded
from align.rl.sequences import Rows, Sequences, completion_hidden, encode_prefixes, hidden_states

Role = Literal["generate", "train", "logprobs", "values", "imitate", "reference", "score", "openings"]

Reader = Literal["policy", "value"]


class SinglePass(NamedTuple):
    """What a role with one result gives: log-probs or values (B, T), or scores (B,)."""

    result: Tensor


class GeneratePass(NamedTuple):
    """Logits (B, kept, V), and values (B, kept) of the same states where a head on the policy gives them."""

    logits: Tensor
    values: Tensor | None


class TrainPass(NamedTuple):
    """What the policy says of each completion token, each (B, T) float32 and zero where masked.

    Entropy is for reports. Values are those of a head on the policy.
    A named tuple, because DeepSpeed finds a module's output tensors in tuples and not in dataclasses.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None


class PpoModels(nn.Module):
    """Common part of both arrangements. Subclasses give the backbones and the heads.

    `policy` is what is saved in the end: a `PeftModel` or a causal LM.
    """

    policy: Any
    value_head: nn.Linear | None

    def __init__(self, temperature: float, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.temperature = temperature
        self.compute_dtype = compute_dtype
        self.sharded = False

    @property
    def shares_prefixes(self) -> bool:
        """Whether rows may share a pass over what they begin with; sharded weights want each layer called once."""
        return not self.sharded and can_share_prefixes(self.config)

    @property
    def keeps_sampled(self) -> bool:
        """Whether the log-probs of sampling are those of a training pass but for float32's rounding."""
        return self.compute_dtype == torch.float32

    @property
    def value_on_policy(self) -> bool:
        """Whether values come from a head on the policy's own hidden states."""
        raise NotImplementedError

    @property
    def config(self) -> Any:
        """The policy's, which DeepSpeed's automatic bucket sizes are read from."""
        return self.causal_lm.config

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model that writes completions."""
        return inner_model(self.policy)

    def forward(self, role: Role, **inputs: Any) -> Any:
        """One pass in a role: generate (called as a causal LM), train, logprobs, values, imitate, reference or score.

        Reference and score have no gradient. SharedPrefixes takes in what prompts begin with, once for several passes.
        """
        with self._autocast():
            if role == "generate":
                return self._generate_pass(**inputs)
            if role == "train":
                return self._train_pass(**inputs)
            if role == "openings":
                return self.encode_prefixes(**inputs)
            passes = {
                "logprobs": self._policy_logprobs,
                "values": self._value_pass,
                "imitate": self._imitated_logprobs,
                "reference": self._reference_logprobs,
                "score": self.reward_scores,
            }
            return SinglePass(passes[role](**inputs))

    def _autocast(self) -> Any:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.causal_lm.device.type, dtype=self.compute_dtype)

    def _generate_pass(self, logits_to_keep: int = 0, **inputs: Any) -> GeneratePass:
        states = self.generation_states(**inputs)[:, -logits_to_keep:]
        # As one matrix: a product of three axes may have the output embedding copied for every row.
        logits = nn.functional.linear(states.flatten(0, 1), self.policy_output_weight())
        logits = logits.unflatten(0, states.shape[:2])
        on_policy = self.value_head if self.value_on_policy else None
        return GeneratePass(logits, None if on_policy is None else head_output(on_policy, states))

    def _train_pass(self, sequences: Sequences) -> TrainPass:
        policy_hidden = self.policy_hidden(sequences)
        logprobs, entropy = self._completion_logprobs(policy_hidden, sequences, self.policy_output_weight())
        on_policy = self.value_head if self.value_on_policy else None
        values = None if on_policy is None else head_output(on_policy, policy_hidden) * sequences.completion_mask
        return TrainPass(logprobs, entropy, values)

    def _value_pass(self, sequences: Sequences) -> Tensor:
        """(B, T) values without log-probs."""
        return self.values(sequences) * sequences.completion_mask

    def _policy_logprobs(self, sequences: Sequences) -> Tensor:
        """(B, T) the policy's log-probs without values."""
        return self._completion_logprobs(self.policy_hidden(sequences), sequences, self.policy_output_weight())[0]

    def _imitated_logprobs(self, sequences: Sequences) -> Tensor:
        """(B, T) the policy's log-probs of demonstrations, at temperature 1 as in supervised fine-tuning."""
        hidden = self.policy_hidden(sequences)
        return self._completion_logprobs(hidden, sequences, self.policy_output_weight(), temperature=1.0)[0]

    @torch.no_grad()
    def _reference_logprobs(self, sequences: Sequences) -> Tensor:
        hidden = self.reference_hidden(sequences)
        return self._completion_logprobs(hidden, sequences, self.reference_output_weight())[0]

    def _completion_logprobs(
        self, hidden: Tensor, sequences: Sequences, weight: Tensor, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy of the completion tokens that count, (B, T) each; no vocabulary logits elsewhere.

        The temperature is that of sampling unless another is given.
        """
        mask = sequences.completion_mask
        picked = gather_logprobs(hidden[mask], weight, sequences.targets[mask], temperature or self.temperature)
        empty = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return empty.masked_scatter(mask, picked.logprobs), empty.masked_scatter(mask, picked.entropy)

    def generation_states(self, **inputs: Any) -> Tensor:
        """(B, L, H) the policy's last hidden states, for the inputs of a forward with a cache."""
        raise NotImplementedError

    def reading(self, reader: Reader) -> AbstractContextManager[Any]:
        """Gives the backbone through which policy or value reads."""
        raise NotImplementedError

    def encode_prefixes(self, openings: PrefixBatch, reader: Reader) -> EncodedPrefixes:
        """SharedPrefixes put through the policy's or the value's backbone."""
        with self.reading(reader) as backbone:
            return encode_prefixes(backbone, openings)

    def policy_hidden(self, sequences: Sequences) -> Tensor:
        """(B, T, H) the policy's last hidden states at the positions that predict the completion."""
        with self.reading("policy") as backbone:
            return completion_hidden(backbone, sequences)

    def reference_hidden(self, sequences: Sequences) -> Tensor:
        """(B, T, H) likewise of the reference."""
        raise NotImplementedError

    def policy_output_weight(self) -> Tensor:
        """(V, H) the policy's output embedding."""
        raise NotImplementedError

    def reference_output_weight(self) -> Tensor:
        """(V, H) the reference's output embedding."""
        raise NotImplementedError

    def values(self, sequences: Sequences) -> Tensor:
        """(B, T) V(s_t), the value before each completion token, by a pass of its own."""
        if self.value_head is None:
            raise ValueError("these models have no value")
        with self.reading("value") as backbone:
            return head_output(self.value_head, completion_hidden(backbone, sequences))

    def reward_scores(self, sequences: Rows) -> Tensor:
        """(B,) the reward model's score of whole conversations."""
        raise NotImplementedError

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Surrounds the sampling of completions; a place to make the policy's forward cheaper."""
        yield


class SharedTrunk(PpoModels):
    """Policy, value, reference and reward on one frozen trunk (a `PeftModel` with an adapter for each role).

    Adapters: 'policy'; 'value' unless the value head sits on the policy's own hidden states; 'reward' where the reward
    model was trained on this very trunk.
    """

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
        use_cpu_attention(self.causal_lm)
        self._use("policy")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name and (".policy." in name or ".value." in name))
        if reward_head is not None:
            reward_head.requires_grad_(False)

    @property
    def _no_split_modules(self) -> Any:
        return self.causal_lm._no_split_modules

    def _autocast(self) -> Any:
        # All is in the trunk's dtype already; looking every operation up would cost as much as small ones take.
        return nullcontext() if self._fused and not self.sharded else super()._autocast()

    def _use(self, adapter: str | None) -> None:
        # peft's set_adapter also switches gradients on and off, which would freeze the other adapter's before backward.
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
            states: Tensor = self.causal_lm.base_model(**inputs).last_hidden_state
            return states

    @contextmanager
    def reading(self, reader: Reader) -> Iterator[Any]:
        with self._adapter("value" if reader == "value" and self.value_adapter else "policy"):
            yield self.causal_lm.base_model

    def reference_hidden(self, sequences: Sequences) -> Tensor:
        with self._adapter(None):
            return completion_hidden(self.causal_lm.base_model, sequences)

    def policy_output_weight(self) -> Tensor:
        return self.causal_lm.get_output_embeddings().weight

    reference_output_weight = policy_output_weight

    def reward_scores(self, sequences: Rows) -> Tensor:
        if self.reward_head is None:
            raise ValueError("this trunk carries no reward adapter")
        with torch.no_grad(), self._adapter("reward"):
            states = hidden_states(self.causal_lm.base_model, sequences)
            return head_output(self.reward_head, last_attended(states, sequences.attention_mask))

    _merged = False

    @contextmanager
    def generation(self) -> Iterator[None]:
        """The policy's adapter added into the trunk's weights, and the very same weights put back afterwards.

        Subtracting what was added would leave rounding behind; the originals are kept aside instead, while completions
        are drawn and no longer. Sums in bf16 are dithered (`align.models.lora`). A sharded trunk stays as it is.
        """
        layers = [layer for layer in self._layers if "policy" in layer.lora_A]
        weights = [layer.get_base_layer().weight for layer in layers]
        if not self._fused or any(is_sharded(weight) for weight in weights):
            yield
            return
        kept = [weight.data for weight in weights]
        try:
            for weight, merged in zip(weights, merged_weights(layers, "policy"), strict=True):
                weight.data = merged
            self._merged = True
            yield
        finally:
            self._merged = False
            for weight, original in zip(weights, kept, strict=True):
                weight.data = original


class SeparateModels(PpoModels):
    """Policy and value trained in every weight (fp32), reference and reward frozen beside them."""

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
    def _no_split_modules(self) -> Any:
        return self.policy._no_split_modules

    @property
    def value_on_policy(self) -> bool:
        return self.value_head is not None and self.value_backbone is None

    def generation_states(self, **inputs: Any) -> Tensor:
        states: Tensor = self.policy.base_model(**inputs).last_hidden_state
        return states

    def reading(self, reader: Reader) -> AbstractContextManager[Any]:
        own = self.value_backbone if reader == "value" else None
        return nullcontext(self.policy.base_model if own is None else own)

    def reference_hidden(self, sequences: Sequences) -> Tensor:
        return completion_hidden(self.reference.base_model, sequences)

    def policy_output_weight(self) -> Tensor:
        return self.policy.get_output_embeddings().weight

    def reference_output_weight(self) -> Tensor:
        return self.reference.get_output_embeddings().weight
