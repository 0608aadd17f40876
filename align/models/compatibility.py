"""Checks that a model's files fit each other: the weights its configuration, and the tokenizer its vocabulary."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.data.chat import end_of_turn_ids

UNUSED = re.compile(
    r"inv_freq$|masked_bias$|(attn|attention)\.bias$|position_ids$"
    r"|(^|\.)(mtp|v_head|visual|vision\w*|audio\w*|image\w*|multi_modal\w*|mm_\w+)\."
)
"""Weights that a text model may leave unused: buffers of older versions, and parts for other modalities or uses."""


def weights_fault(config: Any, loading: Mapping[str, Any]) -> str | None:
    """Why weights do not fit the configuration, by the loading info of `from_pretrained`; None where they do."""
    if missing := sorted(loading["missing_keys"]):
        return f"its weights lack {len(missing)} of the model's tensors, for example {missing[0]}"
    tied = {"lm_head.weight"} if getattr(config.get_text_config(), "tie_word_embeddings", False) else set()
    unused = sorted(name for name in loading["unexpected_keys"] if name not in tied and not UNUSED.search(name))
    if not unused:
        return None
    return f"its config.json leaves {len(unused)} of its weights unused, for example {unused[0]} (too few layers?)"


def vocabulary_fault(tokenizer: PreTrainedTokenizerBase, size: int | None) -> str | None:
    """Why text could get token ids for which the model has no embedding, or None where it cannot.

    Special tokens that the chat template does not use are ignored: some models have such tokens beyond the embedding.
    """
    added = tokenizer.added_tokens_decoder
    ids = [number for number in tokenizer.get_vocab().values() if number not in added or not added[number].special]
    used = max([*ids, *end_of_turn_ids(tokenizer), tokenizer.eos_token_id or 0, tokenizer.pad_token_id or 0])
    if size is None or used < size:
        return None
    return f"its tokenizer uses the token id {used}, but the model's vocabulary only has the ids 0 to {size - 1}"
