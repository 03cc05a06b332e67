"""A search space has the shape of the config it searches, with some values replaced by domains.

    quantize:
      choice:                                               # one of two methods,
        - {method: ptq, weight_bits: {choice: [4, 8]}}      # each with its own inner space
        - {method: qat, epochs: {range: [1, 4]}}

Every option and both ends of every range are validated when the spec is loaded, before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """One of some options. An option may itself hold domains."""

    options: tuple[Any, ...]
    labels: tuple[Any, ...]
    """What is suggested and recorded: the option itself, or the name of its method."""

    @property
    def ordered(self) -> bool:
        """Whether the options are numbers, so that a sampler may use their order."""
        return all(isinstance(label, int | float) and not isinstance(label, bool) for label in self.labels)

    @property
    def values(self) -> tuple[Any, ...]:
        return self.labels


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None
    integer: bool = False

    @property
    def values(self) -> tuple[int | float, ...] | None:
        """All values where they can be counted, else None."""
        if self.integer and not self.log:
            return tuple(range(int(self.low), int(self.high) + 1, int(self.step or 1)))
        if self.step is None or self.log:
            return None
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(self.low + i * self.step for i in range(count))


Domain = Choice | Range
Suggest = Callable[[str, Domain], Any]


class _Wrong(ValueError):
    """A domain that cannot be read; the message says what must hold."""


def parse(node: Any, path: str = "") -> Any:
    """Replace every `{choice: …}` and `{range: …}` in plain data by its domain."""
    if isinstance(node, list | tuple):
        return [parse(item, f"{path}.{i}") for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if "choice" in node:
        return _choice(node, path)
    if "range" in node:
        return _range(node, path)
    return {key: parse(value, f"{path}.{key}".lstrip(".")) for key, value in node.items()}


def _choice(node: dict[str, Any], path: str) -> Choice:
    if set(node) != {"choice"}:
        raise _Wrong(f"`{path}`: a choice takes no other key (got {sorted(set(node) - {'choice'})})")
    options = node["choice"]
    if not isinstance(options, list | tuple) or not options:
        raise _Wrong(f"`{path}.choice`: must be a list with at least one option (got {options!r})")
    parsed = tuple(parse(option, path) for option in options)
    labels: list[Any] = []
    for option in parsed:
        label = option.get("method", option.get("engine", str(option))) if isinstance(option, dict) else option
        label = str(label) if isinstance(label, Choice | Range | list) else label
        if option is not None and label in labels and not isinstance(option, dict):
            raise _Wrong(f"`{path}.choice`: options must differ (got {option!r} twice)")
        twins = sum(str(seen).split("#")[0] == label for seen in labels)
        labels.append(f"{label}#{twins + 1}" if twins and isinstance(option, dict) else label)
    return Choice(parsed, tuple(labels))


def _range(node: dict[str, Any], path: str) -> Range:
    unknown = set(node) - {"range", "log", "step"}
    if unknown:
        raise _Wrong(f"`{path}`: a range takes `log` and `step` (got {sorted(unknown)})")
    ends, log, step = node["range"], node.get("log", False), node.get("step")
    numbers = isinstance(ends, list | tuple) and len(ends) == 2 and all(_number(end) for end in ends)
    if not numbers or not ends[0] < ends[1]:
        raise _Wrong(f"`{path}.range`: must be two numbers, the lower first (got {ends!r})")
    if not isinstance(log, bool):
        raise _Wrong(f"`{path}.log`: must be true or false (got {log!r})")
    if log and (ends[0] <= 0 or step is not None):
        raise _Wrong(f"`{path}`: a range with `log` must start above 0 and have no `step` (got {node!r})")
    if step is not None and not (_number(step) and 0 < step <= ends[1] - ends[0]):
        raise _Wrong(f"`{path}.step`: must be above 0 and fit the range (got {step!r})")
    integer = all(isinstance(value, int) for value in (*ends, step or 1))
    return Range(ends[0], ends[1], log, step, integer)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def resolve(node: Any, suggest: Suggest, path: str = "") -> Any:
    """Replace every domain by a suggested value. Only the branch that was chosen is asked about."""
    if isinstance(node, Choice):
        label = suggest(path, node)
        option = node.options[node.labels.index(label)]
        return resolve(option, suggest, f"{path}.{label}" if isinstance(option, dict) else path)
    if isinstance(node, Range):
        return suggest(path, node)
    if isinstance(node, dict):
        return {key: resolve(value, suggest, f"{path}.{key}".lstrip(".")) for key, value in node.items()}
    if isinstance(node, list):
        return [resolve(item, suggest, f"{path}.{i}") for i, item in enumerate(node)]
    return node


def assignments(tree: Any) -> Iterator[dict[str, Any]]:
    """Every combination of suggested values, in a fixed order. Raises ValueError on an uncountable range."""
    prefix: list[int] = []
    while True:
        taken: list[tuple[str, int, tuple[Any, ...]]] = []

        def follow(path: str, domain: Domain, taken: list[Any] = taken) -> Any:
            values = domain.values
            if values is None:
                raise ValueError(f"`{path}` is a range of real numbers: it has no list of values")
            index = prefix[len(taken)] if len(taken) < len(prefix) else 0
            taken.append((path, index, values))
            return values[index]

        resolve(tree, follow)
        yield {path: values[index] for path, index, values in taken}
        while taken and taken[-1][1] + 1 == len(taken[-1][2]):
            taken.pop()
        if not taken:
            return
        prefix = [index for _, index, _ in taken[:-1]] + [taken[-1][1] + 1]


def corners(node: Any, ends: Callable[[Range], tuple[float, ...]]) -> Iterator[Any]:
    """Configs that together use every option, and the `ends` of every range, at least once."""
    if isinstance(node, Choice):
        for option in node.options:
            yield from corners(option, ends)
    elif isinstance(node, Range):
        yield from ends(node)
    elif isinstance(node, dict | list):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        columns = [list(corners(node[key], ends)) for key in keys]
        first = [column[0] for column in columns]
        rows = [first]
        for i, column in enumerate(columns):
            rows += [first[:i] + [value] + first[i + 1 :] for value in column[1:]]
        for row in rows:
            yield dict(zip(keys, row, strict=True)) if isinstance(node, dict) else row
    else:
        yield node


def complaint(error: ValidationError, path: str = "") -> str:
    """The first thing a pydantic error complains of, in qsweep's words: path, what must hold, what came."""
    first = error.errors()[0]
    if first["type"] == "search_space":
        return str(first["msg"])
    where = ".".join(str(part) for part in (path, *first["loc"]) if part != "")
    message = first["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    if first["type"] == "extra_forbidden":
        message = "there is no such key; look at `qsweep schema` for the ones there are"
    if first["type"] == "missing":
        return f"`{where}`: is required and was not given"
    return f"`{where}`: {message} (got {first['input']!r})"


class Space(Generic[T]):
    """A pydantic field type: `compress: Space[Compression]` takes a Compression with domains in it."""

    def __init__(self, raw: Any, adapter: TypeAdapter[T], path: str) -> None:
        self.raw, self.adapter, self.path = raw, adapter, path
        self.tree = self._typed(parse(raw, path))
        for corner in self.corners():
            self.adapter.validate_python(corner)

    def _typed(self, tree: Any) -> Any:
        """Make a range written with integers real where its field takes real numbers."""
        if isinstance(tree, Range | Choice | dict | list):
            for found in [domain for domain in _ranges(tree) if domain.integer and domain.step is None]:
                half = found.low + 0.5

                def ends(domain: Range, found: Range = found, half: float = half) -> tuple[float, ...]:
                    return (half,) if domain is found else (domain.low,)

                if all(self._valid(corner) for corner in corners(tree, ends)):
                    tree = _swap(tree, found, replace(found, integer=False, low=float(found.low), high=float(found.high)))
        return tree

    def _valid(self, raw: Any) -> bool:
        try:
            self.adapter.validate_python(raw)
        except ValidationError:
            return False
        return True

    def corners(self) -> Iterator[Any]:
        """Plain data of configs that together use every option and both ends of every range."""
        return corners(self.tree, lambda domain: (domain.low, domain.high))

    def sample(self, suggest: Suggest) -> T:
        """The config made of what `suggest(path, domain)` answers for each domain met."""
        return self.adapter.validate_python(resolve(self.tree, suggest, self.path))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        adapter: TypeAdapter[Any] = TypeAdapter(get_args(source)[0])

        def check(raw: Any, info: core_schema.ValidationInfo) -> Space[Any]:
            path = info.field_name or ""
            try:
                return cls(raw, adapter, path)
            except ValidationError as error:
                message = complaint(error, path)
            except _Wrong as error:
                message = str(error)
            raise PydanticCustomError("search_space", "{message}", {"message": message})

        return core_schema.with_info_plain_validator_function(
            check, serialization=core_schema.plain_serializer_function_ser_schema(lambda space: space.raw)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"description": "A config, any value of which may be {choice: [...]} or {range: [low, high]}."}


def _ranges(node: Any) -> Iterator[Range]:
    if isinstance(node, Range):
        yield node
    elif isinstance(node, Choice):
        for option in node.options:
            yield from _ranges(option)
    elif isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _ranges(value)


def _swap(node: Any, old: Range, new: Range) -> Any:
    if node is old:
        return new
    if isinstance(node, Choice):
        return replace(node, options=tuple(_swap(option, old, new) for option in node.options))
    if isinstance(node, dict):
        return {key: _swap(value, old, new) for key, value in node.items()}
    return [_swap(item, old, new) for item in node] if isinstance(node, list) else node
