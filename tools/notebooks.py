"""Run the notebooks of examples/ and store what they print and show.

    python tools/notebooks.py                                  run all, each in a fresh process and folder
    python tools/notebooks.py examples/NAME.ipynb              run one
    python tools/notebooks.py examples/NAME.ipynb --output X   leave it as it is, and write the one with outputs to X
    python tools/notebooks.py --types                          run nothing: does the code of all still fit the library's?

It needs no Jupyter: a cell is Python, and what stands in its last line is shown, as text or, where it can be drawn
(`_repr_png_`, as pictures of Pillow can), as a picture. A cell that fails ends the run, and nothing is written.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Cell = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the notebooks of examples/ and store what they print and show.")
    parser.add_argument("notebooks", type=Path, nargs="*", help="default: all of examples/")
    parser.add_argument("--output", type=Path, help="write one notebook's outputs to another file")
    parser.add_argument("--types", action="store_true", help="run nothing, and check their code with mypy")
    options = parser.parse_args(argv)
    paths = options.notebooks or sorted((ROOT / "examples").glob("*.ipynb"))
    if options.types:
        return typed(paths)
    if len(paths) > 1:
        if options.output:
            parser.error("--output is for one notebook")
        for path in paths:
            subprocess.run([sys.executable, __file__, str(path)], check=True)
        return 0
    (path,) = paths
    made = executed(json.loads(path.read_text(encoding="utf-8")))
    (options.output or path).write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    pictures = sum(
        "image/png" in output.get("data", {}) for cell in made["cells"] for output in cell.get("outputs", ())
    )
    print(f"{path.name}: {len(made['cells'])} cells ran, {pictures} pictures")
    return 0


def typed(paths: list[Path]) -> int:
    """Let mypy read the code cells of each notebook as one module; returns its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        modules = [Path(folder) / f"{path.stem}.py" for path in paths]
        for path, module in zip(paths, modules, strict=True):
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            module.write_text(
                "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"), encoding="utf-8"
            )
        return subprocess.run([sys.executable, "-m", "mypy", *modules], check=False, cwd=ROOT).returncode


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of its code cells, run in order in one namespace and an empty folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells, before = list[dict[str, Any]](), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for cell in notebook["cells"]:
                count = 1 + sum(done["cell_type"] == "code" for done in cells)
                if cell["cell_type"] == "code":
                    cell = {**cell, "outputs": run("".join(cell["source"]), names, count), "execution_count": count}
                cells.append(cell)
        finally:
            os.chdir(before)
    return {**notebook, "cells": cells}


def run(source: str, names: dict[str, Any], count: int) -> list[Cell]:
    """Run one cell in `names`; what it printed, and what its last line is."""
    tree, value = ast.parse(source), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {count}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), names)
    outputs: list[Cell] = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    if value is not None:
        outputs.append(
            {"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": shown(value)}
        )
    return outputs


def shown(value: Any) -> dict[str, Any]:
    """A value in the forms that a notebook keeps."""
    if hasattr(value, "_repr_png_"):
        return {"image/png": base64.b64encode(value._repr_png_()).decode() + "\n", "text/plain": ["a picture"]}
    return {"text/plain": repr(value).splitlines(keepends=True)}


if __name__ == "__main__":
    sys.exit(main())
