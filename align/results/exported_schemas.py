"""The parquet columns of each exported data set."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS: dict[str, dict[str, str]] = {
    "preferences": {
        "id": "text",
        **dict.fromkeys(("prompt", "chosen", "rejected"), "messages"),
        **dict.fromkeys(("probability", "margin"), "number"),
        **dict.fromkeys(("source", "category"), "text"),
        **dict.fromkeys(("judged_by", "revised_by"), "texts"),
        **dict.fromkeys(("chosen_provenance", "rejected_provenance", "judge_provenance"), "provenance"),
    },
    "sft": {
        "id": "text",
        "messages": "messages",
        "source": "text",
        **dict.fromkeys(("revised_by", "judged_by"), "texts"),
        "p_better": "number",
        **dict.fromkeys(("provenance", "judge_provenance"), "provenance"),
    },
    "revisions": {
        "id": "text",
        **dict.fromkeys(("prompt", "completion"), "messages"),
        "original": "text",
        "rounds": "rounds",
        "p_better": "number",
        **dict.fromkeys(("split", "category"), "text"),
        **dict.fromkeys(("revised_by", "judged_by"), "texts"),
        **dict.fromkeys(("original_provenance", "critique_provenance", "provenance", "judge_provenance"), "provenance"),
    },
}
"""Columns by data set, in order, each with the name of its type in `_column_types`."""


def schema_of(name: str) -> "pa.Schema":
    """The schema of a data set. pyarrow is imported here, because only an export needs it."""
    import pyarrow as pa

    types = _column_types()
    return pa.schema({column: types[kind] for column, kind in COLUMNS[name].items()})


def _column_types() -> dict[str, "pa.DataType"]:
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    provenance = {
        **dict.fromkeys(("stage", "step", "engine", "model", "model_digest", "model_revision"), text),
        "verified": pa.bool_(),
        "server_says": text,
        "precision": text,
        "temperature": number,
        "top_p": number,
        "max_new_tokens": pa.int64(),
        **dict.fromkeys(("settings", "constitution", "constitution_digest"), text),
        "seed": pa.int64(),
        "recipe_seed": pa.int64(),
    }
    rounds = {
        "round": pa.int64(),
        **dict.fromkeys(("principle", "completion", "critique", "revision"), text),
        **dict.fromkeys(("finish_reason", "critique_finish_reason"), text),
        **dict.fromkeys(("critique_seed", "revision_seed"), pa.int64()),
        **dict.fromkeys(("evidence", "cited"), pa.list_(text)),
    }
    return {
        "text": text,
        "texts": pa.list_(text),
        "number": number,
        "messages": pa.list_(pa.struct({"role": text, "content": text})),
        "rounds": pa.list_(pa.struct(rounds)),
        "provenance": pa.struct(provenance),
    }
