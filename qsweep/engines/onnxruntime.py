from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qsweep.engines._on_onnx import OnOnnx, no_kernels_for
from qsweep.engines.base import Runner

if TYPE_CHECKING:
    from torch import Tensor

    from qsweep.spec import Compression
    from qsweep.tasks._parts import Parts


class OnnxRuntime(OnOnnx):
    """ONNX Runtime on the CPU, explicit quantize/dequantize (QDQ) with uint8 activations and int8 weights.

    Of weights that are quantized alone (`activation_bits: null`) linears read those of 8 bits and fewer packed, in
    blocks of 32 to 128 inputs, and round what they multiply in these to 8 bits; all others are made real.
    """

    engine: Literal["onnxruntime"] = "onnxruntime"

    def available(self) -> str | None:
        from importlib.util import find_spec

        missing = [name for name in ("onnxruntime", "onnx", "onnxscript") if find_spec(name) is None]
        return f"`{missing[0]}` is not installed: `pip install {missing[0]}`" if missing else None

    def refuses(self, config: Compression) -> str | None:
        reason = no_kernels_for(config.quantize)
        return f"ONNX Runtime's integer kernels cannot run it: {reason}" if reason else None

    def load(self, folder: Path) -> Runner:
        from qsweep.engines._onnxruntime import runner

        return runner(folder, self)

    def export(self, artifact: Path, out: Path, parts: Mapping[str, Parts] | None = None) -> None:
        import onnx

        from qsweep.engines._onnx import complete
        from qsweep.engines._onnx_parts import with_parts

        content = complete(artifact)
        with_parts(content, parts or {})
        onnx.save(content, out / "model.onnx")

    def integer_macs(self, folder: Path, runner: Runner, inputs: Tensor) -> int:
        from qsweep.engines._onnxruntime import integer_macs

        return integer_macs(folder, self, inputs)
