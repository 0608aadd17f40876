"""Encoders of several families as rewards: float32 after the encoder, and the positions that they have."""

from typing import Any

import pytest
import torch
import transformers

from align.rl.classifier_reward import keep_head_in_float32, positions

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_labels": 1,
    "pad_token_id": 1,
}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
MODERN = {"global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}


@pytest.mark.parametrize(
    ("family", "options", "read"),
    [
        ("Bert", {"max_position_embeddings": 66}, 66),
        ("Roberta", {"max_position_embeddings": 66}, 64),
        ("XLMRoberta", {"max_position_embeddings": 66}, 64),
        ("MPNet", {"max_position_embeddings": 66}, 64),
        ("DebertaV2", DISENTANGLED, 512),
        ("ModernBert", MODERN, 8192),
        ("DistilBert", {"max_position_embeddings": 66}, 66),
    ],
)
def test_an_encoder_in_bf16_scores_in_float32_and_reads_as_many_tokens_as_it_says(
    family: str, options: dict[str, Any], read: int
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **options)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).to(torch.bfloat16).eval()
    keep_head_in_float32(model)
    assert positions(model) == read
    assert next(model.base_model.parameters()).dtype == torch.bfloat16
    ids = torch.randint(4, 50, (4, min(read, 80)))
    with torch.no_grad():
        scores = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert scores.dtype == torch.float32 and len(set(scores.flatten().tolist())) == 4
