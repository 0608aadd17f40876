"""Proximal policy optimisation of a language model (Schulman 2017; Ziegler 2019; Ouyang 2022), on accelerate.

One iteration: sample completions, score them, recompute log-probs and values under the policy that sampled, penalise
the KL to the reference, estimate advantages, and take `epochs` passes of clipped updates. What differs from common
practice: every process holds the whole rollout, so whitening and normalisation are over all processes; losses are sums
divided by the minibatch's tokens, so gradient accumulation equals one big batch; all randomness derives from the seed,
the iteration and the row, so a resumed run repeats itself, and one split over other processes does up to rounding.
"""

import itertools
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from align import processes
from align.errors import AlignError, InputError, NotFinite
from align.metrics import repetition
from align.records import as_dicts
from align.repro import derive_seed, peak_resident_gb
from align.rl import checkpoint
from align.rl.advantages import (
    explained_variance,
    generalised_advantages,
    group_relative_advantages,
    kl_terms,
    leave_one_out_advantages,
    penalised_rewards,
    whiten,
)
from align.rl.losses import clipped_policy_loss, clipped_value_loss
from align.rl.rewards import Reward, RunningMoments, adapted_kl_coef, standardise
from align.rl.rollout import (
    Completion,
    MicroBatch,
    TokenizedPrompt,
    completion_mask,
    micro_batches,
    minibatch_rows,
    sample_completions,
    schedule,
)
from align.rl.settings import PpoBlock
from align.rl.updates import open_updates
from align.tracking import Tracker

SKIPS_ALLOWED = 5
"""Optimizer steps in a row that may be left out because their gradient is not finite."""

RATIO_TOLERANCE = 1e-4
"""How far the ratio of the first minibatch may be from 1 in float32; both passes are the same computation."""


@dataclass(frozen=True)
class Experience:
    """A rollout with all that the updates need. N completions, T tokens; `scores` and `raw_scores` are (N,).

    `first_epoch` is this process's micro-batches of each minibatch of the first epoch. They were passed through once
    already, for the old log-probs, so that there the ratio to these is exactly 1.
    """

    completions: Sequence[Completion]
    first_epoch: Sequence[Sequence[MicroBatch]]
    mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    raw_scores: Tensor
    scores: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


class PpoTrainer:
    """Trains the policy (and value) of `models` against `reward`.

    Args:
        models: a `PpoModels`, on the right device.
        tokenizer: the policy's.
        prompts: at least one.
        reward: scores completions as text.
        settings: the recipe's `ppo` block.
        score_moments: mean and standard deviation of the reward's scores on its held-out pairs.
        demonstrations: what the SFT policy was trained on; needed where `ptx_coef` is above 0.
        stop_ids: tokens that end a completion.
        output: folder for metrics, rollouts and checkpoints; an interrupted run there is gone on with.
    """

    def __init__(
        self,
        models: Any,
        tokenizer: Any,
        prompts: Sequence[TokenizedPrompt],
        reward: Reward,
        settings: PpoBlock,
        *,
        stop_ids: Sequence[int],
        seed: int,
        output: Path,
        tracker: Tracker,
        score_moments: tuple[float, float] = (0.0, 1.0),
        demonstrations: Sequence[Completion] = (),
        accelerator: Accelerator | None = None,
    ) -> None:
        self.accelerator = accelerator or Accelerator()
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.reward = reward
        self.settings = settings
        self.stop_ids = tuple(stop_ids)
        self.seed = seed
        self.output = output
        self.tracker = tracker
        self.score_moments = score_moments
        self.demonstrations = demonstrations
        self.uses_value = settings.advantage == "gae"
        self.kl_coef = settings.kl_coef
        self.moments = RunningMoments()
        self.iteration = 0
        self.skipped = 0
        self.last_figures: dict[str, float] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.updates = open_updates(self.accelerator, models, settings.optimizer)
        self.models = self.updates.models
        self.device = self.accelerator.device

    def train(self) -> dict[str, float]:
        """Run the iterations that remain; the last iteration's figures."""
        self._resume()
        total = self.settings.iterations
        progress = tqdm(total=total, initial=self.iteration, desc="ppo", disable=not processes.is_first())
        with progress, (self.output / "rollouts.jsonl").open("a", encoding="utf-8") as rollouts:
            while self.iteration < total:
                figures = self.last_figures = self._iterate(rollouts)
                progress.update()
                progress.set_postfix({name: f"{figures[name]:.3g}" for name in ("score", "kl_to_reference_k1")})
                if self.iteration % self.settings.checkpoint_every == 0 or self.iteration == total:
                    self._save()
        return self.last_figures

    def policy_state(self) -> dict[str, Tensor]:
        """The policy's whole state on the first process, gathered from all where it is sharded."""
        return self.updates.whole_state("policy.")

    def _iterate(self, rollouts: Any) -> dict[str, float]:
        self.seconds.clear()
        experience = self.collect()
        updates = self.update(experience) | {"kl_coef": self.kl_coef}
        if self.settings.kl_target is not None:
            kl = _per_completion(kl_terms(experience.old_logprobs, experience.ref_logprobs)["k1"], experience.mask)
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, float(kl.mean()), self.settings.kl_target, self.settings.rows, self.settings.kl_horizon
            )
        figures = self._figures(experience, updates)
        self.iteration += 1
        if processes.is_first():
            rollouts.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows(experience))
            rollouts.flush()
        self.tracker.log(self.iteration, figures, timings=self._timings(int(experience.mask.sum())))
        return figures

    def collect(self) -> Experience:
        """Sample, score and prepare one iteration's rollout."""
        with self._clock("generate"):
            completions = self._sample()
        with self._clock("reward"):
            raw_scores = self._score(completions)
        with self._clock("forward"):
            first_epoch = list(self._epoch(completions, 0))
            passes = self._passes(completions, first_epoch)
        scores = self._shaped_scores(completions, raw_scores)
        mask = passes["mask"]
        kl = kl_terms(passes["old_logprobs"], passes["ref_logprobs"])[self.settings.kl_estimator]
        rewards = penalised_rewards(scores, kl, mask, self.kl_coef)
        advantages, returns = self._advantages(rewards, passes["values"], mask)
        return Experience(
            completions=completions,
            first_epoch=first_epoch,
            raw_scores=raw_scores,
            scores=scores,
            rewards=rewards,
            advantages=advantages,
            returns=returns,
            **passes,
        )

    def _sample(self) -> list[Completion]:
        """All processes' completions of this iteration, in the schedule's order."""
        settings = self.settings
        scheduled = schedule(self.prompts, settings.rollout_batch, self.iteration, self.seed)
        rows = [
            (prompt, derive_seed(self.seed, "ppo", self.iteration, position, sibling))
            for position, prompt in enumerate(scheduled)
            for sibling in range(settings.completions_per_prompt)
        ]
        size = min(settings.sampling.batch_size, -(-len(rows) // processes.world_size()))
        chunks = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        mine = processes.share(chunks)
        turns = -(-len(chunks) // processes.world_size())
        drawn = sample_completions(
            self.models,
            [[rows[row] for row in chunk] for chunk in mine] + [[]] * (turns - len(mine)),
            max_new_tokens=settings.sampling.max_new_tokens,
            stop_ids=self.stop_ids,
            pad_id=self.tokenizer.pad_token_id,
            to_text=lambda tokens: self.tokenizer.decode(tokens, skip_special_tokens=True),
            synced=self.updates.sharded,
        )
        order = [row for chunk in mine for row in chunk]
        return [completion for _, completion in sorted(_gathered(list(zip(order, drawn, strict=True))))]

    def _score(self, completions: Sequence[Completion]) -> Tensor:
        """(N,) raw scores, each made by one process."""
        mine = list(processes.share(range(len(completions))))
        scores = self.reward(
            [completions[row].prompt.prompt.prompt for row in mine], [completions[row].text for row in mine]
        )
        raw = torch.zeros(len(completions))
        for row, score in _gathered(list(zip(mine, scores.tolist(), strict=True))):
            raw[row] = score
        if not raw.isfinite().all():
            row = int((~raw.isfinite()).nonzero()[0])
            raise self._not_finite(f"reward is {raw[row].item()}", completions[row])
        return raw

    def _passes(
        self, completions: Sequence[Completion], minibatches: Sequence[Sequence[MicroBatch]]
    ) -> dict[str, Tensor]:
        """Log-probs, entropy and values of the policy that sampled, and the reference's log-probs: (N, T) each."""
        width = max(len(completion.tokens) for completion in completions)
        names = ("old_logprobs", "ref_logprobs", "entropy", "values")
        mine: list[tuple[int, dict[str, Tensor]]] = []
        for batch in itertools.chain.from_iterable(minibatches):
            with torch.no_grad():
                now = self.models("train", sequences=batch.sequences)
                reference = self.models("reference", sequences=batch.sequences).result
            results = dict(zip(names, (now.logprobs, reference, now.entropy, now.values), strict=True))
            rows = {name: result.float().cpu() for name, result in results.items()}
            mine += [(row, {name: rows[name][i] for name in names}) for i, row in enumerate(batch.rows.tolist())]
        passes = {name: torch.zeros(len(completions), width) for name in names}
        for row, results in _gathered(mine):
            for name, result in results.items():
                passes[name][row, : len(result)] = result
        return {**passes, "mask": completion_mask(completions, width)}

    def _shaped_scores(self, completions: Sequence[Completion], raw_scores: Tensor) -> Tensor:
        """(N,) standardised and clipped scores, less the penalty for a completion that the limit cut."""
        score = self.settings.score
        mean, std = 0.0, 1.0
        if score.normalise == "running":
            self.moments.update(raw_scores)
            mean, std = self.moments.mean, self.moments.std
        elif score.normalise == "held_out":
            mean, std = self.score_moments
        cut = torch.tensor([not completion.stopped for completion in completions])
        return standardise(raw_scores, mean, std, score.clip) - self.settings.missing_eos_penalty * cut

    def _advantages(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.settings
        if self.uses_value:
            advantages, returns = generalised_advantages(rewards, values, mask, settings.gamma, settings.lam)
            return whiten(advantages, mask), returns
        estimate = leave_one_out_advantages if settings.advantage == "leave_one_out" else group_relative_advantages
        each = estimate(rewards.sum(dim=1), settings.rollout_batch)
        return each[:, None] * mask, torch.zeros_like(rewards)

    def update(self, experience: Experience) -> dict[str, float]:
        """Take `epochs` passes of optimizer steps over a rollout; their mean figures."""
        self._set_learning_rate()
        steps: list[dict[str, float]] = []
        with self._clock("train"):
            for epoch in range(self.settings.epochs):
                minibatches = self._epoch(experience.completions, epoch) if epoch else experience.first_epoch
                for number, batches in enumerate(minibatches):
                    imitated = self._demonstration_batches(epoch, number)
                    steps.append(self._optimizer_step(experience, batches, imitated))
                    if len(steps) == 1:
                        self._check_first_ratio(steps[0])
                    limit = self.settings.kl_to_old_limit
                    if limit is not None and steps[-1]["kl_to_old_k3"] > limit:
                        return _means(steps)
        return _means(steps)

    def _epoch(self, completions: Sequence[Completion], epoch: int) -> Iterator[Sequence[MicroBatch]]:
        """This process's micro-batches of each minibatch of an epoch; reshuffled each epoch."""
        options = self.settings.optimizer
        seed = derive_seed(self.seed, "minibatches", self.iteration, epoch)
        ranks = processes.rank(), processes.world_size()
        for rows in minibatch_rows(len(completions), options.batch_size, seed, *ranks):
            yield micro_batches(completions, rows, options.micro_batch_size, self.tokenizer.pad_token_id, self.device)

    def _demonstration_batches(self, epoch: int, number: int) -> list[MicroBatch]:
        """This process's micro-batches of the demonstrations that an optimizer step mixes in (PPO-ptx)."""
        if not self.settings.ptx_coef:
            return []
        options = self.settings.optimizer
        seed = derive_seed(self.seed, "demonstrations", self.iteration, epoch, number)
        drawn = torch.randint(
            len(self.demonstrations), (options.batch_size,), generator=torch.Generator().manual_seed(seed)
        )
        rows = list(processes.share(drawn.tolist()))
        return micro_batches(
            self.demonstrations, rows, options.micro_batch_size, self.tokenizer.pad_token_id, self.device
        )

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
        self, experience: Experience, batches: Sequence[MicroBatch], imitated: Sequence[MicroBatch]
    ) -> dict[str, float]:
        # First, because DDP adds up the processes' gradients in the last pass, which must use every trained parameter.
        imitation = self._imitate(imitated)
        tokens = self._tokens(batches)
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        for index, batch in enumerate(batches):
            with self.updates.accumulate(last=index == len(batches) - 1):
                loss, sums = self._losses(experience, batch)
                # Gradients are averaged over processes; the loss is the whole minibatch's mean a token.
                self.updates.backward(loss * processes.world_size() / tokens)
            for name, value in sums.items():
                totals[name] = (
                    torch.maximum(totals[name], value) if name == "largest_log_ratio" else totals[name] + value
                )
        norm = self.updates.step()
        finite = norm < float("inf")
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped > SKIPS_ALLOWED:
            raise self._not_finite(f"gradient was not finite {self.skipped} times in a row", experience.completions[0])
        largest = totals.pop("largest_log_ratio")
        figures = {name: float(self._all_sum(total) / tokens) for name, total in totals.items()}
        figures["largest_log_ratio"] = float(self.accelerator.gather(largest).max())
        return figures | imitation | {"gradient_norm": norm, "skipped_steps": float(not finite)}

    def _losses(self, experience: Experience, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss of a micro-batch, and sums of its figures."""
        settings = self.settings
        now = self.updates.wrapped("train", sequences=batch.sequences)
        mask = batch.sequences.completion_mask
        for row, logprobs, values in zip(batch.rows.tolist(), now.logprobs, now.values, strict=True):
            if not (logprobs.isfinite().all() and values.isfinite().all()):
                raise self._not_finite("loss is not finite (NaN or infinity)", experience.completions[row])
        old = {
            name: getattr(experience, name)[batch.rows, : mask.shape[1]].to(self.device)
            for name in ("old_logprobs", "advantages", "values", "returns")
        }
        policy = clipped_policy_loss(now.logprobs, old["old_logprobs"], old["advantages"], mask, settings.clip_range)
        loss = policy.loss
        sums = {
            "policy_loss": policy.loss.detach(),
            "ratio": policy.ratio,
            "clip_fraction": policy.clipped.float(),
            "kl_to_old_k1": policy.kl_to_old_k1,
            "kl_to_old_k3": policy.kl_to_old_k3,
            "largest_log_ratio": policy.largest_log_ratio,
        }
        if self.uses_value:
            clip_range = settings.value_clip_range if settings.value_clip_range is not None else float("inf")
            value = clipped_value_loss(now.values, old["values"], old["returns"], mask, clip_range)
            loss = loss + settings.value_coef * value.loss
            sums |= {"value_loss": value.loss.detach(), "value_clip_fraction": value.clipped.float()}
        return loss, sums

    def _check_first_ratio(self, step: dict[str, float]) -> None:
        """The first minibatch is trained by the policy that sampled it, by the same pass: its ratio is 1."""
        self.first_log_ratio = step["largest_log_ratio"]
        if self.models.compute_dtype == torch.float32 and self.first_log_ratio > RATIO_TOLERANCE:
            raise AlignError(
                f"ppo: the ratio of iteration {self.iteration + 1}'s first minibatch differs from 1 by "
                f"{self.first_log_ratio:.2g}; the training pass and the scoring pass are not the same computation "
                "(is dropout on, or has the model a state of its own?)"
            )

    def _set_learning_rate(self) -> None:
        options = self.settings.optimizer
        rate = options.learning_rate * schedule_factor(
            self.iteration, self.settings.iterations, options.schedule, options.warmup_ratio
        )
        self.updates.learning_rate = rate

    def _figures(self, experience: Experience, updates: dict[str, float]) -> dict[str, float]:
        mask, completions = experience.mask, experience.completions
        terms = kl_terms(experience.old_logprobs, experience.ref_logprobs)
        tokens = int(mask.sum())
        texts = [completion.text for completion in completions]
        sampled = torch.tensor([value for completion in completions for value in completion.sampled_logprobs])
        figures = {
            "score": float(experience.raw_scores.mean()),
            "score_std": float(experience.raw_scores.std(correction=0)),
            "reward": float(experience.rewards.sum(dim=1).mean()),
            **{f"kl_to_reference_{name}": float(_per_completion(term, mask).mean()) for name, term in terms.items()},
            "entropy": float((experience.entropy * mask).sum() / tokens),
            "explained_variance": explained_variance(experience.values, experience.returns, mask),
            "advantage_std": float(experience.advantages[mask].std(correction=0)),
            "completion_length": tokens / len(completions),
            "stopped_share": sum(completion.stopped for completion in completions) / len(completions),
            "repetition": sum(map(repetition, texts)) / len(texts),
            "sampling_gap": float((sampled - experience.old_logprobs[mask]).abs().mean()),
            "first_log_ratio": self.first_log_ratio,
            "learning_rate": self.updates.learning_rate,
            "padding_share": self._padding_share(experience.first_epoch),
        }
        return figures | updates

    def _timings(self, tokens: int) -> dict[str, float]:
        """Seconds of each phase, completion tokens a second over all phases, and the most memory held so far."""
        seconds = {f"seconds_{phase}": value for phase, value in self.seconds.items()}
        rate = tokens / max(sum(self.seconds.values()), 1e-9)
        return seconds | {"tokens_per_second": rate, "peak_memory_gb": self._peak_memory()}

    def _padding_share(self, minibatches: Sequence[Sequence[MicroBatch]]) -> float:
        """Share of the minibatches' positions that is padding, over all processes."""
        batches = [batch for minibatch in minibatches for batch in minibatch]
        padding = self._all_sum(torch.tensor(float(sum(batch.padding for batch in batches))))
        return float(padding / self._all_sum(torch.tensor(float(sum(batch.positions for batch in batches)))))

    def _peak_memory(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return peak_resident_gb()

    def _rows(self, experience: Experience) -> Iterator[dict[str, Any]]:
        kl = _per_completion(kl_terms(experience.old_logprobs, experience.ref_logprobs)["k1"], experience.mask)
        for row, completion in enumerate(experience.completions):
            yield {
                "iteration": self.iteration,
                "prompt_id": completion.prompt.prompt.id,
                "prompt": as_dicts(completion.prompt.prompt.prompt),
                "completion": completion.text,
                "score": float(experience.raw_scores[row]),
                "kl_to_reference_k1": float(kl[row]),
                "tokens": len(completion.tokens),
                "finish_reason": "stop" if completion.stopped else "length",
            }

    def _not_finite(self, fault: str, completion: Completion) -> NotFinite:
        return NotFinite(
            f"ppo: {fault} at step {self.iteration + 1}, prompt '{completion.prompt.prompt.id}'. The run stopped; the "
            f"last checkpoint is kept in {self.output}. If the reward is at fault, mend it and run the same command, "
            "which goes on from there; a lower ppo.optimizer.learning_rate or model.precision fp32 starts ppo anew."
        )

    def _save(self) -> None:
        numbers = {
            "kl_coef": self.kl_coef,
            "moments": self.moments.__dict__,
            "skipped": self.skipped,
            "kind": self.updates.kind,
            "figures": self.last_figures,
        }
        checkpoint.save(self.output, self.iteration, numbers, self.updates.write)

    def _resume(self) -> None:
        saved = checkpoint.newest(self.output)
        if saved is not None:
            folder, numbers = saved
            if numbers["kind"] != self.updates.kind:
                raise InputError(
                    f"{folder}: this checkpoint's state is of the kind '{numbers['kind']}', and the run's is "
                    f"'{self.updates.kind}'; launch it as before, or remove {folder.parent} to start ppo anew"
                )
            self.updates.read(folder)
            self.iteration = numbers["iteration"]
            self.kl_coef = numbers["kl_coef"]
            self.moments = RunningMoments(**numbers["moments"])
            self.skipped = numbers["skipped"]
            self.last_figures = numbers["figures"]
        self.tracker.truncate(self.iteration)
        if processes.is_first():
            _truncate_rollouts(self.output / "rollouts.jsonl", self.iteration)
        processes.barrier()

    def _all_sum(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value.to(self.device), reduction="sum")

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


def schedule_factor(iteration: int, iterations: int, schedule: str, warmup_ratio: float) -> float:
    """What the learning rate is multiplied by in an iteration: warm-up, then constant, linear or cosine decay to 0."""
    warmup = warmup_ratio * iterations
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    done = (iteration - warmup) / max(iterations - warmup, 1)
    if schedule == "linear":
        return 1 - done
    return 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi)))) if schedule == "cosine" else 1.0


def _per_completion(term: Tensor, mask: Tensor) -> Tensor:
    """(N,) sum over each completion's tokens."""
    return (term * mask).sum(dim=1)


def _means(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]} | {
        "optimizer_steps": float(len(steps))
    }


def _gathered(items: list[Any]) -> list[Any]:
    return gather_object(items) if processes.world_size() > 1 else items


def _truncate_rollouts(path: Path, iteration: int) -> None:
    """Drop rows of iterations after the checkpoint: they are about to be made again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["iteration"] <= iteration:
            kept.append(line)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
