"""The notebooks of examples/: they run as they stand, and what is stored with them was made by running them."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
BARE = ("your_own_videos",)
"""Stored without outputs: whoever opens them runs them on videos of their own."""
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
ABSOLUTE = re.compile(r"(?<![\w.<])/[a-z]+/")
"""A path from the root of some machine."""


def notebook(*sources: str) -> dict[str, Any]:
    cells = [
        {"cell_type": "code", "metadata": {}, "source": [s], "execution_count": None, "outputs": []} for s in sources
    ]
    return {"cells": [{"cell_type": "markdown", "metadata": {}, "source": ["# Title"]}, *cells], "nbformat": 4}


def pictures(made: dict[str, Any]) -> list[Image.Image]:
    """What the cells of an executed notebook have shown."""
    outputs = [output.get("data", {}) for cell in made["cells"] for output in cell.get("outputs", ())]
    return [Image.open(BytesIO(base64.b64decode(data["image/png"]))) for data in outputs if "image/png" in data]


def texts(made: Any) -> Iterator[str]:
    """Every text in a notebook, without the pictures, which are letters and slashes too."""
    if isinstance(made, str):
        yield made
    for name, part in made.items() if isinstance(made, dict) else enumerate(made if isinstance(made, list) else ()):
        if not str(name).startswith("image/"):
            yield from texts(part)


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("notebooks")


def test_cells_share_names_and_show_their_last_line(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = "from PIL import Image\nopen('here.txt', 'w')\nImage.new('RGB', (3, 2), 'red')"
    made = tool.executed(notebook("a = 20\nprint('one\\ntwo')", "a + 1", drawn, "a = None\na"))
    first, second, third, last = [cell["outputs"] for cell in made["cells"][1:]]
    assert first == [{"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]}] and last == []
    assert second[0]["data"] == {"text/plain": ["21"]} and second[0]["execution_count"] == 2
    (picture,) = pictures(made)
    assert third[0]["output_type"] == "execute_result" and picture.size == (3, 2)
    assert list(tmp_path.iterdir()) == [] and Path.cwd() == tmp_path  # it ran in a folder of its own


def test_a_cell_that_fails_ends_the_run_and_writes_nothing(tool: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "a.ipynb"
    file.write_text(before := json.dumps(notebook("print(1)", "1 / 0")))
    with pytest.raises(ZeroDivisionError):
        tool.main([str(file)])
    assert file.read_text() == before


def test_there_are_three_and_each_says_what_it_is() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["a_diffusers_model", "demo_step_by_step", "your_own_videos"]
    for path in NOTEBOOKS:
        assert json.loads(path.read_text())["cells"][0]["source"][0].startswith("# ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_was_made_by_running_it(path: Path) -> None:
    """All cells in order, with pictures that show something, and nothing of the machine they were made on; or nothing at all."""
    made = json.loads(path.read_text())
    code = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
    if path.stem in BARE:
        assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
        return
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run python tools/notebooks.py"
    assert len(shown := pictures(made)) >= 3
    assert all(len(picture.convert("RGB").getcolors(1 << 24)) > 50 for picture in shown)
    assert path.stat().st_size < 400_000
    said = "\n".join(texts(made))
    assert ABSOLUTE.search(said) is None and "Traceback" not in said


@pytest.mark.parametrize(
    "said", ["saved to /data/me/clip.mp4", "file:///data/me", "open('/data/me')", "\n/data/me", "/data/me"]
)
def test_a_path_of_a_machine_is_seen_in_every_output(said: str) -> None:
    made = {
        "cells": [{"outputs": [{"text": ["fine\n", said]}, {"data": {"image/png": "a/b/c", "text/html": "<b>x</b>"}}]}]
    }
    assert ABSOLUTE.search("\n".join(texts(made)))
    made["cells"][0]["outputs"][0]["text"].pop()
    assert ABSOLUTE.search("\n".join(texts(made))) is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_as_it_stands(path: Path, tmp_path: Path) -> None:
    """In a fresh process: every cell, with pictures, of the same size as those that are stored."""
    if path.stem == "a_diffusers_model":
        pytest.importorskip("diffusers", reason="needs the extra diffusers")
    output = tmp_path / "made.ipynb"
    command = [sys.executable, ROOT / "tools" / "notebooks.py", path, "--output", output]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    sizes, stored = ([p.size for p in pictures(json.loads(file.read_text()))] for file in (output, path))
    assert len(sizes) >= 3 and (path.stem in BARE or sizes == stored)
