"""Log-probabilities of given tokens, without ever holding a whole sequence's vocabulary logits in float32.

Shapes: B rows, L positions, T completion positions (the last T of L), H hidden size, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from align.models.wrappers import inner_model, replaced_forward

CHUNK = 128
"""Positions whose logits exist at a time."""
IN_CACHE = 16
"""Positions whose logits are in float32 at a time: 3 MB with SmolLM2's 49,152 tokens."""


class LogprobsOut(NamedTuple):
    """Both float32, in nats, one a target token. `entropy` is for reports: no gradient flows through it."""

    logprobs: Tensor
    entropy: Tensor


def gather_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    chunk_size: int = CHUNK,
) -> LogprobsOut:
    """log softmax(hidden weightᵀ / temperature) at the targets, and the distributions' entropy.

    With gradients on, logits are not kept: those of a frozen weight give the log-probs' slopes in the states at once,
    and those of a trained one are computed again in the backward pass.

    Args:
        hidden: (..., H) states at the positions that predict the targets.
        weight: (V, H) output embedding.
        targets: (...) token ids.
        temperature: above 0.

    Returns:
        (...) log-probabilities and entropies.
    """
    if torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad:
        return LogprobsOut(*_FrozenHead.apply(hidden, weight, targets, temperature, chunk_size))
    head = partial(nn.functional.linear, weight=weight)
    return _gather(head, hidden, targets, temperature, chunk_size)


class _FrozenHead(torch.autograd.Function):
    """Keeps d log p(target) / d state = (weight[target] - sum over v of p(v) weight[v]) / temperature, not logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        states, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        logprobs, entropies = states.new_empty(2, len(states), dtype=torch.float32)
        slopes = torch.empty_like(states)
        for start in range(0, len(states), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = nn.functional.linear(states[chunk], weight)
            logprobs[chunk], entropies[chunk] = _picked_(logits, flat_targets[chunk], temperature)
            slopes[chunk] = (weight[flat_targets[chunk]] - logits @ weight) / temperature
        ctx.save_for_backward(slopes.reshape(hidden.shape))
        ctx.mark_non_differentiable(entropies)
        return logprobs.reshape(targets.shape), entropies.reshape(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logprobs: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (logprobs[..., None] * slopes).to(slopes.dtype), None, None, None, None


def _picked_(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(C,) log-probs of the targets and entropies of C positions; the logits (C, V) become probabilities."""
    logprobs, entropies = logits.new_empty(2, len(targets), dtype=torch.float32)
    for start in range(0, len(targets), IN_CACHE):
        rows = slice(start, start + IN_CACHE)
        scores = _tempered(logits[rows], temperature)
        probabilities = scores.softmax(-1)
        largest, likeliest = probabilities.max(-1, keepdim=True)
        # log sum exp(scores), without going over them again: log p = score - it, of the likeliest token as well.
        normaliser = scores.gather(-1, likeliest) - largest.log()
        logprobs[rows] = (scores.gather(-1, targets[rows, None]) - normaliser)[:, 0]
        entropies[rows] = normaliser[:, 0] - torch.linalg.vecdot(probabilities, scores)
        logits[rows] = probabilities
    return logprobs, entropies


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
    logits_of: Callable[[Tensor], Tensor],
    states: Tensor,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
) -> LogprobsOut:
    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(states)
        if not logits.requires_grad:
            return _picked_(logits.clone() if logits is states else logits, targets, temperature)
        logprobs = nn.functional.log_softmax(_tempered(logits, temperature), dim=-1)  # (chunk, V)
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


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature in float32."""
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return logits.float() / temperature
