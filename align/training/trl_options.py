"""Which options of TRL's configs a `trl` block may set, known without importing TRL, so that reading a recipe is quick.

`trl_options.json` lists the options of the versions it names; `python -m align.training.trl_configs` writes it anew.
"""

import importlib.metadata
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from align.settings.validation import nearest

TABLE = Path(__file__).with_suffix(".json")
CONFIGS = {"sft": "SFTConfig", "reward": "RewardConfig", "dpo": "DPOConfig"}
DECIDED = {"reward": {"disable_dropout"}}
"""Options that a stage itself decides, besides those below."""

INSTEAD = {
    "learning_rate": "set `optimizer.learning_rate`",
    "per_device_train_batch_size": "set `optimizer.micro_batch_size`",
    "gradient_accumulation_steps": "it follows from `optimizer.batch_size` and `optimizer.micro_batch_size`",
    "auto_find_batch_size": "set `optimizer.micro_batch_size`",
    "warmup_steps": "set `optimizer.warmup_ratio`",
    "warmup_ratio": "set `optimizer.warmup_ratio`",
    "lr_scheduler_type": "set `optimizer.schedule`",
    "weight_decay": "set `optimizer.weight_decay`",
    "max_grad_norm": "set `optimizer.max_grad_norm`",
    "num_train_epochs": "set `epochs`",
    "max_length": "set `max_length` beside `trl`",
    "truncation_mode": "nothing is truncated: rows longer than `max_length` are left out and counted",
    "beta": "set `beta` beside `trl`",
    "seed": "set the recipe's `seed`",
    "data_seed": "set the recipe's `seed`",
    "bf16": "set `model.precision`",
    "fp16": "set `model.precision`",
    "use_cpu": "set the environment variable ACCELERATE_USE_CPU",
    "report_to": "set `tracking`",
    "gradient_checkpointing": "it is `activation_checkpointing` now",
    "gradient_checkpointing_kwargs": "it is `activation_checkpointing_kwargs` now",
    "trust_remote_code": "set `model.trust_remote_code`",
    "label_names": "the columns are made by the stage",
    "remove_unused_columns": "the columns are made by the stage",
    "logging_steps": "every step is logged",
    "logging_strategy": "every step is logged",
    "logging_nan_inf_filter": "a loss that is not finite stops the stage",
    "save_strategy": "set `save_steps`",
    "save_total_limit": "the last two checkpoints are kept, until the stage is published",
}
OUT_OF_PLACE = {
    "output_dir",
    "do_train",
    "do_eval",
    "do_predict",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "load_best_model_at_end",
    "resume_from_checkpoint",
    "save_only_model",
    "push_to_hub",
    "hub_token",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "hub_always_push",
    "hub_revision",
    "run_name",
    "project",
    "model_init_kwargs",
    "chat_template_path",
    "eos_token",
    "pad_token",
    "dataset_text_field",
    "dataset_kwargs",
    "dataset_num_proc",
    "completion_only_loss",
    "assistant_only_loss",
    "eval_packing",
    "ignore_data_skip",
    "restore_callback_states_from_checkpoint",
    "enable_jit_checkpoint",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
}
"""Options that would be ignored here, or would take the stage's work out of its hands."""


def option_faults(stage: str, options: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with each faulty option of a stage's `trl` block.

    With other versions of TRL than the table's, names that it lacks are left to the stage, which asks TRL.
    """
    known: dict[str, str] = _table()["options"][CONFIGS[stage]]
    faults = {name: _fault(stage, known, name, value) for name, value in options.items()}
    return {name: fault for name, fault in faults.items() if fault}


def _fault(stage: str, known: Mapping[str, str], name: str, value: Any) -> str | None:
    if name in INSTEAD:
        return f"not set here; {INSTEAD[name]}"
    if name in OUT_OF_PLACE or name in DECIDED.get(stage, ()):
        return "the stage decides this itself; leave it out"
    if name not in known:
        return _unknown(name, known) if _is_current() else None
    try:
        TypeAdapter(_type_of(known[name])).validate_python(value, strict=True)
    except ValidationError:
        return f"expected {known[name]}, got {value!r}"
    return None


def _unknown(name: str, known: Mapping[str, str]) -> str:
    near = nearest(name, known)
    meant = f"; did you mean `{near}`?" if near else ""
    elsewhere = f" That is not set here; {INSTEAD[near]}" if near in INSTEAD else ""
    return f"no such option{meant}{elsewhere}"


def _type_of(text: str) -> Any:
    plain = {"bool": bool, "int": int, "float": float, "str": str, "None": None}
    chosen: Any = Any
    for number, part in enumerate([] if text == "other" else text.split(" | ")):
        chosen = plain[part] if number == 0 else chosen | plain[part]
    return chosen


@cache
def _table() -> dict[str, Any]:
    return dict(json.loads(TABLE.read_text(encoding="utf-8")))


@cache
def _is_current() -> bool:
    return all(importlib.metadata.version(name) == version for name, version in _table()["versions"].items())
