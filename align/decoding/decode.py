"""Batched decoding: completions of prompts, one token at a time for the whole batch.

Shapes: B rows still in the batch, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from align.decoding.cache import reserved_cache, select_rows
from align.decoding.continuous_batching import Task
from align.decoding.sampling import sample, uniform_numbers
from align.decoding.shared_prefixes import (
    SharedPrefixes,
    can_share_prefixes,
    find_shared_prefixes,
    prefix_batch,
    without_prefixes,
)
from align.decoding.slot_batching import SlotBatcher, can_use_slots
from align.models.padding import left_padded, position_ids
from align.models.positions import check_length
from align.models.wrappers import eval_mode, inner_model, without_ddp
from align.records import FinishReason

DROP_SHARE = 0.25
"""Finished rows leave the batch once they make up this share of it. Each removal copies the cache."""


@dataclass(frozen=True)
class Decoded:
    """Completions, in the order of their prompts.

    `tokens` include the stop token. `finish_reasons` are 'stop' where one was sampled, and 'length' where the limit was
    reached. `logprobs` are the sampled tokens' log-probabilities in nats, under the temperature but before `top_p`.
    `values` are the model's values of the states before each sampled token. Both are None unless asked for.
    """

    tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    logprobs: list[list[float]] | None
    values: list[list[float]] | None = None


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
    progress: Callable[[float], object] = lambda share: None,
) -> Decoded:
    """Complete each prompt until a stop token or `max_new_tokens`.

    Args:
        model: a causal LM, perhaps wrapped by PEFT, DDP or FSDP, or a callable like one with `config` and `device`.
        prompts: token ids, at least one per prompt; `seeds` has one seed per prompt.
        temperature, top_p: as for `sample`.
        keep_values: also return values. The model's output must have `values` (B, 1).
        synced: all processes call the model equally often, as sharded weights need; all must then call this function.
        progress: called after each token with the share of work done, in (0, 1], as if unfinished rows had the limit.

    Raises:
        InputError: a row may become longer than the positions that the model has learned.
        ValueError: a prompt is empty, or the numbers of prompts and seeds differ.
        NotFinite: the model's logits contain NaN or plus infinity.
    """
    _check_inputs(model, prompts, seeds, max_new_tokens)
    completions = _Completions(len(prompts), stop_ids)
    if not prompts and not synced:
        return completions.decoded(keep_logprobs, keep_values)
    if not synced and can_use_slots(model):
        options = {"temperature": temperature, "top_p": top_p, "stop_ids": stop_ids, "pad_id": pad_id}
        return _decode_in_slots(model, prompts, seeds, max_new_tokens, keep_logprobs, keep_values, **options)
    with torch.no_grad(), eval_mode(model):
        batch = _Batch(model, prompts or [[pad_id]], max_new_tokens, pad_id, share=not synced)
        uniforms = np.stack([uniform_numbers(seed, max_new_tokens) for seed in seeds or [0]])
        for step in range(max_new_tokens):
            output = batch.forward()
            tokens, logprobs = sample(output.logits[:, -1], uniforms[batch.rows, step], temperature, top_p)
            values = output.values[:, -1] if keep_values else torch.zeros_like(logprobs)
            completions.append(batch.rows, tokens, logprobs, values)
            progress(1 - len(completions.unfinished) * (1 - (step + 1) / max_new_tokens) / max(len(prompts), 1))
            if not _in_any_process(bool(completions.unfinished), synced, tokens.device):
                break
            batch.advance(tokens, completions.unfinished)
    return completions.decoded(keep_logprobs, keep_values)


def _check_inputs(model: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_new_tokens: int) -> None:
    if len(prompts) != len(seeds) or not all(prompts):
        raise ValueError("decode needs one seed per prompt, and no empty prompt")
    if isinstance(model, nn.Module):
        longest = max(map(len, prompts), default=0) + max_new_tokens
        check_length(inner_model(model), longest, "shorten the prompts, or lower max_new_tokens")


def _decode_in_slots(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    max_new_tokens: int,
    keep_logprobs: bool,
    keep_values: bool,
    **options: Any,
) -> Decoded:
    batcher = SlotBatcher(model, rows=len(prompts), max_new_tokens=max_new_tokens, keep_values=keep_values, **options)
    tasks = [Task(number, *task) for number, task in enumerate(zip(prompts, seeds, strict=True))]
    found = sorted(batcher.run(deque(tasks)), key=lambda each: each.task.key)
    return Decoded(
        [each.tokens for each in found],
        [each.finish_reason for each in found],
        [each.logprobs for each in found] if keep_logprobs else None,
        [each.values for each in found] if keep_values else None,
    )


class _Completions:
    """The completions so far. `unfinished` has the rows without a stop token."""

    def __init__(self, rows: int, stop_ids: Sequence[int]) -> None:
        self._stops = frozenset(stop_ids)
        self._sampled: list[list[tuple[int, float, float]]] = [[] for _ in range(rows)]
        self.unfinished = set(range(rows))

    def append(self, rows: Sequence[int], tokens: Tensor, logprobs: Tensor, values: Tensor) -> None:
        """Append a token, its log-probability and its value to each of these rows, unless it is finished."""
        for row, *sampled in zip(rows, tokens.tolist(), logprobs.tolist(), values.tolist(), strict=True):
            if row in self.unfinished:
                self._sampled[row].append(tuple(sampled))
                if sampled[0] in self._stops:
                    self.unfinished.remove(row)

    def decoded(self, keep_logprobs: bool, keep_values: bool) -> Decoded:
        tokens = [[token for token, _, _ in row] for row in self._sampled]
        reasons: list[FinishReason] = ["length" if row in self.unfinished else "stop" for row in range(len(tokens))]
        logprobs = [[logprob for _, logprob, _ in row] for row in self._sampled] if keep_logprobs else None
        values = [[value for _, _, value in row] for row in self._sampled] if keep_values else None
        return Decoded(tokens, reasons, logprobs, values)


class _Batch:
    """The rows in the batch, their cache, and the next input to the model.

    A row's positions are [padding, shared prefix, padding, rest of the prompt, sampled tokens]. Each shared prefix runs
    through the model once, however many rows begin with it.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, pad_id: int, *, share: bool
    ) -> None:
        self.model = without_ddp(model)
        self.rows = list(range(len(prompts)))
        inner = inner_model(model)
        share = share and can_share_prefixes(inner.config)
        shared = find_shared_prefixes(prompts) if share else SharedPrefixes.none(len(prompts))
        prefixes = prefix_batch(shared, pad_id, inner.device)
        self.ids, mask = left_padded(without_prefixes(prompts, shared), pad_id, inner.device)
        sampled = torch.ones(len(prompts), max_new_tokens, dtype=torch.long, device=inner.device)
        self.mask = prefixes.full_mask(torch.cat([mask, sampled], dim=1))
        self.length = self.mask.shape[1] - max_new_tokens
        self.positions = position_ids(self.mask[:, : self.length])[:, prefixes.width :]
        self.cache = reserved_cache(inner.config, self.mask.shape[1])
        if prefixes.width:
            encoded = prefixes.encode(self.model, reserved_cache(inner.config, prefixes.width), logits_to_keep=1)
            for layer, source in zip(self.cache.layers, encoded.layers, strict=True):
                layer.update(*(states.index_select(0, prefixes.of_row) for states in (source.keys, source.values)))

    def forward(self) -> Any:
        """The model's output, whose logits (B, 1, V) are those of each row's next token."""
        return self.model(
            input_ids=self.ids,
            attention_mask=self.mask[:, : self.length],
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def advance(self, tokens: Tensor, unfinished: set[int]) -> None:
        """Append (B,) sampled tokens, one per row: they are the next input. Finished rows leave once they are many.

        One row always stays, as other processes may go on.
        """
        self.ids = tokens[:, None]
        self.positions = self.positions[:, -1:] + 1
        self.length += 1
        kept = [slot for slot, row in enumerate(self.rows) if row in unfinished] or [0]
        if len(self.rows) - len(kept) < max(1, DROP_SHARE * len(self.rows)):
            return
        indices = torch.tensor(kept, device=self.ids.device)
        self.rows = [self.rows[slot] for slot in kept]
        self.ids, self.positions, self.mask = self.ids[indices], self.positions[indices], self.mask[indices]
        select_rows(self.cache, indices)


def _in_any_process(flag: bool, synced: bool, device: torch.device) -> bool:
    """Whether the flag is set in this process or, when synced, in any process."""
    if not synced or not torch.distributed.is_initialized():
        return flag
    flags = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags)
