"""What one PPO iteration samples, and how it is cut into micro-batches.

Shapes: N completions an iteration over all processes, T tokens of the longest. Every process holds the whole rollout
(it is small: ids and a few floats a token), so statistics are over all processes by construction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.models.decode import decode
from align.models.ppo_models import PpoModels, Sequences
from align.records import Prompt
from align.repro import derive_seed


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt and its token ids, chat template applied."""

    prompt: Prompt
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """One sampled completion: its tokens (stop token included), what it says, and whether it stopped by itself.

    `sampled_logprobs` are those of the pass that sampled it; they are compared with the training pass's, never used.
    """

    prompt: TokenizedPrompt
    tokens: tuple[int, ...]
    text: str
    stopped: bool
    sampled_logprobs: tuple[float, ...]

    @property
    def length(self) -> int:
        return len(self.prompt.ids) + len(self.tokens)


class GenerationView:
    """The models' 'generate' role, in the shape of a causal language model."""

    def __init__(self, models: PpoModels) -> None:
        self.models = models
        self.config = models.causal_lm.config
        self.device = models.causal_lm.device
        self.dtype = models.causal_lm.dtype

    def __call__(self, **inputs: object) -> object:
        return self.models("generate", **inputs)


def schedule(prompts: Sequence[TokenizedPrompt], count: int, iteration: int, seed: int) -> list[TokenizedPrompt]:
    """The iteration's prompts: the next `count` of an endless chain of shuffles, each shuffle using every prompt once.

    A function of its arguments alone, so a resumed run needs no data position.
    """
    positions = range(iteration * count, (iteration + 1) * count)
    orders = {position // len(prompts): None for position in positions}
    shuffles = {turn: _permutation(len(prompts), derive_seed(seed, "prompts", turn)) for turn in orders}
    return [prompts[shuffles[position // len(prompts)][position % len(prompts)]] for position in positions]


def _permutation(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def sample_completions(
    models: PpoModels,
    chunks: Sequence[Sequence[tuple[TokenizedPrompt, int]]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    to_text: Callable[[Sequence[int]], str],
    synced: bool,
) -> list[Completion]:
    """Complete each (prompt, seed) once with the policy, a chunk at a time.

    Where the weights are sharded every process brings equally many chunks, some perhaps empty, and `synced` is set.
    """
    completions: list[Completion] = []
    view = GenerationView(models)
    with torch.no_grad(), models.generation():
        for chunk in chunks:
            drawn = decode(
                view,
                [list(prompt.ids) for prompt, _ in chunk],
                seeds=[seed for _, seed in chunk],
                max_new_tokens=max_new_tokens,
                temperature=models.temperature,
                top_p=1.0,
                stop_ids=tuple(stop_ids),
                pad_id=pad_id,
                keep_logprobs=True,
                synced=synced,
            )
            for (prompt, _), tokens, reason, logprobs in zip(
                chunk, drawn.tokens, drawn.finish_reasons, drawn.logprobs or [], strict=True
            ):
                stopped = reason == "stop"
                text = to_text(tokens[:-1] if stopped else tokens)
                completions.append(Completion(prompt, tuple(tokens), text, stopped, tuple(logprobs)))
    return completions


@dataclass(frozen=True)
class MicroBatch:
    """Rows of the rollout that one pass takes, and the share of its positions that is padding."""

    rows: Tensor
    sequences: Sequences
    padding: int

    @property
    def positions(self) -> int:
        return self.sequences.input_ids.numel()


def micro_batches(
    completions: Sequence[Completion], rows: Sequence[int], size: int, pad_id: int, device: torch.device
) -> list[MicroBatch]:
    """Cut rows into passes of at most `size`, sorted by length so that little of them is padding."""
    ordered = sorted(rows, key=lambda row: (completions[row].length, row))
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return [_micro_batch([completions[row] for row in group], group, pad_id, device) for group in groups]


def _micro_batch(
    completions: Sequence[Completion], rows: Sequence[int], pad_id: int, device: torch.device
) -> MicroBatch:
    prompt_width = max(len(completion.prompt.ids) for completion in completions)
    width = max(len(completion.tokens) for completion in completions)
    input_ids = torch.full((len(rows), prompt_width + width), pad_id)
    attention = torch.zeros_like(input_ids)
    for index, completion in enumerate(completions):
        start, end = prompt_width - len(completion.prompt.ids), prompt_width + len(completion.tokens)
        input_ids[index, start:end] = torch.tensor([*completion.prompt.ids, *completion.tokens])
        attention[index, start:end] = 1
    sequences = Sequences(input_ids.to(device), attention.to(device), completion_mask(completions, width).to(device))
    return MicroBatch(torch.tensor(rows), sequences, int((attention == 0).sum()))


def completion_mask(completions: Sequence[Completion], width: int) -> Tensor:
    """(N, width) True on each completion's tokens. From lengths, never from ids: padding may be the stop token."""
    lengths = torch.tensor([len(completion.tokens) for completion in completions])
    return torch.arange(width)[None, :] < lengths[:, None]


def minibatch_rows(count: int, batch_size: int, seed: int, rank: int, world_size: int) -> list[list[int]]:
    """This process's rows of each minibatch of one epoch: the same minibatches whatever the number of processes."""
    order = _permutation(count, seed)
    minibatches = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    return [minibatch[rank::world_size] for minibatch in minibatches]
