"""Scores of completions, and their standardisation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from align.data.chat import conversation_ids
from align.records import Conversation


class Reward(Protocol):
    """Scores completions of prompts: higher is better, one float a completion."""

    def __call__(self, prompts: Sequence[Conversation], completions: Sequence[str]) -> Tensor:
        """(B,) float32."""


class RewardModel:
    """A sequence classifier's score of a conversation, read at the token that ends the assistant's turn.

    Completions are taken as text and tokenized by the reward model's own tokenizer and template, exactly as in its
    training; so a reward model of another family works as well as one on the policy's trunk.

    Args:
        scores: (input_ids, attention_mask) → (B,).
        tokenizer: the reward model's.
        pad_id: fills rows on the right.
        batch_size: conversations a pass.
        system_prompt: put before conversations that have none, as in the reward model's training.
    """

    def __init__(
        self,
        scores: Callable[..., Tensor],
        tokenizer: Any,
        *,
        pad_id: int,
        batch_size: int,
        device: torch.device,
        system_prompt: str | None = None,
    ) -> None:
        self.scores = scores
        self.tokenizer = tokenizer
        self.pad_id = pad_id
        self.batch_size = batch_size
        self.device = device
        self.system_prompt = system_prompt

    def __call__(self, prompts: Sequence[Conversation], completions: Sequence[str]) -> Tensor:
        rows = [self._ids(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        result = torch.zeros(len(rows))
        for start in range(0, len(order), self.batch_size):
            group = order[start : start + self.batch_size]
            result[group] = self._score([rows[row] for row in group])
        return result

    def _ids(self, prompt: Conversation, completion: str) -> list[int]:
        opening, words = conversation_ids(self.tokenizer, prompt, completion, self.system_prompt)
        return [*opening, *words]

    def _score(self, rows: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), self.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for index, ids in enumerate(rows):
            input_ids[index, : len(ids)] = torch.tensor(ids)
            attention_mask[index, : len(ids)] = 1
        with torch.no_grad():
            return self.scores(input_ids.to(self.device), attention_mask.to(self.device)).float().cpu()


@dataclass
class RunningMoments:
    """Mean and variance of all values seen, updated a batch at a time (Chan et al. 1979, parallel variance)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, values: Tensor) -> None:
        """Take in a batch; pass that of all processes."""
        batch = values.double()
        count, mean = batch.numel(), float(batch.mean())
        delta, total = mean - self.mean, self.count + count
        self.squares += float((batch - mean).square().sum()) + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation; 1 before two values have been seen, or where they do not vary."""
        deviation = (self.squares / self.count) ** 0.5 if self.count > 1 else 0.0
        return deviation if deviation > 1e-8 else 1.0


def standardise(scores: Tensor, mean: float, std: float, clip: float | None) -> Tensor:
    """(score − mean) / std, kept within ±clip."""
    standard = (scores - mean) / std
    return standard if clip is None else standard.clamp(-clip, clip)


def adapted_kl_coef(kl_coef: float, kl: float, target: float, completions: int, horizon: int) -> float:
    """The coefficient after a batch whose KL to the reference was `kl` nats a completion (Ziegler 2019, section 2.2).

    e = clip(kl / target − 1, ±0.2);  β ← β (1 + e · completions / horizon).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * completions / horizon)
