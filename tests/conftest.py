"""What every test may ask for."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fewstep.core.env import cpu_count

os.environ["HF_HUB_OFFLINE"] = "1"  # recipes name published models; no test asks for one
sys.path.insert(0, str(Path(__file__).parent))  # for what tests share: `support_*.py`, `tiny_*.py`


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden/ anew instead of comparing with it"
    )
    parser.addoption(
        "--save-durations", type=Path, metavar="FILE", help="write what each test cost; see tools/slowest.py"
    )


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--save-durations"):
        from support_costs import Costs

        config.pluginmanager.register(Costs(file), "costs")


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not look at a million objects again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def shared_models_stay_as_they_are() -> Iterator[None]:
    """What many tests read, no test may change."""
    yield
    if (tiny := sys.modules.get("tiny_models")) is not None:
        assert not tiny.changed(), f"a test has changed a shared model ({tiny.changed()}); give it a copy: save_tiny"


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """Also where tests run in the background of a shell, which lets its jobs ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def single_thread() -> Iterator[None]:
    """Sums in one order on every machine, and tiny networks run fastest so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def every_core() -> Iterator[None]:
    """Minutes of training on all cores; the quick tests want one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(cpu_count())
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def load_tool() -> Callable[[str], ModuleType]:
    """A script of `tools/` as a module, by name."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).parent.parent / "tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{name}_tool", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load
