"""Sampling next tokens from logits, with randomness that each row draws from its own seed.

A token takes one uniform number, which the inverse of the cumulative distribution maps to a token. So what a row
samples never depends on the other rows of its batch.

Shapes: B rows, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from align.errors import NotFinite

NUCLEUS_CANDIDATES = 256
"""Number of most likely tokens that are tried before the whole vocabulary is sorted for `top_p`."""


def uniform_numbers(seed: int, count: int) -> np.ndarray:
    """(count,) numbers in [0, 1). With the same seed, a longer sequence begins with the shorter one."""
    return np.random.default_rng(seed).random(count)


def sample(logits: Tensor, uniforms: np.ndarray, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """(B,) one sampled token per row, and (B,) float32 log-probabilities in nats under the temperature, before `top_p`.

    Args:
        logits: (B, V), of any float dtype.
        uniforms: (B,) numbers in [0, 1).
        temperature: 0 takes the most likely token, with its log-probability at temperature 1.
        top_p: sample from the smallest set of most likely tokens with this probability (Holtzman et al. 2020).

    Raises:
        NotFinite: a row's logits contain NaN or plus infinity.
    """
    tokens, logprobs, finite = sample_without_waiting(
        logits, torch.from_numpy(uniforms).to(logits.device), temperature, top_p
    )
    _check_finite(finite)
    return tokens, logprobs


def sample_without_waiting(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sample`, with (B,) float64 uniforms on the device; (B,) whether logits are finite is returned, not checked.

    On a GPU nothing here waits for a result, so that a CUDA graph can hold it.
    """
    scores = logits.float()
    if temperature not in (0.0, 1.0):
        scores = scores / temperature
    peak = scores.amax(-1, keepdim=True)  # (B, 1)
    weights = (scores - peak).exp_()  # (B, V)
    total = weights.sum(-1)  # (B,)
    if temperature == 0:
        tokens = scores.argmax(-1)
    elif top_p < 1:
        kept, ids = _nucleus(weights, top_p * total)
        tokens = ids.gather(-1, _inverse_cdf(kept, uniforms)[:, None])[:, 0]
    else:
        tokens = _inverse_cdf(weights, uniforms)
    return tokens, (scores.gather(-1, tokens[:, None]) - peak)[:, 0] - total.log(), total.isfinite()


def most_likely(logits: Tensor) -> Tensor:
    """(B,) the tokens and errors of `sample` at temperature 0, without its softmax over the vocabulary."""
    peaks, tokens = logits.max(-1)
    _check_finite(peaks.isfinite())
    return tokens


def _check_finite(finite: Tensor) -> None:
    if not finite.all():
        raise NotFinite("sampling: the model's logits are not finite (NaN or infinity); its weights are broken")


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """(B,) the first index at which the cumulative sum of (B, N) weights exceeds the uniform's share of their total."""
    # The parallel sums of a GPU are not monotone in float32.
    cumulative = _running_sums(weights.double() if weights.is_cuda else weights)
    total = cumulative[:, -1]
    target = (total.double() * uniforms).to(total.dtype)
    # Rounding must not raise the target to the total itself, past the last index that has any weight.
    target = target.minimum(total.nextafter(torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return tokens.clamp(max=weights.shape[-1] - 1)  # past the end where weights are not numbers


def _nucleus(weights: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in descending order, those after the first that sum to (B,) `mass` set to 0, and their indices."""
    top, ids = weights.topk(min(NUCLEUS_CANDIDATES, weights.shape[-1]))
    if weights.is_cuda or (top.sum(-1) < mass).any():
        top, ids = weights.sort(descending=True, stable=True)
    before = _running_sums(top) - top
    return top.where(before < mass[:, None], 0.0), ids


def _running_sums(weights: Tensor) -> Tensor:
    """The cumulative sums of each row of (B, N), for which torch's deterministic mode has no algorithm on a GPU.

    There torch scans several rows one block of threads a row, always in the same order; only its scan of a single row
    depends on timing. The mode refuses both, so it is left for the scan, which is given a second row.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return weights.cumsum(-1)
    rows = len(weights)
    torch.use_deterministic_algorithms(False)
    try:
        return torch.cat([weights, weights[:1]]).cumsum(-1)[:rows]
    finally:
        torch.use_deterministic_algorithms(True)
