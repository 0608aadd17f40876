"""Completions drawn token by token from a causal language model, many rows at once.

Each row's randomness comes from its own seed alone: one uniform number a token, turned into a token by the inverse of
the cumulative distribution. So a row's draw never depends on which other rows share its batch.

Shapes: B rows that are still being written, S cached positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from align.decoding.shared_prefixes import (
    PrefixBatch,
    SharedPrefixes,
    can_share,
    find_shared_prefixes,
    left_padded,
    positions,
    prefix_batch,
)
from align.errors import NotFinite
from align.models.wrappers import inner_model, without_ddp
from align.records import FinishReason

NUCLEUS_CANDIDATES = 256
"""How many of the likeliest tokens are looked at before the whole vocabulary is sorted for `top_p`."""

DROP_SHARE = 0.25
"""Rows that have ended leave the batch once they are this share of it: each time costs a copy of the cache."""


@dataclass(frozen=True)
class Decoded:
    """One entry a prompt, in the prompts' order.

    `tokens` include the stop token; `finish_reasons` say whether one was drawn ('stop') or the limit reached
    ('length'); `logprobs` are the drawn tokens' in nats, under the temperature but before `top_p`, when kept; `values`
    are the value before each drawn token, of a model that gives them.
    """

    tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    logprobs: list[list[float]] | None
    values: list[list[float]] | None = None


class ReservedLayer(DynamicLayer):
    """Keys and values of one layer in buffers reserved for the final length, so that a new token copies no old ones."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.is_initialized: bool = False
        self.capacity = capacity
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (B, heads, new, D) states behind those there, and return views of all of them."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = self._reserve(key_states), self._reserve(value_states)
            self.is_initialized = True
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _reserve(self, states: Tensor) -> Tensor:
        batch, heads, _, size = states.shape
        return states.new_empty(batch, heads, self.capacity, size)

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows alone; they must be in ascending order."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(len(indices), *old.shape[1:])
            torch.index_select(old[:, :, : self.length], 0, indices, out=new[:, :, : self.length])
            setattr(self, name, new)


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    stop_ids: Sequence[int],
    pad_id: int,
    keep_logprobs: bool = False,
    keep_values: bool = False,
    synced: bool = False,
    progress: Callable[[float], object] | None = None,
) -> Decoded:
    """Complete each prompt until a stop token or `max_new_tokens`.

    Args:
        model: a causal LM, which may be wrapped by PEFT, DDP or FSDP; it is called through its forward only. Anything
            else that is called like one, and has a `config` and a `device`, does too.
        prompts: token ids, none empty.
        seeds: one a prompt.
        temperature: 0 takes the likeliest token each time (log-probabilities are then at temperature 1).
        top_p: keep the smallest set of likeliest tokens that has this much probability (Holtzman et al. 2020).
        keep_values: the model's output has `values` (B, 1) beside its logits, which are to be kept.
        synced: every process calls the model equally often, as weights that are sharded need. Then every process must
            call this function together, if need be with no prompts.
        progress: told after each token what share of the work is done at most, in (0, 1], rows that ended early being
            done wholly.

    Raises:
        ValueError: an empty prompt, or numbers of prompts and seeds that differ.
        NotFinite: the model's logits are NaN.
    """
    if len(prompts) != len(seeds) or not all(prompts):
        raise ValueError("decode takes one seed a prompt, and no empty prompt")
    if not prompts and not synced:
        return Decoded([], [], [] if keep_logprobs else None, [] if keep_values else None)
    stops = frozenset(stop_ids)
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    values: list[list[float]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    with torch.no_grad(), evaluating(model):
        openings = SharedPrefixes.none(len(prompts)) if synced else find_shared_prefixes(prompts)
        batch = _Batch(model, list(prompts) or [[pad_id]], openings, max_new_tokens, pad_id)
        uniforms = np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds or [0]])
        for step in range(max_new_tokens):
            given = batch.next()
            drawn, drawn_logprobs = draw(given.logits[:, -1], uniforms[batch.rows, step], temperature, top_p)
            drawn_values = given.values[:, -1] if keep_values else torch.zeros_like(drawn_logprobs)
            each = zip(drawn.tolist(), drawn_logprobs.tolist(), drawn_values.tolist(), strict=True)
            for row, (token, logprob, value) in zip(batch.rows, each, strict=True):
                if row in unfinished:
                    tokens[row].append(token)
                    logprobs[row].append(logprob)
                    values[row].append(value)
                    if token in stops:
                        unfinished.remove(row)
            if progress:
                progress(1 - len(unfinished) * (1 - (step + 1) / max_new_tokens) / max(len(prompts), 1))
            if not _anywhere(bool(unfinished), synced, drawn.device):
                break
            batch.extend(drawn)
            batch.drop_ended(unfinished)
    reasons: list[FinishReason] = ["stop" if row[-1] in stops else "length" for row in tokens]
    return Decoded(tokens, reasons, logprobs if keep_logprobs else None, values if keep_values else None)


def draw(logits: Tensor, uniforms: np.ndarray, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token a row, and its log-probability under the temperature.

    Args:
        logits: (B, V), of any float dtype.
        uniforms: (B,) numbers in [0, 1), one a row.

    Returns:
        (B,) tokens and (B,) float32 log-probabilities in nats.

    Raises:
        NotFinite: a row's logits hold NaN or plus infinity.
    """
    scores = logits.float()
    if temperature not in (0.0, 1.0):
        scores = scores / temperature
    peak = scores.amax(-1, keepdim=True)  # (B, 1)
    weights = (scores - peak).exp_()  # (B, V)
    total = weights.sum(-1)  # (B,)
    if not total.isfinite().all():
        raise NotFinite("sampling: the model's logits are not finite (NaN or infinity); its weights are broken")
    if temperature == 0:
        tokens = scores.argmax(-1)
    elif top_p < 1:
        kept, ids = _nucleus(weights, top_p * total)
        tokens = ids.gather(-1, _inverse_cdf(kept, uniforms)[:, None])[:, 0]
    else:
        tokens = _inverse_cdf(weights, uniforms)
    return tokens, (scores.gather(-1, tokens[:, None]) - peak)[:, 0] - total.log()


def _inverse_cdf(weights: Tensor, uniforms: np.ndarray) -> Tensor:
    """(B,) the first index at which the running sum of (B, N) weights passes the uniform's share of their sum."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    target = (total.double() * torch.from_numpy(uniforms).to(total.device)).float()
    # Rounding must not take the target up to the sum itself, past the last index that has any weight.
    target = target.minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _nucleus(weights: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in descending order, those after the first ones that sum to (B,) `mass` set to 0; and their indices."""
    top, ids = weights.topk(min(NUCLEUS_CANDIDATES, weights.shape[-1]))
    if (top.sum(-1) < mass).any():
        top, ids = weights.sort(descending=True, stable=True)
    before = top.cumsum(-1) - top
    return top.where(before < mass[:, None], 0.0), ids


class _Batch:
    """The rows in the model's batch, their cache, and what goes in next.

    A row's positions are [padding, its opening, padding, the rest of its prompt, what is drawn]; each opening goes
    through the model once, however many rows have it.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], openings: SharedPrefixes, max_new_tokens: int, pad_id: int
    ) -> None:
        self.model = without_ddp(model)
        self.rows = list(range(len(prompts)))
        inner = inner_model(model)
        self.device = inner.device
        if not can_share(inner.config):
            openings = SharedPrefixes.none(len(prompts))
        opened = prefix_batch(openings, pad_id, self.device)
        rests = [prompt[len(openings.ids[group]) :] for prompt, group in zip(prompts, openings.of_row, strict=True)]
        self.ids, mask = left_padded(rests, pad_id, self.device)
        drawn = torch.ones(len(prompts), max_new_tokens, dtype=torch.long, device=self.device)
        self.mask = opened.before(torch.cat([mask, drawn], dim=1))
        self.length = self.mask.shape[1] - max_new_tokens
        self.positions = positions(self.mask[:, : self.length])[:, opened.width :]
        self.cache = reserved_cache(inner.config, self.mask.shape[1])
        if opened.width:
            self._open(opened, reserved_cache(inner.config, opened.width))

    def _open(self, openings: PrefixBatch, opened: Cache) -> None:
        """Put the openings through the model, and each row's into its part of the cache."""
        openings.run(self.model, opened, logits_to_keep=1)
        for layer, source in zip(self.cache.layers, opened.layers, strict=True):
            each = (states.index_select(0, openings.of_row) for states in (source.keys, source.values))
            layer.update(*each)

    def next(self) -> Any:
        """What the model gives for each row's next token: (B, 1, V) logits, perhaps more."""
        return self.model(
            input_ids=self.ids,
            attention_mask=self.mask[:, : self.length],
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def extend(self, tokens: Tensor) -> None:
        """Give each row its next token, (B,)."""
        self.ids = tokens[:, None]
        self.positions = self.positions[:, -1:] + 1
        self.length += 1

    def drop_ended(self, unfinished: set[int]) -> None:
        """Take ended rows out once they are many; one row stays, for a process that only keeps step with others."""
        kept = [slot for slot, row in enumerate(self.rows) if row in unfinished] or [0]
        if len(self.rows) - len(kept) < max(1, DROP_SHARE * len(self.rows)):
            return
        indices = torch.tensor(kept, device=self.ids.device)
        self.rows = [self.rows[slot] for slot in kept]
        self.ids, self.positions, self.mask = self.ids[indices], self.positions[indices], self.mask[indices]
        self.cache.batch_select_indices(indices)


def reserved_cache(config: PreTrainedConfig, capacity: int) -> Cache:
    """A cache for `capacity` positions: reserved buffers for full attention, the library's own layers elsewhere."""
    cache = DynamicCache(config=config)
    cache.layers = [ReservedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode, which gradient checkpointing needs for a cache to be used; every module's mode is put back after."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _anywhere(flag: bool, synced: bool, device: torch.device) -> bool:
    """Whether the flag is set here or, when synced, in any process."""
    if not synced or not torch.distributed.is_initialized():
        return flag
    flags = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags)
