"""Train a model with one of TRL's trainers, resuming from its last complete checkpoint, and save it."""

import shutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, Trainer
from transformers.integrations import unset_hf_deepspeed_config

from align.errors import InputError, first_line
from align.models.positions import check_length
from align.models.saving import save_model
from align.models.sharding import deepspeed_state
from align.models.wrappers import inner_model
from align.run import processes
from align.run.damaged_files import check_files
from align.run.stage import Context
from align.run.tracking import Tracker
from align.training.callbacks import (
    COMPLETE,
    UNLOGGED,
    LossProgressCallback,
    TrackingCallback,
    checkpoint_step,
    last_checkpoint,
)
from align.training.trainers import DemonstrationTrainer, SoftLabelDPOTrainer, SoftLabelRewardTrainer

TrainerT = TypeVar("TrainerT", DemonstrationTrainer, SoftLabelRewardTrainer, SoftLabelDPOTrainer)


@dataclass(frozen=True)
class TrainingResult:
    """How a training run ended: the number of optimizer steps, and the figures of the last one."""

    steps: int
    last_step: Mapping[str, float]


def fit(
    trainer_class: type[TrainerT],
    context: Context,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    rows: Sequence[dict[str, Any]],
    dtype: torch.dtype,
    **options: Any,
) -> tuple[TrainerT, TrainingResult]:
    """Train `model` on `rows` and save it, in `dtype`, into the stage's folder. Every process calls it.

    Raises:
        NotFinite: a loss or gradient is NaN or infinite; the last checkpoint is kept.
        InputError: TRL refuses the `trl` options, the checkpoint is damaged, or a row is longer than the positions that
            the model has learned.
    """
    check_length(inner_model(model), max(map(_longest, rows)), f"lower {context.stage}.max_length")
    dataset = Dataset.from_list(list(rows))
    with refusals_as_input_errors(context):
        trainer = trainer_class(
            model, args=config, train_dataset=dataset, processing_class=tokenizer, stage=context.stage, **options
        )
    if processes.world_size() > 1 and not config.dataloader_drop_last:
        trainer.add_filler()
    with context.tracker() as tracker, refusals_as_input_errors(context):
        result = _train(trainer, context.stage, tracker)
    state = _full_state_dict(trainer)
    if processes.is_first():
        unwrapped = trainer.accelerator.unwrap_model(trainer.model)
        save_model(unwrapped, tokenizer, context.output, dtype, state_dict=state)
    processes.barrier()
    return trainer, result


def _longest(row: Mapping[str, Any]) -> int:
    """Tokens of the longest conversation in a row of any trainer."""
    prompt = len(row.get("prompt_ids", ()))
    return prompt + max(len(row.get(name, ())) for name in ("input_ids", "chosen_ids", "rejected_ids"))


@contextmanager
def refusals_as_input_errors(context: Context) -> Iterator[None]:
    """Report a stage's `trl` options that only TRL itself knows to be wrong, such as a loss that it does not have.

    Raises:
        InputError: TRL or transformers raised an error, and the recipe sets `trl` options.
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
            f"{context.stage}.trl: TRL refuses these options ({first_line(error)}); change or remove one of {names}"
        ) from error


def _train(trainer: Trainer, stage: str, tracker: Tracker) -> TrainingResult:
    """Train to the end, resuming from the last complete checkpoint in the trainer's folder if there is one."""
    folder = Path(str(trainer.args.output_dir))
    checkpoint = last_checkpoint(folder)
    if checkpoint:
        check_files(checkpoint)
    if processes.is_first():
        _remove_incomplete_checkpoints(folder)
    tracker.truncate(checkpoint_step(checkpoint) if checkpoint else 0)
    processes.barrier()

    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if processes.is_first() and not trainer.args.disable_tqdm:
        trainer.add_callback(LossProgressCallback(stage))
    trainer.add_callback(TrackingCallback(stage, tracker))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    steps = [row for row in trainer.state.log_history if "loss" in row]
    last = {name: value for name, value in steps[-1].items() if name not in UNLOGGED | {"step"}} if steps else {}
    return TrainingResult(trainer.state.global_step, last)


def _remove_incomplete_checkpoints(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)


def _full_state_dict(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """The full state dict of a model that is sharded (FSDP, ZeRO-3), else None. Every process calls it."""
    if trainer.is_deepspeed_enabled:
        # The trainer had transformers build every later model in shards, which waits for the other processes.
        unset_hf_deepspeed_config()
        return deepspeed_state(trainer.accelerator.unwrap_model(trainer.model_wrapped))
    return trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
