"""Write or check the parts of README.md that are generated from the code and from a demo's results.

    python tools/readme.py                     write them
    python tools/readme.py --check             exit 1 with a diff where README.md is not what would be written
    python tools/readme.py --demo runs/demo    first take the results and clips of a demo into docs/

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results" / "demo.json"
PICTURE = ROOT / "docs" / "images" / "side_by_side.gif"
SHOWN = 4
"""Prompts in the picture."""
REMEDY = "run `fewstep demo`, then `python tools/readme.py --demo runs/demo`"

PHRASES = {
    "examples": "Notebooks; python tools/notebooks.py runs them and stores what they print and show",
    "docs": "Guides, one page per subject",
    "tests": "Identities, contracts, equivalences, exact optima; all on the CPU, without network",
    "tools": "Checks of this repository",
    "src/fewstep/recipes": "Recipes as YAML; each file describes a whole run and has a name such as `world/dmd2`",
    "src/fewstep/world/weights": "The networks shipped with the package: card.json and safetensors",
    "Makefile": "demo, test, wheel, lint, format: each makes its own environment first",
    "CONTRIBUTING.md": "Set-up, how to add a method, pattern, sampler and so on, and when a change is done",
    "CHANGELOG.md": "One line per user-visible change",
    "LOG.md": "Experiments with recipe, seed and figures, including failed ones",
}
"""Descriptions of files and folders that have no docstring."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the generated parts of README.md.")
    parser.add_argument("--check", action="store_true", help="compare instead; exit 1 with a diff")
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="first take a demo's results and clips into docs/")
    options = parser.parse_args(argv)
    if options.demo:
        take(options.demo)
    old = README.read_text(encoding="utf-8")
    new = filled(old)
    if not options.check:
        README.write_text(new, encoding="utf-8")
        return 0
    sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "README.md", "as generated"))
    return int(old != new)


def filled(text: str) -> str:
    """`text` with every generated part written anew. ValueError if a part is missing or unknown."""
    pattern = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    found = [name for _, name, _ in pattern.findall(text)]
    if sorted(found) != sorted(PARTS):
        raise ValueError(f"README.md has the generated parts {found}; it needs each of {list(PARTS)} once")
    return pattern.sub(lambda m: f"{m[1]}{PARTS[m[2]]().rstrip()}\n{m[3]}", text)


def take(folder: Path) -> None:
    """Copy a demo's results, and draw its clips side by side: teacher, teacher at 2 steps, student at 2 steps."""
    from safetensors.torch import load_file

    from fewstep.evaluate import load_report
    from fewstep.evaluate.page.animate import grid_gif
    from fewstep.evaluate.results import CLIPS, FILE

    report, clips = load_report(folder), load_file(folder / CLIPS)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / FILE, RESULTS)
    columns = {name: clips[name][:SHOWN] for name in (report.reference, "teacher 2", "student 2")}
    grid_gif(PICTURE, columns, fps=report.suite["fps"], scale=4)


# --- the parts ----------------------------------------------------------------------------------------------------------


def animation() -> str:
    if not PICTURE.is_file():
        return f"*No animation has been recorded yet: {REMEDY}.*"
    lines = [f"![Clips side by side: teacher, teacher at 2 steps, student at 2 steps]({within(PICTURE)})"]
    if RESULTS.is_file():
        lines += ["", "From top to bottom:", ""]
        lines += [f"- {preview['prompt']}" for preview in read_results().previews[:SHOWN]]
    return "\n".join(lines)


def results() -> str:
    if not RESULTS.is_file():
        return f"*No result has been recorded yet: {REMEDY}.*"
    from fewstep.evaluate.page.table import captions, table

    report = read_results()
    columns = table(report).columns
    students = {row.name for row in report.rows if row.role == "student"}
    lines = [row_of([str(column.header) for column in columns]), row_of(["---"] + ["---:"] * (len(columns) - 1))]
    for cells in zip(*(list(column.cells) for column in columns), strict=True):
        lines.append(row_of([f"**{cell}**" if cell and cells[0] in students else str(cell) for cell in cells]))
    here = report.machine
    measured = f"{here['accelerator'] or here['cpu']}, {here['cores']} cores, torch {report.versions['torch']}"
    return "\n".join([*lines, "", *(f"{line}  " for line in captions(report)), f"Measured on {measured}."])


def methods() -> str:
    from fewstep.catalogue import entry
    from fewstep.diffusion import Contract
    from fewstep.methods import METHODS, in_forwards

    lines = [row_of(["method", "idea", "trains", "reads", "steps", "forwards", "source"]), row_of(["---"] * 7)]
    for cls in METHODS:
        path = Path("src", *cls.__module__.split(".")).with_suffix(".py")
        method = cls()
        counts = method.contract(Contract()).trained
        any_count = "any" if method.part == "denoiser" else "-"
        lines.append(row_of([
            f"[`{cls.__name__}`]({path.as_posix()})", phrase(ROOT / path), method.part, ", ".join(sorted(method.needs)),
            ", ".join(map(str, counts)) or any_count, in_forwards(method.cost()), entry(cls).cite,
        ]))  # fmt: skip
    notes = (
        "All at their defaults. steps: what the student serves. forwards: network evaluations per iteration and sample, "
        "of clips unless it says otherwise"
    )
    return "\n".join([*lines, "", f"{notes} (a backward pass counts as two)."])


def tree() -> str:
    """One phrase per file or folder."""
    lines = [(0, "fewstep/", "")]
    source = ROOT / "src" / "fewstep"
    lines += [(1, "src/fewstep/", phrase(source / "__init__.py"))]
    lines += package(source, 2)
    for name, pattern in (("examples", "*.ipynb"), ("docs", "*.md"), ("tools", "*.py"), ("tests", "")):
        lines.append((1, f"{name}/", PHRASES[name]))
        files = sorted((ROOT / name).glob(pattern)) if pattern else []
        lines += [(2, path.relative_to(ROOT / name).as_posix(), phrase(path)) for path in files]
    lines += [(1, name, PHRASES[name]) for name in ("Makefile", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md")]
    width = max(2 * depth + len(name) for depth, name, _ in lines) + 2
    text = [f"{'  ' * depth + name:<{width}}{about}".rstrip() for depth, name, about in lines]
    return "\n".join(["```", *text, "```"])


PARTS: dict[str, Callable[[], str]] = {"animation": animation, "results": results, "tree": tree, "methods": methods}


# --- what they are made of ----------------------------------------------------------------------------------------------


def package(folder: Path, depth: int) -> Iterator[tuple[int, str, str]]:
    """Sub-packages and modules, folders first."""
    folders = [f for f in sorted(folder.iterdir()) if (f / "__init__.py").is_file()]
    for sub in folders:
        yield depth, f"{sub.name}/", phrase(sub / "__init__.py")
        yield from package(sub, depth + 1)
    for path in sorted(folder.glob("*.py")):
        if not path.stem.startswith("__"):
            yield depth, path.name, phrase(path)
    for name in (n for n in PHRASES if (ROOT / n).parent == folder and (ROOT / n).is_dir()):
        yield depth, f"{Path(name).name}/", PHRASES[name]
        files = sorted((ROOT / name).glob("**/*.yaml"))
        yield from ((depth + 1, path.relative_to(ROOT / name).as_posix(), phrase(path)) for path in files)


def phrase(path: Path) -> str:
    """What a file says of itself first: its docstring's first sentence, its heading, or its first comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "".join(json.loads(text)["cells"][0]["source"])
    if path.suffix == ".py":
        about = ast.get_docstring(ast.parse(text)) or ""
    else:
        about = text.splitlines()[0].lstrip("# ") if text.startswith("#") else ""
    sentence = re.split(r"(?<=[.!])\s", " ".join(about.split("\n\n")[0].split()), maxsplit=1)[0].rstrip(".")
    if not sentence:
        raise ValueError(f"{within(path)} does not say what it is; begin it with a docstring, a comment or a heading")
    sentence = sentence.removeprefix("fewstep: ")
    return sentence[0].upper() + sentence[1:]


def read_results():
    from fewstep.evaluate import load_report
    from fewstep.evaluate.results import FILE

    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(RESULTS, Path(folder) / FILE)
        return load_report(folder)


def row_of(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def within(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


if __name__ == "__main__":
    sys.exit(main())
