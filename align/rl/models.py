"""The models of a PPO run behind one module: policy, value, reference and reward.

With LoRA they are adapters on one frozen trunk (`shared_trunk`); with full fine-tuning they are separate models
(`separate_models`). Either way one module goes to accelerate and its forward takes a role, so that DDP, FSDP2 and
DeepSpeed see every pass.

Shapes: B completions, T completion tokens, V vocabulary, H hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.decoding.shared_prefixes import EncodedPrefixes, PrefixBatch, can_share_prefixes
from align.models.heads import head_output
from align.models.logits import OutputHead
from align.models.logprobs import head_logprobs
from align.models.wrappers import inner_model
from align.rl.sequences import Rows, Sequences, completion_hidden, encode_prefixes

Role = Literal["generate", "train", "logprobs", "values", "imitate", "reference", "score", "prefixes"]

Network = Literal["policy", "value"]
"""A trained network; a value head on the policy's hidden states belongs to the policy's."""


class SinglePass(NamedTuple):
    """The result of a role that has just one: log-probs or values (B, T), or scores (B,)."""

    result: Tensor


class GeneratePass(NamedTuple):
    """Logits (B, kept, V), and the values (B, kept) that a head on the policy reads from the same hidden states."""

    logits: Tensor
    values: Tensor | None


class TrainPass(NamedTuple):
    """Log-probs and entropy of the policy at each completion token, and the values of a head on the policy.

    Each is (B, T) float32, zero where masked. Entropy is only reported. This is a named tuple because DeepSpeed
    finds a module's output tensors in tuples and not in dataclasses.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None


class GenerationView:
    """Presents the models' "generate" role as a causal LM to the decoder."""

    def __init__(self, models: "PpoModels") -> None:
        self.models = models
        self.config = models.causal_lm.config
        self.device = models.causal_lm.device
        self.dtype = models.causal_lm.dtype

    def __call__(self, **inputs: object) -> object:
        return self.models("generate", **inputs)


class PpoModels(nn.Module):
    """What both arrangements have in common. Subclasses provide the backbones and the heads.

    `policy` is the model that the run publishes: a `PeftModel` or a causal LM. `policy_head` and `reference_head` make
    logits of the two models' hidden states.
    """

    policy: Any
    value_head: nn.Linear | None
    policy_head: OutputHead
    reference_head: OutputHead
    adam_epsilon: float
    """Adam's epsilon if the recipe names none."""

    def __init__(self, temperature: float, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.temperature = temperature
        self.compute_dtype = compute_dtype
        self.sharded = False
        self.packs_rows = False

    @property
    def shares_prefixes(self) -> bool:
        """Whether rows may share one prefill of their common prefix.

        Sharded weights need each layer called once, and packed rows have no cache to hold the prefix.
        """
        return not self.sharded and not self.packs_rows and can_share_prefixes(self.config)

    @property
    def reuses_sampled_logprobs(self) -> bool:
        """Whether training can use sampling's log-probs: in float32 a training pass gives the same up to rounding."""
        return self.compute_dtype == torch.float32

    @property
    def value_on_policy(self) -> bool:
        """Whether values come from a head on the policy's own hidden states."""
        raise NotImplementedError

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters, by the name of the norm of their gradient: all that are clipped together."""
        groups: dict[str, list[nn.Parameter]] = {"policy_gradient_norm": [], "value_gradient_norm": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                of_value = name.startswith(("value_head.", "value_backbone.")) or ".value." in name
                groups["value_gradient_norm" if of_value else "policy_gradient_norm"].append(parameter)
        return {name: group for name, group in groups.items() if group}

    @property
    def config(self) -> Any:
        """The policy's config; DeepSpeed reads its automatic bucket sizes from it."""
        return self.causal_lm.config

    @property
    def _no_split_modules(self) -> Any:
        return self.causal_lm._no_split_modules

    @property
    def language_models(self) -> list[Any]:
        """Every transformers model that passes run through."""
        return [self.causal_lm]

    @cached_property
    def generator(self) -> "GenerationView":
        """The models' "generate" role as a causal LM."""
        return GenerationView(self)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model that writes completions."""
        return inner_model(self.policy)

    def forward(self, role: Role, **inputs: Any) -> Any:
        """One pass in a role.

        "generate" takes the inputs of a causal LM; "prefixes" encodes shared prefixes for several later passes; the
        others take `sequences`. "reference" and "score" compute no gradient.
        """
        with self.autocast():
            if role == "generate":
                return self._generate_pass(**inputs)
            if role == "train":
                return self._train_pass(**inputs)
            if role == "prefixes":
                return self._encode_prefixes(**inputs)
            passes: dict[str, Callable[..., Tensor]] = {
                "logprobs": self._policy_logprobs,
                "values": self._value_pass,
                "imitate": partial(self._policy_logprobs, temperature=1.0),  # as in supervised fine-tuning
                "reference": self._reference_logprobs,
                "score": self.reward_scores,
            }
            return SinglePass(passes[role](**inputs))

    def autocast(self) -> Any:
        """Surrounds every pass."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.causal_lm.device.type, dtype=self.compute_dtype)

    def _generate_pass(self, logits_to_keep: int = 0, **inputs: Any) -> GeneratePass:
        states = self.generation_states(**inputs)[:, -logits_to_keep:]
        # Flattened, because a product with three axes may copy the output embedding for every row.
        logits = self.policy_head.logits(states.flatten(0, 1))
        return GeneratePass(logits.unflatten(0, states.shape[:2]), self._policy_head_values(states))

    def _train_pass(self, sequences: Sequences) -> TrainPass:
        hidden = self.policy_hidden(sequences)
        logprobs, entropy = self._completion_logprobs(hidden, sequences, self.policy_head)
        values = self._policy_head_values(hidden)
        return TrainPass(logprobs, entropy, None if values is None else values * sequences.completion_mask)

    def _policy_head_values(self, states: Tensor) -> Tensor | None:
        """(B, L) values of the policy's hidden states (B, L, H), if the value head sits on the policy."""
        return head_output(self.value_head, states) if self.value_head is not None and self.value_on_policy else None

    def _value_pass(self, sequences: Sequences) -> Tensor:
        """(B, T) V(s_t), the value before each completion token."""
        if self.value_head is None:
            raise ValueError("these models have no value head")
        with self.backbone("value") as backbone:
            return head_output(self.value_head, completion_hidden(backbone, sequences)) * sequences.completion_mask

    def _policy_logprobs(self, sequences: Sequences, temperature: float | None = None) -> Tensor:
        hidden = self.policy_hidden(sequences)
        return self._completion_logprobs(hidden, sequences, self.policy_head, temperature)[0]

    @torch.no_grad()
    def _reference_logprobs(self, sequences: Sequences) -> Tensor:
        hidden = self.reference_hidden(sequences)
        return self._completion_logprobs(hidden, sequences, self.reference_head)[0]

    def _completion_logprobs(
        self, hidden: Tensor, sequences: Sequences, head: OutputHead, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy of each completion token, (B, T) each, zero where masked.

        Logits are computed for unmasked positions only. The temperature is that of sampling unless given.
        """
        mask = sequences.completion_mask
        picked = head_logprobs(head, hidden[mask], sequences.targets[mask], temperature or self.temperature)
        empty = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return empty.masked_scatter(mask, picked.logprobs), empty.masked_scatter(mask, picked.entropy)

    def generation_states(self, **inputs: Any) -> Tensor:
        """(B, L, H) the policy's last hidden states, for the inputs of a forward pass with a KV cache."""
        states: Tensor = self.causal_lm.base_model(**inputs).last_hidden_state
        return states

    def backbone(self, network: Network) -> AbstractContextManager[Any]:
        """Yields the backbone of the policy or of the value, whose output is hidden states."""
        raise NotImplementedError

    def _encode_prefixes(self, prefixes: PrefixBatch, network: Network) -> EncodedPrefixes:
        with self.backbone(network) as backbone:
            return encode_prefixes(backbone, prefixes)

    def policy_hidden(self, sequences: Sequences) -> Tensor:
        """(B, T, H) the policy's last hidden states at the positions that predict the completion."""
        with self.backbone("policy") as backbone:
            return completion_hidden(backbone, sequences)

    def reference_hidden(self, sequences: Sequences) -> Tensor:
        """(B, T, H) the same for the reference."""
        raise NotImplementedError

    def reward_scores(self, sequences: Rows) -> Tensor:
        """(B,) the reward model's scores of whole conversations."""
        raise NotImplementedError

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Context in which completions are sampled; subclasses may make the policy's forward cheaper in it."""
        yield
