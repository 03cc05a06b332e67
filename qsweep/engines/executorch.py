from __future__ import annotations

from typing import Any, ClassVar, Literal

from qsweep.engines._one_file import OneFile


class ExecuTorch(OneFile):
    """ExecuTorch with XNNPACK, PyTorch's runtime for phones: one `model.pte` for ARM and x86, of the batch size given.

    Activations are int8 where a layer's result is quantized again; any other linear (the last one, those of attention)
    quantizes each row that it reads anew. What is measured is this machine's speed.
    """

    preload: ClassVar[tuple[str, ...]] = ("qsweep.engines._executorch_warm",)
    packages: ClassVar[tuple[str, ...]] = ("executorch",)
    file: ClassVar[str] = "model.pte"
    engine: Literal["executorch"] = "executorch"

    @property
    def _runtime(self) -> Any:
        from qsweep.engines import _executorch

        return _executorch
