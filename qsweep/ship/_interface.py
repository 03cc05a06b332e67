"""What a loaded model takes and gives, and the one tensor of its artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from qsweep.errors import DataError
from qsweep.tasks._parts import Part, Parts, countable, mapped, outside


class Interface:
    """That of a manifest; where it says nothing, one tensor of real numbers, as it is."""

    def __init__(self, plain: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self._inputs, self._outputs = (
            Parts.read(plain[role]) if role in plain else None for role in ("inputs", "outputs")
        )

    def joined(self, inputs: Any) -> Tensor:
        """What the artifact takes. Raises DataError where `inputs` are not what the model takes."""
        if self._inputs is None:
            return _tensor(inputs, "inputs")
        found = {part.path: self._part(part, inputs) for part in self._inputs.parts}
        if len({len(value) for value in found.values()}) > 1:
            raise DataError(f"inputs must be as many in each tensor (got {[len(value) for value in found.values()]})")
        return self._inputs.side_by_side(found, torch.float32)

    def _part(self, part: Part, inputs: Any) -> Tensor:
        """That of `inputs`, by its path or, as MLflow hands them over, by its name; checked."""
        name = part.called("input")
        for key in (name,) if isinstance(inputs, Mapping) and name in inputs else part.path:
            try:
                if isinstance(key, str) and not isinstance(inputs, Mapping):  # of which PyTorch warns first
                    raise TypeError
                inputs = inputs[key]
            except (LookupError, TypeError):
                raise DataError(f"inputs must be {self._inputs} (there is no `{part.name}`)") from None
        said = f"`{part.name}`" if part.path else "inputs"
        value = _tensor(inputs, said, str(part.dtype).removeprefix("torch."))
        if not value.dim() or value.shape[1:] != part.shape:
            raise DataError(f"{said} must have the shape {['N', *part.shape]} (got {list(value.shape)})")
        if part.dtype.is_floating_point and not value.is_floating_point():
            raise DataError(f"{said} must be float32, preprocessed as the task does (got {value.dtype})")
        if not countable(value):
            raise DataError(f"{said} must be whole numbers up to 2^24, of which float32 holds all (got larger ones)")
        if value.is_floating_point() and not part.dtype.is_floating_point and not value.equal(value.floor()):
            raise DataError(f"{said} must be whole numbers (got others)")
        if (wrong := outside(value, part)) is not None:
            number, sample, rows = wrong
            raise DataError(
                f"{said} must be numbers of rows of a table, 0 to {rows - 1} (got {number:g} in sample {sample})"
            )
        return value

    def shown(self, outputs: Tensor, *, arrays: bool) -> Any:
        """The model's outputs, of those of its artifact."""
        found = self._outputs.apart(outputs, own_types=False) if self._outputs else outputs
        return mapped(found, lambda each: each.numpy()) if arrays else found


def has_tensors(inputs: Any) -> bool:
    """Whether there is a tensor in `inputs`, arrays otherwise."""
    if isinstance(inputs, Mapping):
        return any(map(has_tensors, inputs.values()))
    return isinstance(inputs, Tensor) or (isinstance(inputs, tuple | list) and any(map(has_tensors, inputs)))


def _tensor(inputs: object, name: str, type_name: str = "float32") -> Tensor:
    """An array, or what NumPy takes for one, as a tensor; copied where PyTorch cannot share its memory."""
    if isinstance(inputs, Tensor):
        return inputs
    try:
        array = numpy.require(inputs, requirements=["C", "W"])
        return torch.from_numpy(array)
    except (TypeError, ValueError, RuntimeError):
        kind = inputs.dtype if isinstance(inputs, numpy.ndarray) else type(inputs).__name__
        raise DataError(f"{name} must be a tensor or an array of {type_name} (got {kind})") from None
