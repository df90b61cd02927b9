"""Faults in what sample and evaluate are asked for, and in where their output is to go."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults import around
from faults.case import Case
from faults.given import run, teacher

FULL = os.strerror(errno.ENOSPC)
SAMPLE = ("sample", "teacher", "--prompt", "a duck")

SAMPLER = "fewstep.diffusion.samplers.Sampler.sampling"


def sample(name: str, words: tuple[Any, ...], *says: str, **more: Any) -> Case:
    return Case(f"sample: {name}", words, says, **{"prepare": teacher, **more})


def asked(words: str, *says: str, **more: Any) -> Case:
    return sample(words, (*SAMPLE, *words.split()), *says, **more)


def output(name: str, *says: str, **more: Any) -> Case:
    return sample(f"--output {name[:20]}{name[20:][-20:]}", (*SAMPLE, "--output", name), *says, **more)


def folder(name: str) -> Callable[[Path], None]:
    def make(here: Path) -> None:
        teacher(here)
        (here / name).mkdir(parents=True)

    return make


VALUES = (
    *(asked(f"--num-frames {value}{force}", "--num-frames", value) for value in ("0", "-4") for force in ("", " --force")),
    *(asked(f"--num-inference-steps {value}{force}", "--num-inference-steps", value)
      for value in ("0", "-1") for force in ("", " --force")),
    *(asked(f"--scale {value}", "--scale", value) for value in ("0", "-1", "100000", "1000000000000")),
    *(asked(f"--guidance-scale {value}", "--guidance-scale", value) for value in ("nan", "inf", "-inf")),
    *(asked(f"--scalar {value}", "--scalar", value, "guidance=4.0") for value in ("guidance", "guidance=", "=4", "guidance=nan")),
    asked("--scalar guidance=4 guidance=5", "--scalar", "twice"),
    asked("--scalar guidance=4", "guidance", "none"),
    asked("--num-frames 5", "5", "--force"),
    asked("--num-frames 100000000 --force", "num_frames", "65,536"),
    asked("--image a.png", "a.png", files={"a.png": b""}),
    asked("--last-image a.png", "a.png", files={"a.png": b""}),
    asked("--image nowhere.png", "nowhere.png"),
    asked("--image a.png b.png", "--image", "1 prompt"),
    asked("--prompt-file nowhere.txt", "nowhere.txt", "no such file"),
    asked("--prompt-file p.txt", "p.txt", "no prompts", files={"p.txt": ""}),
    asked("--prompt-file teacher", "teacher"),
    asked("--device gpu", "--device", "gpu"),
    asked("--stepz 3", "--stepz"),
    asked("--preset layout", "--preset", "own contract"),
    asked("--preset quick", "--preset", "quick"),
    sample("prompts in Latin-1", (*SAMPLE, "--prompt-file", "p.txt"), "p.txt", "UTF-8", files={"p.txt": b"gr\xfcn"}),
    sample("prompts in UTF-16", (*SAMPLE, "--prompt-file", "p.txt"), "p.txt", "UTF-8", files={"p.txt": "x".encode("utf-16")}),
    sample("prompts with NUL", (*SAMPLE, "--prompt-file", "p.txt"), "p.txt", "NUL", files={"p.txt": "a\0b"}),
    sample("a film of prompts", (*SAMPLE, "--prompt-file", "p.mp4"), "p.mp4", "UTF-8", files={"p.mp4": b"\xff\xd8" * 99}),
    sample("a prompt that is not UTF-8", ("sample", "teacher", "--prompt", "a \udcff"), "--prompt", "UTF-8"),
    sample("no prompt", SAMPLE[:2], "--prompt"),
    sample("no model", ("sample", "nowhere", *SAMPLE[2:]), "nowhere", "card.json"),
    sample("an empty folder", ("sample", "empty", *SAMPLE[2:]), "empty", "card.json", prepare=folder("empty")),
    sample("a run in place of its student", ("sample", "run", *SAMPLE[2:]), "run", "student", prepare=run),
    sample("no memory", SAMPLE, "out of memory", during=around.raising(SAMPLER, MemoryError())),
    sample("no memory, as torch says it", SAMPLE, "out of memory", during=around.raising(
        SAMPLER, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"))),
)  # fmt: skip


def stopped(kind: str) -> Callable[[], Any]:
    """Ctrl-C or SIGTERM in the middle of the work."""

    @contextmanager
    def during() -> Any:
        from fewstep.core.stopping import Terminated

        with around.raising(SAMPLER, Terminated() if kind == "TERM" else KeyboardInterrupt())():
            yield

    return during


def no_video(path: object, *_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, FULL, str(path))


@contextmanager
def only_temporary() -> Any:
    """The disk of the output is full, and that of temporary files is not."""
    from unittest.mock import patch

    from fewstep.core import atomic

    settle = atomic.settle

    def choose(file: Path) -> None:
        if not file.is_absolute():
            no_video(file)
        settle(file)

    with patch("fewstep.core.atomic.settle", choose):
        yield


OUTPUTS = (
    output("clip", "clip", ".mp4"),
    output("clip.avi", "clip.avi", ".mp4"),
    output("clip.mp4.txt", "clip.mp4.txt", ".mp4"),
    output(".mp4", ".mp4"),
    output("clips.mp4", "clips.mp4", "directory", prepare=folder("clips.mp4")),
    output("notes.txt/clip.mp4", "notes.txt", files={"notes.txt": "mine"}),
    output("/proc/clip.mp4", "/proc/clip.mp4"),
    output("/dev/full/clip.mp4", "/dev/full"),
    output("/dev/full", "/dev/full", ".mp4"),
    output("x" * 300 + ".mp4", "too long", "shorter name"),
    output("x" * 300 + ".gif", "too long", "shorter name"),
    output("é" * 150 + ".mp4", "too long", "shorter name"),
    output("d/" * 3000 + "a.mp4", "too long"),
    output("a\0b.mp4", "null"),
    output("a.mp4", "a.mp4", FULL, during=around.into_full(".a.draft.mp4")),
    output("a.gif", "a.gif", FULL, during=around.into_full(".a.draft.gif")),
    sample("the disk is full at the end", (*SAMPLE, "--output", "a.mp4"), "a.mp4", FULL, "the clips were written to",
           during=only_temporary),
    sample("every disk is full at the end", (*SAMPLE, "--output", "a.mp4"), "a.mp4", FULL, during=around.full_disk),
    sample("Ctrl-C", SAMPLE, "stopped", "0 of 1 files", code=130, during=stopped("INT")),
    sample("SIGTERM", SAMPLE, "stopped", "0 of 1 files", code=143, during=stopped("TERM")),
)  # fmt: skip

EVALUATE = (
    "evaluate",
    "teacher",
    "--teacher",
    "teacher",
    "--output",
    "out",
    "--prompts",
    "2",
    "--seeds",
    "2",
    "--quiet",
)
"""The tiny model beside itself: it is refused for nothing."""


def evaluate(name: str, words: tuple[Any, ...], *says: str, **more: Any) -> Case:
    return Case(f"evaluate: {name}", words, says, **{"prepare": teacher, **more})


def there(**files: str) -> Callable[[Path], None]:
    """Files in the output folder; `results_json` is results.json."""

    def make(here: Path) -> None:
        teacher(here)
        (here / "out").mkdir()
        for name, text in files.items():
            (here / "out" / name.replace("_", ".")).write_text(text)

    return make


RESULTS = {
    "empty": "", "text": "my results", "a list": "[]", "an object": "{}", "a number": "3", "another tool's": '{"rows": [1]}',
    "cut short": '{"rows": [{"name": "tea', "nested deep": "[" * 100_000, "rows that are none": '{"rows": 3, "truth": null}',
}  # fmt: skip

EVALUATED = (
    *(evaluate(f"foreign results.json: {name}", EVALUATE, "results.json", "not written by", prepare=there(results_json=text),
               writes=True) for name, text in RESULTS.items()),
    evaluate("a foreign page", EVALUATE, "report.html", prepare=there(report_html="<html>mine</html>"), writes=True),
    evaluate("0 prompts", (*EVALUATE[:6], "--prompts", "0"), "prompts", "0"),
    evaluate("-1 prompts", (*EVALUATE[:6], "--prompts", "-1"), "prompts", "-1"),
    evaluate("0 seeds", (*EVALUATE[:6], "--seeds", "0"), "seeds_per_prompt", "0"),
    evaluate("a batch of 0", (*EVALUATE, "--batch", "0"), "batch", "0"),
    evaluate("a single clip", (*EVALUATE[:6], "--prompts", "1", "--seeds", "1"), "at least 4 clips"),
    evaluate("2 frames", (*EVALUATE, "--num-frames", "2"), "num_frames", "2", writes=True),
    evaluate("0 frames", (*EVALUATE, "--num-frames", "0"), "num_frames", "0", writes=True),
    evaluate("-4 frames", (*EVALUATE, "--num-frames", "-4"), "num_frames", "-4", writes=True),
    evaluate("0 steps", (*EVALUATE, "--num-inference-steps", "0"), "0", writes=True),
    evaluate("-1 steps", (*EVALUATE, "--num-inference-steps", "-1"), "-1", writes=True),
    evaluate("no prompts in the file", (*EVALUATE, "--prompt-file", "p.txt"), "p.txt", "no prompts", files={"p.txt": " "}),
    evaluate("no such file of prompts", (*EVALUATE, "--prompt-file", "no.txt"), "no.txt"),
    evaluate("features that are not there", (*EVALUATE, "--features", "no.pt"), "no.pt", writes=True),
    evaluate("CLIP that is not there", (*EVALUATE, "--clip", "no"), "no", writes=True),
    evaluate("real clips of another suite", (*EVALUATE, "--real", "videos"), "--real", "avdm2"),
    evaluate("a suite without its clips", (*EVALUATE, "--suite", "avdm2"), "--real", "--clip"),
    evaluate("no student", ("evaluate", "nowhere", *EVALUATE[2:]), "nowhere", "card.json"),
    evaluate("no teacher", (*EVALUATE[:3], "nowhere", *EVALUATE[4:]), "nowhere", "card.json"),
    evaluate("the output is a file", EVALUATE, "out", files={"out": "mine"}),
    evaluate("the output is in /proc", (*EVALUATE[:5], "/proc/out", *EVALUATE[6:]), "/proc/out"),
    evaluate("a name of 300 letters", (*EVALUATE[:5], "x" * 300, *EVALUATE[6:]), "shorter name"),
    evaluate("another works there", EVALUATE, "out", "in use", during=around.held("out")),
    evaluate("the disk is full", EVALUATE, FULL, "again", during=around.full_disk, writes=True),
    evaluate("the disk is read-only", EVALUATE, "read-only", during=around.read_only, writes=True),
    evaluate("Ctrl-C", EVALUATE, "stopped", "0 finished rows", code=130, during=stopped("INT"), writes=True),
    evaluate("SIGTERM", EVALUATE, "stopped", "0 finished rows", code=143, during=stopped("TERM"), writes=True),
)  # fmt: skip

DISTILL = ("distill", "r.yaml", "--output", "run", "--quiet")


def changed(**cells: Any) -> Callable[[Path], None]:
    """The folder `run`, in which r.yaml has run; now it says another number of steps."""

    def make(here: Path) -> None:
        run(here)
        (here / "r.yaml").write_text((here / "r.yaml").read_text().replace("steps: 1", "steps: 2"))

    return make


def distill(name: str, *says: str, words: tuple[Any, ...] = DISTILL, **more: Any) -> Case:
    return Case(f"distill: {name}", words, says, **{"prepare": run, **more})


RUNS = (
    distill("another works there", "run", "in use", "process", during=around.held("run")),
    distill("another recipe has run there", "another recipe", "settings.steps: 1 -> 2", prepare=changed()),
    distill("the output is a file", "r.yaml", words=(*DISTILL[:3], "r.yaml", "--quiet")),
    distill("the output is in /proc", "/proc/out", words=(*DISTILL[:3], "/proc/out", "--quiet")),
    distill("a name of 300 letters", "shorter name", words=(*DISTILL[:3], "x" * 300, "--quiet")),
    distill("the disk is full", FULL, "again", words=(*DISTILL[:3], "new", "--quiet"), during=around.full_disk, writes=True),
    distill("the disk is read-only", "read-only", words=(*DISTILL[:3], "new", "--quiet"), during=around.read_only, writes=True),
    Case("watch: no run", ("watch", "nowhere"), ("nowhere", "metrics.jsonl")),
    Case("watch: a file", ("watch", "r.yaml"), ("r.yaml",), {"r.yaml": ""}),
    Case("list: no such kind", ("watc",), ("watch",)),
)  # fmt: skip

CASES = (*VALUES, *OUTPUTS, *EVALUATED, *RUNS)
