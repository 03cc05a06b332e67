"""The hub form as a file of LiteRT, and the runtime that runs it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from torch import Tensor

from qsweep.engines._litert_file import TYPES
from qsweep.engines._litert_graph import write_graph
from qsweep.engines._litert_windows import ONES
from qsweep.engines._silent import silent
from qsweep.errors import BundleError, Refused, why
from qsweep.hub.form import QuantizedModel

if TYPE_CHECKING:
    from qsweep.engines.base import EngineConfig, Runner


def lower(model: QuantizedModel, path: Path, batch_size: int) -> None:
    """Write the file, which takes batches of `batch_size`."""
    try:
        write_graph(model, batch_size, path)
    except (MemoryError, OSError, Refused):
        raise
    except Exception as error:  # the tracer raises many types; all mean that this engine cannot take the model
        raise Refused(f"LiteRT cannot take the model: {why(error)}") from error


def runner(path: Path, engine: EngineConfig) -> Runner:
    """The artifact in LiteRT, called once, as it sees only then what it cannot run."""
    try:
        with silent():
            interpreter = Interpreter(str(path), num_threads=engine.threads)
    except ValueError as error:
        raise BundleError(f"`{path}`: the artifact cannot be read ({error})") from error
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    shape = given["shape"].tolist()
    try:
        with silent():
            interpreter.allocate_tensors()
            interpreter.set_tensor(given["index"], torch.zeros(shape).numpy())
            interpreter.invoke()
    except RuntimeError as error:
        raise Refused(f"LiteRT cannot run the model: {error}") from error

    def run(inputs: Tensor) -> Tensor:
        if list(inputs.shape) != shape:
            raise Refused(f"the file takes inputs {shape} (got {list(inputs.shape)})")
        interpreter.set_tensor(given["index"], inputs.contiguous().numpy())
        interpreter.invoke()
        return torch.from_numpy(interpreter.get_tensor(result["index"]))

    return run


_LAYERS = {getattr(schema.BuiltinOperator, name) for name in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")}


def integer_macs(path: Path) -> int:
    """Those of layers whose weights are int8 where the kernel reads them, in one call: such kernels sum integers."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    (graph,) = model.subgraphs
    macs = 0
    for operator in graph.operators:
        if model.operatorCodes[operator.opcodeIndex].builtinCode in _LAYERS:
            weight, result = graph.tensors[operator.inputs[1]], graph.tensors[operator.outputs[0]]
            if weight.type == TYPES[torch.int8] and weight.name.decode() != ONES:
                macs += math.prod(map(int, result.shape[:-1])) * math.prod(map(int, weight.shape))
    return macs
