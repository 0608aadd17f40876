"""Collects an iteration's rollout: samples completions, scores them, and computes what the updates need.

Shapes: N completions of an iteration over all processes, T tokens of the longest, S reward sources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from align.data.answers import AnswerReader
from align.errors import NotFinite
from align.figures.tables import printable, shortened
from align.rl.advantages import (
    generalised_advantages,
    group_relative_advantages,
    kl_terms,
    leave_one_out_advantages,
    penalised_rewards,
    whiten,
)
from align.rl.batches import Batches
from align.rl.checkpoint import newest
from align.rl.models import PpoModels, Role
from align.rl.phase_times import PhaseTimer
from align.rl.rewards import Rewards
from align.rl.rollout import Completion, TokenizedPrompt, completion_mask, sample_completions, schedule
from align.rl.settings import PpoBlock
from align.run import processes
from align.run.reproducibility import derive_seed


@dataclass(frozen=True)
class Experience:
    """A rollout and what the updates need, the same in every process. Tensors are (N, T) unless stated otherwise.

    Args:
        iteration: counted from 0.
        old_logprobs: the first minibatch's are sampling's until its training pass replaces them.
        kl_coef: the coefficient in force.
        kl: (N,) nats per completion, for each of the estimators 'k1', 'k2' and 'k3', from sampling's log-probs.
        raw_scores: (N, S) as the sources give them; where a source abstained, the mean of its other scores.
        unscored: share of the completions from which a source abstained, by the source's name.
        cut: share of the conversations that were longer than a source reads, by the source's name.
        standardised: (N, trained sources) scores on one scale.
        scores: (N,) combined, less the penalties for length and for a missing stop token.
    """

    iteration: int
    kl_coef: float
    completions: Sequence[Completion]
    mask: Tensor
    sampled_logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    kl: Mapping[str, Tensor]
    raw_scores: Tensor
    unscored: Mapping[str, float]
    cut: Mapping[str, float]
    standardised: Tensor
    scores: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Collector:
    """Collects the rollout of each iteration; `output` is the stage's folder, which error messages name."""

    models: PpoModels
    tokenizer: Any
    prompts: Sequence[TokenizedPrompt]
    rewards: Rewards
    settings: PpoBlock
    batches: Batches
    timer: PhaseTimer
    output: Path
    stop_ids: tuple[int, ...]
    seed: int

    def collect(self, iteration: int, kl_coef: float) -> Experience:
        """Collect one iteration's rollout. Call in every process."""
        with self.timer.phase("generate"):
            completions = self._sample(iteration)
        with self.timer.phase("reward"):
            given = self._score(completions, iteration)
            raw_scores, unscored = self.rewards.fill_unscored(given)
            cut = self._cut_shares(len(completions))
            self._check_finite(raw_scores, completions, iteration)
        with self.timer.phase("forward"):
            passes = self._forward_passes(completions, iteration)
        mask = completion_mask(completions, passes["values"].shape[1])
        kl = kl_terms(passes["sampled_logprobs"], passes["ref_logprobs"])
        standardised = self.rewards.standardised(raw_scores, scored=~given.isnan())
        scores = self._penalised(completions, self.rewards.combined(standardised))
        rewards = penalised_rewards(scores, kl["k1"], mask, kl_coef if self.settings.kl_in_reward else 0.0)
        advantages, returns = self._advantages(rewards, scores, passes["values"], mask)
        return Experience(
            iteration=iteration,
            kl_coef=kl_coef,
            completions=completions,
            mask=mask,
            kl={name: (term * mask).sum(dim=1) for name, term in kl.items()},
            raw_scores=raw_scores,
            unscored=unscored,
            cut=cut,
            standardised=standardised,
            scores=scores,
            rewards=rewards,
            advantages=advantages,
            returns=returns,
            **passes,
        )

    def _sample(self, iteration: int) -> list[Completion]:
        """The iteration's completions by all processes, in the schedule's order."""
        settings = self.settings
        scheduled = schedule(self.prompts, settings.rollout_batch, iteration, self.seed)
        rows = [
            (prompt, derive_seed(self.seed, "ppo", iteration, position, sibling))
            for position, prompt in enumerate(scheduled)
            for sibling in range(settings.completions_per_prompt)
        ]
        size = min(settings.sampling.batch_size, -(-len(rows) // processes.world_size()))
        chunks = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        mine = processes.shard(chunks)
        most_chunks = -(-len(chunks) // processes.world_size())
        drawn = sample_completions(
            self.models,
            [[rows[row] for row in chunk] for chunk in mine] + [[]] * (most_chunks - len(mine)),
            max_new_tokens=settings.sampling.max_new_tokens,
            stop_ids=self.stop_ids,
            pad_id=self.tokenizer.pad_token_id,
            read=AnswerReader(self.tokenizer).read,
            synced=self.models.sharded,
        )
        order = [row for chunk in mine for row in chunk]
        return [completion for _, completion in sorted(gather_items(list(zip(order, drawn, strict=True))))]

    def _score(self, completions: Sequence[Completion], iteration: int) -> Tensor:
        """(N, S) raw scores; each completion is scored by one process."""
        mine = list(processes.shard(range(len(completions))))
        scores = self.rewards.scores([completions[row].response for row in mine])
        raw = torch.zeros(len(completions), len(self.rewards.names))
        for row, each in gather_items(list(zip(mine, scores.tolist(), strict=True))):
            raw[row] = torch.tensor(each)
        return raw

    def _cut_shares(self, count: int) -> dict[str, float]:
        """By source, the share of the conversations that were too long for it."""
        counts = gather_items([self.rewards.cut()])
        return {name: sum(each[name] for each in counts) / count for name in counts[0]}

    def _check_finite(self, scores: Tensor, completions: Sequence[Completion], iteration: int) -> None:
        if not scores.isfinite().all():
            row, source = (~scores.isfinite()).nonzero()[0].tolist()
            fault = f"reward of source '{self.rewards.names[source]}' is not finite (NaN or infinity)"
            raise not_finite(fault, iteration, completions[row], self.output)

    @torch.no_grad()
    def _forward_passes(self, completions: Sequence[Completion], iteration: int) -> dict[str, Tensor]:
        """The sampling policy's log-probs and values, and the reference's log-probs, (N, T) each."""
        width = max(len(completion.tokens) for completion in completions)
        sampled = _table([completion.sampled_logprobs for completion in completions], width)
        passes = {
            "sampled_logprobs": sampled,
            "old_logprobs": sampled.clone(),
            "ref_logprobs": torch.zeros_like(sampled),
            "values": _table([completion.sampled_values for completion in completions], width),
        }
        every = range(len(completions))
        mine = self._run_role(completions, every, "reference", "ref_logprobs")
        if self.settings.advantage == "gae" and not self.models.value_on_policy:
            mine += self._run_role(completions, every, "values", "values")
        if not self.models.reuses_sampled_logprobs:
            later = self.batches.later_rows(len(completions), iteration)
            mine += self._run_role(completions, later, "logprobs", "old_logprobs")
        for row, name, result in gather_items(mine):
            passes[name][row, : len(result)] = result
        return passes

    def _run_role(
        self, completions: Sequence[Completion], rows: Sequence[int], role: Role, name: str
    ) -> list[tuple[int, str, Tensor]]:
        """Run this process's share of rows through the models in a role; each row, `name`, and its (T,) result."""
        found = []
        for batch in self.batches.cut(completions, processes.shard(rows), with_gradient=False):
            results = self.models(role, sequences=batch.sequences).result.cpu()
            found += [(row, name, result) for row, result in zip(batch.rows.tolist(), results, strict=True)]
        return found

    def _penalised(self, completions: Sequence[Completion], scores: Tensor) -> Tensor:
        """(N,) scores less the penalties for length and for a missing stop token."""
        cut = torch.tensor([not completion.stopped for completion in completions])
        tokens = torch.tensor([len(completion.tokens) for completion in completions])
        return scores - self.settings.missing_eos_penalty * cut - self.settings.length_penalty * tokens

    def _advantages(self, rewards: Tensor, scores: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.settings
        if settings.advantage == "gae":
            advantages, returns = generalised_advantages(rewards, values, mask, settings.gamma, settings.lam)
            return whiten(advantages, mask), returns
        totals = rewards.sum(dim=1)
        if settings.advantage == "leave_one_out":
            each = leave_one_out_advantages(totals, settings.rollout_batch)
        else:
            each = group_relative_advantages(scores, scores - totals, settings.rollout_batch)
        return each[:, None] * mask, torch.zeros_like(rewards)


def not_finite(fault: str, iteration: int, completion: Completion | None, output: Path) -> NotFinite:
    """The error that stops a run: where it failed, on which prompt if known, what is kept, and the remedy."""
    place = f"at step {iteration + 1}"
    if completion is not None:
        prompt = completion.prompt.prompt
        place += f", prompt '{prompt.id}' ({printable(shortened(prompt.prompt[-1].content))!r})"
    kept = "there is no checkpoint to resume from"
    if newest(output) is not None:
        kept = f"the last checkpoint is kept in {output}, and the same command resumes from it"
    return NotFinite(
        f"ppo: {fault} {place}. The run stopped; {kept}. If the reward is at fault, fix it. Otherwise set a "
        "lower ppo.optimizer.learning_rate, or model.precision fp32; either starts ppo from scratch."
    )


def gather_items(items: list[Any]) -> list[Any]:
    """The items of all processes, in every process."""
    return gather_object(items) if processes.world_size() > 1 else items


def _table(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    """(N, width) rows of numbers, padded with zeros on the right."""
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows])
