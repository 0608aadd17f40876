"""Log-probabilities of given tokens, without ever holding a whole sequence's float32 logits in memory.

Shapes: B rows, L positions, T completion positions (the last T of L), C positions of a chunk, H hidden size, V
vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from align.models.logits import OutputHead, find_head
from align.models.padding import position_ids
from align.models.wrappers import inner_model

CHUNK = {"cpu": 128, "cuda": 4096}
"""The number of positions whose logits are in memory at a time."""
IN_FLOAT32 = {"cpu": 16, "cuda": 1024}
"""The number of positions whose float32 logits are in memory at a time: in a CPU's cache, or enough to fill a GPU."""


def positions_at_once(device: torch.device) -> int:
    """The number of positions whose logits are computed together on a device."""
    return CHUNK.get(device.type, CHUNK["cpu"])


class LogprobsOut(NamedTuple):
    """Float32 numbers in nats, one per target token. `entropy` is for reports: no gradient flows through it."""

    logprobs: Tensor
    entropy: Tensor


def gather_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, chunk_size: int | None = None
) -> LogprobsOut:
    """log softmax(hidden weightᵀ / temperature) at the targets, and the distributions' entropy.

    Logits are not kept for the backward pass. With a frozen weight, the gradient with respect to the hidden states is
    computed in the forward pass; with a trained weight, the backward pass recomputes the logits.

    Args:
        hidden: (..., H) hidden states at the positions that predict the targets.
        weight: (V, H) output embedding.
        targets: (...) token ids.
        temperature: above 0.

    Returns:
        (...) log-probabilities and entropies.
    """
    if torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad:
        return LogprobsOut(*_FrozenHead.apply(hidden, weight, targets, temperature, chunk_size))
    return _gather(partial(nn.functional.linear, weight=weight), hidden, targets, temperature, chunk_size)


def head_logprobs(head: OutputHead, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> LogprobsOut:
    """`gather_logprobs` under a model's own head. Where that is more than a product, its logits are computed again in
    the backward pass, however frozen it is."""
    if head.is_plain:
        return gather_logprobs(hidden, head.weight, targets, temperature)
    return _gather(head.logits, hidden, targets, temperature, None)


class _FrozenHead(torch.autograd.Function):
    """Keeps d log p(target) / d state = (weight[target] - sum over v of p(v) weight[v]) / temperature, no logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_size: int | None
    ) -> tuple[Tensor, Tensor]:
        states, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        logprobs, entropies = states.new_empty(2, len(states), dtype=torch.float32)
        slopes = torch.empty_like(states)
        chunk_size = chunk_size or positions_at_once(states.device)
        for start in range(0, len(states), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = nn.functional.linear(states[chunk], weight)
            logprobs[chunk], entropies[chunk] = _score_in_place(logits, flat_targets[chunk], temperature)
            slopes[chunk] = (logits @ weight) / -temperature
        ctx.save_for_backward(slopes.reshape(hidden.shape))
        ctx.mark_non_differentiable(entropies)
        return logprobs.reshape(targets.shape), entropies.reshape(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logprobs: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (logprobs[..., None] * slopes).to(slopes.dtype), None, None, None, None


def _score_in_place(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(C,) log-probabilities of the targets and entropies.

    Overwrites the (C, V) logits with the probabilities less 1 at the target, d (-log p(target)) / d score. The 1 is
    subtracted in float32: of a probability of 0.999 rounded to bf16 nothing would be left, nor of its gradient.
    """
    logprobs, entropies = logits.new_empty(2, len(targets), dtype=torch.float32)
    count = IN_FLOAT32.get(logits.device.type, IN_FLOAT32["cpu"])
    for start in range(0, len(targets), count):
        rows = slice(start, start + count)
        scores = _scaled(logits[rows], temperature)
        probabilities = scores.softmax(-1)
        largest, most_likely = probabilities.max(-1, keepdim=True)
        # log sum exp(scores) without another pass over them: score - log p, here of the most likely token.
        normaliser = scores.gather(-1, most_likely) - largest.log()
        logprobs[rows] = (scores.gather(-1, targets[rows, None]) - normaliser)[:, 0]
        entropies[rows] = normaliser[:, 0] - torch.linalg.vecdot(probabilities, scores)
        minus_one = probabilities.new_full((len(largest), 1), -1.0)
        logits[rows] = probabilities.scatter_add_(-1, targets[rows, None], minus_one)
    return logprobs, entropies


def completion_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> LogprobsOut:
    """Log-probabilities and entropies (B, T) of the last T = `completion_length` tokens under a causal LM.

    Prompts are padded on the left and completions on the right. Values at padding are finite but meaningless.

    Args:
        model: a causal LM, perhaps wrapped by PEFT or DDP. Its outermost forward is called.
        input_ids: (B, L), L > T.
        attention_mask: (B, L) 1 where a token is not padding.
        temperature: above 0; logits are divided by it.
    """
    if not 0 < completion_length < input_ids.shape[1]:
        raise ValueError(f"completion_length {completion_length} must lie in [1, {input_ids.shape[1] - 1}]")
    targets, predicting = input_ids[:, -completion_length:], slice(-completion_length - 1, -1)
    forward = partial(
        model,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
    )
    head = find_head(inner_model(model))
    if head is None:
        logits = forward(logits_to_keep=completion_length + 1).logits[:, predicting]
        return _gather(lambda chunk: chunk, logits, targets, temperature, chunk_size)
    found: list[Tensor] = []
    hook = head.backbone.register_forward_hook(lambda _, __, output: found.append(output.last_hidden_state))
    try:
        forward(logits_to_keep=1)  # the head is run below, chunk by chunk
    finally:
        hook.remove()
    return _gather(head.logits, found[-1][:, predicting], targets, temperature, chunk_size)


def _gather(
    logits_of: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, temperature: float, chunk_size: int | None
) -> LogprobsOut:
    """Score the targets chunk by chunk. With gradients on, each chunk's logits are recomputed in the backward pass."""

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(states)
        if not logits.requires_grad:
            return _score_in_place(logits.clone() if logits is states else logits, targets, temperature)
        logprobs = nn.functional.log_softmax(_scaled(logits, temperature), dim=-1)  # (chunk, V)
        entropy = torch.special.entr(logprobs.detach().exp()).sum(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy

    chunk_size = chunk_size or positions_at_once(states.device)
    flat_states, flat_targets = states.reshape(-1, states.shape[-1]), targets.reshape(-1)
    found: list[tuple[Any, ...]] = []
    # Without any positions, one empty chunk gives the results their shape and their autograd graph.
    for start in range(0, max(len(flat_targets), 1), chunk_size):
        chunk = flat_states[start : start + chunk_size], flat_targets[start : start + chunk_size]
        if torch.is_grad_enabled():
            found.append(checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(score(*chunk))
    logprobs, entropies = (torch.cat(parts).reshape(targets.shape) for parts in zip(*found, strict=True))
    return LogprobsOut(logprobs, entropies)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature in float32."""
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return logits.float() / temperature
