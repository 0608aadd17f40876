"""Builds the models of a PPO run from the SFT policy and the reward model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from align.errors import InputError, first_line
from align.models.compatibility import weights_fault
from align.models.heads import ValueHead, pooled_scores
from align.models.loading import load_causal_lm
from align.models.lora import add_lora
from align.models.padding import right_padded
from align.rl.models import PpoModels, SeparateModels, SharedTrunk
from align.rl.sequences import lay_out_rows
from align.run.damaged_files import check_files
from align.settings.blocks import LoraBlock

SCORE_HEAD = "score.weight"
SHAPES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True)
class RewardFolder:
    """A reward stage's results: `model/` always, `adapter/` where it was trained with LoRA.

    `on_policy_trunk` says that the adapter belongs to the very weights that the policy starts from. `mean` and `std`
    are those of its scores on held-out pairs.
    """

    path: Path
    on_policy_trunk: bool
    mean: float
    std: float

    @property
    def shares_trunk(self) -> bool:
        return self.on_policy_trunk and (self.path / "adapter").is_dir()


def load_shared_trunk(
    policy: str,
    reward: RewardFolder | None,
    lora: LoraBlock,
    *,
    value: str | None,
    dtype: torch.dtype,
    temperature: float,
    trust_remote_code: bool = False,
) -> SharedTrunk:
    """Policy, value, reference and, where it was trained on this trunk, reward, as adapters of one model.

    The value starts as the reward model (its adapter and head, in standardised scores), or from nothing where the
    reward model has no adapter for this trunk.

    Args:
        policy: the SFT model's folder: the trunk, and with adapters off the reference.
        value: 'adapter', 'head' (on the policy's hidden states), or None for methods without values.
        dtype: of the trunk, and of all computation; adapters and heads stay float32.
    """
    model = add_lora(_load_policy(policy, dtype, trust_remote_code), lora, adapter_name="policy")
    hidden = model.config.get_text_config().hidden_size
    reward_head = None
    if reward is not None and reward.shares_trunk:
        reward_head = _add_reward_adapter(model, reward.path / "adapter", "reward", hidden)
    value_head = ValueHead(hidden) if value is not None else None
    if value == "adapter" and reward_head is None:
        add_lora(model, lora, adapter_name="value")
    if value == "adapter" and reward is not None and reward_head is not None and value_head is not None:
        _add_reward_adapter(model, reward.path / "adapter", "value", hidden)
        _start_from_reward(value_head, reward_head, reward)
    return SharedTrunk(
        model,
        value_head,
        reward_head,
        value_adapter=value == "adapter",
        temperature=temperature,
        compute_dtype=dtype,
    )


def load_separate_models(
    policy: str,
    reward: RewardFolder | None,
    *,
    value: str | None,
    dtype: torch.dtype,
    temperature: float,
    trust_remote_code: bool = False,
) -> SeparateModels:
    """Policy and value with every weight trained (fp32), and a frozen reference in the compute dtype.

    The value starts as the reward model where that was trained from the policy's own weights, so that it reads the same
    tokens, and as a copy of the policy with a new head otherwise.
    """
    trained = _load_policy(policy, torch.float32, trust_remote_code)
    hidden = trained.config.get_text_config().hidden_size
    backbone = None
    value_head = ValueHead(hidden) if value is not None else None
    own = reward if reward is not None and reward.on_policy_trunk else None
    if value == "adapter" and own is None:
        backbone = _load_policy(policy, torch.float32, trust_remote_code).base_model
    if value == "adapter" and own is not None and value_head is not None:
        classifier = load_classifier(own.path / "model", torch.float32, trust_remote_code=trust_remote_code)
        backbone = classifier.base_model
        _start_from_reward(value_head, classifier.score, own)
    return SeparateModels(
        trained,
        backbone,
        value_head,
        _load_policy(policy, dtype, trust_remote_code),
        temperature=temperature,
        compute_dtype=dtype,
    )


def _load_policy(path: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """A causal LM whose logits are its output embedding's products and nothing more, as the log-probs assume."""
    model = load_causal_lm(path, dtype, trust_remote_code=trust_remote_code)
    config = model.config.get_text_config()
    for key in SHAPES_LOGITS:
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise InputError(
                f"{path}: its logits are scaled or capped ({key} in config.json), which ppo does not compute; "
                "use dpo for this model, or another model"
            )
    if model.get_output_embeddings().bias is not None:
        raise InputError(f"{path}: its output layer has a bias, which ppo does not compute; use dpo, or another model")
    return model


def load_classifier(path: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """A frozen sequence classifier with a single output.

    Raises:
        InputError: it cannot be loaded, its files do not fit each other, or it has more outputs than one.
    """
    from transformers import AutoModelForSequenceClassification

    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            str(path), dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be loaded as a reward model ({first_line(error)}); train it again") from error
    if fault := weights_fault(model.config, loading):
        raise InputError(f"{path}: {fault}; train it again")
    if model.config.num_labels != 1:
        raise InputError(f"{path}: a reward model has one output, this one has {model.config.num_labels}")
    return model.eval().requires_grad_(False)


Scores = Callable[[Sequence[Sequence[int]]], Tensor]
"""Scores (B,) of B whole conversations, each as token ids."""


def classifier_scores(model: Any, dtype: torch.dtype, pad_id: int) -> Scores:
    """A separate reward model's scores; conversations are padded on the right, as in its training."""

    def scores(rows: Sequence[Sequence[int]]) -> Tensor:
        ids, mask = right_padded(rows, pad_id, model.device)
        with torch.no_grad(), torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return pooled_scores(model, ids, mask)

    return scores


def trunk_scores(models: PpoModels, pad_id: int) -> Scores:
    """The scores of the reward adapter on the policy's own trunk."""

    def scores(rows: Sequence[Sequence[int]]) -> Tensor:
        laid_out = lay_out_rows(rows, pad_id, models.causal_lm.device, share=models.shares_prefixes)
        result: Tensor = models("score", sequences=laid_out).result
        return result

    return scores


def _add_reward_adapter(model: Any, folder: Path, name: str, hidden: int) -> nn.Linear:
    """Load a reward model's adapter under another name; returns its score head."""
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    check_files(folder)
    config = LoraConfig.from_pretrained(str(folder))
    config.modules_to_save = None
    config.task_type = "CAUSAL_LM"
    state = load_file(folder / "adapter_model.safetensors")
    heads = [key for key in state if key.endswith(SCORE_HEAD)]
    if len(heads) != 1:
        raise InputError(f"{folder}: expected one score head among its weights, found {len(heads)}; train reward again")
    head = nn.Linear(hidden, 1, bias=False)
    head.weight.data.copy_(state.pop(heads[0]))
    model.add_adapter(name, config)
    loaded = set_peft_model_state_dict(model, state, adapter_name=name)
    absent = [key for key in loaded.missing_keys if ".lora_" in key and f".{name}." in key]
    if loaded.unexpected_keys or absent:
        raise InputError(f"{folder}: does not fit the policy's layers ({(loaded.unexpected_keys or absent)[0]})")
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.data = parameter.data.float()
    return head


def _start_from_reward(value_head: nn.Linear, reward_head: nn.Linear, reward: RewardFolder) -> None:
    """The value predicts standardised scores, so its head starts as (score − mean) / std."""
    with torch.no_grad():
        value_head.weight.copy_(reward_head.weight / reward.std)
        value_head.bias.fill_(-reward.mean / reward.std)


def reward_folder(path: Path) -> RewardFolder:
    """What a reward stage published, from its manifest's figures."""
    figures = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["figures"]
    return RewardFolder(
        path,
        on_policy_trunk=figures["base"] == "sft",
        mean=float(figures["score_mean"]),
        std=max(float(figures["score_std"]), 1e-6),
    )


def initial_models(
    policy: Path,
    reward: RewardFolder | None,
    lora: LoraBlock | None,
    *,
    value: str | None,
    dtype: torch.dtype,
    temperature: float,
    trust_remote_code: bool = False,
) -> PpoModels:
    """The arrangement that the recipe asks for: a shared trunk with LoRA, separate models without."""
    options: dict[str, Any] = {
        "value": value,
        "dtype": dtype,
        "temperature": temperature,
        "trust_remote_code": trust_remote_code,
    }
    if lora is None:
        return load_separate_models(str(policy), reward, **options)
    return load_shared_trunk(str(policy), reward, lora, **options)
