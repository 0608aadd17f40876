"""Tiny random models of every family that people train, small enough that all of them together take seconds.

Each family is a configuration class of transformers with few and narrow layers. What is peculiar to a family is kept:
tied and untied embeddings, shared key-value heads, sliding windows shorter than the test's rows, capped and scaled
logits, experts, linear attention, learned positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 300
"""A few more than the test tokenizer's."""

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_HEADS = {"head_dim": 8}
_WINDOW = {"sliding_window": 6}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}


@dataclass(frozen=True)
class Family:
    """A family: the `model_type` that transformers knows it by, and the settings that make it small."""

    name: str
    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    common: bool = True

    def config(self) -> Any:
        """A configuration of the family's own class."""
        given = {**(_COMMON if self.common else {}), **self.settings}
        return AutoConfig.for_model(self.model_type, **given)


def random_model(family: Family, seed: int = 0) -> PreTrainedModel:
    """A causal LM of the family in float32 with random weights, large enough that its logits differ visibly."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family.config(), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model


DECODERS = (
    Family("Llama 2", "llama", {"num_key_value_heads": 4}),
    Family("Llama 3", "llama", {"tie_word_embeddings": False, "rope_theta": 500000.0}),
    Family("Llama 3.2, tied", "llama", {"tie_word_embeddings": True}),
    Family("Qwen2.5", "qwen2", {"tie_word_embeddings": True}),
    Family("Qwen3", "qwen3", {**_HEADS, "tie_word_embeddings": True}),
    Family("Qwen3-MoE", "qwen3_moe", {**_HEADS, **_EXPERTS}),
    Family(
        "Qwen3-Next",
        "qwen3_next",
        {
            **_HEADS,
            **_EXPERTS,
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    Family(
        "Qwen3.5",
        "qwen3_5_text",
        {
            **_HEADS,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    Family("Mistral", "mistral", {**_HEADS, "sliding_window": 6}),
    Family("Mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("Gemma 2", "gemma2", {**_HEADS, **_WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
    Family("Gemma 3", "gemma3_text", {**_HEADS, **_WINDOW, "query_pre_attn_scalar": 8}),
    Family(
        "Gemma 4",
        "gemma4_text",
        {
            **_HEADS,
            **_WINDOW,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "final_logit_softcapping": 3.0,
        },
    ),
    Family(
        "Gemma 3 with vision",
        "gemma3",
        {
            "text_config": {**_COMMON, **_HEADS, **_WINDOW, "query_pre_attn_scalar": 8},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 297,
            "boi_token_index": 298,
            "eoi_token_index": 299,
        },
        common=False,
    ),
    Family("Phi-2", "phi", {"partial_rotary_factor": 0.5, "tie_word_embeddings": False}),
    Family("Phi-3", "phi3", {"num_key_value_heads": 4}),
    Family("Phi-4 mini", "phi3", {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    Family("SmolLM3", "smollm3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    Family("OLMo 2", "olmo2"),
    Family("OLMo 3", "olmo3", {**_WINDOW}),
    Family("GLM-4", "glm4", {**_HEADS, "partial_rotary_factor": 0.5}),
    Family("gpt-oss", "gpt_oss", {**_HEADS, **_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Family(
        "DeepSeek-V3",
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
    ),
    Family("Granite", "granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    Family("Cohere 2", "cohere2", {**_WINDOW, "logit_scale": 0.25}),
    Family("Falcon", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    Family("Falcon, ALiBi", "falcon", {"alibi": True, "multi_query": True}),
    Family("LFM2", "lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    Family("GPT-NeoX", "gpt_neox", {"tie_word_embeddings": False}),
    Family("GPT-2", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 48}),
    Family("OPT", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Family("OPT-350m", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    Family("Bloom", "bloom", {"n_layer": 2, "n_head": 4}),
)

_ENCODER = {**_COMMON, "num_labels": 1, "type_vocab_size": 2}

ENCODERS = (
    Family("BERT", "bert", _ENCODER, common=False),
    Family("RoBERTa", "roberta", _ENCODER, common=False),
    Family("DeBERTa v2", "deberta-v2", {**_ENCODER, "type_vocab_size": 0}, common=False),
    Family(
        "DeBERTa v3",
        "deberta-v2",
        {
            **_ENCODER,
            "type_vocab_size": 0,
            "relative_attention": True,
            "position_biased_input": False,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_buckets": 8,
        },
        common=False,
    ),
    Family(
        "ModernBERT",
        "modernbert",
        {**_ENCODER, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": 1},
        common=False,
    ),
)
