"""What keeps the tests cheap: the list of the slow ones, models that are made once, processes that import nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from support_costs import cpu_seconds
from support_processes import forked

pytest_plugins = ["pytester"]

SUITE = '''
import time
import pytest

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

@pytest.fixture(scope="module")
def shared():
    burn(0.3)

def test_a_loss_goes_down(shared):
    """The loss falls, and the second. Not this."""

def test_names_are_words(shared):
    burn(0.1)

def test_that_waits():
    time.sleep(0.2)
'''


@pytest.mark.parametrize("processes", [(), ("-n", "1")])
def test_costs_are_cpu_seconds_of_every_test(pytester: pytest.Pytester, processes: tuple[str, ...]) -> None:
    """With their fixtures, without waiting, also where tests run in other processes."""
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text().replace(
        "Path(__file__).parent)", repr(str(Path(__file__).parent)) + ")"
    ))  # fmt: skip
    pytester.makepyfile(test_it=SUITE)
    pytester.runpytest_subprocess("--save-durations", "costs.json", *processes).assert_outcomes(passed=3)
    costs = json.loads((pytester.path / "costs.json").read_text())
    assert [name.partition("::")[2] for name in costs] == [
        "test_a_loss_goes_down", "test_names_are_words", "test_that_waits",
    ]  # fmt: skip
    first, second, third = costs.values()
    assert first >= 0.29 and 0.09 <= second < first and third < 0.1


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_forked_processes_are_counted() -> None:
    """They are children of the process that they are forked from, and not of the one that tests."""
    spent = []
    for seconds in (0.0, 0.3):  # the first waits for the imports
        before = cpu_seconds()
        process = forked().Process(target=burn, args=(seconds,))
        process.start()
        process.join()
        spent.append(cpu_seconds() - before)
    assert 0.28 <= spent[1] < 1.0


def test_the_slowest_come_first_with_what_they_guard(
    load_tool: Callable[[str], ModuleType], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load_tool("slowest")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    (tmp_path / "test_it.py").write_text(SUITE)
    costs = {
        "test_it.py::test_names_are_words[a::b]": 1.0,
        "test_it.py::test_a_loss_goes_down[1]": 6.0,
        "b.py::test_x": 3.0,
    }
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    assert tool.main([str(tmp_path / "costs.json"), "--count", "3"]) == 0
    out = capsys.readouterr().out
    assert "3 tests, 10 CPU-seconds; 1 take more than 5" in out
    dear, third, cheap = (
        out.index(words) for words in ("The loss falls, and the second\n", "guards: x", "guards: names are words")
    )
    assert dear < third < cheap and "60.0 %  test_it.py::test_a_loss_goes_down[1]" in out
    tool.main([str(tmp_path / "costs.json"), "--files"])
    assert "7.00 s  70.0 %  test_it.py" in capsys.readouterr().out


def test_a_shared_model_that_was_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy may be changed, what all read may not."""
    pytest.importorskip("diffusers", reason="needs the extra diffusers")
    import tiny_models

    monkeypatch.setattr(tiny_models, "SHARED", {})
    folder = tiny_models.shared("wan", seed=1)
    assert tiny_models.shared("wan", seed=1) == folder != tiny_models.shared("wan", seed=2)
    weights = Path("transformer", "diffusion_pytorch_model.safetensors")
    assert (folder / weights).read_bytes() != (tiny_models.shared("wan", seed=2) / weights).read_bytes()
    copy = tiny_models.save_tiny("wan", tmp_path / "copy", seed=1)
    (copy / weights).write_bytes(b"")
    assert tiny_models.changed() == [] and (folder / weights).stat().st_size > 0
    (folder / "model_index.json").write_text("{}")
    assert tiny_models.changed() == ["wan-1-[]"]
    (folder / "model_index.json").unlink()
    assert tiny_models.changed() == ["wan-1-[]"]


def imported() -> None:
    """Ends with the number of modules that this process would have to import."""
    wanted = (
        {"torch", "fewstep.recipe", "support_engine", "diffusers"} if has_diffusers() else {"torch", "support_engine"}
    )
    sys.exit(len(wanted - sys.modules.keys()))


def has_diffusers() -> bool:
    return importlib.util.find_spec("diffusers") is not None


def test_a_forked_process_has_everything_imported() -> None:
    process = forked().Process(target=imported)
    process.start()
    process.join()
    assert process.exitcode == 0
