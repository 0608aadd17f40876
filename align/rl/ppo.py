"""Proximal policy optimisation of a language model (Schulman 2017; Ziegler 2019; Ouyang 2022), on accelerate.

One iteration: sample completions, score them, penalise the KL to the reference, estimate advantages, and take `epochs`
passes of clipped updates. What differs from common practice: log-probs and values of the policy that sampled are kept
from sampling where all passes compute in float32, and recomputed where rounding would part them; every process holds
the whole rollout, so whitening and normalisation are over all processes; losses are sums divided by the minibatch's
tokens, so gradient accumulation equals one big batch; all randomness derives from the seed, the iteration and the row,
so a resumed run repeats itself, and one split over other processes does up to rounding.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from align.errors import AlignError, InputError, NotFinite
from align.rl import checkpoint
from align.rl.batches import Batches, MicroBatch, positions
from align.rl.early_stop import Ending
from align.rl.experience import Collector, Experience, gathered, not_finite
from align.rl.losses import clipped_policy_loss, clipped_value_loss
from align.rl.minibatch_prefixes import MinibatchPrefixes
from align.rl.models import TrainPass
from align.rl.monitoring import Watch
from align.rl.phase_times import Clock
from align.rl.rewards import Rewards, adapted_kl_coef
from align.rl.rollout import Completion, TokenizedPrompt
from align.rl.rollout_figures import rollout_figures, rollout_rows
from align.rl.settings import PpoBlock
from align.rl.updates import open_updates
from align.run import processes
from align.run.reproducibility import peak_resident_gb
from align.run.tracking import Tracker, truncate_rows

ROLLOUTS = "rollouts.jsonl"
LARGEST = ("largest_log_ratio", "first_log_ratio")
"""Figures of an optimizer step that are the largest of its tokens; the others are means."""

SKIPS_ALLOWED = 5
"""Optimizer steps in a row that may be left out because their gradient is not finite."""

RATIO_TOLERANCE = 1e-2
"""How far a log-prob of the first minibatch's training pass may be from sampling's in float32; rounding gives 1e-4."""


class PpoTrainer:
    """Trains the policy (and value) of `models` against `rewards`.

    Args:
        models: a `PpoModels`, on the right device.
        tokenizer: the policy's.
        prompts: at least one.
        rewards: the sources that score completions as text.
        settings: the recipe's `ppo` block.
        demonstrations: what the SFT policy was trained on; needed where `ptx_coef` is above 0.
        provenance: the entry that the rows of rollouts name.
        stop_ids: tokens that end a completion.
        output: folder for metrics, rollouts and checkpoints; an interrupted run there is gone on with.
    """

    def __init__(
        self,
        models: Any,
        tokenizer: Any,
        prompts: Sequence[TokenizedPrompt],
        rewards: Rewards,
        settings: PpoBlock,
        *,
        stop_ids: Sequence[int],
        seed: int,
        output: Path,
        tracker: Tracker,
        demonstrations: Sequence[Completion] = (),
        provenance: str = "",
        accelerator: Accelerator | None = None,
    ) -> None:
        self.accelerator = accelerator or Accelerator()
        self.device = self.accelerator.device
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.rewards = rewards
        self.settings = settings
        self.output = output
        self.tracker = tracker
        self.watch = Watch(settings, rewards.names[rewards.trained :], output, tracker)
        self.demonstrations = demonstrations
        self.provenance = provenance
        self.kl_coef = settings.kl_coef
        self.iteration = 0
        self.skipped = 0
        self.last_figures: dict[str, float] = {}
        self.ending: Ending | None = None
        self.clock = Clock()
        self.updates = open_updates(self.accelerator, models, settings.optimizer)
        self.models = self.updates.models
        self.models.sharded = self.updates.sharded
        self.batches = Batches(
            settings.optimizer, seed, tokenizer.pad_token_id, self.device, share=self.models.shares_prefixes
        )
        self.collector = Collector(
            models=self.models,
            tokenizer=tokenizer,
            prompts=prompts,
            rewards=rewards,
            settings=settings,
            batches=self.batches,
            clock=self.clock,
            output=output,
            stop_ids=tuple(stop_ids),
            seed=seed,
        )

    def train(self) -> dict[str, float]:
        """Run the iterations that remain, or fewer by the recipe's rule; the figures of the last, or of the best.

        `ending` says afterwards how the run ended, and whose policy this is.
        """
        self._resume()
        total = self.settings.iterations
        progress = tqdm(total=total, initial=self.iteration, desc="ppo", disable=not processes.is_first())
        with progress, (self.output / ROLLOUTS).open("a", encoding="utf-8") as rollouts:
            while self.ending is None:
                figures = self.last_figures = self._iterate(rollouts)
                progress.update()
                progress.set_postfix({name: f"{figures[name]:.3g}" for name in ("score", "kl_to_reference_k1")})
                if self.iteration % self.settings.checkpoint_every == 0 or self.ending is not None:
                    self._save()
        if self.ending.published != self.iteration:
            self._restore(*checkpoint.at(self.output, self.ending.published))
        return self.last_figures

    def policy_state(self) -> dict[str, Tensor]:
        """The policy's whole state on the first process, gathered from all where it is sharded."""
        return self.updates.whole_state("policy.")

    def _iterate(self, rollouts: Any) -> dict[str, float]:
        self.clock.reset()
        experience = self.collector.collect(self.iteration, self.kl_coef)
        figures = rollout_figures(experience, self.rewards, with_values=self.settings.advantage == "gae")
        figures |= {"kl_coef": self.kl_coef, **self.update(experience)}
        figures["learning_rate"] = self.updates.learning_rate
        self._adapt_kl_coef(experience)
        self.iteration += 1
        observed = self.watch.observe(self.iteration, figures)
        figures |= observed.figures
        self.ending = observed.ending
        timings = self.clock.timings(int(experience.mask.sum()))
        self.tracker.log(self.iteration, figures, timings=timings | {"peak_memory_gb": self._peak_memory()})
        if processes.is_first():
            rows = list(rollout_rows(experience, self.rewards, self.iteration, self.provenance))
            rollouts.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            rollouts.flush()
            self.watch.show_samples(self.iteration, rows)
        return figures

    def _adapt_kl_coef(self, experience: Experience) -> None:
        settings = self.settings
        if settings.kl_target is not None:
            kl = float(experience.kl["k1"].mean())
            self.kl_coef = adapted_kl_coef(self.kl_coef, kl, settings.kl_target, settings.rows, settings.kl_horizon)

    def update(self, experience: Experience) -> dict[str, float]:
        """Take `epochs` passes of optimizer steps over a rollout; their mean figures."""
        self._set_learning_rate()
        steps: list[dict[str, float]] = []
        with self.clock.phase("train"):
            for epoch in range(self.settings.epochs):
                for number, batches in enumerate(self.batches.epoch(experience.completions, self.iteration, epoch)):
                    imitated = self._demonstration_batches(epoch, number)
                    steps.append(self._optimizer_step(experience, batches, imitated, first=not steps))
                    if len(steps) == 1:
                        self._check_first_ratio(steps[0])
                    limit = self.settings.kl_to_old_limit
                    if limit is not None and steps[-1]["kl_to_old_k3"] > limit:
                        return _means(steps)
        return _means(steps)

    def _demonstration_batches(self, epoch: int, number: int) -> list[MicroBatch]:
        """This process's micro-batches of the demonstrations that an optimizer step mixes in (PPO-ptx)."""
        if not self.settings.ptx_coef:
            return []
        return self.batches.drawn(self.demonstrations, self.iteration, epoch, number)

    def _imitate(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Add the gradient of ptx_coef times the demonstrations' mean negative log-likelihood a token."""
        if not batches:
            return {}
        tokens = self._tokens(batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with self.updates.accumulate(last=False):
                loss = -self.updates.wrapped("imitate", sequences=batch.sequences).result.sum()
                self.updates.backward(self.settings.ptx_coef * loss * processes.world_size() / tokens)
            total += loss.detach()
        return {"ptx_loss": float(self._all_sum(total) / tokens)}

    def _tokens(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Completion tokens of a minibatch over all processes."""
        return self._all_sum(torch.tensor(float(sum(int(batch.sequences.completion_mask.sum()) for batch in batches))))

    def _optimizer_step(
        self, experience: Experience, batches: Sequence[MicroBatch], imitated: Sequence[MicroBatch], *, first: bool
    ) -> dict[str, float]:
        imitation = self._imitate(imitated)
        tokens = self._tokens(batches)
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        openings = MinibatchPrefixes(self.updates, batches)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with self.updates.accumulate(last=last):
                for loss, sums in self._losses(experience, batch, openings, first=first):
                    # Gradients are averaged over processes; the loss is the whole minibatch's mean a token.
                    self.updates.backward(loss * processes.world_size() / tokens)
                    for name, value in sums.items():
                        totals[name] = torch.maximum(totals[name], value) if name in LARGEST else totals[name] + value
                if last:
                    openings.backward()
        if first:
            _share_old_logprobs(experience, batches)
        norm = self.updates.step()
        finite = norm < float("inf")
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped > SKIPS_ALLOWED:
            raise self._not_finite(f"gradient was not finite {self.skipped} times in a row")
        largest = {name: totals.pop(name) for name in list(totals) if name in LARGEST}
        figures = {name: float(self._all_sum(total) / tokens) for name, total in totals.items()}
        figures |= {name: float(self.accelerator.gather(value).max()) for name, value in largest.items()}
        figures["padding_share"] = self._padding_share(batches)
        return figures | imitation | {"gradient_norm": norm, "skipped_steps": float(not finite)}

    def _losses(
        self, experience: Experience, batch: MicroBatch, openings: MinibatchPrefixes, *, first: bool
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """A micro-batch's summed losses, each with sums of its figures.

        A value model of its own has a pass of its own, so that the activations of two passes are never held at once.
        """
        now: TrainPass = self.updates.wrapped("train", sequences=openings.before(batch, "policy"))
        self._check_finite(now.logprobs, experience, batch)
        loss, sums = self._policy_loss(experience, batch, now, first=first)
        if now.values is not None:
            value_loss, value_sums = self._value_loss(experience, batch, now.values)
            loss, sums = loss + value_loss, sums | value_sums
        yield loss, sums
        if self.settings.advantage == "gae" and now.values is None:
            values = self.updates.wrapped("values", sequences=openings.before(batch, "value")).result
            yield self._value_loss(experience, batch, values)

    def _policy_loss(
        self, experience: Experience, batch: MicroBatch, now: TrainPass, *, first: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The first minibatch's own log-probs take the place of sampling's, which are the same policy's.

        Its ratio is then exactly 1, whatever rounding there is between the two kinds of pass; how far apart they were
        is a figure.
        """
        mask, logprobs = batch.sequences.completion_mask, now.logprobs.detach()
        apart = {}
        if first:
            gap = ((logprobs - self._of(experience.sampled_logprobs, batch)) * mask).abs()
            apart = {"first_log_ratio": gap.max(), "sampling_gap": gap.sum()}
            experience.old_logprobs[batch.rows, : mask.shape[1]] = logprobs.cpu()
        old_logprobs, advantages = self._of(experience.old_logprobs, batch), self._of(experience.advantages, batch)
        policy = clipped_policy_loss(now.logprobs, old_logprobs, advantages, mask, self.settings.clip_range)
        sums = {
            "policy_loss": policy.loss.detach(),
            "ratio": policy.ratio,
            "clip_fraction": policy.clipped.float(),
            "kl_to_old_k1": policy.kl_to_old_k1,
            "kl_to_old_k3": policy.kl_to_old_k3,
            "largest_log_ratio": policy.largest_log_ratio,
            "entropy": now.entropy.detach().sum(),
        }
        return policy.loss, sums | apart

    def _value_loss(
        self, experience: Experience, batch: MicroBatch, values: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._check_finite(values, experience, batch)
        settings = self.settings
        old_values, returns = self._of(experience.values, batch), self._of(experience.returns, batch)
        clip_range = settings.value_clip_range if settings.value_clip_range is not None else float("inf")
        value = clipped_value_loss(values, old_values, returns, batch.sequences.completion_mask, clip_range)
        sums = {"value_loss": value.loss.detach(), "value_clip_fraction": value.clipped.float()}
        return settings.value_coef * value.loss, sums

    def _check_finite(self, numbers: Tensor, experience: Experience, batch: MicroBatch) -> None:
        for row, each in zip(batch.rows.tolist(), numbers, strict=True):
            if not each.isfinite().all():
                raise self._not_finite("loss is not finite (NaN or infinity)", experience.completions[row])

    def _of(self, table: Tensor, batch: MicroBatch) -> Tensor:
        """(B, T) the micro-batch's part of an (N, T') table."""
        return table[batch.rows, : batch.sequences.completion_mask.shape[1]].to(self.device)

    def _check_first_ratio(self, step: dict[str, float]) -> None:
        """The first minibatch is trained by the policy that sampled it."""
        if step["largest_log_ratio"] != 0:
            raise AlignError("ppo: the first minibatch's ratio of policies is not 1, though no step was taken yet")
        if self.models.compute_dtype == torch.float32 and step["first_log_ratio"] > RATIO_TOLERANCE:
            raise AlignError(
                f"ppo: log-probs of iteration {self.iteration + 1}'s first minibatch differ by "
                f"{step['first_log_ratio']:.2g} from those of sampling; the two passes are not the same computation "
                "(is dropout on, or has the model a state of its own?)"
            )

    def _set_learning_rate(self) -> None:
        options = self.settings.optimizer
        rate = options.learning_rate * schedule_factor(
            self.iteration, self.settings.iterations, options.schedule, options.warmup_ratio
        )
        self.updates.learning_rate = rate

    def _padding_share(self, batches: Sequence[MicroBatch]) -> float:
        """Share of a minibatch's positions that is padding, over all processes."""
        computed, padding = self._all_sum(torch.tensor(positions(batches), dtype=torch.float32)).tolist()
        return padding / computed

    def _peak_memory(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return peak_resident_gb()

    def _not_finite(self, fault: str, completion: Completion | None = None) -> NotFinite:
        return not_finite(fault, self.iteration, completion, self.output)

    def _save(self) -> None:
        numbers = {
            "kl_coef": self.kl_coef,
            "rewards": self.rewards.state(),
            "skipped": self.skipped,
            "kind": self.updates.kind,
            "figures": self.last_figures,
        }
        checkpoint.save(self.output, self.iteration, numbers, self.updates.write, self.watch.worth_keeping)

    def _resume(self) -> None:
        saved = checkpoint.newest(self.output)
        if saved is not None:
            self._restore(*saved)
        self.tracker.truncate(self.iteration)
        if processes.is_first():
            truncate_rows(self.output / ROLLOUTS, "iteration", self.iteration)
        self.ending = self.watch.resume(self.iteration)
        processes.barrier()

    def _restore(self, folder: Path, numbers: dict[str, Any]) -> None:
        """Be where a checkpoint was saved."""
        if numbers["kind"] != self.updates.kind:
            raise InputError(
                f"{folder}: this checkpoint's state is of the kind '{numbers['kind']}', and the run's is "
                f"'{self.updates.kind}'; launch it as before, or remove {folder.parent} to start ppo anew"
            )
        self.updates.read(folder)
        self.iteration = numbers["iteration"]
        self.kl_coef = numbers["kl_coef"]
        self.rewards.load_state(numbers["rewards"])
        self.skipped = numbers["skipped"]
        self.last_figures = numbers["figures"]

    def _all_sum(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value.to(self.device), reduction="sum")


def _share_old_logprobs(experience: Experience, batches: Sequence[MicroBatch]) -> None:
    """Let every process have the old log-probs of the rows that one of them has met."""
    mine = [(row, experience.old_logprobs[row]) for batch in batches for row in batch.rows.tolist()]
    for row, logprobs in gathered(mine):
        experience.old_logprobs[row] = logprobs


def schedule_factor(iteration: int, iterations: int, schedule: str, warmup_ratio: float) -> float:
    """What the learning rate is multiplied by in an iteration: warm-up, then constant, linear or cosine decay to 0."""
    warmup = warmup_ratio * iterations
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    done = (iteration - warmup) / max(iterations - warmup, 1)
    if schedule == "linear":
        return 1 - done
    return 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi)))) if schedule == "cosine" else 1.0


def _means(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the steps that have a figure: those of the first minibatch are in the first step alone."""
    having = {name: [step[name] for step in steps if name in step] for name in steps[0]}
    return {name: sum(values) / len(values) for name, values in having.items()} | {"optimizer_steps": float(len(steps))}
