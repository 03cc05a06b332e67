"""Decomposing an exported program traces it once more, which exporters ask for where nothing of it would change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram


@contextmanager
def decomposed_where(needed: Callable[..., bool]) -> Iterator[None]:
    """Within it `run_decompositions` gives the program itself back where `needed(program, *its arguments)` is false."""
    own = ExportedProgram.run_decompositions

    def run(program: ExportedProgram, *arguments: Any, **keywords: Any) -> ExportedProgram:
        return own(program, *arguments, **keywords) if needed(program, *arguments, **keywords) else program

    ExportedProgram.run_decompositions = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = own  # type: ignore[method-assign]


def ops_of(program: ExportedProgram) -> set[Any] | None:
    """What its nodes call; None where one has a graph of its own."""
    ops = {node.target for node in program.graph.nodes if node.op == "call_function"}
    return None if any(isinstance(op, HigherOrderOperator) for op in ops) else ops
