"""The optimizer steps of a PPO iteration: clipped updates of policy and value on one rollout.

Losses are sums over tokens, divided by the minibatch's tokens over all processes, so gradient accumulation gives the
gradient of one big batch.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from align.errors import AlignError
from align.rl.batches import Batches, MicroBatch, position_counts
from align.rl.experience import Experience, gather_items, not_finite
from align.rl.losses import Loss, clipped_policy_loss, clipped_value_loss, reference_kl_loss
from align.rl.minibatch_prefixes import MinibatchPrefixes
from align.rl.models import TrainPass
from align.rl.rollout import Completion
from align.rl.settings import PpoBlock
from align.rl.updates import Updates
from align.run import processes

MAX_FIGURES = ("largest_log_ratio", "first_log_ratio")
"""Figures of an optimizer step that are a maximum over its tokens; the others are means."""

MAX_SKIPPED_STEPS = 5
"""Consecutive optimizer steps that may be skipped because their gradient is not finite."""

RATIO_TOLERANCE = 1e-2
"""Largest allowed difference in float32 between sampling's log-probs and the first training pass's; rounding: 1e-4."""


@dataclass
class Learner:
    """Trains the models on each iteration's rollout.

    Args:
        output: the stage's folder, which error messages name.
        demonstrations: what the SFT policy was trained on; needed where `ptx_coef` is above 0.
        skipped: consecutive optimizer steps skipped so far because their gradient was not finite.
    """

    updates: Updates
    settings: PpoBlock
    batches: Batches
    output: Path
    demonstrations: Sequence[Completion]
    skipped: int = 0

    def update(self, experience: Experience) -> dict[str, float]:
        """Train for `epochs` passes over a rollout, or until `kl_to_old_limit`; returns the steps' mean figures.

        Raises:
            NotFinite: a loss is NaN or infinite, or too many consecutive gradients were.
            AlignError: the first minibatch's log-probs are not those that the completions were sampled with.
        """
        options, limit = self.settings.optimizer, self.settings.kl_to_old_limit
        self.updates.learning_rate = options.learning_rate * schedule_factor(
            experience.iteration, self.settings.iterations, options.schedule, options.warmup_ratio
        )
        steps: list[dict[str, float]] = []
        for epoch in range(self.settings.epochs):
            for number, batches in enumerate(self.batches.epoch(experience.completions, experience.iteration, epoch)):
                mixed_in: list[MicroBatch] = []
                if self.settings.ptx_coef:
                    mixed_in = self.batches.draw(self.demonstrations, experience.iteration, epoch, number)
                steps.append(self._optimizer_step(experience, batches, mixed_in, first=not steps))
                if len(steps) == 1:
                    self._check_first_ratio(experience, steps[0])
                if limit is not None and steps[-1]["kl_to_old_k3"] > limit:
                    return _mean_figures(steps)
        return _mean_figures(steps)

    def _imitate(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Add the gradient of ptx_coef times the demonstrations' mean negative log-likelihood per token (PPO-ptx)."""
        if not batches:
            return {}
        tokens = self._token_count(batches)
        total = torch.zeros((), device=self.batches.device)
        for batch in batches:
            with self.updates.accumulate(last=False):
                loss = -self.updates.wrapped("imitate", sequences=batch.sequences).result.sum()
                self.updates.backward(self.settings.ptx_coef * loss * processes.world_size() / tokens)
            total += loss.detach()
        return {"ptx_loss": float(self._all_sum(total) / tokens)}

    def _optimizer_step(
        self,
        experience: Experience,
        batches: Sequence[MicroBatch],
        demonstrations: Sequence[MicroBatch],
        *,
        first: bool,
    ) -> dict[str, float]:
        imitation = self._imitate(demonstrations)
        tokens = self._token_count(batches)
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.batches.device))
        prefixes = MinibatchPrefixes(self.updates, batches)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with self.updates.accumulate(last=last):
                for loss, figures in self._losses(experience, batch, prefixes, first=first):
                    # Gradients are averaged over processes, and the loss is a mean over all processes' tokens.
                    self.updates.backward(loss * processes.world_size() / tokens)
                    for name, value in figures.items():
                        is_max = name in MAX_FIGURES
                        totals[name] = torch.maximum(totals[name], value) if is_max else totals[name] + value
                if last:
                    prefixes.backward()
        if first:
            _exchange_old_logprobs(experience, batches)
        norms = self.updates.step()
        finite = all(norm < float("inf") for norm in norms.values())
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped > MAX_SKIPPED_STEPS:
            fault = f"gradient was not finite {self.skipped} times in a row"
            raise not_finite(fault, experience.iteration, None, self.output)
        maxima = {name: totals.pop(name) for name in list(totals) if name in MAX_FIGURES}
        step = {name: float(self._all_sum(total) / tokens) for name, total in totals.items()}
        step |= {name: float(self.updates.accelerator.gather(value).max()) for name, value in maxima.items()}
        step["padding_share"] = self._padding_share(batches)
        return step | imitation | norms | {"skipped_steps": float(not finite)}

    def _losses(
        self, experience: Experience, batch: MicroBatch, prefixes: MinibatchPrefixes, *, first: bool
    ) -> Iterator[Loss]:
        """Yields a micro-batch's summed losses.

        A separate value model is run only after the policy's loss has been used, so that the activations of just one
        of the two passes are held at a time.
        """
        current: TrainPass = self.updates.wrapped("train", sequences=prefixes.sequences(batch, "policy"))
        self._check_finite(current.logprobs, experience, batch)
        policy = self._policy_loss(experience, batch, current, first=first)
        if current.values is not None:
            value = self._value_loss(experience, batch, current.values)
            policy = Loss(policy.loss + value.loss, policy.figures | value.figures)
        yield policy
        if self.settings.advantage == "gae" and current.values is None:
            values = self.updates.wrapped("values", sequences=prefixes.sequences(batch, "value")).result
            yield self._value_loss(experience, batch, values)

    def _policy_loss(self, experience: Experience, batch: MicroBatch, current: TrainPass, *, first: bool) -> Loss:
        """The first minibatch is trained by the very policy that sampled it, so its own log-probs become the old ones.

        Its ratio is then exactly 1, however differently the two passes round; the difference is reported.
        """
        mask, logprobs = batch.sequences.completion_mask, current.logprobs.detach()
        gap_figures = {}
        if first:
            gap = ((logprobs - self._rows_of(experience.sampled_logprobs, batch)) * mask).abs()
            gap_figures = {"first_log_ratio": gap.max(), "sampling_gap": gap.sum()}
            experience.old_logprobs[batch.rows, : mask.shape[1]] = logprobs.cpu()
        old_logprobs = self._rows_of(experience.old_logprobs, batch)
        advantages = self._rows_of(experience.advantages, batch)
        policy = clipped_policy_loss(current.logprobs, old_logprobs, advantages, mask, self.settings.clip_range)
        loss, figures = policy.loss, policy.figures | {"entropy": current.entropy.detach().sum()} | gap_figures
        if self.settings.kl_estimator != "k1":  # k1 is in the rewards
            ref_logprobs = self._rows_of(experience.ref_logprobs, batch)
            kl = reference_kl_loss(current.logprobs, ref_logprobs, mask, self.settings.kl_estimator)
            loss, figures = loss + experience.kl_coef * kl.loss, figures | kl.figures
        return Loss(loss, figures)

    def _value_loss(self, experience: Experience, batch: MicroBatch, values: Tensor) -> Loss:
        self._check_finite(values, experience, batch)
        settings = self.settings
        old_values, returns = self._rows_of(experience.values, batch), self._rows_of(experience.returns, batch)
        clip_range = settings.value_clip_range if settings.value_clip_range is not None else float("inf")
        value = clipped_value_loss(values, old_values, returns, batch.sequences.completion_mask, clip_range)
        return value._replace(loss=settings.value_coef * value.loss)

    def _rows_of(self, table: Tensor, batch: MicroBatch) -> Tensor:
        """(B, T) the micro-batch's rows of an (N, T') table."""
        return table[batch.rows, : batch.sequences.completion_mask.shape[1]].to(self.batches.device)

    def _check_first_ratio(self, experience: Experience, step: dict[str, float]) -> None:
        if step["largest_log_ratio"] != 0:
            raise AlignError("ppo: the first minibatch's ratio of policies is not 1, though no step was taken yet")
        in_float32 = self.updates.models.compute_dtype == torch.float32
        if in_float32 and step["first_log_ratio"] > RATIO_TOLERANCE:
            raise AlignError(
                f"ppo: log-probs of iteration {experience.iteration + 1}'s first minibatch differ by "
                f"{step['first_log_ratio']:.2g} from those of sampling, so sampling and training do not compute the "
                "same; check whether the model has dropout enabled, or keeps a state between passes"
            )

    def _check_finite(self, numbers: Tensor, experience: Experience, batch: MicroBatch) -> None:
        for row, each in zip(batch.rows.tolist(), numbers, strict=True):
            if not each.isfinite().all():
                fault = "loss is not finite (NaN or infinity)"
                raise not_finite(fault, experience.iteration, experience.completions[row], self.output)

    def _padding_share(self, batches: Sequence[MicroBatch]) -> float:
        """Share of a minibatch's positions that is padding, over all processes."""
        computed, padding = self._all_sum(torch.tensor(position_counts(batches), dtype=torch.float32)).tolist()
        return padding / computed

    def _token_count(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Completion tokens of a minibatch over all processes."""
        return self._all_sum(torch.tensor(float(sum(int(batch.sequences.completion_mask.sum()) for batch in batches))))

    def _all_sum(self, value: Tensor) -> Tensor:
        return self.updates.accelerator.reduce(value.to(self.batches.device), reduction="sum")


def _exchange_old_logprobs(experience: Experience, batches: Sequence[MicroBatch]) -> None:
    """Give every process the old log-probs that each process has just computed for its own rows."""
    mine = [(row, experience.old_logprobs[row]) for batch in batches for row in batch.rows.tolist()]
    for row, logprobs in gather_items(mine):
        experience.old_logprobs[row] = logprobs


def schedule_factor(iteration: int, iterations: int, schedule: str, warmup_ratio: float) -> float:
    """Factor on the learning rate in an iteration: warm-up, then constant, linear or cosine decay to 0."""
    warmup = warmup_ratio * iterations
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    done = (iteration - warmup) / max(iterations - warmup, 1)
    if schedule == "linear":
        return 1 - done
    return 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi)))) if schedule == "cosine" else 1.0


def _mean_figures(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each figure's mean over the steps that report it: the first step reports some that no other does."""
    reported = {name: [step[name] for step in steps if name in step] for name in steps[0]}
    means = {name: sum(values) / len(values) for name, values in reported.items()}
    return means | {"optimizer_steps": float(len(steps))}
