"""Language models and their tokenizers: load, adapt with LoRA, and save so that plain `from_pretrained` opens them."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align.data.chat import end_of_turn_ids
from align.errors import InputError, first_line
from align.models.compatibility import vocabulary_fault, weights_fault
from align.models.lora import dither, dithered
from align.models.sources import resolve_model
from align.run.processes import number_in_environment, on_cpu
from align.settings.blocks import LoraBlock

__all__ = [
    "add_lora",
    "compute_dtype",
    "default_device",
    "load_causal_lm",
    "load_tokenizer",
    "resolve_model",
    "save_model",
    "stop_token_ids",
    "zero_dropout",
]


CLASSIFIER = "ForSequenceClassification"
"""What the names of transformers' classifiers end with."""


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of matrix products for 'auto', 'bf16' or 'fp32'.

    'auto' is bf16 on a GPU that has it and on a CPU with AMX tiles, and fp32 elsewhere: a CPU whose AVX-512 alone knows
    bf16 (avx512_bf16) multiplies no more of it a cycle than of fp32, and was measured at about half the speed.

    Raises:
        InputError: another name.
    """
    if precision == "auto":
        return torch.bfloat16 if _gains_by_bf16() else torch.float32
    try:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    except KeyError:
        raise InputError(f"model.precision: expected auto, bf16 or fp32, got {precision!r}") from None


def _gains_by_bf16() -> bool:
    if default_device().type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not tell
    return bool(capabilities.get("amx_bf16"))


def default_device() -> torch.device:
    """This process's device: its GPU where there is one and `ACCELERATE_USE_CPU` is not set, else the CPU."""
    if on_cpu():
        return torch.device("cpu")
    return torch.device("cuda", number_in_environment("LOCAL_RANK", 0))


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """A model's tokenizer, padding on the left; where it has no pad token the end-of-sequence token serves.

    Raises:
        InputError: there is no tokenizer, it has no chat template, or nothing can serve as pad token.
    """
    resolved = resolve_model(path, revision=revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolved, revision=revision, trust_remote_code=trust_remote_code, padding_side="left"
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model {path}: its tokenizer cannot be loaded ({first_line(error)}); put the tokenizer's files "
            "(tokenizer.json, tokenizer_config.json) beside the weights"
        ) from error
    if not tokenizer.chat_template:
        raise InputError(
            f"model {path}: its tokenizer has no chat template; use the instruct version of the model, or put a "
            "chat_template.jinja beside the tokenizer"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"model {path}: its tokenizer has neither pad nor end token; set eos_token in its config")
        tokenizer.pad_token = tokenizer.eos_token
    config = _configuration(resolved, revision, trust_remote_code)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) if config else None
    if fault := vocabulary_fault(tokenizer, vocabulary):
        raise InputError(f"model {path}: {fault}; put the tokenizer beside the weights that they were trained with")
    return tokenizer


def _configuration(resolved: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig | None:
    """The model's configuration; None where it cannot be read, which loading the model tells."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            resolved, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError):
        return None
    return config


def load_causal_lm(
    path: str, dtype: torch.dtype, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model from safetensors, on the CPU, in eval mode, with dropout off for good.

    Raises:
        InputError: nothing is there, there are no safetensors weights, some weights are missing from them, or it is a
            classifier.
    """
    resolved = resolve_model(path, revision=revision)
    config = _configuration(resolved, revision, trust_remote_code)
    if classifiers := [name for name in getattr(config, "architectures", None) or () if name.endswith(CLASSIFIER)]:
        raise InputError(
            f"model {path}: a {classifiers[0]}, which scores answers and writes none; give a language model, such as "
            "the folder of sft, dpo or ppo beside a reward model's"
        )
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            resolved,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model {path}: cannot be loaded as a causal language model ({first_line(error)})") from error
    if fault := weights_fault(model.config, loading):
        raise InputError(f"model {path}: {fault}; give the folder of a whole causal language model")
    zero_dropout(model)
    return model.eval()


def zero_dropout(model: nn.Module) -> None:
    """Turn every dropout off, in training mode too: the ratio of policies must be 1 before the first update."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def add_lora(
    model: nn.Module, lora: LoraBlock, task_type: str = "CAUSAL_LM", adapter_name: str = "default"
) -> PeftModel:
    """Add an adapter beside the frozen weights; everything that trains is fp32, whatever the trunk's dtype.

    On a model that has adapters already this adds one more, which is not active until `set_adapter`. A classifier's
    score head (`task_type="SEQ_CLS"`) trains whole, with the adapter.

    Raises:
        InputError: `target_modules` names nothing in this model, or layers that are not linear.
    """
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, bias="none", task_type=task_type
    )
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
            peft_model = model
        else:
            peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    except ValueError as error:
        raise InputError(f"model.lora.target_modules: {first_line(error)}") from error
    for name, parameter in peft_model.named_parameters():
        if "lora_embedding_" in name:
            raise InputError("model.lora.target_modules: embeddings cannot be adapted; name linear layers")
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end the assistant's turn, sorted: the model's own, the tokenizer's, and the chat template's."""
    config = getattr(model, "generation_config", None)
    configured = config.eos_token_id if config is not None else None
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    ids.add(end_of_turn_ids(tokenizer)[-1])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    dtype: torch.dtype,
    *,
    adapter_name: str = "default",
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `directory/model`, which plain `from_pretrained` opens, and the adapter alone to `directory/adapter`.

    An adapter is merged in fp32 and the result cast to `dtype`, bf16 dithered so that a small adapter is not rounded
    away; `model` itself is not changed. Call it in one process.

    Args:
        state_dict: the whole state where `model` holds only a shard of it (FSDP, ZeRO-3); its own state otherwise.
    """
    state = dict(state_dict if state_dict is not None else model.state_dict())
    base: Any = model
    cast = _cast
    if isinstance(model, PeftModel):
        _save_adapter(model, state, directory / "adapter", adapter_name)
        state = merged_state(model, state, adapter_name)
        base = model.get_base_model()
        cast = _cast_dithered
    plain = _plain_copy(base, {name: cast(tensor, dtype) for name, tensor in state.items()})
    if plain.can_generate():
        plain.generation_config = _generation_config(base, tokenizer)
    plain.config.pad_token_id = tokenizer.pad_token_id
    plain.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")


def merged_state(model: PeftModel, state: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """The state of the model under the adapters with one adapter merged: W + (alpha / r) B A, in fp32 (Hu et al. 2021).

    Layers that train whole beside the adapter (a score head) take the adapter's copy.
    """
    prefix = "base_model.model."
    merged: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key.removeprefix(prefix)
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        if ".original_module." in name:
            own = name.replace(".original_module.", f".modules_to_save.{adapter_name}.")
            tensor = state.get(prefix + own, tensor)
            name = name.replace(".original_module.", ".")
        if name.endswith(".base_layer.weight"):
            tensor = tensor.float() + _delta(model, state, key.removesuffix(".base_layer.weight"), adapter_name)
        merged[name.replace(".base_layer.", ".")] = tensor
    return merged


def _delta(model: PeftModel, state: Mapping[str, Tensor], layer: str, adapter_name: str) -> Tensor | float:
    down = state.get(f"{layer}.lora_A.{adapter_name}.weight")
    up = state.get(f"{layer}.lora_B.{adapter_name}.weight")
    if down is None or up is None:
        return 0.0
    module = model.get_submodule(layer)
    delta = (up.float() @ down.float()) * module.scaling[adapter_name]
    return delta.T if module.fan_in_fan_out else delta


def _save_adapter(model: PeftModel, state: dict[str, Tensor], directory: Path, adapter_name: str) -> None:
    weights = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=False)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
        directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = copy.deepcopy(model.peft_config[adapter_name])
    config.inference_mode = True
    config.base_model_name_or_path = _portable(config.base_model_name_or_path)
    # PEFT keeps the targets as a set, whose order changes from one process to the next.
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(directory)


def _portable(path: str | None) -> str | None:
    """A path below the working folder, made relative to it; any other unchanged."""
    if path and Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd()):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def _plain_copy(base: Any, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of `base`'s class and configuration that holds `state`, whatever wraps or shards `base`."""
    kind = next(kind for kind in type(base).__mro__ if not kind.__name__.startswith("FSDP"))
    with torch.device("meta"):
        plain = kind(copy.deepcopy(base.config))
    _, unknown = plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    lacking = [name for name, parameter in plain.named_parameters() if parameter.is_meta]
    if lacking or unknown:
        raise ValueError(f"the state does not fit the model: it lacks {lacking[:3]} and has besides {unknown[:3]}")
    return plain


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().cpu().to(dtype) if tensor.is_floating_point() else tensor.detach().cpu()


def _cast_dithered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same; what is float32 and becomes bf16 is rounded by chance, which leaves a bf16 number as it is."""
    if dtype != torch.bfloat16 or tensor.dtype != torch.float32:
        return _cast(tensor, dtype)
    whole = tensor.detach().cpu()
    return dithered(whole, dither(whole.numel(), whole.device))


def _generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    config.eos_token_id = list(stop_token_ids(model, tokenizer))
    config.pad_token_id = tokenizer.pad_token_id
    return config
