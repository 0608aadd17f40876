"""Loading language models and their tokenizers, and choosing their dtype and device."""

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align.data.chat import end_of_turn_ids
from align.errors import InputError, first_line
from align.models.compatibility import vocabulary_fault, weights_fault
from align.models.sources import resolve_model
from align.run.processes import number_in_environment, on_cpu

CLASSIFIER = "ForSequenceClassification"
"""The suffix of the names of transformers' classifiers."""


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of matrix products for 'auto', 'bf16' or 'fp32'.

    'auto' is bf16 on GPUs that support it and on CPUs with AMX tiles, and fp32 elsewhere. A CPU that supports bf16 only
    in AVX-512 (avx512_bf16) has no higher bf16 than fp32 throughput, and was measured at about half the speed.

    Raises:
        InputError: the precision has another name.
    """
    if precision == "auto":
        return torch.bfloat16 if _bf16_is_faster() else torch.float32
    try:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    except KeyError:
        raise InputError(f"model.precision: expected auto, bf16 or fp32, got {precision!r}") from None


def _bf16_is_faster() -> bool:
    if default_device().type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(getattr(torch.cpu, "get_capabilities", dict[str, bool])().get("amx_bf16"))  # missing in older torch


# On Hopper, PyTorch prefers cuDNN's attention, which takes about 60 ms to plan each new shape: every token of a growing
# cache, and every width of a micro-batch.
torch.backends.cuda.enable_cudnn_sdp(False)


def default_device() -> torch.device:
    """This process's device: its GPU, or the CPU where there is no GPU or `ACCELERATE_USE_CPU` is set."""
    if on_cpu():
        return torch.device("cpu")
    return torch.device("cuda", number_in_environment("LOCAL_RANK", 0))


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """A model's tokenizer, which pads on the left. Where it has no pad token, the end-of-sequence token becomes one.

    Raises:
        InputError: the tokenizer cannot be loaded, has no chat template or no possible pad token, or does not fit the
            model's vocabulary.
    """
    resolved = resolve_model(path, revision=revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolved, revision=revision, trust_remote_code=trust_remote_code, padding_side="left"
        )
    except ImportError as error:
        raise _lacking_package(path, error) from error
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
            raise InputError(f"model {path}: its tokenizer has no pad and no end token; set eos_token in its config")
        tokenizer.pad_token = tokenizer.eos_token
    config = _configuration(resolved, revision, trust_remote_code)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) if config else None
    if fault := vocabulary_fault(tokenizer, vocabulary):
        raise InputError(f"model {path}: {fault}; use the tokenizer that the weights were trained with")
    return tokenizer


def _configuration(resolved: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig | None:
    """The model's configuration, or None where it cannot be read: loading the model then reports the error."""
    try:
        return AutoConfig.from_pretrained(resolved, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _lacking_package(path: str, error: ImportError) -> InputError:
    """The error for a model whose code, or the format of whose weights, needs a package that is not installed."""
    said = " ".join(str(error).split())
    return InputError(f"model {path}: needs a package that is not installed ({said}); install it with pip")


def load_causal_lm(
    path: str, dtype: torch.dtype, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model from safetensors, on the CPU, in eval mode, with dropout permanently off.

    Raises:
        InputError: the model is not found, has no safetensors weights or weights that do not fit its configuration, or
            is a classifier.
    """
    resolved = resolve_model(path, revision=revision)
    config = _configuration(resolved, revision, trust_remote_code)
    if classifiers := [name for name in getattr(config, "architectures", None) or () if name.endswith(CLASSIFIER)]:
        raise InputError(
            f"model {path}: it is a {classifiers[0]}, which scores answers but writes none; give a language model, "
            "such as the output folder of sft, dpo or ppo"
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
    except ImportError as error:
        raise _lacking_package(path, error) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model {path}: cannot be loaded as a causal language model ({first_line(error)})") from error
    if fault := weights_fault(model.config, loading):
        raise InputError(f"model {path}: {fault}; give the folder of a complete causal language model")
    # TRL asks for the experts' router logits itself in training; elsewhere their loss would only cost time.
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
    zero_dropout(model)
    return model.eval()


def zero_dropout(model: nn.Module) -> None:
    """Turn all dropout off, even in training mode: before the first update, the ratio of policies must be 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end the assistant's turn, in order: the model's, the tokenizer's and the chat template's."""
    config = getattr(model, "generation_config", None)
    configured = config.eos_token_id if config is not None else None
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    ids.add(end_of_turn_ids(tokenizer)[-1])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))
