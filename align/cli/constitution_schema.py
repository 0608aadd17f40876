"""The JSON schema of constitutions, with which editors complete the keys and check the values."""

import json
from typing import Any

from align.constitution.schema import ConstitutionFile


def constitution_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a constitution as written.

    It knows keys, types, ranges, and what goes together; names that name nothing are found by `check` alone.
    """
    schema = ConstitutionFile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Constitution"}


def schema_page() -> str:
    """The schema as text."""
    return json.dumps(constitution_schema(), indent=2, ensure_ascii=False) + "\n"
