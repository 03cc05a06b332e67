"""The hub form as a program of ExecuTorch that XNNPACK runs."""

from __future__ import annotations

import json
import math
import re
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram

from qsweep.engines._decompositions import decomposed_where, ops_of
from qsweep.engines._executorch_graph import for_xnnpack
from qsweep.engines._silent import silent
from qsweep.errors import BundleError, Refused, why
from qsweep.hub.form import QuantizedModel

with silent(), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.exir._serialize import _flatbuffer
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    from qsweep.engines._executorch_passes import traced_where_changed

if TYPE_CHECKING:
    from qsweep.engines.base import EngineConfig, Runner


def lower(model: QuantizedModel, path: Path, batch_size: int) -> None:
    """Write the program, which takes batches of `batch_size`."""
    example = torch.zeros(batch_size, *model.example.shape[1:])
    config = EdgeCompileConfig(_check_ir_validity=False)  # ops of quantized models are none of its core
    try:
        with warnings.catch_warnings(), torch.no_grad(), decomposed_where(_changes), traced_where_changed():
            warnings.simplefilter("ignore")
            program = torch.export.export(for_xnnpack(model), (example,))
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], compile_config=config)
            made = edge.to_executorch()
    except (MemoryError, Refused):
        raise
    except Exception as error:  # it raises many types; all mean that this engine cannot take the model
        raise Refused(f"ExecuTorch cannot take the model: {why(error)}") from error
    _check_kernels(made.executorch_program)
    path.write_bytes(made.buffer)


def _changes(program: ExportedProgram, decomp_table: Any = None, **_: object) -> bool:
    """Whether decomposing by this table makes another program: `to_edge_transform_and_lower` does so three times."""
    ops = ops_of(program)
    return program.dialect != "ATEN" or decomp_table is None or ops is None or any(op in decomp_table for op in ops)


def _check_kernels(program: Any) -> None:
    """Raises Refused for ops that the runtime has no kernels for: it would tell a number when it loads the program."""
    known = Runtime.get().operator_registry.operator_names
    used = [f"{op.name}.{op.overload}".rstrip(".") for op in program.execution_plan[0].operators]
    if lacking := [name for name in used if name not in known]:
        raise Refused(f"ExecuTorch has no kernel for {', '.join(f'`{name}`' for name in lacking)}")


def runner(path: Path, engine: EngineConfig) -> Runner:
    """The artifact in ExecuTorch, called once, as it sees only then what it cannot run. Its threads are the engine's,
    unless this process has loaded a program with others before."""
    try:
        program = Runtime.get().load_program(path)
    except RuntimeError as error:
        raise BundleError(f"`{path}`: the artifact cannot be read ({error})") from error
    try:
        with silent():
            _share_threads(engine.threads)
            method = program.load_method("forward")
            assert method is not None
            given = method.metadata.input_tensor_meta(0).sizes()
            method.execute([torch.zeros(given)])
    except RuntimeError as error:
        raise Refused(f"ExecuTorch cannot run the model: {error}") from error

    def run(inputs: Tensor) -> Tensor:
        if inputs.shape != given:
            raise Refused(f"the program takes inputs {list(given)} (got {list(inputs.shape)})")
        return cast(Tensor, method.execute([inputs.contiguous()])[0])

    return run


_threads: list[int] = []


def _share_threads(count: int) -> None:
    """Give this process a pool of `count` threads, unless it has one: programs that are loaded hold on to it."""
    if not _threads:
        portable_lib._unsafe_reset_threadpool(count)
        _threads.append(count)


def integer_macs(path: Path) -> int:
    """Those of integer kernels in one call, from what the program hands to XNNPACK."""
    return sum(map(_macs, _graphs(path.read_bytes())))


def _graphs(content: bytes) -> list[dict[str, Any]]:
    """The graphs that XNNPACK is given, as its schema has them."""
    header = xnnpack_graph_serialize.XNNHeader
    program = deserialize_pte_binary(content).program
    graphs = []
    with tempfile.TemporaryDirectory() as place:
        schema, packed, text = (Path(place) / name for name in ("schema.fbs", "graph.bin", "graph.json"))
        schema.write_bytes(xnnpack_graph_serialize._get_schema_bytes())
        for delegate in program.execution_plan[0].delegates:
            data = program.backend_delegate_data[delegate.processed.index].data
            start = header.from_bytes(data[: header.EXPECTED_LENGTH])
            packed.write_bytes(data[start.flatbuffer_offset : start.flatbuffer_offset + start.flatbuffer_size])
            _flatbuffer._flatc_decompile(place, str(schema), str(packed), ["--raw-binary"])
            graphs.append(json.loads(re.sub(r"(-?)\b(inf|nan)\b", _numbers, text.read_text())))
    return graphs


def _numbers(found: re.Match[str]) -> str:
    """What `json` reads for what is no number in JSON."""
    return f"{found[1]}Infinity" if found[2] == "inf" else "NaN"


_PRODUCTS = {"XNNConv2d", "XNNDepthwiseConv2d", "XNNFullyConnected"}
_INTEGERS = {f"xnn_datatype_{name}" for name in ("qint8", "qdint8", "qpint8")}


def _macs(graph: dict[str, Any]) -> int:
    values = {}
    for value in graph["xvalues"]:
        tensor = value["xvalue_union"]
        tensor = tensor.get("tensor_value", tensor)
        values[tensor["id_out"]] = tensor
    macs = 0
    for node in graph["xnodes"]:
        if node["xnode_union_type"] in _PRODUCTS:
            given, weight, result = (
                values[node["xnode_union"][f"{name}_id"]] for name in ("input1", "filter", "output")
            )
            if given["datatype"] in _INTEGERS:
                macs += math.prod(result["dims"][:-1]) * math.prod(weight["dims"])
    return macs
