"""An artifact in the hub form as a program of `torch.export`, which PyTorch alone loads and compiles."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from qsweep.hub.form import NAMESPACES
from qsweep.hub.save import load
from qsweep.hub.simulate import simulation

_FILE = "model.pt2"
_KNOWN = set(NAMESPACES) - {"qsweep"}


def write_program(artifact: Path, out: Path) -> None:
    """Write `model.pt2` to the folder `out`; it takes and gives float32, of any batch size.

    Integers stay where PyTorch has ops for them (`quantized_decomposed`, which `torch.ao.quantization.fx._decomposed`
    registers); other schemes are written as the floating point that simulates them.
    """
    model = load(artifact)
    called = {node.target.namespace for node in model.graph.graph.nodes if node.op == "call_function"}
    known = called <= _KNOWN and model.dtype == torch.float32
    graph = model.graph if known else simulation(model)
    shapes = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(graph, (model.example,), dynamic_shapes=shapes), out / _FILE)
