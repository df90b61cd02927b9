"""What a newcomer reads is true: README is up to date, commands parse, links lead somewhere, code blocks run."""

from __future__ import annotations

import doctest
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

from fewstep.cli.arguments import COMMANDS, parse, split_overrides
from fewstep.core.build import build, load_yaml
from fewstep.core.shipped import shipped
from fewstep.data import write_video
from fewstep.engine.prepare import require_processes
from fewstep.methods import METHODS
from fewstep.models import VideoModel, bundle
from fewstep.pipeline import Pipeline, read
from fewstep.recipe import Recipe
from fewstep.written import names
from support_engine import tiny_model

ROOT = Path(__file__).parent.parent
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = {
    r"Settings\(steps=\d+, batch=\d+": "Settings(steps=2, batch=2", r"Suite\(prompts=\d+": "Suite(prompts=2",
    r"Wan-AI/[\w.-]+": "wan", r"\(16, 21": "(4, 21",
}  # fmt: skip
"""Sizes in code blocks, and what they become here."""
WHOLE = {
    "model": {"type": "Pretrained"}, "method": {"type": "DMD2"}, "data": {"type": "WorldClips"}, "settings": {"steps": 1},
}  # fmt: skip
"""A recipe that completes the fragments in the documents."""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [text for found, text in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def shell_lines() -> Iterator[tuple[str, str]]:
    """Page and command of every line of every `sh` block, without its comment."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.splitlines():
                command = re.split(r"\s+#", line)[0].strip()
                if command:
                    yield page.name, command


def words_of(command: str) -> list[str]:
    return shlex.split(command)[1:]


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("readme")


@pytest.fixture
def tiny_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single_thread: None) -> Path:
    """An empty folder to work in, with a video, a list of prompts, and a tiny `world`."""
    for name in ("world", "world/features"):
        monkeypatch.setitem(bundle._BUILT_INS, name, tiny_model().save(tmp_path / "weights" / name))
    assert VideoModel.from_pretrained("world").card.name == "tiny"
    monkeypatch.chdir(tmp_path)
    Path("videos").mkdir()
    write_video("videos/duck.mp4", torch.zeros(3, 40, 32, 32))
    Path("videos/duck.txt").write_text("a duck")
    Path("prompts.txt").write_text("a duck\na goose\n")
    return tmp_path


@pytest.fixture
def tiny_wan(tiny_world: Path) -> None:
    """There is a tiny Wan too."""
    from tiny_models import save_tiny

    save_tiny("wan", tiny_world / "wan")


# --- generated parts ----------------------------------------------------------------------------------------------------


def test_readme_is_up_to_date(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--check"]) == 0, "run python tools/readme.py\n" + capsys.readouterr().out


def test_readme_counts_the_methods() -> None:
    (line,) = re.findall(r"- Has (\d+ training methods: .*?)\.\n", (ROOT / "README.md").read_text(), re.DOTALL)
    total, *kinds = (int(number) for number in re.findall(r"\b\d+\b", line))
    assert total == len(METHODS) == sum(kinds)


def test_check_shows_what_differs(tool, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    stale = tmp_path / "README.md"
    stale.write_text(tool.README.read_text().replace("| [`DMD2`]", "| [`DMD1`]"))
    monkeypatch.setattr(tool, "README", stale)
    assert tool.main(["--check"]) == 1 and "-| [`DMD1`]" in capsys.readouterr().out
    stale.write_text("<!-- generated: tree -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="needs each of"):
        tool.main(["--check"])


def test_a_demo_fills_the_table_and_the_picture(tool, tiny_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from fewstep.diffusion import Contract, Exact
    from fewstep.evaluate import Entry, Suite, evaluate

    teacher = tiny_model()
    student = tiny_model(1).with_part("denoiser", tiny_model(1).denoiser)
    student.card = replace(
        student.card, name="student", role="student", contract=Contract(steps=2, grid=Exact(grids=((1.0, 0.5, 0.0),)))
    )
    rows = [
        Entry(name="teacher 3", model=teacher),
        Entry(name="teacher 2", model=teacher, steps=2),
        Entry(name="student 2", model=student),
    ]
    evaluate(rows, Suite(prompts=2, latency_runs=3), "demo")
    monkeypatch.setattr(tool, "ROOT", tiny_world)
    monkeypatch.setattr(tool, "RESULTS", tiny_world / "docs" / "results" / "demo.json")
    monkeypatch.setattr(tool, "PICTURE", tiny_world / "docs" / "images" / "side_by_side.gif")
    assert "fewstep demo" in tool.results() and "fewstep demo" in tool.animation()
    tool.take(Path("demo"))
    table = tool.results().splitlines()
    assert table[0].startswith("|  | NFE | accuracy") and table[1].count("---") == table[0].count("|") - 1
    assert [line.split(" | ")[0] for line in table[2:6]] == [
        "| teacher 3",
        "| teacher 2",
        "| **student 2**",
        "| renderer",
    ]
    assert "floor" in tool.results() and "cores" in table[-1]
    assert tool.PICTURE.read_bytes().startswith(b"GIF89a") and "](docs/images/side_by_side.gif)" in tool.animation()


# --- what the documents name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "command"), [c for c in shell_lines() if c[1].startswith("fewstep ")])
def test_commands_parse(page: str, command: str) -> None:
    assert_runs(words_of(command))


def assert_runs(command: list[str]) -> None:
    words, overrides = split_overrides(command)
    options = parse(words)
    assert words[0] in COMMANDS and (options.takes_overrides or not overrides)
    recipe = getattr(options, "recipe", None)
    if recipe is not None:
        made = read(recipe, overrides)
        for stage in made.stages.values() if isinstance(made, Pipeline) else [made]:
            with mock.patch("fewstep.engine.prepare.require_device"):  # a page may speak of GPUs
                require_processes(stage.settings)


@pytest.mark.parametrize(("page", "command"), [c for c in shell_lines() if not c[1].startswith("fewstep ")])
def test_other_commands_exist(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    program, words = command.split()[0], words_of(command)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[0] in targets
    elif program == "pip":
        extras = re.findall(r"\[(.*)\]", words[-1])
        assert words[:2] == ["install", "-e"] and set(",".join(extras).split(",")) <= {
            *project["optional-dependencies"],
            "",
        }
    elif program == "torchrun":
        assert words[words.index("fewstep") - 1] == "-m"
        monkeypatch.setenv("WORLD_SIZE", words[words.index("--nproc-per-node") + 1])
        monkeypatch.setenv("RANK", "0")
        assert_runs(words[words.index("fewstep") + 1 :])
    elif program == "python":
        script = (ROOT / words[0]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in script for word in words if word.startswith("--")), command
    else:
        assert program == "pytest"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "LOG.md"], ids=lambda page: page.name)
def test_names_in_running_text_exist(page: Path) -> None:
    """`fewstep ...`, `make ...`, `python tools/...` and paths between single backquotes. The log names things as they were."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for quoted in re.findall(r"`([^`\n]+)`", text):
        program, _, rest = quoted.partition(" ")
        first = rest.split(" ")[0]
        if program == "fewstep":
            assert first in COMMANDS, quoted
        elif program == "make":
            assert first in targets, quoted
        elif program == "python":
            assert (ROOT / first).exists(), quoted
        elif re.fullmatch(r"(src|tests|tools|examples)/[\w./-]+\.\w+", quoted) and "NAME" not in quoted:
            assert (ROOT / quoted).exists(), quoted
        elif re.fullmatch(rf"({'|'.join({name.partition('/')[0] for name in shipped()})})/[a-z]\w+", quoted):
            assert quoted in shipped() or quoted in bundle._BUILT_INS, quoted


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target.partition("#")[0]).exists(), target


def test_no_address_of_a_machine_or_host() -> None:
    for path in [*PAGES, ROOT / "Makefile", ROOT / "pyproject.toml"]:
        assert not re.findall(r"https?://|/(?:home|root|tmp|work)/", path.read_text(encoding="utf-8")), path.name


def test_layers_are_those_that_are_checked() -> None:
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert " > ".join(contract["layers"][1:]) in (ROOT / "docs" / "architecture.md").read_text()


# --- what the documents show --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tiny_world: Path, request: pytest.FixtureRequest) -> None:
    """All blocks of a page, in order, in one namespace. A block with `>>>` is compared with what it says it prints."""
    if page.stem == "models":
        request.getfixturevalue("tiny_wan")
    module = ModuleType(f"blocks_of_{page.stem}")
    sys.modules[module.__name__] = module
    try:
        for number, block in enumerate(blocks(page, "python")):
            for pattern, small in SMALL.items():
                block = re.sub(pattern, small, block)
            if ">>>" in block:
                test = doctest.DocTestParser().get_doctest(
                    block, vars(module), f"{page.name}, block {number}", None, None
                )
                result = doctest.DocTestRunner().run(test, clear_globs=False)
                vars(module).update(test.globs)
                assert result.attempted and not result.failed
            else:
                exec(compile(block, f"{page.name}, block {number}", "exec"), vars(module))
    finally:
        del sys.modules[module.__name__]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda page: page.name)
def test_yaml_blocks_are_parts_of_recipes(page: Path) -> None:
    for block in blocks(page, "yaml"):
        tree = load_yaml(block)
        if "stages" in tree:
            assert build(Pipeline, tree, names()).stages
            continue
        recipe = build(Recipe, WHOLE | tree, names())
        assert isinstance(recipe, Recipe) and recipe.method.needs <= recipe.data.provides
