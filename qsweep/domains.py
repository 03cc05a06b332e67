"""Domains: what may stand in a config in place of a value, and how a tree of them is walked.

    {choice: [4, 6, 8]}                          one of some options, which may hold domains themselves
    {range: [1.0e-4, 1.0e-1], log: true}         numbers from low to high, both included
    {range: [8, 64], step: 8}

A *tree* is plain data (mappings, lists, scalars) with `Choice` and `Range` objects in it. Every domain has a path that
is its own: below an option that is not a plain value the path carries the option's label, as in
`quantize.qat.weight_bits`, so one name never stands for two domains.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

Label = bool | int | float | str | None


@dataclass(frozen=True)
class Choice:
    """One of some options. An option may itself hold domains."""

    options: tuple[Any, ...]
    labels: tuple[Label, ...]
    """What is suggested and recorded: the option itself, or the name of its method."""

    @property
    def ordered(self) -> bool:
        """Whether the options are numbers, so that a sampler may use their order."""
        return all(isinstance(label, int | float) and not isinstance(label, bool) for label in self.labels)

    @property
    def values(self) -> Sequence[Label]:
        """All labels, in the order of the spec."""
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
    def values(self) -> Sequence[int | float] | None:
        """All values where they can be counted, else None."""
        if self.integer:
            return range(int(self.low), int(self.high) + 1, int(self.step or 1))
        if self.step is None:
            return None
        return tuple(self._point(i) for i in range(self._last + 1))

    @property
    def between(self) -> int | float:
        """A value inside the range that shows whether the field takes what lies between the ends."""
        if self.integer or self.step is not None:
            return self.low + (self.step or 1)
        return self.low + (self.high - self.low) * 0.3819660112501051  # golden section: never a round number

    def snap(self, value: float) -> int | float:
        """The value of the range that is nearest, written as the range writes it: 0.3, not 0.30000000000000004."""
        if self.step is not None:
            return self._point(min(max(round((value - self.low) / self.step), 0), self._last))
        return round(value) if self.integer else value

    @property
    def _last(self) -> int:
        """Index of the last point of the grid that `step` makes."""
        low, high, step = (Decimal(str(number)) for number in (self.low, self.high, self.step))
        return int((high - low) / step)

    def _point(self, i: int) -> int | float:
        point = Decimal(str(self.low)) + i * Decimal(str(self.step))
        return int(point) if self.integer else float(point)


Domain = Choice | Range
Suggest = Callable[[str, Domain], Any]


class DomainError(ValueError):
    """A domain that cannot be read; the message says where, what must hold and what came."""


def parse(node: Any, path: str = "") -> Any:
    """Plain data as a tree: every `{choice: …}` and `{range: …}` becomes its domain. Raises DomainError."""
    if isinstance(node, list | tuple):
        return [parse(item, _join(path, i)) for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if "choice" in node:
        return _choice(node, path)
    if "range" in node:
        return _range(node, path)
    return {key: parse(value, _join(path, key)) for key, value in node.items()}


def _join(path: str, *parts: object) -> str:
    return ".".join(str(part) for part in (path, *parts) if part != "")


def _choice(node: dict[str, Any], path: str) -> Choice:
    if set(node) != {"choice"}:
        raise DomainError(f"`{path}`: a choice takes no other key (got `{_others(node, 'choice')}`)")
    given = node["choice"]
    if not isinstance(given, list | tuple) or not given:
        raise DomainError(f"`{path}.choice`: must be a list with at least one option (got {given!r})")
    options: list[Any] = []
    for i, raw in enumerate(given):
        option = parse(raw, _join(path, "choice", i))
        options += option.options if isinstance(option, Choice) else [option]
    for i, option in enumerate(options):
        if option in options[:i]:
            twin = options[options.index(option)]
            raise DomainError(f"`{path}.choice`: options must differ (got {_plain(twin)!r} and {_plain(option)!r})")
    return Choice(tuple(options), _labels(options))


def _labels(options: list[Any]) -> tuple[Label, ...]:
    """A scalar is its own label; others are named by their method, and numbered where that is not enough."""
    labels: list[Label] = [option if _scalar(option) else None for option in options]
    taken = {option for option in options if _scalar(option)}
    for i, option in enumerate(options):
        if not _scalar(option):
            name = _name(option)
            numbered = (name if k == 1 else f"{name}#{k}" for k in itertools.count(1))
            labels[i] = next(label for label in numbered if label not in taken)
            taken.add(labels[i])
    return tuple(labels)


def _scalar(option: Any) -> bool:
    return option is None or isinstance(option, bool | int | float | str)


def _name(option: Any) -> str:
    if isinstance(option, dict):
        names = [option[key] for key in ("method", "engine") if isinstance(option.get(key), str)]
        return names[0] if names else "option"
    return type(option).__name__.lower()


def _range(node: dict[str, Any], path: str) -> Range:
    if set(node) - {"range", "log", "step"}:
        unknown = _others(node, "range", "log", "step")
        raise DomainError(f"`{path}`: a range takes `log` and `step` and nothing else (got `{unknown}`)")
    ends, log, step = node["range"], node.get("log", False), node.get("step")
    numbers = isinstance(ends, list | tuple) and len(ends) == 2 and all(_number(end) for end in ends)
    if not numbers or not ends[0] < ends[1]:
        raise DomainError(f"`{path}.range`: must be two numbers, the lower first (got {ends!r})")
    if not isinstance(log, bool):
        raise DomainError(f"`{path}.log`: must be true or false (got {log!r})")
    if log and ends[0] <= 0:
        raise DomainError(f"`{path}.range`: must start above 0 where `log` is true (got {ends!r})")
    if log and step is not None:
        raise DomainError(f"`{path}.step`: must be left out where `log` is true (got {step!r})")
    if step is not None and not (_number(step) and 0 < step <= ends[1] - ends[0]):
        raise DomainError(f"`{path}.step`: must be above 0 and fit the range {ends!r} (got {step!r})")
    return Range(ends[0], ends[1], log, step, all(isinstance(value, int) for value in (*ends, step or 1)))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _others(node: dict[str, Any], *known: str) -> str:
    return ", ".join(sorted(str(key) for key in node if key not in known))


def _plain(node: Any) -> Any:
    """A tree as the plain data it was read from."""
    if isinstance(node, Choice):
        return {"choice": [_plain(option) for option in node.options]}
    if isinstance(node, Range):
        return {"range": [node.low, node.high]}
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(item) for item in node] if isinstance(node, list) else node


def ranges(tree: Any) -> Iterator[Range]:
    """Every range in the tree, in its order."""
    if isinstance(tree, Range):
        yield tree
    elif isinstance(tree, Choice):
        for option in tree.options:
            yield from ranges(option)
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from ranges(value)


def swap(tree: Any, old: Range, new: Range) -> Any:
    """The tree with this very `old` (not its equals) replaced."""
    if tree is old:
        return new
    if isinstance(tree, Choice):
        return replace(tree, options=tuple(swap(option, old, new) for option in tree.options))
    if isinstance(tree, dict):
        return {key: swap(value, old, new) for key, value in tree.items()}
    return [swap(item, old, new) for item in tree] if isinstance(tree, list) else tree


def resolve(tree: Any, suggest: Suggest, path: str = "") -> Any:
    """Plain data: every domain replaced by what `suggest(path, domain)` answers. Only the branch that was chosen
    is asked about."""
    if isinstance(tree, Choice):
        label = suggest(path, tree)
        option = tree.options[tree.labels.index(label)]
        return option if _scalar(option) else resolve(option, suggest, _join(path, label))
    if isinstance(tree, Range):
        return tree.snap(suggest(path, tree))
    if isinstance(tree, dict):
        return {key: resolve(value, suggest, _join(path, key)) for key, value in tree.items()}
    if isinstance(tree, list):
        return [resolve(item, suggest, _join(path, i)) for i, item in enumerate(tree)]
    return tree


def behind(tree: Any, plain: Any, path: str = "") -> Iterator[dict[str, Any]]:
    """Every combination of suggested values for which `resolve` may give what is in `plain`, which may have keys that
    the tree leaves to their defaults, and written out what is short in the tree (`gptq` for `{method: gptq}`)."""
    if isinstance(tree, Choice):
        for option, label in zip(tree.options, tree.labels, strict=True):
            yield from ({path: label} | found for found in behind(option, plain, _join(path, label)))
    elif isinstance(tree, Range):
        if _number(plain) and tree.low <= plain <= tree.high and tree.snap(plain) == plain:
            yield {path: plain}
    elif isinstance(tree, dict):
        if isinstance(plain, dict) and tree.keys() <= plain.keys():
            parts = [list(behind(value, plain[key], _join(path, key))) for key, value in tree.items()]
            for taken in itertools.product(*parts):
                yield {where: value for part in taken for where, value in part.items()}
    elif isinstance(tree, list):
        if isinstance(plain, list) and len(tree) == len(plain):
            yield from behind(dict(enumerate(tree)), dict(enumerate(plain)), path)
    elif tree == plain or (isinstance(tree, str) and isinstance(plain, dict)):
        yield {}


def assignments(tree: Any, path: str = "") -> Iterator[dict[str, Any]]:
    """Every combination of suggested values, each once, the last domain turning fastest.

    Raises ValueError on a range of real numbers without a step.
    """
    prefix: list[int] = []
    while True:
        taken: list[tuple[str, int, Sequence[Any]]] = []

        def follow(where: str, domain: Domain, taken: list[Any] = taken, prefix: list[int] = prefix) -> Any:
            if (values := domain.values) is None:
                raise ValueError(f"`{where}` is a range of real numbers: it has no list of values")
            index = prefix[len(taken)] if len(taken) < len(prefix) else 0
            taken.append((where, index, values))
            return values[index]

        resolve(tree, follow, path)
        yield {where: values[index] for where, index, values in taken}
        while taken and taken[-1][1] + 1 == len(taken[-1][2]):
            taken.pop()
        if not taken:
            return
        prefix = [index for _, index, _ in taken[:-1]] + [taken[-1][1] + 1]


def corners(tree: Any, points: Callable[[Range], tuple[float, ...]]) -> Iterator[Any]:
    """Plain data that together uses every option, and the `points` of every range, at least once."""
    if isinstance(tree, Choice):
        for option in tree.options:
            yield from corners(option, points)
    elif isinstance(tree, Range):
        yield from points(tree)
    elif isinstance(tree, dict | list):
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        columns = [list(corners(tree[key], points)) for key in keys]
        first = [column[0] for column in columns]
        rows = [first]
        for i, column in enumerate(columns):
            rows += [[*first[:i], value, *first[i + 1 :]] for value in column[1:]]
        for row in rows:
            yield dict(zip(keys, row, strict=True)) if isinstance(tree, dict) else row
    else:
        yield tree
