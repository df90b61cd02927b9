"""The rules of tools/budgets.py: kept by the tree, and noticed when broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
BAD = (
    """
import os
import torch

def save(a, b, c, d, e, f, g, h):
    print(os.environ["HOME"], torch.nan_to_num(a), os.getenv("X"))
    try:
        return eval(b)
    except:
        model.eval()

def long():
"""
    + "    x = 1\n" * 400
)


@pytest.fixture(scope="module")
def budgets(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("budgets")


def test_the_tree_keeps_them(budgets: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert budgets.main() == 0, capsys.readouterr().out


def test_each_is_noticed(budgets: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "src" / "fewstep" / "engine" / "utils.py"
    path.parent.mkdir(parents=True)
    path.write_text(BAD)
    found = sorted(o.key.removeprefix("src/fewstep/engine/utils.py:") for o in budgets.check(path, tmp_path))
    assert found == [
        "environ",
        "environ",
        "eval",
        "except",
        "lines",
        "long:lines",
        "name",
        "nan_to_num",
        "print",
        "save:parameters",
    ]


def test_limits_depend_on_the_room(budgets: ModuleType) -> None:
    limits = [
        budgets.file_limit(f"src/fewstep/{n}")
        for n in (
            "methods/dmd2.py",
            "methods/targets.py",
            "models/adapters/dits/wan.py",
            "models/bundle.py",
            "cli/plan.py",
        )
    ]
    assert limits == [150, 400, 600, 400, 400]


@pytest.mark.parametrize("room", ["methods", "attention"])
def test_a_method_or_pattern_file_holds_one_public_class(budgets: ModuleType, tmp_path: Path, room: str) -> None:
    path = tmp_path / "src" / "fewstep" / room / "mine.py"
    path.parent.mkdir(parents=True)
    for source, offences in (
        ("class Mine: ...\nclass _Part: ...\n", []),
        ("class Mine: ...\nclass Yours: ...\n", ["classes"]),
        ("def mine(): ...\n", ["classes"]),
    ):
        path.write_text(source)
        assert [o.key.rpartition(":")[2] for o in budgets.check(path, tmp_path)] == offences
    path.rename(path.with_name("__init__.py"))
    assert list(budgets.check(path.with_name("__init__.py"), tmp_path)) == []


def test_an_adapter_file_holds_one_public_class(budgets: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "src" / "fewstep" / "models" / "adapters" / "two.py"
    path.parent.mkdir(parents=True)
    for classes, offends in ((), False), (("A",), False), (("A", "_B"), False), (("A", "B"), True):
        path.write_text("\n".join(f"class {name}: ..." for name in classes))
        assert [o.key for o in budgets.check(path, tmp_path)] == [
            "src/fewstep/models/adapters/two.py:classes"
        ] * offends
