"""No room has a circle of imports that nobody knows of; a planted one is found."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

grimp = pytest.importorskip("grimp", reason="comes with import-linter: pip install -e '.[lint]'")


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("circles")


def test_the_tree_has_none_but_those_that_are_listed(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main() == 0, capsys.readouterr().out


def test_circles_are_found_in_rooms_and_in_rooms_of_rooms(tool: ModuleType) -> None:
    graph = grimp.ImportGraph()
    for module in ("house", "house.a", "house.a.x", "house.a.y", "house.b", "house.c"):
        graph.add_module(module)
    for importer, imported in (("a.x", "b"), ("b", "c"), ("c", "a.y"), ("a.x", "a.y")):
        graph.add_import(importer=f"house.{importer}", imported=f"house.{imported}")
    assert set(tool.circles(graph, "house")) == {"house: a, b, c"}
    graph.remove_import(importer="house.c", imported="house.a.y")
    assert not set(tool.circles(graph, "house"))
    graph.add_import(importer="house.a.y", imported="house.a.x")
    assert set(tool.circles(graph, "house")) == {"house.a: x, y"}
