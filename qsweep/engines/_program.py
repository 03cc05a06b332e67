"""An artifact in the hub form as a program of `torch.export`, which PyTorch alone loads and compiles."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from qsweep.engines._torch_graph import with_token_grids
from qsweep.errors import ExportFailure, why
from qsweep.hub.kinds import EMBEDDING, NAMESPACES, aten
from qsweep.hub.nodes import attributes, nodes_of, set_constant, source
from qsweep.hub.ops import DEQUANTIZE_WEIGHT
from qsweep.hub.save import load
from qsweep.hub.simulate import simulation
from qsweep.tasks._parts import Parts, as_dicts, mapped

_FILE = "model.pt2"
_KNOWN = set(NAMESPACES) - {"qsweep"}


class _Whole(nn.Module):
    """A graph, which takes and gives one tensor, with the inputs and outputs of the model that it was made of.

    (`torch.export` loses the weights of a graph within a module.)
    """

    def __init__(self, graph: fx.GraphModule, parts: Mapping[str, Parts]) -> None:
        super().__init__()
        self.ops, self.parts = graph.graph, parts
        for name, value in attributes(graph):
            set_constant(self, name, value)

    def forward(self, inputs: Any) -> Any:
        given, shown = self.parts.get("inputs"), self.parts.get("outputs")
        joined = given.joined(inputs, torch.float32) if given else inputs
        found = fx.Interpreter(self, graph=self.ops).run(joined)
        return as_dicts(shown.apart(found)) if shown else found


def write_program(artifact: Path, out: Path, parts: Mapping[str, Parts]) -> None:
    """Write `model.pt2` to the folder `out`; it takes and gives float32, of any batch size, or `parts`, in one dict or
    tuple.

    Integers stay where PyTorch has ops for them (`quantized_decomposed`, which `torch.ao.quantization.fx._decomposed`
    registers); other schemes are written as the floating point that simulates them. Raises ExportFailure where
    `torch.export` knows no such op, as of ranges that each batch sets.
    """
    model = load(artifact)
    with_token_grids(model)
    ops = [node.target for node in model.graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    known = {op.namespace for op in ops} <= _KNOWN and model.dtype == torch.float32
    graph = by_rows(model.graph) if known else simulation(model)
    example = as_dicts(parts["inputs"].apart(model.example)) if "inputs" in parts else model.example
    batch = {0: torch.export.Dim("batch")}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(
                _Whole(graph, parts) if parts else graph,
                (example,),
                dynamic_shapes=(as_dicts(mapped(example, lambda _: batch)),),
            )
        except Exception as error:  # the tracer raises dozens of types
            raise ExportFailure(f"`torch.export` cannot write the artifact: {why(error)}") from error
        torch.export.save(program, out / _FILE)


def by_rows(graph: fx.GraphModule) -> fx.GraphModule:
    """Rows of tables made real where they are read, in place: the whole table would be, in every call."""
    call = graph.graph.call_function
    for node in nodes_of(graph, {EMBEDDING}):
        if source(node).target is DEQUANTIZE_WEIGHT:
            (table, scale, *_), places = source(node).args, node.args[1]
            with graph.graph.inserting_before(node):
                rows, steps = call(EMBEDDING, (table, places)), call(aten.index.Tensor, (scale, [places]))
                real = call(aten.mul.Tensor, (rows, call(aten.unsqueeze.default, (steps, -1))))
            node.replace_all_uses_with(real)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
