"""Proximal policy optimisation of a language model (Schulman 2017; Ziegler 2019; Ouyang 2022), on accelerate.

One iteration samples completions, scores them, penalises the KL to the reference, estimates advantages (`experience`),
and takes `epochs` passes of clipped updates (`learner`). This differs from common practice:

- Log-probs and values are kept from sampling where all passes compute in float32, and recomputed by a training pass
  where the two kinds of pass would round differently.
- Every process holds the whole rollout, so whitening and normalisation are over all processes.
- All randomness derives from the seed, the iteration and the row. A resumed run gives the same bits, and a run on
  another number of processes gives the same up to rounding.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from align.errors import InputError
from align.rl import checkpoint
from align.rl.batches import Batches
from align.rl.early_stop import Ending
from align.rl.experience import Collector, Experience
from align.rl.gpu_passes import prepare_gpu_passes
from align.rl.learner import Learner
from align.rl.models import PpoModels
from align.rl.monitoring import Watch
from align.rl.phase_times import PhaseTimer
from align.rl.rewards import Rewards, adapted_kl_coef
from align.rl.rollout import Completion, TokenizedPrompt
from align.rl.rollout_figures import rollout_figures, rollout_rows
from align.rl.settings import PpoBlock
from align.rl.updates import open_updates
from align.run import processes
from align.run.reproducibility import peak_resident_gb
from align.run.tracking import Tracker, truncate_rows

ROLLOUTS = "rollouts.jsonl"


class PpoTrainer:
    """Trains the policy (and value) of `models` against `rewards`.

    Args:
        models: on the accelerator's device, unless it shards them.
        tokenizer: the policy's.
        prompts: at least one.
        rewards: the sources that score completions as text.
        settings: the recipe's `ppo` block.
        stop_ids: tokens that end a completion.
        output: folder for metrics, rollouts and checkpoints; training resumes from the newest checkpoint there.
        demonstrations: what the SFT policy was trained on; needed where `ptx_coef` is above 0.
        provenance: id of the provenance entry that each row of the rollouts names.
    """

    def __init__(
        self,
        models: PpoModels,
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
        accelerator = accelerator or Accelerator()
        self.device = accelerator.device
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.rewards = rewards
        self.settings = settings
        self.output = output
        self.tracker = tracker
        self.watch = Watch(settings, rewards.names[rewards.trained :], output, tracker)
        self.provenance = provenance
        self.kl_coef = settings.kl_coef
        self.iteration = 0
        self.last_figures: dict[str, float] = {}
        self.ending: Ending | None = None
        self.timer = PhaseTimer()
        self.updates = open_updates(accelerator, models, settings.optimizer)
        self.models = self.updates.models
        self.models.sharded = self.updates.sharded
        longest = max(len(prompt.ids) for prompt in prompts) + settings.sampling.max_new_tokens
        prepare_gpu_passes(self.models, settings.optimizer.micro_batch_size * longest)
        batches = Batches(
            settings.optimizer, seed, tokenizer.pad_token_id, self.device, share=self.models.shares_prefixes
        )
        self.learner = Learner(self.updates, settings, batches, output, demonstrations)
        self.collector = Collector(
            self.models, tokenizer, prompts, rewards, settings, batches, self.timer, output, tuple(stop_ids), seed
        )

    def train(self) -> dict[str, float]:
        """Run the remaining iterations, or fewer if the recipe's early stop ends the run.

        Afterwards `ending` says how the run ended, and from which iteration the models' policy is.

        Returns:
            the figures of that iteration.
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
        """The policy's full state dict on the first process, gathered from all processes if it is sharded."""
        return self.updates.whole_state("policy.")

    def _iterate(self, rollouts: Any) -> dict[str, float]:
        self.timer.reset()
        experience = self.collector.collect(self.iteration, self.kl_coef)
        figures = rollout_figures(experience, self.rewards, self.settings)
        with self.timer.phase("train"):
            training_figures = self.learner.update(experience)
        figures |= {"kl_coef": self.kl_coef, **training_figures}
        figures["learning_rate"] = self.updates.learning_rate
        self._adapt_kl_coef(experience)
        self.iteration += 1
        observed = self.watch.observe(self.iteration, figures)
        figures |= observed.figures
        self.ending = observed.ending
        timings = self.timer.timings(int(experience.mask.sum()))
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

    def _peak_memory(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return peak_resident_gb()

    def _save(self) -> None:
        numbers = {
            "kl_coef": self.kl_coef,
            "rewards": self.rewards.state(),
            "skipped": self.learner.skipped,
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
        """Load a checkpoint.

        Raises:
            InputError: it was written under another kind of sharding.
        """
        if numbers["kind"] != self.updates.kind:
            raise InputError(
                f"{folder}: this checkpoint's state was saved as '{numbers['kind']}', but this run saves it as "
                f"'{self.updates.kind}'; launch the run as before, or remove {folder.parent} to start ppo from scratch"
            )
        self.updates.read(folder)
        self.iteration = numbers["iteration"]
        self.kl_coef = numbers["kl_coef"]
        self.rewards.load_state(numbers["rewards"])
        self.learner.skipped = numbers["skipped"]
        self.last_figures = numbers["figures"]
