"""The list of planted mistakes is one of the source as it stands, and the tool tells killed from survived."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TARGETS = "test_methods_targets.py::"


@pytest.fixture(scope="module")
def mutate(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("mutate")


def test_every_mutation_is_one_of_the_source_as_it_stands(
    mutate: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mutate.main(["--check"]) == 0, capsys.readouterr().out
    listed = mutate.mutations()
    assert len(listed) >= 650 and len({(m.file, m.old, m.new) for m in listed}) == len(listed)
    assert {m.room for m in listed} >= {
        "attention", "caching", "compress", "core", "data", "diffusion", "engine", "evaluate", "methods", "metrics", "models",
        "pipeline", "streaming", "world",
    }  # fmt: skip


def test_every_named_test_is_there(mutate: ModuleType) -> None:
    for m in mutate.mutations():
        for test in m.tests:
            file, _, name = test.partition("::")
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert not name or f"def {name.partition('[')[0]}(" in source, f"{m.file}: {m.mistake}: no test {test}"


def tried(tmp_path: Path, **entries: tuple[str, str, str]) -> dict[str, str]:
    """The verdicts of a list of its own, by mistake; each entry is old text, new text, test."""
    listed: dict[str, list[dict[str, str]]] = {}
    for name, (old, new, test) in entries.items():
        file = "methods/targets.py" if "FLOOR" in old else "methods/gan.py"
        listed.setdefault(file, []).append({"mistake": name, "old": old, "new": new, "tests": test})
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(listed))
    code = (
        "import sys, pathlib; sys.path.insert(0, 'tools'); import mutate\n"
        "mutate.GOLDEN, mutate.LIBRARIES = sys.argv[2], ('torch',)\n"
        "for o in mutate.tried(mutate.mutations(pathlib.Path(sys.argv[1]))): print('=', o.mutation.mistake, o.verdict)"
    )
    golden = f"{TARGETS}test_approximate_r1_is_the_squared_gradient"  # stands for the golden losses, which take longer
    command = [sys.executable, "-c", code, str(tmp_path), golden]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name: verdict for _, name, verdict in (line.split(" ", 2) for line in said.splitlines() if line[:1] == "=")}


def test_mistakes_are_killed_by_meaning_by_golden_losses_or_not_at_all(tmp_path: Path) -> None:
    """Inside a function, and in what is run when the file is imported."""
    adversarial, huber = f"{TARGETS}test_adversarial_terms", f"{TARGETS}test_pseudo_huber_limits"
    generator, r1 = "return F.softplus(-fake).mean()", "return (logits - perturbed).square().mean()"
    before = {path: path.read_bytes() for path in (ROOT / "src").rglob("*.py")}
    assert tried(
        tmp_path,
        sign=(generator, "return F.softplus(fake).mean()", adversarial),
        elsewhere=(generator, "return F.softplus(fake).mean()", huber),
        square=(r1, "return (logits - perturbed).abs().mean()", huber),
        floor=("FLOOR = 1e-5", "FLOOR = 1.0", f"{TARGETS}test_distribution_matching_is_normalised_per_sample"),
        broken=(generator, "return nothing_of_that_name", adversarial),
        unimportable=("FLOOR = 1e-5", "FLOOR = nothing_of_that_name", adversarial),
    ) == {
        "sign": "killed", "elsewhere": "survived", "square": "golden only", "floor": "killed",
        "broken": "killed", "unimportable": "stale",
    }  # fmt: skip
    assert before == {path: path.read_bytes() for path in (ROOT / "src").rglob("*.py")}


def test_a_stale_mutation_says_why(mutate: ModuleType) -> None:
    def why(**changes: object) -> str:
        fields = {
            "file": "methods/targets.py",
            "mistake": "m",
            "old": "FLOOR = 1e-5",
            "new": "",
            "tests": ("test_core.py",),
        }
        return mutate.Mutation(**fields | changes).stale

    assert why() == ""
    assert "stands there 0 times" in why(old="no such text") and "times instead of once" in why(old="return")
    assert "no such file" in why(file="methods/nothing.py") and "no test" in why(tests=())
    assert "name a test of meaning" in why(tests=("test_golden.py",)) and "equal" in why(new="FLOOR = 1e-5")


def test_targets_are_on_rates_of_all_that_was_tried(mutate: ModuleType) -> None:
    mutation = mutate.Mutation("methods/targets.py", "m", "a", "b", ("test_core.py",))

    def outcomes(killed: int, golden: int, survived: int, stale: int = 0) -> list[object]:
        verdicts = [mutate.KILLED] * killed + [mutate.GOLDEN_ONLY] * golden
        return [mutate.Outcome(mutation, v) for v in verdicts + [mutate.SURVIVED] * survived + [mutate.STALE] * stale]

    assert mutate.rates(outcomes(90, 5, 5)) == (0.95, 0.05)
    assert mutate.enough(outcomes(94, 3, 3)) and mutate.enough(outcomes(100, 0, 0))
    assert not any(map(mutate.enough, (outcomes(96, 0, 4), outcomes(96, 4, 0), outcomes(100, 0, 0, stale=1))))
    assert "methods               100           94            3            3            0" in mutate.table(
        outcomes(94, 3, 3)
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tests_notice_what_people_get_wrong() -> None:
    done = subprocess.run([sys.executable, "tools/mutate.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
