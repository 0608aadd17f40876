"""How long rows may be for a model that looks its positions up in a table."""

from torch import nn
from transformers import PreTrainedModel

from align.errors import InputError

UNUSED_ROWS = 8
"""Tables have a few more rows than positions in some models: OPT leaves the first two of its table unused."""


def learned_positions(model: PreTrainedModel) -> int | None:
    """The positions that a model has learned an embedding of (GPT-2, OPT); None where positions are computed."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    sizes = (table.num_embeddings for table in tables if table is not model.get_input_embeddings())
    return positions if any(positions <= size <= positions + UNUSED_ROWS for size in sizes) else None


def check_length(model: PreTrainedModel, tokens: int, remedy: str) -> None:
    """Refuse rows that are longer than a model's table of positions: it would be read beyond its end.

    Raises:
        InputError: with the remedy that the caller names.
    """
    positions = learned_positions(model)
    if positions is not None and tokens > positions:
        raise InputError(
            f"model {model.config.name_or_path}: rows may become {tokens} tokens long, but the model has learned only "
            f"{positions} positions; {remedy}"
        )
