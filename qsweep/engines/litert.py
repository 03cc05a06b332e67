from __future__ import annotations

from typing import Any, ClassVar, Literal

from qsweep.engines._one_file import OneFile


class LiteRT(OneFile):
    """LiteRT (TensorFlow Lite), the runtime of Android, with XNNPACK: one `model.tflite` of the batch size given.

    Activations are int8 where a layer's result is quantized again; any other linear (the last one, those of attention)
    quantizes each row that it reads anew. What is measured is this machine's speed.
    """

    packages: ClassVar[tuple[str, ...]] = ("ai-edge-litert",)
    file: ClassVar[str] = "model.tflite"
    engine: Literal["litert"] = "litert"

    @property
    def _runtime(self) -> Any:
        from qsweep.engines import _litert

        return _litert
