"""TRL's trainers with soft labels, rows that are already token ids, and a stop at a loss that is not finite.

Shapes: B pairs in a micro-batch, L tokens of the longest conversation. Batches hold the chosen conversations first,
then the rejected ones: `input_ids` (2B, L); `probability` (B,) that the chosen one is better; and `weight` (B,), 1 for
a pair and 0 for a filler.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from trl import DPOTrainer, RewardTrainer, SFTTrainer
from trl.trainer import utils as trl_utils

from align.data.token_columns import IGNORE_INDEX
from align.errors import NotFinite
from align.models.sharding import DEEPSPEED_SUMS, set_precision
from align.training.callbacks import not_finite_message
from align.training.epoch_rows import EpochOrderMixin

# Without a Triton kernel TRL also projects the states of prompts and padding onto the vocabulary, and discards the
# result: a third of a step on a CPU. This makes TRL skip them there too; it does not change which kernel runs.
if _has_kernel := getattr(trl_utils, "_use_triton", None):
    trl_utils._use_triton = lambda device: device.type == "cpu" or _has_kernel(device)


def soft_label_loss(margin: Tensor, probability: Tensor) -> Tensor:
    """Cross-entropy between a soft label and the Bradley-Terry model's preference.

    -(p · log σ(margin) + (1 - p) · log σ(-margin)). With p = 1 this is the reward-model loss of Ouyang et al. 2022
    (eq. 1), or the DPO loss of Rafailov et al. 2023 (eq. 7); with 0 < p < 1, the loss of Bai et al. 2022 (section 4.1).

    Args:
        margin: (B,) score of the chosen completion minus that of the rejected one.
        probability: (B,) that the chosen completion is better.

    Returns:
        (B,) losses in nats.
    """
    return functional.binary_cross_entropy_with_logits(margin, probability.to(margin.dtype), reduction="none")


class _TrainerMixin(EpochOrderMixin):
    """Stops a trainer before the optimizer step if a micro-batch's loss is not finite, and names its prompts.

    It also keeps TRL from sending telemetry.
    """

    def __init__(self, *args: Any, stage: str, **kwargs: Any) -> None:
        self.stage = stage
        super().__init__(*args, **kwargs)
        # At an epoch's end gather_for_metrics drops what it takes for repeated rows, and TRL gathers sums with it: a
        # resumed run, whose last epoch is shorter, would log other figures than an uninterrupted one.
        trainer: Any = self
        trainer.accelerator.gather_for_metrics = trainer.accelerator.gather

    def create_accelerator_and_postprocess(self: Any) -> None:
        """Open the accelerator. When sharding, it sums gradients in float32 and leaves the dtype of outputs alone."""
        if self.args.deepspeed_plugin is not None:
            self.args.deepspeed_plugin.deepspeed_config |= DEEPSPEED_SUMS
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self.is_fsdp_enabled:
            dtype = torch.bfloat16 if self.args.bf16 else torch.float32
            set_precision(self.accelerator.state.fsdp_plugin, dtype)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch forwards and backwards, and return its loss.

        Raises:
            NotFinite: the loss is NaN or infinite.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if not torch.isfinite(loss):
            self._stop(loss, inputs)
        return loss

    def _stop(self: Any, loss: Tensor, inputs: dict[str, Any]) -> None:
        texts = self.processing_class.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        prompts = ", ".join(repr(text[:80]) for text in dict.fromkeys(texts))
        step, folder = self.state.global_step + 1, Path(self.args.output_dir)
        raise NotFinite(
            not_finite_message(self.stage, "loss", float(loss), step, folder, f", among the rows {prompts}")
        )

    def _send_telemetry(self) -> None:
        pass


class DemonstrationTrainer(_TrainerMixin, SFTTrainer):
    """Supervised fine-tuning on rows of `input_ids` and `labels`."""

    def as_filler(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row without labels, so that none of its tokens enters the loss."""
        return {**row, "labels": [IGNORE_INDEX] * len(row["labels"])}


class _PairTrainerMixin(_TrainerMixin):
    """Makes the loss the mean over the pairs of a global batch, however that is divided into micro-batches."""

    loss_is_scaled_for_ga: Any = True

    def add_filler(self: Any) -> None:
        """Append a pair of weight 0; the others get 1. TRL's own losses know no weights and get no filler."""
        if self.loss_is_scaled_for_ga:
            self.train_dataset = self.train_dataset.add_column("weight", [1.0] * len(self.train_dataset))
            super().add_filler()  # type: ignore[misc]

    def as_filler(self, row: dict[str, Any]) -> dict[str, Any]:
        """The pair with weight 0."""
        return {**row, "weight": 0.0}

    def get_batch_samples(self: Any, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of an optimizer step, and the number of its pairs over all processes."""
        batches, counted = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if not self.loss_is_scaled_for_ga:
            return batches, counted
        pairs = sum((batch["weight"].sum() for batch in batches), torch.tensor(0.0)).to(device)
        return batches, self.accelerator.gather(pairs).sum()

    def _mean(self: Any, losses: Tensor, weight: Tensor, pairs: Tensor | None) -> Tensor:
        """This micro-batch's part of the mean, times the number of processes, because gradients are averaged."""
        total = (losses * weight).sum()
        return total / weight.sum() if pairs is None else total * self.accelerator.num_processes / pairs

    def _record(self: Any, figures: dict[str, Tensor], weight: Tensor) -> None:
        """Log the means of (B,) figures over the pairs of all processes."""
        weights = self.accelerator.gather(weight)
        for name, values in figures.items():
            mean = (self.accelerator.gather(values.detach()) * weights).sum() / weights.sum()
            self._metrics["train" if self.model.training else "eval"][name].append(mean.item())


class SoftLabelRewardTrainer(_PairTrainerMixin, RewardTrainer):
    """A reward model trained on rows of `chosen_ids`, `rejected_ids` and `probability`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        trainer.data_collator = with_soft_labels(trainer.data_collator)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of `soft_label_loss` over the pairs, plus TRL's centring term if the recipe asks for it."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        chosen, rejected = outputs.logits.squeeze(-1).float().chunk(2)  # (B,) each
        losses = soft_label_loss(chosen - rejected, inputs["probability"])
        args: Any = self.args
        centring = args.center_rewards_coefficient
        if centring is not None:
            losses = losses + centring * (chosen + rejected).square()
        margin = chosen - rejected
        figures = {"score": (chosen + rejected) / 2, "margin": margin, "accuracy": (margin > 0).float()}
        self._record(figures, inputs["weight"])
        loss = self._mean(losses, inputs["weight"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class SoftLabelDPOTrainer(_PairTrainerMixin, DPOTrainer):
    """DPO on rows of `prompt_ids`, `chosen_ids`, `rejected_ids` and `probability`.

    `hard_loss` leaves the loss to TRL, whose own losses treat every label as certain.
    """

    def __init__(self, *args: Any, hard_loss: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        trainer.loss_is_scaled_for_ga = not hard_loss
        if not hard_loss:
            trainer.data_collator = with_soft_labels(trainer.data_collator)
        if "ref" in getattr(trainer.model, "peft_config", {}):
            # TRL's copy of a new adapter computes the same as the trunk alone, and would be saved beside ours.
            trainer.model.delete_adapter("ref")

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of `soft_label_loss`; the margin is beta times the difference of the log-ratios to the reference.

        For a model with experts, its loss for an even use of them is added, as in TRL, and logged as `aux_loss`.
        """
        if not self.loss_is_scaled_for_ga:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        probability, weight = inputs["probability"], inputs["weight"]
        batch = {name: value for name, value in inputs.items() if name not in ("probability", "weight")}
        outputs = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100),
            fused_lm_head=True,
            use_cache=False,
            **({"output_router_logits": True} if self.aux_loss_enabled else {}),
        )
        chosen, rejected = outputs.log_probs.sum(dim=1).chunk(2)  # (B,) each
        reference = self.ref_model if self.ref_model is not None else self.model
        ref_chosen, ref_rejected = self.compute_ref_log_probs(reference, batch)
        chosen_reward, rejected_reward = self.beta * (chosen - ref_chosen), self.beta * (rejected - ref_rejected)
        figures = {
            "rewards/chosen": chosen_reward,
            "rewards/rejected": rejected_reward,
            "rewards/margins": chosen_reward - rejected_reward,
            "rewards/accuracies": (chosen_reward > rejected_reward).float(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        loss = self._mean(soft_label_loss(chosen_reward - rejected_reward, probability), weight, num_items_in_batch)
        if self.aux_loss_enabled:
            # A mean over the micro-batch's tokens, as TRL adds it: each of the step's micro-batches has its share.
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
            figures["aux_loss"] = outputs.aux_loss.expand(len(weight))
        self._record(figures, weight)
        return (loss, outputs) if return_outputs else loss


def with_soft_labels(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], dict[str, Any]]:
    """A collator that adds the pairs' `probability` (B,) and `weight` (B,) to the batch that `collate` makes."""

    def collate_pairs(rows: list[Any]) -> dict[str, Any]:
        labels = {
            "probability": [row["probability"] for row in rows],
            "weight": [float(row.get("weight", 1)) for row in rows],
        }
        return {**collate(rows), **{name: torch.tensor(values) for name, values in labels.items()}}

    return collate_pairs
