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
from qsweep.errors import did_you_mean

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
        """Raises DomainError, or PydanticCustomError for a config in the space that its model refuses."""
        self.raw = raw.model_dump(mode="json", exclude_defaults=True) if isinstance(raw, BaseModel) else raw
        self.adapter, self.path = adapter, path
        self.tree = self._typed(parse(self.raw, path))
        for config in corners(self.tree, _shown):
            try:
                adapter.validate_python(config)
            except ValidationError as error:
                raise _wrong(complaint_at(error, (path,) if path else (), self.raw, config)) from None

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
            except DomainError as error:
                keys = str(error).split("`")[1].split(".")
                raise _wrong((tuple(int(key) if key.isdigit() else key for key in keys), str(error))) from None

        return core_schema.with_info_plain_validator_function(
            check, serialization=core_schema.plain_serializer_function_ser_schema(lambda space: space.raw)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"description": "A config, any value of which may be {choice: [...]} or {range: [low, high]}."}


_WORDS = {
    r"^\w+ should\b": "must",
    r"^input was not a valid JSON value": "must be null, true, false, a number, text, a list or a mapping",
    r"a valid dictionary.*": "a mapping",
    r"a valid (tuple|list)": "a list",
    r"a valid string": "text",
    r"a valid boolean": "true or false",
    r"a valid integer": "an integer",
    r"a valid number": "a number",
}


Where = tuple[str | int, ...]
"""Keys and numbers that lead to a value."""


def complaint(error: ValidationError, path: str = "", content: Any = None) -> str:
    """The first thing a pydantic error complains of, in qsweep's words: path, what must hold, what came.

    `content`: what was validated, in which the path leads to what is wrong; None: as pydantic names it.
    """
    return complaint_at(error, (path,) if path else (), content, content)[1]


def complaint_at(error: ValidationError, path: Where, raw: Any, value: Any) -> tuple[Where, str]:
    """Where in `raw`, of which `value` is made by choosing in its domains, lies what is wrong; and the `complaint`."""
    first = error.errors()[0]
    if first["type"] == "search_space":
        return tuple(first["ctx"]["where"]), first["msg"]
    missing = first["type"] == "missing"
    found = first["loc"] if raw is None else _place(raw, value, first["loc"], missing=missing)
    place: Where = (*path, *found, *_discriminator(first))
    where = ".".join(map(str, place))
    if missing or first["type"] == "union_tag_not_found":
        return place, f"`{where}`: is required and was not given"
    if first["type"] == "unknown_key":
        key, known = first["ctx"]["key"], first["ctx"]["known"]
        where = ".".join(map(str, (*place, key)))
        there = f"there is no such key; there are {', '.join(f'`{name}`' for name in known)}"
        return (*place, key), f"`{where}`: {did_you_mean(there, key, known)} (got {_short(first['input'][key])})"
    if first["type"] == "union_tag_invalid":
        tag, tags = first["ctx"]["tag"], first["ctx"]["expected_tags"]
        said = did_you_mean(f"must be one of {tags}", tag, re.findall(r"'(.+?)'", tags))
        return place, f"`{where}`: {said} (got {_short(tag)})"
    if not where:  # the whole: what came is all of it
        return place, _must(first["msg"])
    if first["type"] == "model_attributes_type":  # a family: its members are told apart by one key
        key = "engine" if where.rpartition(".")[2] == "target" else "method"
        return place, f"`{where}`: must be a mapping such as {{{key}: …}} (got {_short(first['input'])})"
    said, got = _must(first["msg"]), first["input"]
    of_one = first["type"] in _OF_ONE and place[:1] in (("compress",), ("target",))
    if first["type"] == "literal_error":
        said = did_you_mean(said, got, re.findall(r"'(.+?)'", said))
    if of_one and isinstance(got, dict) and len(got) == 1:
        said = did_you_mean(said, next(iter(got)), ("choice", "range"))
    hint = "; several to choose from are written `{choice: [...]}`" if of_one and isinstance(got, list) else ""
    return place, f"`{where}`: {said} (got {_short(got)}){hint}"


_OF_ONE = {"int_type", "float_type", "string_type", "bool_type", "literal_error"}
"""What pydantic complains of where one value is wanted."""


def _wrong(complaint: tuple[Where, str]) -> PydanticCustomError:
    where, message = complaint
    return PydanticCustomError("search_space", "{message}", {"message": message, "where": list(where)})


def _place(raw: Any, value: Any, named: Where, *, missing: bool) -> Where:
    """The keys that lead through `raw` to what pydantic has `named` in `value`: it names members of families, too, and
    knows nothing of choices. `missing`: the last one is a key that there is not."""
    found: list[str | int] = []
    for number, key in enumerate(named):
        raw = _chosen(raw, value, found)
        here = range(len(value)) if isinstance(value, list | tuple) else value if isinstance(value, dict) else ()
        if key in here and isinstance(raw, dict | list | tuple):
            found.append(key)
            raw, value = raw[key], value[key]  # type: ignore[index]
        elif missing and number == len(named) - 1:
            found.append(key)
    if not missing:
        _chosen(raw, value, found)
    return tuple(found)


def _chosen(raw: Any, value: Any, found: list[str | int]) -> Any:
    """The option of `raw`, if that is a choice, that gives `value`; its place is added to `found`. Where nothing was
    chosen, `raw` is `value`."""
    while isinstance(raw, dict) and "choice" in raw and raw is not value:
        number = next(i for i, option in enumerate(raw["choice"]) if _gives(option, value))
        found += ["choice", number]
        raw = raw["choice"][number]
    return raw


def _gives(raw: Any, value: Any) -> bool:
    """Whether `value` can be made of `raw`."""
    if isinstance(raw, dict) and "choice" in raw:
        return any(_gives(option, value) for option in raw["choice"])
    if isinstance(raw, dict) and "range" in raw:
        return isinstance(value, int | float) and raw["range"][0] <= value <= raw["range"][1]
    if isinstance(raw, dict):
        return isinstance(value, dict) and list(raw) == list(value) and all(_gives(raw[key], value[key]) for key in raw)
    if isinstance(raw, list | tuple):
        same = isinstance(value, list | tuple) and len(raw) == len(value)
        return same and all(_gives(one, other) for one, other in zip(raw, value, strict=True))
    return raw is value or (type(raw) is type(value) and bool(raw == value))  # NaN is not equal to itself


def _discriminator(first: ErrorDetails) -> Where:
    """The field that names the method, where it is what is wrong."""
    return (first["ctx"]["discriminator"].strip("'"),) if first["type"].startswith("union_tag_") else ()


def _must(message: str) -> str:
    text = message.removeprefix("Value error, ")
    for theirs, ours in _WORDS.items():
        text = re.sub(theirs, ours, text)
    return text


def _short(value: Any, most: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"
