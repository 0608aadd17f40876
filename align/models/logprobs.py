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

from align.models.wrapped import inner_model, replaced_forward

CHUNK = 128
"""Positions whose logits exist at a time. In float32 25 MB with SmolLM2's 49,152 tokens: glibc reuses up to 32."""


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
    with_entropy: bool = True,
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
        with_entropy: without gradients, entropies may be left out, which are 0 then.

    Returns:
        (...) log-probabilities and entropies.
    """
    if torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad:
        return LogprobsOut(*_FrozenHead.apply(hidden, weight, targets, temperature, chunk_size))
    head = partial(nn.functional.linear, weight=weight)
    return _gather(head, hidden, targets, temperature, chunk_size, with_entropy)


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
            wanted = flat_targets[chunk]
            scores = _log_softmax_(nn.functional.linear(states[chunk], weight), temperature)
            logprobs[chunk] = scores.gather(-1, wanted[:, None])[:, 0]
            probabilities = scores.exp()
            entropies[chunk] = -torch.linalg.vecdot(probabilities, scores)
            slopes[chunk] = (weight[wanted] - probabilities.to(weight.dtype) @ weight) / temperature
        ctx.save_for_backward(slopes.reshape(hidden.shape))
        ctx.mark_non_differentiable(entropies)
        return logprobs.reshape(targets.shape), entropies.reshape(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logprobs: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (logprobs[..., None] * slopes).to(slopes.dtype), None, None, None, None


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
    with_entropy: bool = True,
) -> LogprobsOut:
    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = _log_softmax_(logits_of(states), temperature)  # (chunk, V)
        distribution = logprobs.detach().exp() if with_entropy else logprobs.new_zeros(len(targets), 1)
        entropy = torch.special.entr(distribution).sum(-1)
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


def _log_softmax_(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) in float32, in place where no gradient needs the logits."""
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if logits.requires_grad:
        scores = logits.float() / temperature
        return scores - scores.logsumexp(-1, keepdim=True)
    # The same operations, so that passes with gradients and without give the same bits.
    scores = (logits.float() if logits.dtype != torch.float32 else logits.clone()).div_(temperature)
    return scores.sub_(scores.logsumexp(-1, keepdim=True))
