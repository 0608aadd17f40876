"""`align constitution schema`: the JSON schema that lets editors complete and check constitution files."""

import json
from typing import Any

from align.constitution.schema import ConstitutionFile


def constitution_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a constitution file.

    It covers keys, types, ranges and keys that need each other. References to missing names are only found by `check`.
    """
    schema = ConstitutionFile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Constitution"}


def schema_page() -> str:
    """The schema as JSON text."""
    return json.dumps(constitution_schema(), indent=2, ensure_ascii=False) + "\n"
