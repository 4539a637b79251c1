"""Imports of the package: no module reaches upward and none sits in a circle.

Every import counts, also those inside functions and those under TYPE_CHECKING.
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp
import pytest

LAYERS = (
    "cli",
    "study",
    "launch",
    "analysis",
    "inference",
    "evaluation",
    "training",
    "runtime",
    "method",
    "data",
    "config",
    "utils",
    "errors",
)


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("amlp_ray", exclude_type_checking_imports=False, cache_dir=None)


def layer_of(module: str) -> int | None:
    """Return the position of a module's layer, 0 at the top; None for the package itself."""
    parts = module.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 1 and parts[1] in LAYERS else None


def test_every_folder_of_the_package_is_a_layer(graph: grimp.ImportGraph) -> None:
    children = {module.rpartition(".")[2] for module in graph.find_children("amlp_ray")}
    assert children - {"__main__"} == set(LAYERS)


def test_no_import_goes_upward(graph: grimp.ImportGraph) -> None:
    upward = []
    for module in graph.modules:
        layer = layer_of(module)
        if layer is None:
            continue
        for imported in graph.find_modules_directly_imported_by(module):
            other = layer_of(imported)
            if other is not None and other < layer:
                upward.append(f"{module} -> {imported}")
    assert not upward


def test_no_module_is_in_a_circle(graph: grimp.ImportGraph) -> None:
    imports = {
        module: graph.find_modules_directly_imported_by(module) - {module}
        for module in graph.modules
    }
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
