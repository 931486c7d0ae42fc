"""The published schema of JSON reports, without room for keys that it does not describe."""

import json
from typing import Any

from jsonschema import Draft202012Validator

from d2l.io.resources import resource

PUBLISHED: dict[str, Any] = json.loads(resource("docs/report.schema.json").read_text(encoding="utf-8"))


def closed(schema: Any) -> Any:
    """Return a schema whose objects have the described keys only, but for those that say otherwise; conditions stay."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {key: value if key == "allOf" else closed(value) for key, value in schema.items()}
    described = schema.get("type") == "object" and "properties" in schema and "additionalProperties" not in schema
    return parts | ({"additionalProperties": False} if described else {})


VALIDATOR = Draft202012Validator(closed(PUBLISHED))


def validated(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document that follows the schema.

    Raises:
        jsonschema.ValidationError: it does not.
    """
    VALIDATOR.validate(document)
    return document
