from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from qsweep.engines.base import EngineConfig

if TYPE_CHECKING:
    from qsweep.hub.form import QuantizedModel
    from qsweep.quantize import Quantization
    from qsweep.store import Store


class OnOnnx(EngineConfig):
    """A runtime of the artifact in ONNX, on the CPU."""

    preload: ClassVar[tuple[str, ...]] = ("qsweep.engines._onnx_export",)
    """The export's. No runtime: the import of one starts threads, and takes no time."""
    device: Literal["cpu"] = "cpu"

    def lower(self, model: QuantizedModel, folder: Path, store: Store) -> None:
        from qsweep.engines._onnx import lower
        from qsweep.hub.accumulators import check_accumulators

        check_accumulators(model)
        lower(model, folder, store)


def no_kernels_for(quantize: Quantization | None) -> str | None:
    """Why the artifact cannot hold it, and what to do instead; None where it can."""
    from qsweep.quantize.base import Grids

    if quantize is None or quantize.weights_alone or (reason := quantize.not_integer) is None:
        return None
    instead = ", or quantize weights alone (`activation_bits: null`)" if isinstance(quantize, Grids) else ""
    return f"{reason}; use `float`{instead}"
