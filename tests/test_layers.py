from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qsweep"
ARCHITECTURE = PACKAGE.parent / "docs" / "architecture.md"

ROWS = [line.split("|")[1] for line in ARCHITECTURE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
LAYERS = [row.replace("`", "").replace(",", " ").split() for row in ROWS]
"""The table in docs/architecture.md, from the foundation down to what stands on everything."""
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}

HOMES = {
    "optuna": {"study"},
    "mlflow": {"track", "ship"},
    "ray": {"executors"},
    "onnxruntime": {"engines"},
}
"""Who may import what is heavy, replaceable, or both."""

FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test).endswith("TYPE_CHECKING")


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Every module that is imported when the code runs, and whether inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports name their module in full"
            yield from ((f"{node.module}.{alias.name}", inside) for alias in node.names)
        elif isinstance(node, ast.If) and is_type_checking(node.test):
            yield from (found for other in node.orelse for found in imports(ast.Module([other], []), inside))
        else:
            yield from imports(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def of(path: Path) -> list[tuple[str, bool]]:
    return list(imports(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_imports_only_from_its_layer_and_those_above(path: Path) -> None:
    layer = layer_of(path)
    if layer == "__init__":
        assert all(inside for name, inside in of(path) if name.startswith("qsweep"))
        return
    for name, _ in of(path):
        parts = name.split(".")
        if parts[0] == "qsweep" and len(parts) > 1:
            assert LEVEL[parts[1]] <= LEVEL[layer], f"`{layer}` must not import `{name}`, which is below it"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_runtimes_and_services_are_imported_in_one_place_and_inside_functions(path: Path) -> None:
    for name, inside in of(path):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or layer_of(path) in homes, f"`{name}` is for {sorted(homes or ())}"
        assert homes is None or inside, f"`{name}` must be imported inside the function that needs it"


def test_the_table_of_layers_holds_every_module_and_no_other() -> None:
    assert set(LEVEL) == {layer_of(path) for path in FILES} - {"__init__"}
