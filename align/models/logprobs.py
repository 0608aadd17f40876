"""Log-probabilities of given tokens, without ever holding a whole sequence's vocabulary logits in float32.

Shapes: B rows, L positions, T completion positions (the last T of L), H hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from align.models.wrapped import inner_model, replaced_forward

CHUNK = 256
"""Positions whose logits exist at a time: 50 MB in float32 with SmolLM2's 49,152 tokens."""


class LogprobsOut(NamedTuple):
    """Both float32, in nats, one a target token. `entropy` is for reports: no gradient flows through it."""

    logprobs: Tensor
    entropy: Tensor


def gather_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk_size: int = CHUNK
) -> LogprobsOut:
    """log softmax(hidden weightᵀ / temperature) at the targets, and the distributions' entropy.

    With gradients on, each chunk's logits are computed again in the backward pass instead of being kept.

    Args:
        hidden: (..., H) states at the positions that predict the targets.
        weight: (V, H) output embedding.
        targets: (...) token ids.
        temperature: above 0.

    Returns:
        (...) log-probabilities and entropies.
    """
    return _gather(lambda states: nn.functional.linear(states, weight), hidden, targets, temperature, chunk_size)


def completion_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    temperature: float = 1.0,
    chunk_size: int = CHUNK,
) -> LogprobsOut:
    """Log-probabilities and entropies (B, T) of the last T = `completion_length` tokens under a causal LM.

    Prompts are padded on the left and completions on the right; at padding the values are finite and mean nothing.

    Args:
        model: a causal LM, which may be wrapped by PEFT or DDP; it is called through its outermost forward.
        input_ids: (B, L), L > T.
        attention_mask: (B, L) 1 where a token counts.
        temperature: above 0; logits are divided by it.
    """
    if not 0 < completion_length < input_ids.shape[1]:
        raise ValueError(f"completion_length {completion_length} must lie in [1, {input_ids.shape[1] - 1}]")
    targets = input_ids[:, -completion_length:]
    inner = inner_model(model)
    head = inner.get_output_embeddings()
    logits_of = head.forward
    last: list[Tensor] = []

    def score(hidden: Tensor) -> Tensor:
        states = hidden[:, -completion_length - 1 : -1]
        last.append(torch.stack(_gather(logits_of, states, targets, temperature, chunk_size), dim=-1))  # (B, T, 2)
        return last[-1]

    def run() -> Tensor:
        return model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=completion_length + 1,
        ).logits

    untouched: list[bool] = []
    watch = inner.register_forward_hook(lambda _, __, output: untouched.append(output.logits is last[-1]))
    try:
        with replaced_forward(head, score):
            scored = run()
    finally:
        watch.remove()
    if untouched[-1]:
        return LogprobsOut(scored[..., 0], scored[..., 1])
    # The architecture scales or caps what its head gives (Gemma 2, Cohere, Granite): only its own logits are right.
    logits = run()[:, -completion_length - 1 : -1]
    return _gather(lambda chunk: chunk, logits, targets, temperature, chunk_size)


def _gather(
    logits_of: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, temperature: float, chunk_size: int
) -> LogprobsOut:
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits_of(states).float() / temperature  # (chunk, V)
        # The same subtraction with gradients and without, so that both passes give the same bits.
        total = scores.logsumexp(-1, keepdim=True)
        logprobs = scores - total if scores.requires_grad else scores.sub_(total)
        entropy = torch.special.entr(logprobs.detach().exp()).sum(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy

    flat_states, flat_targets = states.reshape(-1, states.shape[-1]), targets.reshape(-1)
    found: list[tuple[Any, ...]] = []
    # One empty chunk where there are no positions at all, so that the results have their shape and graph.
    for start in range(0, max(len(flat_targets), 1), chunk_size):
        chunk = flat_states[start : start + chunk_size], flat_targets[start : start + chunk_size]
        if torch.is_grad_enabled():
            found.append(checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(score(*chunk))
    logprobs, entropies = (torch.cat(parts).reshape(targets.shape) for parts in zip(*found, strict=True))
    return LogprobsOut(logprobs, entropies)
