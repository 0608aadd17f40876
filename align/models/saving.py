"""Saving models with their tokenizers, so that plain `from_pretrained` loads them."""

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from align.errors import first_line
from align.models.loading import stop_token_ids
from align.models.lora import dither, dithered, lora_delta


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    dtype: torch.dtype,
    *,
    adapter_name: str = "default",
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `directory/model`, which plain `from_pretrained` loads, and the adapter, if any, to `directory/adapter`.

    An adapter is merged in fp32, and the sums are cast to `dtype`. The cast to bf16 is dithered, so that rounding does
    not erase a small adapter. `model` itself is not changed. Call this in one process only.

    Args:
        state_dict: the whole state, needed where `model` holds only a shard (FSDP, ZeRO-3).
    """
    state = dict(state_dict if state_dict is not None else model.state_dict())
    base: Any = model
    if isinstance(model, PeftModel):
        _save_adapter(model, state, directory / "adapter", adapter_name)
        state = merged_state(model, state, adapter_name)
        base = model.get_base_model()
    is_merged = base is not model
    plain = _plain_copy(base, {name: _cast(tensor, dtype, is_merged) for name, tensor in state.items()})
    if plain.can_generate():
        plain.generation_config = _generation_config(base, tokenizer)
    plain.config.pad_token_id = tokenizer.pad_token_id
    text_config = plain.config.get_text_config()
    if getattr(text_config, "output_router_logits", False):
        text_config.output_router_logits = False  # TRL's doing: with it, decoding with a cache fails
    plain.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")


def merged_state(model: PeftModel, state: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """The base model's state with one adapter merged in fp32: W + (alpha / r) B A (Hu et al. 2021).

    Layers that are trained in full beside the adapter (a score head) come from the adapter's copy.
    """
    deltas = _deltas(model, state, adapter_name)
    merged: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key.removeprefix("base_model.model.")
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        if ".original_module." in name:
            own = key.replace(".original_module.", f".modules_to_save.{adapter_name}.")
            tensor = state.get(own, tensor)
            name = name.replace(".original_module.", ".")
        if key in deltas:
            tensor = tensor.float() + deltas[key]()
        merged[re.sub(r"\.base_layer(?=\.)", "", name)] = tensor
    return merged


def _deltas(model: PeftModel, state: Mapping[str, Tensor], adapter_name: str) -> dict[str, Callable[[], Tensor]]:
    """For each adapted weight, by its name in the state, the function that computes what the adapter adds to it."""
    deltas: dict[str, Callable[[], Tensor]] = {}
    for path, layer in model.named_modules():
        down, up = (state.get(f"{path}.lora_{factor}.{adapter_name}.weight") for factor in "AB")
        if isinstance(layer, LoraLayer) and down is not None and up is not None:
            weight = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
            deltas[f"{_base_path(path, layer)}.{weight}"] = partial(lora_delta, layer, down, up, adapter_name)
    return deltas


def _base_path(path: str, layer: Any) -> str:
    """The path of the module inside a layer of PEFT's. Experts have one layer around another for each weight."""
    while isinstance(layer, LoraLayer):
        path, layer = f"{path}.base_layer", layer.base_layer
    return path


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
    # PEFT keeps the targets as a set, whose order differs between processes.
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(directory)


def _portable(path: str | None) -> str | None:
    """A path inside the working directory relative to it; any other path unchanged."""
    if path and Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd()):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def _plain_copy(base: Any, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of `base`'s class and configuration with the given state, even where `base` is wrapped or sharded."""
    kind = next(kind for kind in type(base).__mro__ if not kind.__name__.startswith("FSDP"))
    with torch.device("meta"):
        plain = kind(copy.deepcopy(base.config))
    _, unknown = plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    lacking = [name for name, parameter in plain.named_parameters() if parameter.is_meta]
    if lacking or unknown:
        raise ValueError(f"the state does not fit the model: it lacks {lacking[:3]} and also has {unknown[:3]}")
    return plain


def _cast(tensor: Tensor, dtype: torch.dtype, is_merged: bool) -> Tensor:
    """Cast floats on the CPU. A merged model's float32 is dithered to bf16; numbers that bf16 can represent stay."""
    tensor = tensor.detach().cpu()
    if is_merged and dtype == torch.bfloat16 and tensor.dtype == torch.float32:
        return dithered(tensor, dither(tensor.numel(), tensor.device))
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    config.eos_token_id = list(stop_token_ids(model, tokenizer))
    config.pad_token_id = tokenizer.pad_token_id
    return _valid(config)


def _valid(config: GenerationConfig) -> GenerationConfig:
    """The configuration in a form that transformers saves.

    Older models, Llama 2 among them, set a temperature or top_p without `do_sample`, which is now an error. They meant
    to sample. Of a configuration with other faults only the token ids are kept.
    """
    for candidate in (config, _sampling(config)):
        try:
            candidate.validate(strict=True)
        except ValueError as error:
            fault = first_line(error)
        else:
            return candidate
    warnings.warn(f"generation_config.json: only its token ids are kept, as it is not valid ({fault})", stacklevel=2)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**ids)


def _sampling(config: GenerationConfig) -> GenerationConfig:
    changed = copy.deepcopy(config)
    changed.do_sample = True
    return changed
