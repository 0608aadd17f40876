"""How a GPU runs PPO's passes over whole rows: without padding, and recomputing activations that would not fit."""

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from align.models.packed_attention import use_packed_attention
from align.rl.models import PpoModels

ACTIVATION_SHARE = 0.6
"""Share of the free memory that a micro-batch's activations may take before they are recomputed instead of kept."""


def prepare_gpu_passes(models: PpoModels, positions: int) -> None:
    """Choose how passes of at most so many positions run. Call it once the models are on their device.

    On a CPU, and where weights are sharded, everything stays as it is.
    """
    device = models.causal_lm.device
    if device.type != "cuda" or models.sharded:
        return
    with models.autocast():
        models.packs_rows = all([use_packed_attention(model, models.compute_dtype) for model in models.language_models])
    if activation_bytes(models.config, positions) > ACTIVATION_SHARE * torch.cuda.mem_get_info(device)[0]:
        for model in models.language_models:
            recompute_activations(model)


def activation_bytes(config: Any, positions: int) -> int:
    """Bytes that a decoder's layers keep in bf16 for a backward pass over so many positions, with frozen weights.

    Per layer and position about ten vectors of the hidden size (norms, queries, keys, values, attention's output, the
    residual stream) and four and a half of the MLP's size. Counted by hooks on the tensors that autograd saves, for
    models of 1B and 8B parameters: 115 and 212 kB.
    """
    config = config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return int(2 * (10 * config.hidden_size + 4.5 * inner) * config.num_hidden_layers * positions)


def recompute_activations(model: Any) -> None:
    """Keep only each layer's input for the backward pass, and run the layer again there (Chen et al. 2016)."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            # transformers only recomputes in training mode. The modules inside stay in eval mode, without dropout.
            layer.training = True
