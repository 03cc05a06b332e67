from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from qsweep.config import members
from qsweep.quantize import Quantization
from qsweep.schema import json_schema
from qsweep.yamlfile import read_mapping

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(
    path for path in ROOT.glob("experiments/**/*.yaml") if not {"sweeps", "mlartifacts"} & set(path.parts)
)
SCHEMA = json_schema()
TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
    "integer": int, "number": (int, float),
}  # fmt: skip
KNOWN = {
    "$defs", "$ref", "$schema", "additionalProperties", "anyOf", "const", "default", "description", "enum",
    "exclusiveMaximum", "exclusiveMinimum", "items", "maxItems", "maximum", "minItems", "minimum", "oneOf",
    "pattern", "prefixItems", "properties", "propertyNames", "required", "title", "type",
}  # fmt: skip
"""What `fits` understands: all that the schema may use."""


def fits(value: Any, schema: Any) -> bool:
    """Whether a JSON Schema (of the few words that are used here) takes the value."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and not fits(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")]):
        return False
    kind = TYPES.get(schema.get("type", ""), object)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, (int, float))):
        return False
    return (
        ("const" not in schema or value == schema["const"])
        and ("enum" not in schema or value in schema["enum"])
        and ("anyOf" not in schema or any(fits(value, option) for option in schema["anyOf"]))
        and ("oneOf" not in schema or sum(fits(value, option) for option in schema["oneOf"]) == 1)
        and (not isinstance(value, str) or re.search(schema.get("pattern", ""), value) is not None)
        and (isinstance(value, bool) or not isinstance(value, int | float) or number_fits(value, schema))
        and (not isinstance(value, list) or list_fits(value, schema))
        and (not isinstance(value, dict) or mapping_fits(value, schema))
    )


def number_fits(value: float, schema: Any) -> bool:
    return (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
        and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
    )


def list_fits(value: list[Any], schema: Any) -> bool:
    kinds = schema.get("prefixItems") or [schema.get("items", True)] * len(value)
    length = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
    return length and all(fits(item, kind) for item, kind in zip(value, kinds, strict=True))


def mapping_fits(value: dict[str, Any], schema: Any) -> bool:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    return (
        set(schema.get("required", ())) <= set(value)
        and all(fits(item, known.get(key, others)) for key, item in value.items())
        and all(fits(key, schema.get("propertyNames", True)) for key in value)
    )


def words(schema: Any) -> set[str]:
    """Every keyword in the schema, names of properties and definitions left out."""
    if not isinstance(schema, dict):
        return set()
    found = set(schema)
    for key, value in schema.items():
        if key in ("properties", "$defs"):
            found |= {word for inner in value.values() for word in words(inner)}
        elif key not in ("default", "enum", "const"):
            found |= {word for inner in (value if isinstance(value, list) else [value]) for word in words(inner)}
    return found


def spec(**compress: Any) -> dict[str, Any]:
    return read_mapping(ROOT / "experiments" / "digits.yaml") | {"compress": compress}


def test_the_committed_schema_is_the_one_of_the_code() -> None:
    committed = json.loads((ROOT / "docs" / "spec.schema.json").read_text(encoding="utf-8"))
    assert committed == SCHEMA, "run `make schema`"


def test_the_schema_uses_only_words_that_the_check_in_this_file_understands() -> None:
    assert words(SCHEMA) <= KNOWN


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_experiment_fits_the_schema_and_points_to_it(path: Path) -> None:
    assert fits(read_mapping(path), SCHEMA)
    (pointer,) = re.findall(r"^# yaml-language-server: \$schema=(.+)$", path.read_text(encoding="utf-8"), re.M)
    assert (path.parent / pointer).samefile(ROOT / "docs" / "spec.schema.json")


@pytest.mark.parametrize(
    "quantize",
    [
        "{method: ptq}",
        "{method: ptq, weight_bits: {choice: [4, 8]}}",
        "{method: ptq, weight_bits: {range: [2, 8]}}",
        "{method: ptq, calibration_samples: {range: [128, 512], step: 128}}",
        "{method: qat, learning_rate: {range: [0.001, 0.1], log: true}}",
        "{choice: [null, {method: ptq, weight_bits: {choice: [4, {range: [6, 8]}]}}, {method: qat}]}",
    ],
)
def test_domains_fit_wherever_a_value_does(quantize: str) -> None:
    assert fits(spec(quantize=yaml.safe_load(quantize)), SCHEMA)


@pytest.mark.parametrize(
    "quantize",
    [
        "{weight_bits: 4}",
        "{method: magic}",
        "{method: ptq, epochs: 3}",
        "{method: ptq, weight_bits: 17}",
        "{method: ptq, weight_bits: {choice: []}}",
        "{method: ptq, weight_bits: {choice: [4, 17]}}",
        "{method: ptq, weight_bits: {range: [2, 17]}}",
        "{method: ptq, weight_bits: {range: [2]}}",
        "{method: ptq, weight_bits: {range: [2, 8], steps: 2}}",
        "{method: ptq, activation_scheme: {range: [0, 1]}}",
        "{choice: [{method: ptq, weight_bits: 17}]}",
    ],
)
def test_what_cannot_be_does_not_fit(quantize: str) -> None:
    assert not fits(spec(quantize=yaml.safe_load(quantize)), SCHEMA)


@pytest.mark.parametrize("timeout", ["90", "1h30m"])
def test_durations_fit_as_numbers_and_as_text(timeout: str) -> None:
    assert fits(spec() | {"search": {"timeout": yaml.safe_load(timeout)}}, SCHEMA)
    assert not fits(spec() | {"search": {"timeout": "soon"}}, SCHEMA)


def test_fields_are_described_by_their_docstrings() -> None:
    fields: list[tuple[type[BaseModel], str, str]] = [
        (cls, name, field.description)
        for cls in members(Quantization, "qsweep.quantize")  # type: ignore[type-abstract]
        for name, field in cls.model_fields.items()
        if field.description
    ]
    assert fields
    for cls, name, text in fields:
        assert SCHEMA["$defs"][cls.__name__]["properties"][name]["description"] == text
