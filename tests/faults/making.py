"""Faults in what prepare and pairs are asked for, in the videos, and in what they left before."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from faults import around
from faults.case import Case
from faults.given import teacher

CLIP = 4
"""Frames of the model `teacher`."""


@cache
def video() -> bytes:
    """A film of 8 frames of 32 x 32 pixels."""
    import torch

    from fewstep.data.video import write_video

    with tempfile.TemporaryDirectory() as folder:
        return write_video(
            Path(folder) / "a.mp4", torch.linspace(-1, 1, 3 * 8 * 32 * 32).view(3, 8, 32, 32)
        ).read_bytes()


def films(here: Path) -> None:
    """The folder `teacher`, and `videos` with two films that can be used."""
    teacher(here)
    (here / "videos").mkdir(exist_ok=True)
    for name in ("a", "b"):
        (here / f"videos/{name}.mp4").write_bytes(video())
        (here / f"videos/{name}.txt").write_text(f"film {name}")


@cache
def _prepared() -> Path:
    """What prepare made of two films, once."""
    from fewstep.cli import main

    folder = Path(tempfile.mkdtemp(prefix="fewstep-faults-"))
    films(folder)
    words = [
        "prepare",
        str(folder / "videos"),
        "--model",
        str(folder / "teacher"),
        "--output",
        str(folder / "out"),
        "--quiet",
    ]
    assert main(words) == 0
    return folder / "out"


def finished(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """`films`, and the finished folder `out` of an earlier command, changed."""

    def prepare(here: Path) -> None:
        films(here)
        change(Path(shutil.copytree(_prepared(), here / "out")))

    return prepare


PREPARE = ("prepare", "videos", "--model", "teacher", "--output", "out", "--quiet")


def option(words: str, *says: str) -> Case:
    name, *values = words.split()
    return Case(
        f"prepare {words}", (*PREPARE, name, *values), (name.strip("-").replace("-", "_"), *says), prepare=films
    )


LIMITS = ("min_seconds", "max_seconds", "min_motion", "max_motion", "min_brightness", "max_brightness")
OPTIONS = (
    *(option(f"--{name} {value}", "at least 1", value) for name in ("num-frames", "height", "width", "stride", "batch", "threads")
      for value in ("0", "-1")),
    *(option(f"--{name.replace('_', '-')} {value}", "must be") for name in LIMITS for value in ("nan", "-1", "inf", "-inf")),
    *(option(f"--{name} 1.5", "from 0 to 1", "1.5") for name in ("min-motion", "max-motion", "min-brightness", "max-brightness")),
    option("--min-side -1", "at least 0"),
    option("--clips-per-video -1", "0"),
    option("--min-seconds 3 --max-seconds 2", "max_seconds"),
    option("--min-brightness 0.9 --max-brightness 0.1", "max_brightness"),
    Case("prepare: a height that the codec cannot halve", (*PREPARE, "--height", "33"), ("33",), prepare=films),
    Case("prepare: a width that the codec cannot halve", (*PREPARE, "--width", "31"), ("31",), prepare=films),
    Case("prepare: a size beyond all memory", (*PREPARE, "--height", "4194304", "--width", "4194304"), ("memory",),
         prepare=films, writes=True),
    Case("prepare: a model that is not there", (*PREPARE[:3], "nowhere", *PREPARE[4:]), ("nowhere", "card.json"), prepare=films),
    Case("prepare: no videos", PREPARE, ("videos", "no such"), prepare=teacher, writes=True),
    Case("prepare: a root that is not there", (*PREPARE, "--root", "nowhere"), ("nowhere",), prepare=films, writes=True),
    Case("prepare: no output", PREPARE[:4], ("--output",), prepare=films),
)  # fmt: skip


def media(name: str, content: bytes | Callable[[], bytes], *says: str, file: str = "a.mp4") -> Case:
    """A dataset of one film that is none."""

    def write(here: Path) -> None:
        teacher(here)
        (here / "videos").mkdir()
        (here / "videos" / file).write_bytes(content if isinstance(content, bytes) else content())
        (here / "videos" / file).with_suffix(".txt").write_text("a film")

    return Case(f"a film: {name}", PREPARE, (file, *says), prepare=write, writes=True)


def odd(name: str, make: Callable[[Path], object], *says: str) -> Case:
    """A dataset whose film `videos/a.mp4` is no file."""

    def write(here: Path) -> None:
        teacher(here)
        (here / "videos").mkdir()
        (here / "videos/a.txt").write_text("a film")
        make(here / "videos/a.mp4")

    return Case(f"a film: {name}", PREPARE, ("a.mp4", *says), prepare=write, writes=True)


def picture(suffix: str) -> bytes:
    from io import BytesIO

    from PIL import Image

    made = BytesIO()
    Image.new("RGB", (32, 32)).save(made, suffix)
    return made.getvalue()


MEDIA = (
    media("nothing", b"", "video"),
    media("text", b"a duck swims\n" * 50, "video"),
    media("zeros", bytes(4096), "video"),
    media("noise", bytes((i * 7919 + i // 251) % 256 for i in range(20_000)), "video"),
    media("its first half", lambda: video()[: len(video()) // 2], "video"),
    media("all but its end", lambda: video()[:-600], "video"),
    media("its head alone", lambda: video()[:64], "video"),
    media("its end alone", lambda: video()[-200:], "video"),
    media("a web page", b"<!doctype html><title>404</title>", "video"),
    media("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "video"),
    media("a picture of one frame", lambda: picture("png"), "too short"),
    media("a GIF of one frame", lambda: picture("gif"), "too short", file="a.gif"),
    media("an archive", b"PK\x03\x04" + bytes(200), "video"),
    media("its data torn out", lambda: video()[:60] + bytes(len(video()) - 60), "video"),
    odd("a folder", Path.mkdir, "no such file"),
    odd("a link to nothing", lambda path: path.symlink_to("nowhere.mp4"), "no such file"),
    odd("a link to itself", lambda path: path.symlink_to("a.mp4"), "a.mp4"),
    odd("a pipe", os.mkfifo, "no such file"),
)  # fmt: skip


def shard(out: Path) -> Path:
    return next(out.rglob("shard-*.safetensors"))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def again(name: str, change: Callable[[Path], object], *says: str, words: tuple[str, ...] = PREPARE) -> Case:
    """The same command once more, on what it had finished."""
    return Case(f"prepared again: {name}", words, says, prepare=finished(change))


AGAIN = (
    again("a shard cut short", lambda out: cut(shard(out), 200), "shard-00000.safetensors", "damaged"),
    again("a shard without its last byte", lambda out: cut(shard(out), -1), "shard-00000", "damaged"),
    again("an empty shard", lambda out: shard(out).write_bytes(b""), "shard-00000", "damaged"),
    again("a shard that is text", lambda out: shard(out).write_bytes(b"x" * 500), "shard-00000", "damaged"),
    again("a shard that grew", lambda out: shard(out).write_bytes(shard(out).read_bytes() + b"x"), "shard-00000", "damaged"),
    again("a shard that is gone", lambda out: shard(out).unlink(), "shard-00000", "lacks"),
    again("an empty index", lambda out: (out / "index.jsonl").write_text(""), "index.jsonl", "lacks"),
    again("an index cut short", lambda out: cut(out / "index.jsonl", 10), "index.jsonl"),
    again("an empty manifest", lambda out: (out / "manifest.json").write_text(""), "manifest.json", "damaged"),
    again("a manifest cut short", lambda out: cut(out / "manifest.json", 30), "manifest.json", "damaged"),
    again("a manifest that is a list", lambda out: (out / "manifest.json").write_text("[]"), "manifest.json", "damaged"),
    again("a manifest that says nothing", lambda out: (out / "manifest.json").write_text("{}"), "manifest.json", "damaged"),
    again("a manifest nested deep", lambda out: (out / "manifest.json").write_text("[" * 100_000), "manifest.json", "damaged"),
    again("a report that is no JSON", lambda out: (out / "report.json").write_text("x"), "report.json", "damaged"),
    again("a report that is a list", lambda out: (out / "report.json").write_text("[]"), "report.json", "damaged"),
    again("a report that is gone", lambda out: (out / "report.json").unlink(), "report.json"),
    again("other options", lambda out: None, "out", "stride: there 1, here 2", words=(*PREPARE, "--stride", "2")),
    again("another caption", lambda out: (out.parent / "videos/a.txt").write_text("other"), "other videos or captions"),
    again("another film", lambda out: shutil.copy(out.parent / "videos/a.mp4", out.parent / "videos/c.mp4"), "other videos"),
    again("pairs in its place", lambda out: None, "out", "latents, not pairs",
          words=("pairs", "world:2", "--model", "teacher", "--output", "out", "--quiet")),
)  # fmt: skip

FULL = os.strerror(errno.ENOSPC)
PLACES = (
    Case("prepare: the output is a file", PREPARE, ("out",), {"out": "mine"}, prepare=films),
    Case("prepare: the output's folder is a file", (*PREPARE[:5], "notes/out", "--quiet"), ("notes",), {"notes": "x"}, films),
    Case("prepare: the output is in /proc", (*PREPARE[:5], "/proc/out", "--quiet"), ("/proc/out",), prepare=films),
    Case("prepare: a name of 300 letters", (*PREPARE[:5], "x" * 300, "--quiet"), ("shorter name",), prepare=films),
    Case("prepare: the disk is full", PREPARE, (FULL, "again"), prepare=films, during=around.full_disk, writes=True),
    Case("prepare: the disk is read-only", PREPARE, ("read-only",), prepare=films, during=around.read_only, writes=True),
    Case("prepare: the quota is used up", PREPARE, ("quota",), prepare=films, during=around.quota, writes=True),
    Case("prepare: another works there", PREPARE, ("out", "in use", "process"), prepare=films, during=around.held("out")),
    Case("prepare: shards of nobody", PREPARE, ("out", "no manifest.json"), {"out/shard-00000.safetensors": ""}, films,
         writes=True),
)  # fmt: skip

PAIRS = ("pairs", "world:2", "--model", "teacher", "--output", "out", "--quiet", "--times", "1", "0")


def pairs(name: str, words: tuple[str, ...], *says: str, **more: object) -> Case:
    return Case(f"pairs: {name}", words, says, prepare=teacher, **{"writes": True, **more})  # type: ignore[arg-type]


PAIRED = (
    pairs("no prompts", ("pairs", "nowhere.txt", *PAIRS[2:]), "nowhere.txt", "no such file"),
    pairs("0 prompts", ("pairs", "world:0", *PAIRS[2:]), "0"),
    pairs("no number of prompts", ("pairs", "world:x", *PAIRS[2:]), "world:x"),
    pairs("an empty file", ("pairs", "p.txt", *PAIRS[2:]), "p.txt", "no prompts", files={"p.txt": ""}),
    pairs("blank lines", ("pairs", "p.txt", *PAIRS[2:]), "p.txt", "no prompts", files={"p.txt": "\n \n"}),
    pairs("prompts in Latin-1", ("pairs", "p.txt", *PAIRS[2:]), "p.txt", "UTF-8", files={"p.txt": b"gr\xfcn"}),
    pairs("prompts in UTF-16", ("pairs", "p.txt", *PAIRS[2:]), "p.txt", "UTF-8", files={"p.txt": "x".encode("utf-16")}),
    pairs("prompts with NUL", ("pairs", "p.txt", *PAIRS[2:]), "p.txt", "NUL", files={"p.txt": "a\0b"}),
    pairs("a folder of prompts", ("pairs", "teacher", *PAIRS[2:]), "teacher"),
    pairs("a table without pictures", ("pairs", "p.csv", *PAIRS[2:]), "p.csv", "image", files={"p.csv": "caption\nx\n"}),
    pairs("a table of pictures that are not there", ("pairs", "p.csv", *PAIRS[2:]), "no.png",
          files={"p.csv": "caption,image\nx,no.png\n"}),
    pairs("a batch of 0", (*PAIRS, "--batch", "0"), "batch", "0"),
    pairs("a batch of -1", (*PAIRS, "--batch", "-1"), "batch", "-1"),
    pairs("shards of 0", (*PAIRS, "--shard-size", "0"), "shard_size", "0"),
    pairs("0 steps", (*PAIRS, "--steps", "0"), "0"),
    pairs("-1 steps", (*PAIRS, "--steps", "-1"), "-1"),
    pairs("0 frames", (*PAIRS, "--num-frames", "0"), "num_frames", "0"),
    pairs("-4 frames", (*PAIRS, "--num-frames", "-4"), "num_frames", "-4"),
    pairs("guidance that is no number", (*PAIRS, "--guidance-scale", "nan"), "guidance", "nan"),
    pairs("guidance without end", (*PAIRS, "--guidance-scale", "inf"), "guidance", "inf"),
    pairs("times that rise", (*PAIRS[:-2], "0", "1"), "decreases", "0"),
    pairs("times from 2", (*PAIRS[:-2], "2", "0"), "2"),
    pairs("times that are no numbers", (*PAIRS[:-2], "1", "nan", "0"), "nan"),
    pairs("one time", (*PAIRS[:-2], "1"), "1"),
    pairs("the same time twice", (*PAIRS[:-2], "1", "0.5", "0.5", "0"), "0.5"),
    pairs("another works there", PAIRS, "out", "in use", during=around.held("out"), writes=False),
    pairs("the disk is full", PAIRS, FULL, "again", during=around.full_disk),
    pairs("the output is a file", PAIRS, "out", files={"out": "mine"}),
    pairs("the output is in /proc", (*PAIRS[:5], "/proc/out", *PAIRS[6:]), "/proc/out"),
)  # fmt: skip

CASES = (*OPTIONS, *MEDIA, *AGAIN, *PLACES, *PAIRED)
