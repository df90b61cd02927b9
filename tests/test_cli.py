"""The command line, in process: exit codes, messages, and what it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fewstep.catalogue import KINDS
from fewstep.cli import COMMANDS, doctor, main
from fewstep.cli.arguments import split_overrides
from fewstep.cli.questions import List
from fewstep.compress import ScalarInput
from fewstep.core.shipped import FOLDER, header, headline, shipped
from fewstep.pipeline import read
from fewstep.recipe import Recipe
from support_engine import shaken, tiny_model

TINY = """
model:
  type: Scratch
  denoiser: {type: VideoDiT, width: 24, depth: 1, heads: 2, text_width: 16}
  text: {type: TextEncoder, width: 16, depth: 1, heads: 2, buckets: 64}
  codec: {type: FrameAutoencoder, width: 8, depth: 1}
  num_frames: 4
method: {type: DMD2, critic_updates: 1}
data: {type: WorldClips, num_frames: 4}
settings: {steps: 1, batch: 2}
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]):
    """Run a command; its exit code, standard output and standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def refused(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 2, (out, err)
    assert "Traceback" not in err
    for word in words:
        assert word in " ".join(err.split()), err


def test_help_names_every_command_without_loading_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "fewstep", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "tyro" in loaded and not loaded & {"torch", "numpy", "av", "PIL"}  # so it answers in 0.4 s


def test_version_and_no_command(said) -> None:
    assert said("--version")[1].startswith("fewstep 0.")
    code, out, _ = said()
    assert code == 0 and "distill" in out


def test_a_device_that_is_not_there_is_refused(said, tmp_path: Path) -> None:
    missing = "xpu:3" if torch.cuda.is_available() else "cuda:3"
    for words in (
        ("sample", "world", "--prompt", "a red ring"),
        ("evaluate", "world", "--output", tmp_path),
        ("check-model", "world"),
        ("check-lora", "LORA", "--student", "world", "--output", tmp_path),
        ("prepare", tmp_path, "--output", tmp_path / "out"),
        ("pairs", "world:1", "--output", tmp_path / "out"),
    ):
        refused(said(*words, "--device", missing), f"--device {missing}: this machine has")


def test_unknown_command_and_option_name_the_nearest(said, tiny: Path) -> None:
    refused(said("distil", tiny), "there is no command 'distil'. Did you mean distill?")
    refused(said("sample", "world", "--num-inference-step", "3"), "--num-inference-steps")
    refused(said("list", "method"), "methods")
    refused(said("distill"), "--help")
    refused(said("distill", tiny, "--dry-runn"), "--dry-run")
    refused(said("distill", tiny, "--method.critic-updats", "3"), "did you mean critic_updates?")
    refused(said("distill", tiny, "--settings.compile"), "--settings.compile needs a value")
    refused(said("sample", "world", "--method.steps", "3"), "--method.steps")


def test_mistakes_are_one_line_and_tracebacks_are_asked_for(said, tiny: Path) -> None:
    code, _, err = said("distill", "tinny.yaml")
    assert code == 2 and err.count("\n") == 1 and "Did you mean tiny.yaml?" in err
    with pytest.raises(FileNotFoundError):
        main(["distill", "tinny.yaml", "--traceback"])
    tiny.write_text(TINY.replace("critic_updates", "critic_updats"))
    refused(said("explain", tiny), "tiny.yaml: method.critic_updats is unknown; did you mean critic_updates?")
    tiny.write_text(TINY + "method: {type: DMD2}\n")
    refused(said("explain", tiny), "line 11: the key 'method' is written twice")


EVIL = """
from pathlib import Path
from fewstep.methods import FlowMatching
Path("pwned").touch()
class Foo(FlowMatching): ...
"""


@pytest.fixture
def evil(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A recipe whose method lies in a module that leaves a trace where it is imported."""
    (tiny.parent / "evil_module.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(tiny.parent))
    yield TINY.replace("{type: DMD2, critic_updates: 1}", "{type: evil_module:Foo}")
    sys.modules.pop("evil_module", None)


def test_a_recipe_imports_nothing_unasked(said, tiny: Path, evil: str) -> None:
    """Not from a folder, not from a file beside a card, and not for comparing, allowed or not."""
    for name in ("mine.yaml", "run/recipe.yaml", "student/recipe.yaml", "student/other.yaml"):
        (tiny.parent / name).parent.mkdir(exist_ok=True)
        (tiny.parent / name).write_text(evil)
    Path("student/card.json").write_text("{}")
    Path("run/checkpoints").mkdir()
    for words in (
        ("explain", "mine.yaml"),
        ("distill", "mine.yaml", "--dry-run"),
        ("distill", tiny, "--dry-run", "--method.type", "evil_module:Foo"),
        ("explain", "run", "--allow-imports"),
        ("distill", "run", "--dry-run", "--allow-imports"),
        ("explain", "student/recipe.yaml", "--allow-imports"),
        ("train", "student/other.yaml", "--dry-run", "--allow-imports"),
        ("distill", tiny, "--output", "run", "--allow-imports"),
    ):
        refused(said(*words), "is 'evil_module:Foo', a class outside fewstep", "import evil_module", "--allow-imports")
    assert not Path("pwned").exists() and "evil_module" not in sys.modules


def test_the_users_own_recipe_imports_where_she_allows_it(said, tiny: Path, evil: str) -> None:
    tiny.write_text(evil)
    code, out, err = said("explain", tiny, "--allow-imports")
    assert code == 0 and "Foo: Lipman" in out, err
    assert Path("pwned").exists()
    code, _, err = said("train", tiny, "--output", "run", "--quiet", "--allow-imports")
    assert code == 0, err
    code, _, err = said("train", tiny, "--output", "run", "--quiet", "--allow-imports")  # compares with what is there
    assert code == 0, err


@pytest.mark.parametrize("kind", KINDS)
def test_list(said, kind: str) -> None:
    code, out, _ = said("list", kind, "--json")
    found = json.loads(out)
    assert code == 0 and [set(entry) for entry in found] == [{"name", "doc", "cite", "file", "line"}] * len(KINDS[kind])
    for entry in found:
        assert entry["doc"], f"{entry['name']} has no docstring"
        assert entry["name"] in Path(entry["file"]).read_text().splitlines()[entry["line"] - 1] or entry["line"] > 0
    code, out, _ = said("list", kind)
    assert code == 0 and all(entry["name"] in out for entry in found)


def test_every_method_is_cited(said) -> None:
    assert all(entry["cite"] for entry in json.loads(said("list", "methods", "--json")[1]))


def test_list_offers_what_the_catalogue_has() -> None:
    from typing import get_args, get_type_hints

    kinds = get_args(get_type_hints(List)["kind"])
    assert {*KINDS, "recipes", "students"} == set(kinds)


def test_list_recipes_says_what_each_makes(said) -> None:
    code, out, _ = said("list", "recipes")
    rows = [line.strip().split(maxsplit=1) for line in out.splitlines()[1:]]
    assert code == 0 and [name for name, _ in rows] == sorted(shipped())
    assert dict(rows)["world/features"].startswith("The clip encoder that gives the features")
    found = json.loads(said("list", "recipes", "--json")[1])
    assert {entry["name"]: entry["doc"] for entry in found} == dict(rows)
    assert all(Path(entry["file"]).is_file() for entry in found)


@pytest.mark.parametrize("name", shipped())
def test_explain_prints_every_recipe_as_a_recipe(said, name: str, tmp_path: Path) -> None:
    """Every key, with its note; what is printed loads again as the same recipe, and keeps the header."""
    code, out, err = said("explain", name)
    assert code in (0, 2) and ("model" in out and "settings" in out and "# papers" in out)
    # a recipe that starts from a run or from data that have not been made here is printed all the same
    assert code == 0 or any(
        words in err for words in ("card.json", "manifest.json", "no such file", "is not there", "the hub")
    )
    mine = tmp_path / "mine.yaml"
    mine.write_text(out)
    assert read(mine, []) == read(name, []) and header(shipped()[name]) in out


def test_a_name_is_found_from_anywhere_and_a_file_goes_first(
    said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Recipe.load("world/dmd2") == Recipe.load(FOLDER / "world" / "dmd2.yaml") and not caplog.records
    Path("world/dmd2").mkdir(parents=True)
    assert Recipe.load("world/dmd2").settings.steps > 1 and not caplog.records  # a folder without a recipe is none
    Path("world/dmd2/recipe.yaml").write_text(TINY)
    assert Recipe.load("world/dmd2").settings.steps == 1
    assert "not the recipe with this name in the package" in caplog.text and "world/dmd2/recipe.yaml" in caplog.text
    code, out, _ = said("distill", "world/consistency", "--dry-run")
    assert code == 0 and "runs/consistency-" in out


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [
        ("world/dmd", "world/dmd2"), ("recipes/world/avdm2.yaml", "world/avdm2"), ("world/style_lora.yaml", "world/style_lora"),
        ("wan/dmd2", "wan21_1p3b/dmd2"), ("world/progresive", "world/progressive"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_answered_with_the_nearest(
    said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(said("distill", wanted), f"there is no recipe {wanted}. Did you mean {meant}?", "fewstep list recipes")


def test_a_headline_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("# A student in 4.5 words. More of it.\n# And more.\nmodel: {}\n# not this\n")
    assert headline(file) == "A student in 4.5 words"
    assert header(file) == "# A student in 4.5 words. More of it.\n# And more."


def test_explain_shows_defaults_sources_and_overrides(said, tiny: Path) -> None:
    code, out, _ = said("explain", tiny, "--method.critic-updates", "7", "--settings.seed=3")
    assert code == 0
    assert "critic_updates: 7" in out and "seed: 3" in out and "warmup: 0" in out
    assert "dmd2.py:" in out and "2405.14867" in out
    assert out.count("critic, ") >= 6  # the schedule of one iteration


def test_dry_run_loads_and_writes_nothing(said, tiny: Path) -> None:
    before = sorted(tiny.parent.rglob("*"))
    code, out, _ = said("distill", tiny, "--dry-run", "--method.adversary", "{weight: 0.01}")
    assert code == 0, out
    for word in ("teacher", "student", "critic", "discriminator", "VideoDiT", "[2, 4, 4, 8, 8]", "MiB"):
        assert word in out, out
    assert sorted(tiny.parent.rglob("*")) == before


def test_distill_sample_and_refuse(said, tiny: Path) -> None:
    code, out, err = said("distill", tiny, "--output", "run", "--quiet")
    assert code == 0 and out.strip() == "run/student", err
    code, out, err = said("sample", "run/student", "--prompt", "a red ball", "--output", "clip.gif", "--seed", 3)
    assert code == 0 and Path("clip.gif").stat().st_size > 0, err
    refused(said("sample", "run/student", "--prompt", "a", "--num-inference-steps", 7), "was trained for", "--force")
    code, _, err = said(
        "sample", "run/student", "--prompt", "a", "--num-inference-steps", 2, "--force", "--output", "b.mp4"
    )
    assert code == 0 and Path("b.mp4").is_file(), err
    refused(said("sample", "run/student"), "--prompt")
    refused(
        said("sample", "run/student", "--prompt", "a", "--scalar", "guidance=4"), "does not read 'guidance'", "none"
    )
    refused(said("sample", "run/student", "--prompt", "a", "--output", "clip.avi"), ".mp4, .gif, .webp, .png")
    refused(said("sample", "nowhere", "--prompt", "a"), "no card.json")
    refused(
        said("sample", "run/student", "--prompt", "a", "--num-frames", 6),
        "makes clips of 4 frames and was asked for 6", "--force",
    )  # fmt: skip
    code, _, err = said("sample", "run/student", "--prompt", "a", "--num-frames", 6, "--force", "--output", "c.gif")
    assert code == 0, err


def test_sample_with_scalars(said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model().transformed(ScalarInput(name="guidance"), ScalarInput(name="until"))
    shaken(model.denoiser.backbone.scalars, 0.5)
    model.save("student")
    words = ("sample", "student", "--prompt", "a red ball", "--scalar")
    files = []
    asked = {
        "a.gif": ("guidance=4", "until=.5"),
        "b.gif": ("until=0.5", "guidance=4.0"),
        "c.gif": ("until=1", "guidance=4"),
    }
    for name, numbers in asked.items():
        code, _, err = said(*words, *numbers, "--output", name)
        assert code == 0, err
        files.append(Path(name).read_bytes())
    assert files[0] == files[1] != files[2]
    refused(said(*words, "guidance=4"), "reads 'until', which has no default", "--scalar until=4.0")
    refused(said(*words, "guidance"), "--scalar guidance: write the name and a number, such as guidance=4.0")


def test_pairs(said, tiny: Path) -> None:
    from fewstep.recipe import Recipe

    Recipe.load(tiny).model.load().save(Path("teacher"))
    code, out, err = said(
        "pairs", "world:3", "--model", "teacher", "--output", "pairs", "--steps", 4, "--batch", 2, "--quiet",
        "--times", 1, 0.5, 0,
    )  # fmt: skip
    assert code == 0 and "3 pairs" in out, err


def test_doctor(said) -> None:
    code, out, _ = said("doctor")
    assert code == 0
    for word in ("torch", "cores", "memory", "gpu", "tensorboard", "in float32: sdpa-", "in bfloat16: "):
        assert word in out, out


@pytest.mark.parametrize(("there", "words"), [(True, "bf16 is faster here"), (False, "write 'off' in the recipe")])
def test_doctor_says_which_arithmetic_is_fast(said, monkeypatch: pytest.MonkeyPatch, there: bool, words: str) -> None:
    monkeypatch.setattr(doctor, "has_bfloat16", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = said("doctor")[1]
    assert words in out
    (line,) = [line for line in out.splitlines() if line.startswith("speed of one core")]
    single, half = map(int, re.findall(r"(\d+) GFLOP/s in", line))
    assert 1 <= single < 10_000 and half < 100_000


def test_overrides_are_split_off() -> None:
    words = ["distill", "a.yaml", "--method.x", "-1", "--output", "runs/x.y", "--a.b=c=d", "--dry-run"]
    rest, pairs = split_overrides(words)
    assert rest == ["distill", "a.yaml", "--output", "runs/x.y", "--dry-run"]
    assert pairs == [("method.x", "-1"), ("a.b", "c=d")]


@pytest.fixture
def few_latency_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation takes each time three times, not twenty: a test asks that it is there, not how long it is."""
    from fewstep.evaluate import cost

    measure = cost.measure_latency
    monkeypatch.setattr(cost, "measure_latency", lambda fn, **options: measure(fn, **options | {"runs": 3}))


@pytest.mark.usefixtures("few_latency_runs")
def test_evaluate_compares_a_student_with_its_teacher(said, tiny: Path) -> None:
    from fewstep.recipe import Recipe

    Recipe.load(tiny).model.load().save(Path("teacher"))
    assert said("distill", tiny, "--output", "run", "--quiet")[0] == 0
    words = ["--teacher", "teacher", "--output", "report", "--prompts", 2, "--num-inference-steps", 4, "--quiet"]
    code, out, err = said("evaluate", "run/student", *words)
    assert code == 0, err
    code, _, err = said("evaluate", "run/student", *words[:4], "--num-inference-steps", 3, "--quiet")
    assert code == 2 and "trained for 4 steps and was asked for 3" in err and "--force" not in err
    assert "p95 s/clip" in out and all(name in out for name in ("shape", "background"))
    assert "teacher 4" in out and "student 4" in out and out.split()[-1] == "report/report.html"
    assert Path("report/results.json").is_file()
