"""Loads the models of a PPO run from the SFT policy and the reward model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from align.errors import InputError, first_line
from align.models.compatibility import weights_fault
from align.models.heads import ValueHead, pooled_scores, state_width
from align.models.loading import load_causal_lm
from align.models.lora import add_lora
from align.models.padding import right_padded
from align.rl.models import PpoModels
from align.rl.separate_models import SeparateModels
from align.rl.sequences import lay_out_rows
from align.rl.settings import OUTPUT_ADAPTED
from align.rl.shared_trunk import SharedTrunk
from align.run.damaged_files import check_files
from align.settings.blocks import LoraBlock

SCORE_HEAD = "score.weight"


@dataclass(frozen=True)
class RewardFolder:
    """A reward stage's results: `model/`, and `adapter/` if it was trained with LoRA.

    Args:
        on_policy_trunk: it was trained from the same weights as the policy starts from.
        mean, std: of its scores on held-out pairs.
    """

    path: Path
    on_policy_trunk: bool
    mean: float
    std: float

    @property
    def shares_trunk(self) -> bool:
        return self.on_policy_trunk and (self.path / "adapter").is_dir()


def load_models(
    policy: str | Path,
    reward: RewardFolder | None,
    lora: LoraBlock | None,
    *,
    value: str | None,
    dtype: torch.dtype,
    temperature: float,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PpoModels:
    """Load a shared trunk, or separate models if `lora` is None.

    A value adapter or model starts as the reward model, in standardised scores, if that was trained from the same
    weights. Otherwise a value adapter starts untrained, and a value model as a copy of the policy.

    Args:
        policy: the model to train, which is the reference too: a folder, or a hub id with its `revision`.
        value: 'adapter' (without LoRA, a separate model), 'head' (on the policy's hidden states), or None for methods
            without values.
        dtype: of all computation and of frozen weights; whatever is trained stays float32.
    """
    load = partial(_load_policy, policy, trust_remote_code=trust_remote_code, revision=revision)
    if lora is None:
        trained = load(torch.float32)
        value_head = ValueHead(state_width(trained)) if value is not None else None
        backbone = None
        if value == "adapter" and value_head is not None:
            backbone = _value_backbone(load, reward, value_head, trust_remote_code)
        reference = load(dtype)
        return SeparateModels(trained, backbone, value_head, reference, temperature=temperature, compute_dtype=dtype)
    model = add_lora(load(dtype), lora, adapter_name="policy")
    _require_plain_output(model)
    reward_head = _add_reward_adapter(model, reward, "reward") if reward is not None and reward.shares_trunk else None
    value_head = ValueHead(state_width(model.get_base_model())) if value is not None else None
    if value == "adapter" and reward_head is None:
        add_lora(model, lora, adapter_name="value")
    elif value == "adapter" and reward is not None and reward_head is not None and value_head is not None:
        _add_reward_adapter(model, reward, "value")
        _start_from_reward(value_head, reward_head, reward)
    value_adapter = value == "adapter"
    return SharedTrunk(
        model, value_head, reward_head, value_adapter=value_adapter, temperature=temperature, compute_dtype=dtype
    )


def _value_backbone(
    load: Callable[[torch.dtype], Any], reward: RewardFolder | None, value_head: nn.Linear, trust_remote_code: bool
) -> nn.Module:
    """The backbone that a separate value model starts from; makes the head match it."""
    if reward is None or not reward.on_policy_trunk:
        copy: nn.Module = load(torch.float32).base_model
        return copy
    classifier = load_classifier(reward.path / "model", torch.float32, trust_remote_code=trust_remote_code)
    _start_from_reward(value_head, classifier.score, reward)
    backbone: nn.Module = classifier.base_model
    return backbone


def _load_policy(
    path: str | Path, dtype: torch.dtype, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    return load_causal_lm(str(path), dtype, revision=revision, trust_remote_code=trust_remote_code)


def _require_plain_output(model: Any) -> None:
    """Refuse an adapter on the output layer: log-probs are products with its weight, so the adapter would not train."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    output = model.get_output_embeddings()
    if isinstance(output, BaseTunerLayer):
        name = next(name for name, module in model.get_base_model().named_modules() if module is output)
        raise InputError(OUTPUT_ADAPTED.format(name=name.rpartition(".")[2]))


def load_classifier(path: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """Load a frozen sequence classifier with a single output.

    Raises:
        InputError: it cannot be loaded, its weights do not fit its config, or it has several outputs.
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
        raise InputError(f"{path}: a reward model must have one output, but this one has {model.config.num_labels}")
    return model.eval().requires_grad_(False)


Scores = Callable[[Sequence[Sequence[int]]], Tensor]
"""Maps B whole conversations, each as token ids, to (B,) scores."""


def classifier_scores(model: Any, dtype: torch.dtype, pad_id: int) -> Scores:
    """Scores by a separate reward model. Conversations are padded on the right, as in its training."""

    def scores(rows: Sequence[Sequence[int]]) -> Tensor:
        ids, mask = right_padded(rows, pad_id, model.device)
        with torch.no_grad(), torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return pooled_scores(model, ids, mask)

    return scores


def trunk_scores(models: PpoModels, pad_id: int) -> Scores:
    """Scores by the reward adapter on the policy's trunk."""

    def scores(rows: Sequence[Sequence[int]]) -> Tensor:
        laid_out = lay_out_rows(rows, pad_id, models.causal_lm.device, share=models.shares_prefixes)
        result: Tensor = models("score", sequences=laid_out).result
        return result

    return scores


def _add_reward_adapter(model: Any, reward: RewardFolder, name: str) -> nn.Linear:
    """Load a reward model's adapter under the given name; returns its score head."""
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    folder = reward.path / "adapter"
    check_files(folder)
    config = LoraConfig.from_pretrained(str(folder))
    config.modules_to_save = None
    config.task_type = "CAUSAL_LM"
    state = load_file(folder / "adapter_model.safetensors")
    heads = [key for key in state if key.endswith(SCORE_HEAD)]
    if len(heads) != 1:
        raise InputError(f"{folder}: expected one score head among its weights, found {len(heads)}; train reward again")
    weight = state.pop(heads[0])
    head = nn.Linear(weight.shape[1], 1, bias=False)
    head.weight.data.copy_(weight)
    model.add_adapter(name, config)
    loaded = set_peft_model_state_dict(model, state, adapter_name=name)
    misfits = [key for key in loaded.missing_keys if ".lora_" in key and f".{name}." in key]
    if misfits := [*loaded.unexpected_keys, *misfits]:
        raise InputError(f"{folder}: does not fit the policy's layers ({misfits[0]}); train reward again")
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.data = parameter.data.float()
    return head


def _start_from_reward(value_head: nn.Linear, reward_head: nn.Linear, reward: RewardFolder) -> None:
    """Set the value head to (score − mean) / std, because the value predicts standardised scores."""
    with torch.no_grad():
        value_head.weight.copy_(reward_head.weight / reward.std)
        value_head.bias.fill_(-reward.mean / reward.std)


def reward_folder(path: Path) -> RewardFolder:
    """Read a reward stage's results; base, mean and std come from its manifest's figures."""
    figures = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["figures"]
    return RewardFolder(
        path,
        on_policy_trunk=figures["base"] == "sft",
        mean=float(figures["score_mean"]),
        std=max(float(figures["score_std"]), 1e-6),
    )
