"""TRL's trainers with what ours must have: soft labels, our own tokens, and a stop where a loss is not finite.

Shapes: B pairs in a micro-batch, L tokens of the longest conversation. Batches hold the chosen conversations first,
then the rejected ones: `input_ids` (2B, L), and `probability` (B,), that the chosen one is the better, and `weight`
(B,), 1 for a pair and 0 for one that only fills up a batch.
"""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedTokenizerBase, set_seed
from trl import DPOTrainer, RewardTrainer, SFTTrainer
from trl.trainer import utils as trl_utils

from align.data.chat import end_of_turn_ids
from align.data.token_columns import IGNORE_INDEX
from align.errors import InputError, NotFinite, first_line
from align.models.loading import load_causal_lm
from align.models.lora import add_lora
from align.models.positions import check_length
from align.models.saving import save_model
from align.models.sharding import DEEPSPEED_SUMS, set_precision
from align.models.wrappers import inner_model
from align.run import processes
from align.run.stage import Context
from align.settings.blocks import ModelBlock
from align.training.epoch_rows import TakesRowsInOrder
from align.training.trl_configs import Trained, not_finite, train, whole_state, with_labels

# Without a Triton kernel TRL projects the states of prompts and padding onto the vocabulary as well, and throws the
# result away: a third of a CPU's step. This makes it leave them out there too; which kernel runs is decided elsewhere.
if _has_kernel := getattr(trl_utils, "_use_triton", None):
    trl_utils._use_triton = lambda device: device.type == "cpu" or _has_kernel(device)


def soft_label_loss(margin: Tensor, probability: Tensor) -> Tensor:
    """Cross-entropy between a soft preference and the Bradley-Terry model's.

    -(p · log σ(margin) + (1 - p) · log σ(-margin)); with p = 1 it is the reward model's loss of Ouyang et al. 2022
    (eq. 1) or DPO's of Rafailov et al. 2023 (eq. 7), with p between that of Bai et al. 2022 (section 4.1).

    Args:
        margin: (B,) score of the chosen completion minus that of the rejected one.
        probability: (B,) that the chosen completion is the better.

    Returns:
        (B,) losses in nats.
    """
    return functional.binary_cross_entropy_with_logits(margin, probability.to(margin.dtype), reduction="none")


class _Guarded(TakesRowsInOrder):
    """For a trainer: stops before the optimizer step where a micro-batch's loss is not finite, and names its prompts.

    It also keeps TRL from reporting runs over the network.
    """

    def __init__(self, *args: Any, stage: str, **kwargs: Any) -> None:
        self.stage = stage
        super().__init__(*args, **kwargs)
        # At an epoch's end gather_for_metrics cuts off what it takes for repeated rows, and TRL gathers sums with it: a
        # resumed run, whose last epoch is shorter, would log other figures than an undisturbed one.
        trainer: Any = self
        trainer.accelerator.gather_for_metrics = trainer.accelerator.gather

    def create_accelerator_and_postprocess(self: Any) -> None:
        """Open the accelerator; sharded, it adds up gradients in float32 and leaves results as they are."""
        if self.args.deepspeed_plugin is not None:
            self.args.deepspeed_plugin.deepspeed_config |= DEEPSPEED_SUMS
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self.is_fsdp_enabled:
            dtype = torch.bfloat16 if self.args.bf16 else torch.float32
            set_precision(self.accelerator.state.fsdp_plugin, dtype)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch, forwards and backwards; returns its loss.

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
        raise NotFinite(not_finite(self.stage, "loss", float(loss), step, folder, f", among the rows {prompts}"))

    def _send_telemetry(self) -> None:
        pass


class DemonstrationTrainer(_Guarded, SFTTrainer):
    """Supervised fine-tuning on rows of `input_ids` and `labels`."""

    def uncounted(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row without a label, so that no token of it is counted."""
        return {**row, "labels": [IGNORE_INDEX] * len(row["labels"])}


class _OverPairs(_Guarded):
    """For a trainer on pairs: the loss is the mean over the pairs of a global batch, however it is cut up."""

    loss_is_scaled_for_ga: Any = True

    def add_filler(self: Any) -> None:
        """Put a pair of weight 0 behind the others, which weigh 1. TRL's own losses know no weights, and get none."""
        if self.loss_is_scaled_for_ga:
            self.train_dataset = self.train_dataset.add_column("weight", [1.0] * len(self.train_dataset))
            super().add_filler()  # type: ignore[misc]

    def uncounted(self, row: dict[str, Any]) -> dict[str, Any]:
        """The pair without weight."""
        return {**row, "weight": 0.0}

    def get_batch_samples(self: Any, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of an optimizer step, and how many pairs it has over all processes."""
        batches, counted = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if not self.loss_is_scaled_for_ga:
            return batches, counted
        pairs = sum((batch["weight"].sum() for batch in batches), torch.tensor(0.0)).to(device)
        return batches, self.accelerator.gather(pairs).sum()

    def _mean(self: Any, losses: Tensor, weight: Tensor, pairs: Tensor | None) -> Tensor:
        """This micro-batch's part of the mean, times the processes, whose gradients are averaged."""
        total = (losses * weight).sum()
        return total / weight.sum() if pairs is None else total * self.accelerator.num_processes / pairs

    def _record(self: Any, figures: dict[str, Tensor], weight: Tensor) -> None:
        """Log the means of (B,) figures over the pairs of every process."""
        weights = self.accelerator.gather(weight)
        for name, values in figures.items():
            mean = (self.accelerator.gather(values.detach()) * weights).sum() / weights.sum()
            self._metrics["train" if self.model.training else "eval"][name].append(mean.item())


class SoftLabelRewardTrainer(_OverPairs, RewardTrainer):
    """A reward model trained on rows of `chosen_ids`, `rejected_ids` and `probability`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        trainer.data_collator = with_labels(trainer.data_collator)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of `soft_label_loss` over the pairs, and TRL's centring term where the recipe asks for it."""
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


class SoftLabelDPOTrainer(_OverPairs, DPOTrainer):
    """DPO on rows of `prompt_ids`, `chosen_ids`, `rejected_ids` and `probability`.

    `hard_loss` hands the loss to TRL, which has many of them and takes every label for certain.
    """

    def __init__(self, *args: Any, hard_loss: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        trainer.loss_is_scaled_for_ga = not hard_loss
        if not hard_loss:
            trainer.data_collator = with_labels(trainer.data_collator)
        if "ref" in getattr(trainer.model, "peft_config", {}):
            # TRL's copy of a fresh adapter computes what the trunk does alone, and would be saved beside ours.
            trainer.model.delete_adapter("ref")

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of `soft_label_loss` of beta times the difference of the two log-ratios to the reference.

        With experts, the model's own loss for an even use of them is added, as in TRL, and logged as `aux_loss`.
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
        self._record(figures, weight)
        loss = self._mean(soft_label_loss(chosen_reward - rejected_reward, probability), weight, num_items_in_batch)
        if self.aux_loss_enabled:
            # A mean over the micro-batch's tokens, as TRL adds it: each of the step's micro-batches has its share.
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
            self._record({"aux_loss": outputs.aux_loss.expand(len(weight))}, weight)
        return (loss, outputs) if return_outputs else loss


class ScoreHead(nn.Linear):
    """A reward model's head: float32 whatever the autocast around it, or near scores would round to one.

    Starts with standard deviation 1 / sqrt(hidden + 1) (Huang et al. 2024, detail 7).
    """

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, 1, bias=False)
        nn.init.normal_(self.weight, std=(hidden + 1) ** -0.5)

    def forward(self, states: Tensor) -> Tensor:
        """(…, H) hidden states to (…, 1) scores."""
        with torch.autocast(states.device.type, enabled=False):
            return functional.linear(states.float(), self.weight.float())


Kind = TypeVar("Kind", DemonstrationTrainer, SoftLabelRewardTrainer, SoftLabelDPOTrainer)


def load_trainable(path: str, block: ModelBlock, dtype: torch.dtype, seed: int, revision: str | None = None) -> Any:
    """A policy to train: with LoRA an fp32 adapter on a frozen trunk in `dtype`, without it every weight in fp32."""
    set_seed(seed)
    weights = dtype if block.lora else torch.float32
    model = load_causal_lm(path, weights, revision=revision, trust_remote_code=block.trust_remote_code)
    return add_lora(model, block.lora) if block.lora else model


def load_scorer(path: str, block: ModelBlock, dtype: torch.dtype, seed: int, revision: str | None = None) -> Any:
    """A reward model to train: a causal language model's trunk under a fresh `ScoreHead`, trained as `load_trainable`.

    Raises:
        InputError: transformers has no sequence classifier with a `score` head for this architecture.
    """
    set_seed(seed)
    weights = dtype if block.lora else torch.float32
    causal = load_causal_lm(path, weights, revision=revision, trust_remote_code=block.trust_remote_code)
    config = causal.config
    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if not isinstance(kind, type):
        raise InputError(
            f"model {path}: transformers has no sequence classifier for `{config.model_type}`, so no reward model can "
            "be trained from it; use dpo, or ppo with other `rewards`, or start reward from another model"
        )
    config.num_labels = 1
    with torch.device("meta"):
        model = kind(config)
    if not hasattr(model, "score"):
        raise InputError(
            f"model {path}: the classifier {kind.__name__} has no `score` head, so no reward model can be trained from "
            "it; use dpo, or ppo with other `rewards`, or start reward from another model"
        )
    setattr(model, model.base_model_prefix, causal.base_model)
    model.score = ScoreHead(model.score.in_features)
    return add_lora(model, block.lora, task_type="SEQ_CLS") if block.lora else model


def pad_apart(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer a pad token that ends no conversation, on the right.

    transformers' classifiers read the score at the last token that is not padding: where the pad token also ends turns
    (SmolLM2's does) they would read it one token early.

    Raises:
        InputError: every special token ends turns.
    """
    endings = {end_of_turn_ids(tokenizer)[-1], tokenizer.eos_token_id}
    candidates = [tokenizer.pad_token_id, getattr(tokenizer, "unk_token_id", None), tokenizer.bos_token_id]
    apart = [token for token in [*candidates, *tokenizer.all_special_ids] if token is not None and token not in endings]
    if not apart:
        raise InputError("reward: the tokenizer's one special token ends turns; add a pad token to it")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(apart[0])
    tokenizer.padding_side = "right"
    return tokenizer


def score_pairs(trainer: Any, rows: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """A reward trainer's (chosen score, rejected score) of each row, in order. Every process calls it.

    Raises:
        NotFinite: a score is NaN or infinite.
    """
    if not rows:
        return []
    model = trainer.model_wrapped
    model.eval()  # DeepSpeed's engine returns nothing here
    size = trainer.args.per_device_train_batch_size
    dataset: Any = list(rows)
    loader = trainer.accelerator.prepare(DataLoader(dataset, batch_size=size, collate_fn=trainer.data_collator))
    found: list[Tensor] = []
    for batch in tqdm(loader, desc="scoring pairs", disable=not processes.is_first() or trainer.args.disable_tqdm):
        with torch.no_grad():
            outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        scores = outputs.logits.float().reshape(2, -1).T.contiguous()  # (B, 2)
        found.append(trainer.accelerator.gather(scores).cpu())
    scores = torch.cat(found)[: len(rows)]  # the processes' last batches are filled up with the first rows
    if not scores.isfinite().all():
        row = int((~scores.isfinite()).any(dim=1).nonzero()[0])
        text = trainer.processing_class.decode(rows[row]["chosen_ids"], skip_special_tokens=True)
        raise NotFinite(f"reward: the trained model's score is not finite for the pair {text[:80]!r}; train it again")
    return [(chosen, rejected) for chosen, rejected in scores.tolist()]


@contextmanager
def refusals_told(context: Context) -> Iterator[None]:
    """Tell what TRL alone knows to be wrong with a stage's `trl` options, such as a loss that it does not have.

    Raises:
        InputError: TRL refused, and there are such options.
    """
    try:
        yield
    except (ValueError, NotImplementedError, ImportError) as error:
        options = context.settings.trl
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts
        if not options or not {"trl", "transformers"} & set(raised_in):
            raise
        names = ", ".join(options)
        raise InputError(
            f"{context.stage}.trl: TRL refuses these options ({first_line(error)}); mend or remove one of {names}"
        ) from error


def _longest(row: Mapping[str, Any]) -> int:
    """Tokens of the longest conversation in a row of any trainer's."""
    prompt = len(row.get("prompt_ids", ()))
    return prompt + max(len(row.get(name, ())) for name in ("input_ids", "chosen_ids", "rejected_ids"))


def fit(
    kind: type[Kind],
    context: Context,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    rows: Sequence[dict[str, Any]],
    dtype: torch.dtype,
    **options: Any,
) -> tuple[Kind, Trained]:
    """Train `model` on `rows` and save it, in `dtype`, into the stage's folder; every process calls it.

    Raises:
        NotFinite: a loss or gradient is NaN or infinite; the last checkpoint is kept.
        InputError: TRL refuses the `trl` options, or a row is longer than the positions that the model has learned.
    """
    check_length(inner_model(model), max(map(_longest, rows)), f"lower {context.stage}.max_length")
    dataset = Dataset.from_list(list(rows))
    with refusals_told(context):
        trainer = kind(
            model, args=config, train_dataset=dataset, processing_class=tokenizer, stage=context.stage, **options
        )
    if processes.world_size() > 1 and not config.dataloader_drop_last:
        trainer.add_filler()
    with context.tracker() as tracker, refusals_told(context):
        trained = train(trainer, context.stage, tracker)
    state = whole_state(trainer)
    if processes.is_first():
        whole = trainer.accelerator.unwrap_model(trainer.model)
        save_model(whole, tokenizer, context.output, dtype, state_dict=state)
    processes.barrier()
    return trainer, trained
