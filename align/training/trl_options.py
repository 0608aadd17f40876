"""Which options of TRL's configs a `trl` block may set, without importing TRL, so that recipes are read quickly.

`trl_options.json` lists the options of the versions that it names; `python -m align.training.trl_configs` rewrites it.
"""

import importlib.metadata
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from align.settings.validation import nearest

TABLE = Path(__file__).with_suffix(".json")
CONFIGS = {"sft": "SFTConfig", "reward": "RewardConfig", "dpo": "DPOConfig"}
SET_ELSEWHERE = {
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
    "gradient_checkpointing": "use `activation_checkpointing`",
    "gradient_checkpointing_kwargs": "use `activation_checkpointing_kwargs`",
    "trust_remote_code": "set `model.trust_remote_code`",
    "label_names": "the stage makes the columns",
    "remove_unused_columns": "the stage makes the columns",
    "logging_steps": "every step is logged",
    "logging_strategy": "every step is logged",
    "logging_nan_inf_filter": "a loss that is not finite stops the stage",
    "save_strategy": "set `save_steps`",
    "save_total_limit": "the last two checkpoints are kept until the stage is published",
}
"""Options that another key of the recipe sets, or that are fixed, each with the key or the reason."""

RESERVED = set(
    (
        "output_dir do_train do_eval do_predict eval_strategy eval_steps eval_delay eval_on_start "
        "load_best_model_at_end resume_from_checkpoint save_only_model push_to_hub hub_token hub_model_id "
        "hub_strategy hub_private_repo hub_always_push hub_revision run_name project model_init_kwargs "
        "chat_template_path eos_token pad_token dataset_text_field dataset_kwargs dataset_num_proc "
        "completion_only_loss assistant_only_loss eval_packing ignore_data_skip "
        "restore_callback_states_from_checkpoint enable_jit_checkpoint sync_ref_model ref_model_mixup_alpha "
        "ref_model_sync_steps precompute_ref_log_probs precompute_ref_batch_size"
    ).split()
)
"""Options that would be ignored, or would change what the stage itself has to decide."""

SCHEDULE_OPTIONS = {"constant": frozenset[str](), "linear": frozenset[str](), "cosine": frozenset({"num_cycles"})}
"""The `lr_scheduler_kwargs` of each `optimizer.schedule`."""

RESERVED_BY = {"reward": {"disable_dropout"}}
"""Further options that one stage alone decides."""


def option_faults(stage: str, options: Mapping[str, Any], types: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What is wrong with each faulty option of a stage's `trl` block.

    Args:
        types: of all options there are, by name. By default they are the table's, and if other versions are installed
            than the table's, names that it lacks pass.
    """
    known = types or {name: _type_of(text) for name, text in _table()["options"][CONFIGS[stage]].items()}
    has_all = types is not None or _is_current()
    faults = {name: _fault(stage, known, name, value, has_all) for name, value in options.items()}
    return {name: fault for name, fault in faults.items() if fault}


def schedule_fault(options: Any, schedule: str) -> str | None:
    """What is wrong with `lr_scheduler_kwargs` for a recipe's schedule; None if nothing is."""
    known = SCHEDULE_OPTIONS.get(schedule)
    unknown = sorted(map(str, {*options} - known)) if isinstance(options, dict) and known is not None else []
    if not unknown:
        return None
    has = f"has only {', '.join(sorted(known))}" if known else "has none"
    return f"the schedule `{schedule}` {has}, not {unknown[0]!r}; remove it, or change `optimizer.schedule`"


def _fault(stage: str, known: Mapping[str, Any], name: str, value: Any, has_all: bool) -> str | None:
    if name in SET_ELSEWHERE:
        return f"not set here; {SET_ELSEWHERE[name]}"
    if name in RESERVED or name in RESERVED_BY.get(stage, ()):
        return "the stage decides this itself; leave it out"
    if name not in known:
        return _unknown(name, known) if has_all else None
    hint = known[name]
    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
    except ValidationError:
        expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        return f"expected {expected}, got {value!r}"
    return None


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    near = nearest(name, known)
    meant = f"; did you mean `{near}`?" if near else ""
    elsewhere = f" That is not set here; {SET_ELSEWHERE[near]}" if near in SET_ELSEWHERE else ""
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
