"""Several tensors as one: between a model of the user's and its loss everything takes and gives one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

_OF_FLOAT32 = {torch.uint8, torch.int8, torch.int16, torch.bool, torch.float16, torch.bfloat16, torch.float32}
"""Types whose values float32 holds, all of them."""
_COUNTS = 1 << 24
"""Up to here float32 tells whole numbers apart."""


Place: TypeAlias = tuple[str | int, ...]
"""Keys of dicts and places in tuples that lead to a tensor; none: it is in neither."""


class NotParts(ValueError):
    """What came instead of tensors."""


class Part(NamedTuple):
    """One of the tensors, for one sample."""

    path: Place
    shape: tuple[int, ...]
    dtype: torch.dtype
    below: int | list[int | None] | None = None
    """What its numbers are below, all of them or those of each column: rows of a table."""

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path))

    def called(self, what: Literal["input", "output"]) -> str:
        """Its name elsewhere, where all have one: that of its key, or such as `input_0`."""
        return self.name if self.path and isinstance(self.path[0], str) else "_".join([what, *map(str, self.path)])


class Named(dict[str, Any]):
    """A dict whose values are attributes, too, as those of transformers' outputs are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class Parts:
    """How tensors (N, ...) lie side by side in one, (N, columns), and in which dicts and tuples they belong. One alone
    keeps its shape."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, value: object) -> Parts:
        """Those of `value`: a tensor, or tuples, lists and dicts of tensors, nested or not; None in these is left out.
        Raises NotParts for anything else."""
        found = list(tensors(value))
        if not found:
            raise NotParts("no tensor")
        parts = tuple(Part(path, tuple(value.shape[1:]), value.dtype) for path, value in found)
        names = [part.name for part in parts]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise NotParts(f"two that are called `{twice}`")
        return cls(parts)

    @property
    def several(self) -> bool:
        return len(self.parts) > 1

    @property
    def unnamed(self) -> bool:
        """Whether it is one tensor, in no dict or tuple."""
        return not self.parts[0].path

    @property
    def plain(self) -> bool:
        """Whether it is one such tensor, of real numbers."""
        return self.unnamed and self.parts[0].dtype.is_floating_point

    @property
    def widths(self) -> list[int]:
        """Columns of each, where they lie side by side."""
        return [prod(part.shape) for part in self.parts]

    def joined(self, value: Any, dtype: torch.dtype | None = None) -> Tensor:
        """`value`, which has these parts, as one tensor of `dtype`, by default the smallest that holds all values."""
        return self.side_by_side(dict(tensors(value)), dtype)

    def side_by_side(self, found: Mapping[Place, Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """The same of the tensors by their paths."""
        dtype = dtype or _common([value.dtype for value in found.values()])
        typed = [_typed(found[part.path], dtype) for part in self.parts]
        return torch.cat([_flat(value) for value in typed], 1) if self.several else typed[0]

    def apart(self, joined: Tensor, *, own_types: bool = True) -> Any:
        """What `joined` was made of, for any number of samples; in the types that it had, or all in that of `joined`.
        Of one tensor alone only whole numbers that have become real get their type back."""
        if not self.several:
            (part,) = self.parts
            whole = own_types and not part.dtype.is_floating_point and joined.is_floating_point()
            return _built([(part.path, joined.to(part.dtype) if whole else joined)])
        found, begin = [], 0
        for part, width in zip(self.parts, self.widths, strict=True):
            value = joined[:, begin : begin + width] if part.shape else joined[:, begin]
            if len(part.shape) > 1:
                value = value.reshape(-1, *part.shape)
            found.append((part.path, _typed(value, part.dtype) if own_types else value))
            begin += width
        return _built(found)

    def alike(self, other: Parts) -> bool:
        """Whether both are the same, but for the shape of one alone."""
        ours, theirs = ({part.path: part.shape * each.several for part in each.parts} for each in (self, other))
        return ours == theirs

    def rows(self) -> list[dict[str, Any]]:
        """As plain data, which `read` takes."""
        rows = []
        for part in self.parts:
            kind = str(part.dtype).removeprefix("torch.")
            row = {"path": list(part.path), "shape": list(part.shape), "dtype": kind}
            rows.append(row if part.below is None else row | {"below": part.below})
        return rows

    @classmethod
    def read(cls, rows: Sequence[Mapping[str, Any]]) -> Parts:
        return cls(
            tuple(
                Part(tuple(row["path"]), tuple(row["shape"]), getattr(torch, row["dtype"]), row.get("below"))
                for row in rows
            )
        )

    def __str__(self) -> str:
        told = (f"`{part.name}` {('N', *part.shape)}".replace("'", "") for part in self.parts)
        return ", ".join(told) if self.parts[0].path else "one tensor"


def tensors(value: object, path: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """The tensors in `value` and the paths to them. Raises NotParts, with what it is, for what is neither a tensor nor
    holds some."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, (*path, str(key)))
    elif isinstance(value, tuple | list):
        for place, item in enumerate(value):
            yield from tensors(item, (*path, place))
    elif value is not None or not path:
        where = f" at `{'.'.join(map(str, path))}`" if path else ""
        raise NotParts(f"{type(value).__name__}{where}")


def mapped(value: object, change: Callable[[Tensor], Any]) -> Any:
    """`value` with each tensor in it changed."""
    return _built([(path, change(found)) for path, found in tensors(value)])


def as_dicts(value: Any) -> Any:
    """`value` with dicts of Python's own, which other tools know."""
    if isinstance(value, Named):
        return {name: as_dicts(item) for name, item in value.items()}
    return tuple(map(as_dicts, value)) if isinstance(value, tuple) else value


def by_name(joined: Tensor, parts: Parts | None) -> dict[str, Tensor]:
    """The tensors that lie side by side in `joined`, in its type; without `parts` it alone, which has no name."""
    if parts is None:
        return {"": joined}
    values = tensors(parts.apart(joined, own_types=False))
    return {part.name: value for part, (_, value) in zip(parts.parts, values, strict=True)}


def countable(value: object) -> bool:
    """Whether float32 tells the whole numbers in `value` apart."""
    wide = [found for _, found in tensors(value) if found.dtype in (torch.int32, torch.int64) and found.numel()]
    return all(int(found.abs().max()) <= _COUNTS for found in wide)


def outside(value: Tensor, part: Part) -> tuple[float, int, int] | None:
    """The first of the numbers in `value` (N, ...) that is no row of the table that `part` is looked up in: it, its
    sample, and how many rows there are."""
    if part.below is None:
        return None
    found = value.reshape(len(value), -1)
    below = part.below if isinstance(part.below, list) else [part.below] * found.shape[1]
    most = torch.tensor([float("inf") if rows is None else rows for rows in below])
    wrong = ((found < 0) & most.isfinite()) | (found >= most)
    if not wrong.any():
        return None
    sample, column = wrong.nonzero()[0].tolist()
    return found[sample, column].item(), sample, int(most[column])


def _typed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`; where it is, no op that a tracer would see."""
    return value if value.dtype == dtype else value.to(dtype)


def _flat(value: Tensor) -> Tensor:
    """(N, ...) as (N, columns)."""
    return value.unsqueeze(1) if value.dim() == 1 else value.flatten(1)


def _common(dtypes: list[torch.dtype]) -> torch.dtype:
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return torch.float32 if _OF_FLOAT32.issuperset(dtypes) else torch.float64


def _built(found: list[tuple[Place, Any]]) -> Any:
    if not found[0][0]:
        return found[0][1]
    groups: dict[str | int, list[tuple[Place, Any]]] = {}
    for (first, *rest), value in found:
        groups.setdefault(first, []).append((tuple(rest), value))
    items = {key: _built(group) for key, group in groups.items()}
    if any(isinstance(key, str) for key in items):
        return Named({str(key): item for key, item in items.items()})
    return tuple(items.get(place) for place in range(1 + max(int(key) for key in items)))
