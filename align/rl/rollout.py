"""What one PPO iteration samples.

Shapes: N completions an iteration over all processes, T tokens of the longest. Every process holds the whole rollout
(it is small: ids and a few floats a token), so statistics are over all processes by construction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.decoding.decode import decode
from align.records import Prompt
from align.rl.models import PpoModels
from align.run.reproducibility import derive_seed


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt and its token ids, chat template applied."""

    prompt: Prompt
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """One sampled completion: its tokens (stop token included), what it says, and whether it stopped by itself.

    `sampled_logprobs` are those of the pass that sampled it, and `sampled_values` the values before each token, empty
    where that pass gives none. `seed` is what it was drawn with; None for one that was not sampled.
    """

    prompt: TokenizedPrompt
    tokens: tuple[int, ...]
    text: str
    stopped: bool
    sampled_logprobs: tuple[float, ...]
    sampled_values: tuple[float, ...] = ()
    seed: int | None = None

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
    shuffles = {turn: permutation(len(prompts), derive_seed(seed, "prompts", turn)) for turn in orders}
    return [prompts[shuffles[position // len(prompts)][position % len(prompts)]] for position in positions]


def permutation(count: int, seed: int) -> list[int]:
    """The numbers below `count` in an order that the seed alone decides."""
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
                keep_values=models.value_on_policy,
                synced=synced,
            )
            values = drawn.values or [[]] * len(chunk)
            for (prompt, seed), tokens, reason, logprobs, each in zip(
                chunk, drawn.tokens, drawn.finish_reasons, drawn.logprobs or [], values, strict=True
            ):
                stopped = reason == "stop"
                text = to_text(tokens[:-1] if stopped else tokens)
                completions.append(Completion(prompt, tuple(tokens), text, stopped, tuple(logprobs), tuple(each), seed))
    return completions


def completion_mask(completions: Sequence[Completion], width: int) -> Tensor:
    """(N, width) True on each completion's tokens. From lengths, never from ids: padding may be the stop token."""
    lengths = torch.tensor([len(completion.tokens) for completion in completions])
    return torch.arange(width)[None, :] < lengths[:, None]
