"""A search space has the shape of the config it searches, with some values replaced by domains.

    quantize:
      choice:                                               # one of two methods,
        - {method: ptq, weight_bits: {choice: [4, 8]}}      # each with its own inner space
        - {method: qat, epochs: {range: [1, 4]}}

Every option and both ends of every range are validated when the spec is loaded, before anything runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Generic, TypeVar, get_args

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from qsweep.domains import (
    Choice,
    Domain,
    DomainError,
    Range,
    Suggest,
    assignments,
    corners,
    parse,
    ranges,
    resolve,
    swap,
)

__all__ = ["Choice", "Domain", "Range", "Space", "Suggest", "assignments", "complaint", "corners", "parse", "resolve"]

T = TypeVar("T")


_FEW = 64


def _shown(domain: Range) -> tuple[float, ...]:
    """The values that are looked at before anything runs: all where they are few whole numbers, as some between the
    ends may not be valid."""
    if domain.integer and domain.values is not None and len(domain.values) <= _FEW:
        return tuple(domain.values)
    return domain.low, domain.high, domain.between


class Space(Generic[T]):
    """A pydantic field type: `compress: Space[Compression]` takes a Compression with domains in it."""

    def __init__(self, raw: Any, adapter: TypeAdapter[T], path: str) -> None:
        """Raises DomainError, or ValidationError for a config in the space that its model refuses."""
        self.raw = raw.model_dump(mode="json", exclude_defaults=True) if isinstance(raw, BaseModel) else raw
        self.adapter, self.path = adapter, path
        self.tree = self._typed(parse(self.raw, path))
        for config in corners(self.tree, _shown):
            adapter.validate_python(config)

    def _typed(self, tree: Any) -> Any:
        """Make every range real or integer as its field is. What is neither stays as it is, to be refused so: `2.0` is
        no end for a range of integers."""
        for found in list(ranges(tree)):
            ends = isinstance(found.low, int) and isinstance(found.high, int)
            typed = replace(found, integer=False)
            if self._takes_fractions(tree, found):
                step = found.step if found.step is None else float(found.step)
                typed = replace(typed, low=float(found.low), high=float(found.high), step=step)
            elif ends and float(found.step or 1).is_integer():
                typed = replace(found, step=found.step if found.step is None else int(found.step), integer=True)
            tree = swap(tree, found, typed)
        return tree

    def _takes_fractions(self, tree: Any, found: Range) -> bool:
        real = replace(found, low=float(found.low), step=None, integer=False)
        tries = corners(tree, lambda domain: (real.between if domain is found else domain.low,))
        return all(self._valid(config) for config in tries)

    def _valid(self, config: Any) -> bool:
        try:
            self.adapter.validate_python(config)
        except ValidationError:
            return False
        return True

    def corners(self) -> Iterator[Any]:
        """Plain data of configs that together use every option and both ends of every range."""
        return corners(self.tree, lambda domain: (domain.low, domain.high))

    def configs(self) -> Iterator[T]:
        """The configs of `corners`."""
        return (self.adapter.validate_python(corner) for corner in self.corners())

    def sample(self, suggest: Suggest) -> T:
        """The config made of what `suggest(path, domain)` answers for each domain met."""
        return self.adapter.validate_python(resolve(self.tree, suggest, self.path))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Space) and (self.path, self.raw) == (other.path, other.raw)

    def __repr__(self) -> str:
        return f"Space({self.raw!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        adapter: TypeAdapter[Any] = TypeAdapter(get_args(source)[0])

        def check(raw: Any, info: core_schema.ValidationInfo) -> Space[Any]:
            path = info.field_name or ""
            try:
                return cls(raw.raw if isinstance(raw, Space) else raw, adapter, path)
            except ValidationError as error:
                message = complaint(error, path)
            except DomainError as error:
                message = str(error)
            raise PydanticCustomError("search_space", "{message}", {"message": message})

        return core_schema.with_info_plain_validator_function(
            check, serialization=core_schema.plain_serializer_function_ser_schema(lambda space: space.raw)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"description": "A config, any value of which may be {choice: [...]} or {range: [low, high]}."}


_WORDS = {
    r"^\w+ should\b": "must",
    r"a valid dictionary.*": "a mapping",
    r"a valid (tuple|list)": "a list",
    r"a valid string": "text",
    r"a valid boolean": "true or false",
    r"a valid integer": "an integer",
    r"a valid number": "a number",
}


def complaint(error: ValidationError, path: str = "") -> str:
    """The first thing a pydantic error complains of, in qsweep's words: path, what must hold, what came."""
    first = error.errors()[0]
    if first["type"] == "search_space":
        return first["msg"]
    where = ".".join(str(part) for part in (path, *first["loc"], _discriminator(first)) if part != "")
    if first["type"] in ("missing", "union_tag_not_found"):
        return f"`{where}`: is required and was not given"
    if first["type"] == "unknown_key":
        key, known = first["ctx"]["key"], first["ctx"]["known"]
        where = ".".join(filter(None, (where, str(key))))
        return f"`{where}`: there is no such key; there are {known} (got {_short(first['input'][key])})"
    if first["type"] == "union_tag_invalid":
        return f"`{where}`: must be one of {first['ctx']['expected_tags']} (got {_short(first['ctx']['tag'])})"
    if not where:  # the whole: what came is all of it
        return _must(first["msg"])
    if first["type"] == "model_attributes_type":  # a family: its members are told apart by one key
        key = "engine" if where.rpartition(".")[2] == "target" else "method"
        return f"`{where}`: must be a mapping such as {{{key}: …}} (got {_short(first['input'])})"
    return f"`{where}`: {_must(first['msg'])} (got {_short(first['input'])})"


def _discriminator(first: ErrorDetails) -> str:
    """The field that names the method, where it is what is wrong."""
    return first["ctx"]["discriminator"].strip("'") if first["type"].startswith("union_tag_") else ""


def _must(message: str) -> str:
    text = message.removeprefix("Value error, ")
    for theirs, ours in _WORDS.items():
        text = re.sub(theirs, ours, text)
    return text


def _short(value: Any, most: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"
