"""Faults in what says which video shows what: tables, lines of JSON, texts beside the files, archives, lists of classes."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

from faults.case import Case

LONG = 200_000
DEEP = 100_000


def listed(layout: str = "plain", source: str = "videos", root: str = "") -> Callable[[], object]:
    """Read the list of the videos as every command does, to its end."""

    def call() -> object:
        from fewstep.data.listing import write_listing

        return write_listing(Path("listing.jsonl"), source, layout, root)  # type: ignore[arg-type]

    return call


def table(name: str, content: str | bytes, *says: str, file: str = "captions.csv", writes: bool = False) -> Case:
    return Case(f"{file}: {name}", (), says, {f"videos/{file}": content}, call=listed(), writes=writes)


HEAD = "video,caption\n"
CSV = (
    table("a caption with commas", f"{HEAD}duck.mp4,a,b,c\n", "captions.csv", "line 2", "4 cells", "double quotes"),
    table("one cell too many", f"{HEAD}a.mp4,x\nb.mp4,y,z\n", "line 3", "3 cells", "header 2"),
    table("a cell after an empty one", f"{HEAD}a.mp4,,x\n", "line 2", "3 cells"),
    table("a quote that is not closed", f'{HEAD}a.mp4,"a duck\nb.mp4,a dog\n', "captions.csv", "double quote"),
    table("a quote that is not closed at the end", f'{HEAD}a.mp4,x\nb.mp4,"a dog', "captions.csv", "double quote"),
    table("a quote closed too early", f'{HEAD}a.mp4,"a "big" duck"\n', "captions.csv", "double quote"),
    table("text after a closed quote", f'{HEAD}a.mp4,"a duck" swims\n', "captions.csv", "line 1"),
    table("two columns of captions", "video,caption,caption\na.mp4,x,y\n", "'caption' twice"),
    table("two columns of files", "video,caption,video\na.mp4,x,b.mp4\n", "'video' twice"),
    table("two columns without a name", "video,caption,,\na.mp4,x,1,2\n", "'' twice"),
    table("NUL in the caption", f"{HEAD}a.mp4,a\0duck\n", "a.mp4", "NUL"),
    table("NUL in the name", f"{HEAD}a\0.mp4,a duck\n", "NUL", "name"),
    table("NUL alone", f"{HEAD}a.mp4,\0\n", "NUL"),
    table("nothing but NUL", b"\0" * 4096, "captions.csv"),
    table("UTF-16 with its mark", f"{HEAD}a.mp4,x\n".encode("utf-16"), "captions.csv", "UTF-8"),
    table("UTF-16 without its mark", f"{HEAD}a.mp4,x\n".encode("utf-16-le"), "captions.csv"),
    table("Latin-1", f"{HEAD}a.mp4,ein grüner Würfel\n".encode("latin-1"), "captions.csv", "UTF-8"),
    table("half of a character", HEAD.encode() + b"a.mp4,x\xc3", "captions.csv", "UTF-8"),
    table("tabs", "video\tcaption\na.mp4\tx\n", "'video'", "captions.csv"),
    table("semicolons", "video;caption\na.mp4;x\n", "'video'", "captions.csv"),
    table("no header", "a.mp4,a duck\nb.mp4,a dog\n", "'video'", "a.mp4"),
    table("a header alone", HEAD, "videos", "lists nothing"),
    table("nothing", "", "videos", "lists nothing"),
    table("blank lines", "\n\n\n", "videos"),
    table("one column", "video\na.mp4\n", "'caption'", "video"),
    table("a column by another name", "video,captions\na.mp4,x\n", "rename 'captions' to 'caption'"),
    table("capitals", "Video,Caption\na.mp4,x\n", "'video'", "Video"),
    table("a row without a caption", f"{HEAD}a.mp4\n", "a.mp4", "no caption"),
    table("an empty caption", f"{HEAD}a.mp4,\n", "a.mp4", "no caption"),
    table("a blank caption", f'{HEAD}a.mp4,"  "\n', "a.mp4", "no caption"),
    table("no file name", f"{HEAD},a duck\n", "line 2", "no file name"),
    table("a cell of 200,000 letters", f'{HEAD}a.mp4,"{"x" * LONG}"\n', "captions.csv", "field larger"),
)  # fmt: skip


def lines(name: str, content: str | bytes, *says: str) -> Case:
    return table(name, content, *says, file="captions.jsonl")


def row(**cells: object) -> str:
    return json.dumps({"video": "a.mp4", "caption": "a duck", **cells}) + "\n"


JSONL = (
    lines("no JSON", "a.mp4: a duck\n", "captions.jsonl", "line 1", "JSON"),
    lines("a line cut short", row() + '{"video": "b.mp4", "cap', "line 2", "JSON"),
    lines("single quotes", "{'video': 'a.mp4', 'caption': 'x'}\n", "line 1", "JSON"),
    lines("a comma at the end", '{"video": "a.mp4", "caption": "x",}\n', "line 1", "JSON"),
    lines("two objects on a line", row().strip() + row(), "line 1", "JSON"),
    lines("one array of all rows", f"[{row().strip()}]", "line 1", "object"),
    lines("an object over several lines", json.dumps({"video": "a.mp4", "caption": "x"}, indent=2), "line 1", "JSON"),
    lines("a text", '"a duck"\n', "line 1", "object"),
    lines("a number", "3\n", "line 1", "object"),
    lines("null", "null\n", "line 1", "object"),
    lines("true", "true\n", "line 1", "object"),
    lines("lists nested 100,000 deep", "[" * DEEP + "]" * DEEP, "line 1", "nested too deeply"),
    lines("objects nested 100,000 deep", '{"a":' * DEEP + "1" + "}" * DEEP, "line 1", "nested too deeply"),
    lines("a tag nested 100,000 deep", row()[:-2] + ', "x": ' + "[" * DEEP + "]" * DEEP + "}", "line 1", "too deep"),
    lines("brackets that never close", "[" * DEEP, "line 1"),
    lines("a number of 5,000 digits", '{"video": "a.mp4", "caption": "x", "n": ' + "9" * 5000 + "}", "line 1", "JSON"),
    lines("a key given twice", '{"video": "a.mp4", "caption": "x", "caption": "y"}\n', "line 1", "twice"),
    lines("the video given twice", '{"video": "a.mp4", "video": "b.mp4", "caption": "x"}\n', "line 1", "twice"),
    lines("no caption", '{"video": "a.mp4"}\n', "line 1", "'caption'"),
    lines("no video", '{"caption": "x"}\n', "line 1", "'video' or 'path'"),
    lines("an empty caption", row(caption=""), "a.mp4", "no caption"),
    lines("a blank caption", row(caption=" \n "), "a.mp4", "no caption"),
    lines("a caption of null", row(caption=None), "a.mp4", "no caption"),
    lines("a caption that is a number", row(caption=3), "a.mp4", "no caption"),
    lines("a caption that is a list", row(caption=["a", "b"]), "a.mp4", "no caption"),
    lines("a caption that is not a number", '{"video": "a.mp4", "caption": NaN}\n', "a.mp4", "no caption"),
    lines("an empty name", row(video=""), "line 1", "no file name"),
    lines("a name that is null", row(video=None), "line 1", "no file name"),
    lines("a name that is a list", row(video=["a.mp4"]), "line 1", "no file name"),
    lines("NUL in the caption", row(caption="a\0duck"), "a.mp4", "NUL"),
    lines("NUL in the name", row(video="a\0.mp4"), "NUL", "name"),
    lines("half a character in the caption", row(caption="a \ud800"), "a.mp4", "half a character"),
    lines("half a character in the name", row(video="\udc80.mp4"), "\\udc80.mp4", "name"),
    lines("Latin-1", '{"video": "a.mp4", "caption": "grün"}'.encode("latin-1"), "captions.jsonl", "UTF-8"),
    lines("UTF-16", row().encode("utf-16"), "captions.jsonl", "UTF-8"),
    lines("UTF-16 without its mark", row().encode("utf-16-be"), "line 1", "JSON"),
    lines("nothing", "", "videos", "lists nothing"),
    lines("blank lines", " \n\n", "videos", "lists nothing"),
    Case(
        "captions.jsonl: half a character in a tag is written as an escape",
        files={"videos/captions.jsonl": row(note="\ud800", **{"\udc80": "x"})}, call=listed(), code=0, writes=True,
    ),
)  # fmt: skip


def beside(name: str, text: str | bytes | None, *says: str, also: Callable[[Path], object] | None = None) -> Case:
    """A video whose text file is as given."""
    files: dict[str, str | bytes] = {"videos/duck.mp4": b""}
    if text is not None:
        files["videos/duck.txt"] = text
    return Case(f"duck.txt: {name}", (), says, files, prepare=also, call=listed())


def foreign_name(here: Path) -> None:
    """A file whose name was written in Latin-1."""
    (here / "videos" / "duck.mp4").unlink()
    for suffix, content in ((b".mp4", b""), (b".txt", b"a duck")):
        Path(os.fsdecode(os.fsencode(here / "videos") + b"/gr\xfcn" + suffix)).write_bytes(content)


TEXTS = (
    beside("none", None, "duck.mp4", "no duck.txt"),
    beside("empty", "", "duck.mp4", "no caption", "duck.txt"),
    beside("blank", " \n\t\n", "duck.mp4", "no caption", "duck.txt"),
    beside("a mark and nothing else", b"\xef\xbb\xbf", "duck.mp4", "no caption"),
    beside("Latin-1", "grün".encode("latin-1"), "duck.txt", "UTF-8", "byte 2"),
    beside("UTF-16", "a duck".encode("utf-16"), "duck.txt", "UTF-8"),
    beside("UTF-16 without its mark", "a duck".encode("utf-16-le"), "duck.mp4", "NUL"),
    beside("NUL", "a\0duck", "duck.mp4", "NUL"),
    beside("a film in its place", b"\x00\x00\x00\x18ftypmp42\xff\xfe", "duck.txt", "UTF-8"),
    beside("a folder in its place", None, "duck.txt", also=lambda here: (here / "videos/duck.txt").mkdir()),
    beside("a name that is not UTF-8", None, "gr\\udcfcn.mp4", "rename", also=foreign_name),
    Case("no such folder", (), ("nowhere", "no such file"), call=listed(source="nowhere")),
    Case("an empty folder", (), ("videos", "lists nothing"), prepare=lambda h: (h / "videos").mkdir(), call=listed()),
    Case("a folder without videos", (), ("videos",), {"videos/notes.md": "x"}, call=listed()),
    Case("a folder of archives", (), ("layout tars",), {"videos/a.tar": b""}, call=listed()),
    Case("a video in place of the list", (), ("duck.mp4", ".jsonl"), {"duck.mp4": b""}, call=listed(source="duck.mp4")),
    Case("a layout that is not there", (), ("'webdata'", "webvid"), {"v/a": ""}, call=listed("webdata", "v")),
    Case("a root that is not there", (), ("nowhere",), {"v/captions.csv": HEAD}, call=listed(source="v", root="nowhere")),
)  # fmt: skip


def archive(**members: str | bytes) -> bytes:
    """A tar of one sample, `key.<suffix>` each."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for suffix, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(f"key.{suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


def tar(name: str, content: bytes, *says: str) -> Case:
    return Case(f"a tar: {name}", (), says, {"videos/a.tar": content}, call=listed("tars"))


TARS = (
    tar("nothing", b"", "a.tar", "damaged archive"),
    tar("no archive", b"a duck swims " * 100, "a.tar", "damaged archive"),
    tar("compressed", b"\x1f\x8b\x08\x00" + bytes(600), "a.tar", "damaged archive"),
    tar("no video", archive(txt="a duck"), "key", "no video", ".txt"),
    tar("no caption", archive(mp4=b""), "key.mp4", "no caption"),
    tar("an empty caption", archive(mp4=b"", txt=" "), "key.mp4", "no caption"),
    tar("Latin-1", archive(mp4=b"", txt="grün".encode("latin-1")), "key.mp4", "no caption"),
    tar("NUL", archive(mp4=b"", txt="a\0b"), "key.mp4", "NUL"),
    tar("facts that are no JSON", archive(mp4=b"", json="{"), "key.mp4", "no caption"),
    tar("facts that are a list", archive(mp4=b"", json="[1]"), "key.mp4", "no caption"),
    tar("facts nested 100,000 deep", archive(mp4=b"", json="[" * DEEP + "]" * DEEP), "key.mp4", "no caption"),
    tar("facts with half a character", archive(mp4=b"", json='{"caption": "\\ud800"}'), "key.mp4", "half a character"),
    tar("a caption that is a number", archive(mp4=b"", json='{"caption": 3}'), "key.mp4", "no caption"),
    Case("a tar: none", (), ("videos", "no .tar"), {"videos/a.tgz": b""}, call=listed("tars")),
)  # fmt: skip


def classes(name: str, content: str | bytes, *says: str) -> Case:
    return Case(
        f"trainlist01.txt: {name}", (), says, {"trainlist01.txt": content}, call=listed("ucf101", "trainlist01.txt")
    )


def web(name: str, content: str | bytes, *says: str, layout: str = "webvid") -> Case:
    return Case(f"{layout}: {name}", (), says, {"videos/a.csv": content}, call=listed(layout))


OTHERS = (
    classes("nothing", "", "trainlist01.txt", "lists nothing"),
    classes("names without a class", "v_YoYo_g01_c01.avi 1\n", "trainlist01.txt", "class folder"),
    classes("UTF-16", "YoYo/a.avi 1\n".encode("utf-16"), "trainlist01.txt", "UTF-8"),
    classes("NUL", "YoYo/a\0.avi 1\n", "trainlist01.txt", "NUL"),
    classes("Latin-1", "Jo/grün.avi 1\n".encode("latin-1"), "trainlist01.txt", "UTF-8"),
    web("no page_dir", "videoid,name\n1,x\n", "'page_dir'", "line 2"),
    web("no name", "videoid,page_dir\n1,x\n", "'name'", "line 2"),
    web("an empty name", "videoid,page_dir,name\n1,p,\n", "p/1.mp4", "no caption"),
    web("commas in a name", "videoid,page_dir,name\n1,p,a,b\n", "line 2", "4 cells"),
    web("no caption", "video,text\na.mp4,x\n", "'caption'", layout="openvid"),
    web("a quote that is not closed", 'video,caption\na.mp4,"x\n', "a.csv", "double quote", layout="openvid"),
    Case("webvid: two tables", (), ("a.csv, b.csv",), {"videos/a.csv": "", "videos/b.csv": ""}, call=listed("webvid")),
    Case("webvid: no table", (), ("none",), {"videos/a.txt": ""}, call=listed("webvid")),
)  # fmt: skip

CASES = (*CSV, *JSONL, *TEXTS, *TARS, *OTHERS)
