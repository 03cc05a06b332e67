"""The JSON schema of a spec, for editors and other programs, made from the fields that validate it."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from qsweep.engines import Engine
from qsweep.spec import Compression, Spec

Schema = dict[str, Any]

_ABOUT = ("title", "description", "default")
_TAGS = ("method", "engine")


def json_schema() -> Schema:
    """The schema of a whole spec (JSON Schema 2020-12). Under `compress` and `target` any value may be a domain."""
    schema = Spec.model_json_schema()
    definitions: Schema = {name: _tagged(found) for name, found in schema.pop("$defs").items()}
    properties = schema["properties"]
    for name, field in (("compress", Compression), ("target", Engine)):
        inner = TypeAdapter(field).json_schema(ref_template="#/$defs/{model}")
        parts = inner.pop("$defs", {})
        if "properties" in inner:  # a model, not a union
            parts, inner = parts | {field.__name__: inner}, {"$ref": f"#/$defs/{field.__name__}"}
        definitions |= {part: _searched(_tagged(found)) for part, found in parts.items()}
        about = {key: value for key, value in properties[name].items() if key == "description"}
        properties[name] = _domain(_untagged(inner)) | about
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **_untagged(schema), "$defs": dict(sorted(_untagged(definitions).items()))}


def _tagged(model: Schema) -> Schema:
    """A member of a family must say which one it is, although the field has a default."""
    tags = [tag for tag in _TAGS if "const" in model.get("properties", {}).get(tag, {})]
    return model | {"required": sorted({*model.get("required", []), *tags})} if tags else model


def _untagged(node: Any) -> Any:
    """Without OpenAPI's `discriminator`, which JSON Schema does not know."""
    if isinstance(node, dict):
        return {key: _untagged(value) for key, value in node.items() if key != "discriminator"}
    return [_untagged(item) for item in node] if isinstance(node, list) else node


def _searched(model: Schema) -> Schema:
    """The model, each of its fields also a domain."""
    fields = model.get("properties", {}).items()
    return model | {"properties": {name: _domain(field) for name, field in fields}}


def _domain(field: Schema) -> Schema:
    """The field's schema, or a choice of such values, or a range of them where they are numbers."""
    if "const" in field:
        return field
    about = {key: value for key, value in field.items() if key in _ABOUT}
    plain = {key: value for key, value in field.items() if key not in _ABOUT}
    if isinstance(plain.get("additionalProperties"), dict):  # a mapping: each of its values too
        plain["additionalProperties"] = _domain(plain["additionalProperties"])
    numbers = [kind for kind in plain.get("anyOf", [plain]) if kind.get("type") in ("integer", "number")]
    options = [*plain.get("anyOf", [plain]), *(_range(kind) for kind in numbers)]
    return about | {"anyOf": [*options, _choice(options)]}


def _choice(options: list[Schema]) -> Schema:
    items = options[0] if len(options) == 1 else {"anyOf": options}
    return {
        "type": "object",
        "properties": {"choice": {"type": "array", "items": items, "minItems": 1}},
        "required": ["choice"],
        "additionalProperties": False,
        "description": "One of these.",
    }


def _range(number: Schema) -> Schema:
    return {
        "type": "object",
        "properties": {
            "range": {"type": "array", "items": number, "minItems": 2, "maxItems": 2},
            "log": {"type": "boolean", "default": False, "description": "Search evenly in the logarithm."},
            "step": {
                "type": "number",
                "exclusiveMinimum": 0,
                "description": "Only multiples of it above the lower end.",
            },
        },
        "required": ["range"],
        "additionalProperties": False,
        "description": "From the first to the second, both included.",
    }
