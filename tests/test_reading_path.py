"""The way from a recipe to the loss stays short enough to read."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

pytestmark = pytest.mark.usefixtures("single_thread")


def test_few_files_lead_from_a_recipe_to_the_loss(load_tool: Callable[[str], ModuleType]) -> None:
    tool = load_tool("reading_path")
    path = tool.trace("world/dmd2")
    assert {"recipe.py", "engine/loop.py", "engine/run.py", "methods/dmd2.py", "methods/targets.py"} <= set(path)
    assert tool.lines_of(path).total() <= tool.LINES and len(path) <= tool.FILES, tool.lines_of(path)
