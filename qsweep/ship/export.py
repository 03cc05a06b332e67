"""What other tools take: the files of an artifact without qsweep."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qsweep.errors import BundleError
from qsweep.records import Record
from qsweep.ship.model import engine_of
from qsweep.track.bundle import bundle, verify


def export(record: Record, sweep: Path, out: Path) -> Path:
    """Write the record's artifact to the new folder `out` as its runtime takes it alone; returns `out`.

    For `onnxruntime` that is one complete `model.onnx`; for `openvino` `model.xml`, `model.bin` and the settings to
    compile them with, `settings.json`; for `executorch` its `model.pte`, for `litert` its `model.tflite`; for engines
    that are PyTorch a `model.pt2`, which `torch.export.load` reads once `torch.ao.quantization.fx._decomposed` has been
    imported. All take and give the tensors that the model does, but those for phones: their one tensor has the columns
    of these as `interface.json` lists them.
    Raises BundleError where there is no artifact or `out` exists.
    """
    if out.exists():
        raise BundleError(f"`{out}`: must not exist yet")
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        made = bundle(record, sweep, unfinished / "bundle")
        from qsweep.tasks._parts import Parts

        manifest = verify(made)
        parts = {role: Parts.read(rows) for role, rows in manifest.interface.items()}
        engine_of(manifest, made).export(made / "artifact", unfinished, parts)
        shutil.rmtree(made)
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out
