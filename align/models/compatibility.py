"""Whether a model's files fit each other: weights and configuration, tokenizer and vocabulary."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.data.chat import end_of_turn_ids

UNUSED = re.compile(
    r"inv_freq$|masked_bias$|(attn|attention)\.bias$|position_ids$"
    r"|(^|\.)(mtp|v_head|visual|vision\w*|audio\w*|image\w*|multi_modal\w*|mm_\w+)\."
)
"""Weights that a text model may leave unused: buffers of older versions, and parts for another use."""


def weights_fault(config: Any, loading: Mapping[str, Any]) -> str | None:
    """Why weights do not fit the configuration, by what `from_pretrained` tells of loading; None where they do."""
    if missing := sorted(loading["missing_keys"]):
        return f"its weights lack {len(missing)} of the model's tensors, among them {missing[0]}"
    tied = {"lm_head.weight"} if getattr(config.get_text_config(), "tie_word_embeddings", False) else set()
    unused = sorted(name for name in loading["unexpected_keys"] if name not in tied and not UNUSED.search(name))
    if not unused:
        return None
    return f"its config.json leaves {len(unused)} of its weights unused, among them {unused[0]} (has it fewer layers?)"


def vocabulary_fault(tokenizer: PreTrainedTokenizerBase, size: int | None) -> str | None:
    """Why text would be given token ids that the model has no embedding for; None where it cannot be.

    Special tokens that the chat template does not use never come up: some models have them beyond the embedding.
    """
    added = tokenizer.added_tokens_decoder
    ids = [number for number in tokenizer.get_vocab().values() if number not in added or not added[number].special]
    used = max([*ids, *end_of_turn_ids(tokenizer), tokenizer.eos_token_id or 0, tokenizer.pad_token_id or 0])
    if size is None or used < size:
        return None
    return f"its tokenizer has the token id {used}, and the model's vocabulary has {size} tokens, from 0"
