from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from qsweep.engines.base import EngineConfig, Runner

if TYPE_CHECKING:
    from torch import Tensor

    from qsweep.hub.form import QuantizedModel
    from qsweep.spec import Compression
    from qsweep.store import Store


class OnnxRuntime(EngineConfig):
    """ONNX Runtime on the CPU, explicit quantize/dequantize (QDQ) with uint8 activations and int8 weights.

    Of weights that are quantized alone (`activation_bits: null`) linears read those of 8 bits and fewer packed, in
    blocks of 32 to 128 inputs, and round what they multiply in these to 8 bits; all others are made real.
    """

    preload: ClassVar[tuple[str, ...]] = ("qsweep.engines._onnx_table",)
    """The export's. Not onnxruntime: its import starts a thread, and takes no time."""
    engine: Literal["onnxruntime"] = "onnxruntime"
    device: Literal["cpu"] = "cpu"

    def available(self) -> str | None:
        from importlib.util import find_spec

        missing = [name for name in ("onnxruntime", "onnx", "onnxscript") if find_spec(name) is None]
        return f"`{missing[0]}` is not installed: `pip install {missing[0]}`" if missing else None

    def refuses(self, config: Compression) -> str | None:
        if config.quantize is None or config.quantize.weights_alone:
            return None
        reason = config.quantize.not_integer
        return f"ONNX Runtime's integer kernels cannot run it: {reason}; use `float`" if reason else None

    def lower(self, model: QuantizedModel, folder: Path, store: Store) -> None:
        from qsweep.engines._onnx import lower
        from qsweep.hub.accumulators import check_accumulators

        check_accumulators(model)
        lower(model, folder, store)

    def load(self, folder: Path) -> Runner:
        from qsweep.engines._onnxruntime import runner

        return runner(folder, self)

    def export(self, artifact: Path, out: Path) -> None:
        import onnx

        from qsweep.engines._onnx import complete

        onnx.save(complete(artifact), out / "model.onnx")

    def integer_macs(self, folder: Path, runner: Runner, inputs: Tensor) -> int:
        from qsweep.engines._onnxruntime import integer_macs

        return integer_macs(folder, self, inputs)
