"""The recipe's training settings as configs of TRL."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import DPOConfig, RewardConfig, SFTConfig

from align.errors import FileProblems, InputError
from align.run.reproducibility import derive_seed
from align.settings.blocks import OptimizerBlock
from align.stages.sft import STAGE
from align.training.trl_configs import accumulation_steps, check_options, training_config
from align.training.trl_options import SCHEDULE_OPTIONS, TABLE
from tests.stages.training import context


def sft_config(tmp_path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> SFTConfig:
    made = context(STAGE, settings, tmp_path / "model", tmp_path)
    return training_config(SFTConfig, made, dtype, max_length=made.settings.max_length)


def test_every_optimizer_setting_reaches_trl(tmp_path: Path) -> None:
    optimizer = {
        "learning_rate": 3e-4,
        "batch_size": 12,
        "micro_batch_size": 3,
        "warmup_ratio": 0.25,
        "schedule": "cosine",
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
    }
    config = sft_config(tmp_path, optimizer=optimizer, epochs=1.5, max_length=77)
    assert config.learning_rate == 3e-4
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (3, 4)
    assert config.get_warmup_steps(100) == 25
    assert config.lr_scheduler_type == "cosine"
    assert (config.weight_decay, config.max_grad_norm) == (0.01, 0.5)
    assert (config.num_train_epochs, config.max_length) == (1.5, 77)
    assert config.seed == derive_seed(7, "sft") % 2**32
    assert config.report_to == []
    assert Path(str(config.output_dir)) == tmp_path / "checkpoint"


def test_a_cpu_gets_no_activation_checkpointing_and_bf16_only_as_compute_dtype(tmp_path: Path) -> None:
    config = sft_config(tmp_path)
    assert config.use_cpu and not config.activation_checkpointing and not config.gradient_checkpointing
    assert not config.bf16
    assert sft_config(tmp_path, torch.bfloat16).bf16


@pytest.mark.parametrize(
    ("schedule", "ratio", "expected", "steps"),
    [("constant", 0.0, "constant", 0), ("constant", 0.1, "constant_with_warmup", 1), ("linear", 1.0, "linear", 10)],
)
def test_warm_up_is_a_share_of_the_run_under_every_schedule(
    tmp_path: Path, schedule: str, ratio: float, expected: str, steps: int
) -> None:
    config = sft_config(tmp_path, optimizer={"schedule": schedule, "warmup_ratio": ratio})
    assert config.lr_scheduler_type == expected
    assert config.get_warmup_steps(10) == steps


def test_options_beside_ours_reach_trl(tmp_path: Path) -> None:
    config = sft_config(tmp_path, trl={"adam_beta2": 0.95, "save_steps": 50, "activation_checkpointing": True})
    assert (config.adam_beta2, config.save_steps, config.activation_checkpointing) == (0.95, 50, True)


def test_adams_epsilon_is_the_recipes(tmp_path: Path) -> None:
    assert sft_config(tmp_path, optimizer={"epsilon": 1e-6}).adam_epsilon == 1e-6
    assert sft_config(tmp_path).adam_epsilon == 1e-8
    with pytest.raises(InputError, match=r"sft\.trl\.adam_epsilon: optimizer.epsilon is set as well"):
        sft_config(tmp_path, optimizer={"epsilon": 1e-6}, trl={"adam_epsilon": 1e-7})


def test_every_faulty_option_is_reported_at_once_with_its_remedy() -> None:
    options = {
        "adam_bet2": 0.9,
        "adam_beta1": "0.9",
        "dataloader_num_workers": 2.5,
        "learning_rate": 1e-3,
        "output_dir": "/tmp",
        "gradient_checkpointing": True,
        "packing": True,
    }
    with pytest.raises(FileProblems) as error:
        check_options(SFTConfig, "sft", options)
    text = str(error.value)
    assert "6 problems" in text
    assert "sft.trl.adam_bet2: no such option; did you mean `adam_beta2`?" in text
    assert "sft.trl.adam_beta1: expected float, got '0.9'" in text
    assert "sft.trl.dataloader_num_workers: expected int, got 2.5" in text
    assert "sft.trl.learning_rate: not set here; set `optimizer.learning_rate`" in text
    assert "sft.trl.output_dir: the stage decides this itself" in text
    assert "not set here; use `activation_checkpointing`" in text


@pytest.mark.parametrize("kind", [SFTConfig, RewardConfig, DPOConfig])
def test_no_default_of_trl_s_is_called_a_wrong_type(kind: type) -> None:
    from align.training.trl_configs import _option_types
    from align.training.trl_options import RESERVED, SET_ELSEWHERE

    config = kind(use_cpu=True, bf16=False)
    changed_while_reading = {"accelerator_config", "fsdp_config", "debug", "include_for_metrics", "disable_tqdm"}
    free = set(_option_types(kind)) - set(SET_ELSEWHERE) - RESERVED - changed_while_reading
    check_options(kind, "stage", {name: getattr(config, name) for name in free})
    assert len(free) > 50


def test_a_refusal_of_trl_s_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sft\.trl: .*nosuchoptimizer"):
        sft_config(tmp_path, trl={"optim": "nosuchoptimizer"})


def test_accumulation_follows_from_the_global_batch() -> None:
    block = OptimizerBlock(batch_size=24, micro_batch_size=3)
    assert [accumulation_steps("sft", block, processes) for processes in (1, 2, 8)] == [8, 4, 1]


def test_a_batch_that_cannot_be_divided_is_an_error() -> None:
    with pytest.raises(InputError, match=r"dpo.optimizer.batch_size: 16 is not a multiple .* 3 processes = 24"):
        accumulation_steps("dpo", OptimizerBlock(batch_size=16, micro_batch_size=8), 3)


def test_the_shipped_table_of_options_is_the_installed_trl_s() -> None:
    from align.training.trl_configs import option_table

    assert json.loads(TABLE.read_text()) == option_table(), "rewrite it: python -m align.training.trl_configs"


def test_the_schedules_options_are_those_of_transformers(tmp_path: Path) -> None:
    cosine = {"schedule": "cosine"}
    config = sft_config(tmp_path, optimizer=cosine, trl={"lr_scheduler_kwargs": {"num_cycles": 1.5}})
    assert config.lr_scheduler_kwargs == {"num_cycles": 1.5}
    for schedule in {*SCHEDULE_OPTIONS} - {"constant"}:  # which ignores options, so a recipe that has some is refused
        with pytest.raises(InputError, match=rf"lr_scheduler_kwargs.*`{schedule}`.*min_lr_rate"):
            sft_config(tmp_path, optimizer={"schedule": schedule}, trl={"lr_scheduler_kwargs": {"min_lr_rate": 0.1}})
