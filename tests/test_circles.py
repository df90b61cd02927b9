"""No room has a circle of imports that nobody knows of; a planted one is found."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
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


def test_no_function_of_a_room_is_hidden_by_a_file_of_its_name() -> None:
    """Importing `room.x` replaces what the room calls `x`."""
    for init in (Path(__file__).parent.parent / "src" / "fewstep").rglob("__init__.py"):
        inside = {path.stem for path in init.parent.iterdir()}
        made = {
            node.name for node in ast.parse(init.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert not inside & made, f"{init}: {inside & made}"
