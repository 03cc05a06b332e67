from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from qsweep.engines._on_onnx import OnOnnx, no_kernels_for
from qsweep.engines.base import Runner

if TYPE_CHECKING:
    from torch import Tensor

    from qsweep.quantize import Quantization
    from qsweep.spec import Compression
    from qsweep.tasks._parts import Parts


class OpenVINO(OnOnnx):
    """OpenVINO on the CPU: the artifact of `onnxruntime` on the kernels of oneDNN; bf16 where the processor has it.

    Biases are added in floating point, and sums behind convolutions to what has not been rounded: apart from these its
    integers are the reference's, as are all of rows that set their own grids. Weights that are quantized alone are read
    as by `onnxruntime`.
    """

    packages: ClassVar[tuple[str, ...]] = ("openvino",)
    export_note: ClassVar[str] = (
        'compile model.xml with what settings.json has for "CPU", `compile_model(model, "CPU", settings["CPU"])`: left '
        "to itself OpenVINO may compute in bf16. It takes batches of any size; reshaped to that of the target, "
        "`model.reshape`, it is as quick, and as near, as what was measured"
    )
    engine: Literal["openvino"] = "openvino"

    def refuses(self, config: Compression) -> str | None:
        reason = _reason(config.quantize)
        return f"OpenVINO's kernels cannot run it: {reason}" if reason else None

    def load(self, folder: Path) -> Runner:
        from qsweep.engines._openvino import OpenVINORunner

        return OpenVINORunner(folder, self)

    def export(self, artifact: Path, out: Path, parts: Mapping[str, Parts] | None = None) -> None:
        from qsweep.engines._openvino import write_ir

        write_ir(artifact, out, parts or {}, self)

    def integer_macs(self, folder: Path, runner: Runner, inputs: Tensor) -> int:
        from qsweep.engines._openvino import OpenVINORunner

        assert isinstance(runner, OpenVINORunner)
        return runner.integer_macs(folder)


def _reason(quantize: Quantization | None) -> str | None:
    from qsweep.machine import features
    from qsweep.quantize.cast import Cast

    if isinstance(quantize, Cast) and quantize.dtype == "bf16":
        known = {"avx512_bf16", "amx_bf16"}.intersection(features())
        return None if known else "this processor does not compute in bf16; use `float`"
    return no_kernels_for(quantize)
