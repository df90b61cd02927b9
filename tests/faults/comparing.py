"""Faults in finished videos, prompts and answers that compare and study are given, and in where they are to write."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from faults.around import held, read_only
from faults.case import Case
from faults.making import picture, video

COMPARE = ("compare", "a", "b", "--output", "out", "--quiet")
STUDY = ("study", "a", "b", "--output", "out", "--quiet")
Prepare = Callable[[Path], object]


def sides(*names: str, change: Prepare | None = None) -> Prepare:
    """Folders `a` and `b` with two films each, and something changed in them."""

    def prepare(here: Path) -> None:
        for folder in names or ("a", "b"):
            (here / folder).mkdir()
            for name in ("one", "two"):
                (here / folder / f"{name}.mp4").write_bytes(video())
        if change is not None:
            change(here)

    return prepare


def written(name: str, content: bytes | Callable[[], bytes]) -> Prepare:
    """`sides`, and one file with other content."""

    def change(here: Path) -> None:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content())

    return sides(change=change)


def renamed(here: Path) -> None:
    (here / "b/one.mp4").rename(here / "b/three.mp4")


def both(name: str, says: tuple[str, ...], prepare: Prepare) -> tuple[Case, Case]:
    """One fault, for both commands."""
    return tuple(Case(f"{words[0]}: {name}", words, says, prepare=prepare, writes=True) for words in (COMPARE, STUDY))  # type: ignore[return-value]


VIDEOS = (
    *both("a folder that is not there", ("b", "no such file or folder"), sides("a")),
    *both("an empty folder", ("b", "no video"), lambda here: (sides("a")(here), (here / "b").mkdir())),
    *both("videos of other names", ("b lacks one", "a lacks three", "--prompt-file"), sides(change=renamed)),
    *both("half of a video", ("b/two.mp4", "remove"), written("b/two.mp4", lambda: video()[: len(video()) // 2])),
    *both("a text called a video", ("b/two.mp4", "not a readable video"), written("b/two.mp4", b"a duck swims\n" * 50)),
    *both("nothing called a video", ("b/two.mp4",), written("b/two.mp4", b"")),
    *both("a picture that is none", ("b/two.png",), lambda here: (
        written("b/two.png", b"a duck")(here), (here / "b/two.mp4").unlink())),
    *both("a picture and a video of one name", ("two", "keep one"), written("b/two.png", lambda: picture("png"))),
    *both("a picture in place of a video", ("two", "same kind"), lambda here: (
        written("b/two.png", lambda: picture("png"))(here), (here / "b/two.mp4").unlink())),
    *both("a folder and a file", ("folder",), lambda here: (sides("a")(here), (here / "b").write_bytes(video()))),
    Case("compare: one folder", ("compare", "a", "--output", "out"), ("two or more",), prepare=sides(), writes=True),
    Case("compare: no folder", ("compare", "--output", "out"), ("two or more",), writes=True),
    Case("compare: one folder twice", ("compare", "a", "a", "--output", "out"), ("a", "twice"), prepare=sides(), writes=True),
    Case("compare: two texts", ("compare", "a/one.txt", "b/one.txt", "--output", "out"), ("a/one.txt", ".mp4"),
         files={"a/one.txt": "a", "b/one.txt": "b"}, writes=True),
    Case("study: three folders", ("study", "a", "b", "c", "--output", "out"), ("two folders", "3"),
         prepare=sides("a", "b", "c"), writes=True),
)  # fmt: skip


def prompts(name: str, content: str | bytes, *says: str, file: str = "p.txt") -> tuple[Case, Case]:
    """A prompt file that does not fit the folders."""
    return tuple(  # type: ignore[return-value]
        Case(f"{words[0]}: {name}", (*words, "--prompt-file", file), says, {file: content}, sides(), writes=True)
        for words in (COMPARE, STUDY)
    )


PROMPTS = (
    *prompts("a prompt too many", "a\nb\nc\n", "3 prompts", "2 files"),
    *prompts("no prompts", "\n\n", "p.txt", "no prompts"),
    *prompts("prompts that are no text", b"\xff\xfe\x00", "p.txt"),
    *prompts("a table without videos", "caption\na duck\n", "p.csv", "row 1", "video and caption", file="p.csv"),
    *prompts("a table that is torn", '{"video": "one.mp4", "capt\n', "p.jsonl", file="p.jsonl"),
    *prompts("a list of lists", "[1, 2]\n", "p.jsonl", "row 1", file="p.jsonl"),
    *prompts("a row without a video", '{"video": "three", "caption": "a"}\n', "three", file="p.jsonl"),
    Case("compare: prompts that are not there", (*COMPARE, "--prompt-file", "p.txt"), ("p.txt", "no such"), prepare=sides(),
         writes=True),
)  # fmt: skip


def asked(words: str, *says: str, study: bool = False) -> Case:
    command = STUDY if study else COMPARE
    return Case(f"{command[0]} {words}", (*command, *words.split(" ")), says, prepare=sides(), writes=True)


OPTIONS = (
    asked("--num-frames 0", "num_frames", "0"),
    asked("--features nowhere.pt", "nowhere.pt", "no such"),
    asked("--clip nowhere", "nowhere", "config.json"),
    asked("--pairs 0", "pairs", "0", study=True),
    asked("--pairs 3", "3", "only 2", study=True),
    Case("study: an empty question", (*STUDY, "--question", ""), ("question",), prepare=sides(), writes=True),
    Case("study: neither output nor answers", ("study", "a", "b"), ("--output", "--answers"), prepare=sides()),
)


def there(words: tuple[str, ...], name: str, out: str, files: dict[str, str], *says: str) -> Case:
    """An output folder that is something else."""
    command = (*words[:4], out, *words[5:])
    return Case(f"{words[0]}: {name}", command, says, files, sides(), writes=True)


OUTPUTS = (
    *(there(words, "an output of other files", "out", {"out/mine.txt": "mine"}, "out", "another output folder")
      for words in (COMPARE, STUDY)),
    *(there(words, "an output that is a file", "out", {"out": "mine"}, "out", "folder") for words in (COMPARE, STUDY)),
    *(there(words, "an output among the videos", "a/out", {}, "a/out", "another output folder") for words in (COMPARE, STUDY)),
    there(COMPARE, "an output of another command", "out", {"out/results.json": '{"rows": []}'}, "out", "did not write it"),
    there(STUDY, "an output of compare", "out", {"out/results.json": '{"kind": "fewstep compare"}'}, "out", "did not write it"),
    Case("compare: an output in use", COMPARE, ("out", "in use"), prepare=sides(), during=held("out"), writes=True),
    Case("compare: an output that cannot be written", COMPARE, ("out", "Read-only"), prepare=sides(), during=read_only,
         writes=True),
    Case("study: an output that cannot be written", STUDY, ("out", "Read-only"), prepare=sides(), during=read_only,
         writes=True),
)  # fmt: skip

HEADER = "study,rater,question,pair,left,choice,seconds\n"


@cache
def _key() -> str:
    return (
        '{"kind": "fewstep study", "id": "s1", "sides": ["a", "b"], "questions": ["Which?"], "seed": 0, "pairs": [{"name": "one",'
        ' "prompt": "", "p": 0, "files": ["videos/001-p.mp4", "videos/001-q.mp4"]}]}'
    )


def answered(name: str, content: str | bytes | None, *says: str, key: str | None = None) -> Case:
    files: dict[str, str | bytes] = {"out/key.json": _key() if key is None else key}
    files |= {} if content is None else {"x.csv": content}
    return Case(f"answers: {name}", ("study", "out", "--answers", "x.csv"), says, files)


ANSWERS = (
    answered("not there", None, "x.csv", "no such"),
    answered("a picture", b"\x89PNG\r\n\x1a\n\x00\xff", "x.csv"),
    answered("other columns", "name,age\na,1\n", "x.csv", "lacks the columns"),
    answered("nothing", "", "x.csv", "lacks the columns"),
    answered("no row", HEADER, "no answers"),
    answered("another study", HEADER + "s2,r1,1,1,p,p,1\n", "x.csv", "line 2", "another study"),
    answered("half a row", HEADER + "s1,r1\n", "x.csv", "line 2"),
    answered("a pair that is not there", HEADER + "s1,r1,1,2,p,p,1\n", "line 2", "pair"),
    answered("a torn key", HEADER, "key.json", "damaged", key='{"kind": "fewstep study", "pa'),
    answered("a stopped study", HEADER, "key.json", "stopped", key='{"kind": "fewstep study"}'),
    Case("answers: no study", ("study", "a", "--answers", "x.csv"), ("key.json",), {"x.csv": HEADER}, sides()),
    Case("answers: an option of making", ("study", "out", "--answers", "x.csv", "--pairs", "3"), ("--pairs", "leave it out"),
         {"x.csv": HEADER, "out/key.json": _key()}),
    Case("answers: two folders", ("study", "a", "b", "--answers", "x.csv"), ("one folder",), {"x.csv": HEADER}, sides()),
)  # fmt: skip

CASES = (*VIDEOS, *PROMPTS, *OPTIONS, *OUTPUTS, *ANSWERS)
