"""Schedules the prompts of a PPO iteration and samples their completions.

Every process holds the whole rollout (it is small: ids and a few floats per token), so statistics are over all
processes by construction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.data.answers import Answer
from align.decoding.decode import decode
from align.decoding.slot_batching import can_use_slots
from align.models.wrappers import eval_mode
from align.records import Prompt
from align.rl.models import PpoModels
from align.rl.rewards import Response
from align.run.reproducibility import derive_seed


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt and its token ids, with the chat template applied."""

    prompt: Prompt
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """One completion: its tokens (stop token included), its answer's text, and whether it ended with a stop token.

    `thought` is what a thinking model wrote before its answer; `answered` is False if it wrote nothing else.
    `sampled_logprobs` and `sampled_values` (the value before each token) come from the passes that sampled it; without
    a value head on the policy there are no values. `seed` is None for a completion that was not sampled.
    """

    prompt: TokenizedPrompt
    tokens: tuple[int, ...]
    text: str
    stopped: bool
    sampled_logprobs: tuple[float, ...]
    sampled_values: tuple[float, ...] = ()
    seed: int | None = None
    thought: str = ""
    answered: bool = True

    @property
    def response(self) -> Response:
        """What the rewards are shown."""
        prompt = self.prompt.prompt.prompt
        return Response(prompt, self.text, self.stopped, self.answered, self.prompt.ids, self.tokens)

    @property
    def length(self) -> int:
        return len(self.prompt.ids) + len(self.tokens)


def schedule(prompts: Sequence[TokenizedPrompt], count: int, iteration: int, seed: int) -> list[TokenizedPrompt]:
    """The iteration's prompts: the next `count` of an endless chain of shuffles of all prompts.

    It depends on its arguments alone, so a resumed run needs no saved position in the data.
    """
    positions = range(iteration * count, (iteration + 1) * count)
    rounds = {position // len(prompts) for position in positions}
    shuffles = {each: permutation(len(prompts), derive_seed(seed, "prompts", each)) for each in rounds}
    return [prompts[shuffles[position // len(prompts)][position % len(prompts)]] for position in positions]


def permutation(count: int, seed: int) -> list[int]:
    """The numbers below `count`, shuffled by the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def sample_completions(
    models: PpoModels,
    chunks: Sequence[Sequence[tuple[TokenizedPrompt, int]]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    read: Callable[[Sequence[int], Sequence[int]], Answer],
    synced: bool,
) -> list[Completion]:
    """Sample one completion of each (prompt, seed) from the policy, chunk by chunk.

    Args:
        read: the answer in a completion's tokens without the stop token, given the prompt's ids.
        synced: the weights are sharded; every process then passes equally many chunks, some possibly empty.
    """
    completions: list[Completion] = []
    with torch.no_grad(), eval_mode(models), models.generation():
        if not synced and can_use_slots(models.generator):
            # A GPU keeps as many rows under way as its memory holds, whatever the chunks.
            chunks = [[row for chunk in chunks for row in chunk]]
        for chunk in chunks:
            drawn = decode(
                models.generator,
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
                answer = read(prompt.ids, tokens[:-1] if stopped else tokens)
                sampled = tuple(tokens), answer.text, stopped, tuple(logprobs), tuple(each), seed
                completions.append(Completion(prompt, *sampled, answer.thought, answer.given))
    return completions


def completion_mask(completions: Sequence[Completion], width: int) -> Tensor:
    """(N, width) True on each completion's tokens. Read from lengths, because the pad token may be the stop token."""
    lengths = torch.tensor([len(completion.tokens) for completion in completions])
    return torch.arange(width)[None, :] < lengths[:, None]
