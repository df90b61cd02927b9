"""Faults in options of commands: devices, sizes, budgets, names that are no names, and the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from faults.case import Case
from faults.given import recipe, teacher

DRY = ("distill", "r.yaml", "--dry-run")
CHECK = ("check-model", "teacher")
ABSENT = "xpu:3"


def dry(*words: str, says: tuple[str, ...]) -> Case:
    return Case("dry run " + " ".join(words), (*DRY, *words), says, recipe())


def check(*words: str, says: tuple[str, ...]) -> Case:
    return Case("check-model " + " ".join(words), (*CHECK, *words), says, prepare=teacher)


def without_model(*words: str, says: tuple[str, ...], files: dict[str, str] | None = None) -> Case:
    return Case(" ".join(words)[:100], words, says, files or {})


@contextmanager
def environment(**values: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, values):
        yield


def started_by(**values: str) -> Any:
    return lambda: environment(**values)


BUDGETS = (
    dry("--flops", "0", says=("--flops", "0")),
    dry("--flops", "-1", says=("--flops", "-1")),
    dry("--flops", "nan", says=("--flops", "nan")),
    dry("--flops", "inf", says=("--flops", "inf")),
    dry("--flops", "fast", says=("--flops", "fast")),
    dry("--price", "3", says=("--price", "--flops")),
    dry("--flops", "1e12", "--price", "-3", says=("--price", "-3")),
    dry("--flops", "1e12", "--price", "0", says=("--price", "0")),
    dry("--flops", "1e12", "--price", "nan", says=("--price", "nan")),
    dry("--memory", "0", says=("memory", "0")),
    dry("--memory", "-3GB", says=("memory", "-3GB")),
    dry("--memory", "much", says=("memory", "much")),
    dry("--memory", "nanGB", says=("memory", "nanGB")),
    dry("--memory", "infGB", says=("memory", "infGB")),
    dry("--memory", "", says=("memory",)),
    dry("--memory", "24 parsecs", says=("memory", "24 parsecs")),
    dry("--shard", "8", says=("--shard", "--memory")),
    dry("--memory", "1GB", "--shard", "0", says=("--shard", "0")),
    dry("--memory", "1GB", "--shard", "-8", says=("--shard", "-8")),
    dry("--memory", "1GB", "--shard", "99999999999999", says=("--shard",)),
    without_model("distill", "r.yaml", "--flops", "1e12", says=("--flops", "--dry-run"), files=recipe()),
    without_model("distill", "r.yaml", "--strict", "--allow-fallback", says=("--strict",), files=recipe()),
)
SIZES = (
    check("--num-frames", "0", says=("num_frames", "0")),
    check("--num-frames", "-4", says=("num_frames", "-4")),
    check("--num-frames", "99999999999", says=("num_frames", "99999999999")),
    check("--height", "0", says=("height", "0")),
    check("--height", "-8", says=("height", "-8")),
    check("--width", "0", says=("width", "0")),
    check("--width", "33", says=("33",)),
    check("--width", "many", says=("--width", "many")),
    check("--num-inference-steps", "0", says=("steps", "0")),
    check("--num-inference-steps", "-1", says=("steps", "-1")),
    check("--num-inference-steps", "99999999999999", says=("steps", "99999999999999")),
    check("--dtype", "float16", says=("--dtype", "float16")),
    check("--only", "nothing", says=("nothing",)),
    check("--video", "nowhere.mp4", says=("nowhere.mp4",)),
)
DEVICES = tuple(
    Case(f"{words[0]} on {device!r}", (*words, "--device", device), ("--device", device), prepare=teacher)
    for words in (
        ("sample", "teacher", "--prompt", "a", "--output", "o.gif"),
        ("check-model", "teacher"),
        ("evaluate", "teacher", "--output", "o"),
        ("pairs", "world:1", "--model", "teacher", "--output", "o"),
        ("prepare", ".", "--model", "teacher", "--output", "o"),
        ("check-lora", "l.safetensors", "--student", "teacher", "--output", "o"),
    )
    for device in (ABSENT, "gpu0", "cuda:x", "meta", "CPU", "tpu", "cuda:-1")
)
NAMES = (
    without_model("distil", "r.yaml", says=("distil", "distill")),
    without_model("", says=("command",)),
    without_model("--nothing", says=("--nothing",)),
    without_model("distill", says=("RECIPE",)),
    without_model("distill", "nowhere.yaml", says=("nowhere.yaml",)),
    without_model("distill", "rr.yaml", says=("rr.yaml", "Did you mean r.yaml"), files=recipe()),
    without_model("distill", "n" * 300 + ".yaml", says=("nnn",)),
    without_model("explain", "n" * 300, says=("nnn",)),
    without_model("sample", "n" * 300, "--prompt", "a", says=("nnn",)),
    without_model("check-model", "n" * 300, says=("nnn",)),
    without_model("explain", "", says=("recipe",)),
    without_model("explain", ".", says=("recipe.yaml",)),
    without_model("explain", "/dev/null", says=("/dev/null",)),
    without_model("explain", "folder", says=("folder/recipe.yaml",), files={"folder/x": ""}),
    without_model("explain", "r.yaml/x", says=("r.yaml/x",), files=recipe()),
    without_model("distill", "r.yaml", "--output", "taken", says=("taken",), files=recipe() | {"taken": "mine"}),
    without_model("distill", "r.yaml", "--output", "taken/x", says=("taken",), files=recipe() | {"taken": "mine"}),
    without_model("list", "everything", says=("methods",)),
    without_model("watch", "nowhere", says=("nowhere",)),
    without_model("watch", ".", says=("metrics.jsonl",)),
    without_model("check-model", "nowhere", says=("nowhere",)),
    without_model("export", "nowhere", "out", says=("nowhere",)),
    without_model("check-lora", "nowhere", "--student", "nowhere", "--output", "out", says=("nowhere",)),
)
ENVIRONMENT = tuple(
    Case(f"environment {values}", DRY, tuple(values)[:1], recipe(), during=started_by(**values))
    for values in ({"RANK": "first"}, {"WORLD_SIZE": ""}, {"LOCAL_RANK": "1.5"}, {"WORLD_SIZE": "0"}, {"RANK": "-1"},
                   {"WORLD_SIZE": "-2"}, {"RANK": "5"}, {"TORCHELASTIC_RESTART_COUNT": "x"})
)  # fmt: skip

CASES = (*BUDGETS, *SIZES, *DEVICES, *NAMES, *ENVIRONMENT)


def unreadable(here: Path) -> None:
    (here / "r.yaml").write_text("model: world")
    (here / "r.yaml").chmod(0)


if os.getuid():
    CASES += (Case("a recipe that may not be read", ("explain", "r.yaml"), ("r.yaml",), prepare=unreadable),)
