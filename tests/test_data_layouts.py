"""Datasets as they lie on disk, and the list that is made of each."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import get_args

import av
import numpy as np
import pytest
import torch

from fewstep.cli import arguments
from fewstep.core import Rng
from fewstep.data import (
    ClipError,
    Cut,
    DataError,
    Item,
    Latents,
    Preparation,
    Videos,
    prepare,
    read_clips,
    read_listing,
)  # fmt: skip
from fewstep.data.layouts import LAYOUTS, LayoutName
from fewstep.data.listing import Listing, write_listing
from fewstep.data.video import write_video
from fewstep.models import Card, FrameAutoencoder, VideoModel

CUT = Cut(num_frames=2, height=16, width=16)
GREYS = {"dark": -0.6, "middle": 0.0, "light": 0.6}


def clip(path: Path, grey: float) -> Path:
    """A video of one grey, so that it is known again; .avi as UCF-101 has them, or .mp4."""
    frames = torch.full((3, 3, 32, 48), grey)
    if path.suffix == ".mp4":
        return write_video(path, frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for _ in range(3):
            picture = np.full((32, 48, 3), round((grey + 1) * 127.5), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


def shown(item: Item) -> str:
    """Which of `GREYS` an item's video is."""
    level = float(next(read_clips(item.video(), CUT)).frames.float().mean()) / 127.5 - 1
    return min(GREYS, key=lambda name: abs(GREYS[name] - level))


def captions(items: tuple[Item, ...]) -> dict[str, str]:
    return {item.name: item.caption for item in items}


@pytest.fixture
def openvid(tmp_path: Path) -> Path:
    """The table beside folders that the parts of the dataset were unpacked to."""
    root = tmp_path / "OpenVid"
    clip(root / "OpenVid_part0" / "a_0.mp4", GREYS["dark"])
    clip(root / "OpenVid_part1" / "b,c_1.mp4", GREYS["light"])
    (root / "OpenVid-1M.csv").write_text(
        "video,caption,aesthetic score,motion score,seconds\n"
        'a_0.mp4,"A ""grey"" wall,\nin two lines.",5.1,2.25,3.5\n'
        '"b,c_1.mp4",A light wall.,4.0,0.1,\n'
        "gone_2.mp4,Not there.,4.0,0.1,9\n"
    )
    return root


@pytest.fixture
def webvid(tmp_path: Path) -> Path:
    root = tmp_path / "webvid"
    clip(root / "videos" / "000001_000050" / "11.mp4", GREYS["dark"])
    clip(root / "videos" / "000051_000100" / "12.mp4", GREYS["light"])
    (root / "results_2M_train.csv").write_text(
        "videoid,contentUrl,duration,page_dir,name\n"
        "11,https://x/11.mp4,PT00H00M03S,000001_000050,Dark wall\n"
        "12,https://x/12.mp4,PT00H00M03S,000051_000100,Light wall\n"
        "13,https://x/13.mp4,PT00H00M03S,000051_000100,\n"
    )
    return root


@pytest.fixture
def ucf101(tmp_path: Path) -> Path:
    root = tmp_path / "UCF-101"
    for number, (name, grey) in enumerate(GREYS.items()):
        clip(root / ("ApplyEyeMakeup" if name == "dark" else "YoYo") / f"v_g0{number}_c01.avi", grey)
    (tmp_path / "trainlist01.txt").write_text("ApplyEyeMakeup/v_g00_c01.avi 1\nYoYo/v_g02_c01.avi 101\n")
    (tmp_path / "testlist01.txt").write_text("YoYo/v_g01_c01.avi\n")
    return root


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two archives: captions as text and as JSON, a sample without video, one without caption."""
    folder = tmp_path / "tars"
    members = {
        "00000.tar": {"000.mp4": "dark", "000.txt": "dark wall", "000.json": {"seconds": 3, "nested": {}}},
        "00001.tar": {
            "001.json": {"caption": "light wall", "fps": 8.0}, "001.mp4": "light", "x/002.mp4": "middle",
            "003.txt": "nothing to see",
        },
    }  # fmt: skip
    folder.mkdir()
    for name, files in members.items():
        with tarfile.open(folder / name, "w") as archive:
            for member, content in files.items():
                if member.endswith(".mp4"):
                    data = clip(tmp_path / "draft.mp4", GREYS[str(content)]).read_bytes()
                else:
                    data = (content if isinstance(content, str) else json.dumps(content)).encode()
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return folder


def test_openvid(openvid: Path) -> None:
    items = read_listing(openvid, "openvid")
    assert items == read_listing(openvid / "OpenVid-1M.csv", "openvid")
    assert captions(items) == {
        "a_0.mp4": 'A "grey" wall,\nin two lines.', "b,c_1.mp4": "A light wall.", "gone_2.mp4": "Not there.",
    }  # fmt: skip
    assert [shown(item) for item in items[:2]] == ["dark", "light"]
    assert items[0].tags == {"aesthetic score": "5.1", "motion score": "2.25", "seconds": "3.5"}
    with pytest.raises(ClipError, match="no such file: .*gone_2.mp4"):
        items[2].video()
    moved = openvid.parent / "elsewhere"
    shutil.move(openvid / "OpenVid_part1", moved)
    assert shown(read_listing(openvid, "openvid", root=moved)[1]) == "light"


def test_webvid(webvid: Path) -> None:
    items = read_listing(webvid, "webvid", root=webvid / "videos")
    assert captions(items[:2]) == {"000001_000050/11.mp4": "Dark wall", "000051_000100/12.mp4": "Light wall"}
    assert [shown(item) for item in items[:2]] == ["dark", "light"]
    assert items[1].tags["duration"] == "PT00H00M03S"
    with pytest.raises(ClipError, match="no caption: results_2M_train.csv, line 4, has ''"):
        items[2].video()


def test_ucf101(ucf101: Path) -> None:
    items = read_listing(ucf101, "ucf101")
    assert [(item.caption, shown(item)) for item in items] == [
        ("apply eye makeup", "dark"), ("yo yo", "middle"), ("yo yo", "light"),
    ]  # fmt: skip
    assert items[0].tags == {"class": "ApplyEyeMakeup"}
    train = read_listing(ucf101.parent / "trainlist01.txt", "ucf101", root=ucf101)
    test = read_listing(ucf101.parent / "testlist01.txt", "ucf101", root=ucf101)
    assert [shown(item) for item in (*train, *test)] == ["dark", "light", "middle"]
    assert {*captions(train), *captions(test)} == {*captions(items)}
    (ucf101.parent / "testlist01.txt").write_text("v_g00_c01.avi\n")
    with pytest.raises(DataError, match="'v_g00_c01.avi' is not in a class folder"):
        read_listing(ucf101.parent / "testlist01.txt", "ucf101", root=ucf101)


def test_tars_are_read_in_place(tars: Path) -> None:
    items = read_listing(tars, "tars")
    assert captions(items) == {
        "00000.tar/000.mp4": "dark wall", "00001.tar/001.mp4": "light wall", "00001.tar/x/002.mp4": "",
        "00001.tar/003": "",
    }  # fmt: skip
    assert [shown(item) for item in items[:2]] == ["dark", "light"]
    assert (items[0].tags, items[1].tags) == ({"seconds": "3"}, {"fps": "8.0"})
    assert items[2].problem.startswith("no caption: ")
    assert items[3].problem == "no video: the sample has only .txt"
    assert len(list(tars.iterdir())) == 2
    assert captions(read_listing(tars / "00000.tar", "tars")) == {"00000.tar/000.mp4": "dark wall"}


def test_a_torn_archive_keeps_what_is_whole_and_says_so(tars: Path) -> None:
    whole = (tars / "00001.tar").read_bytes()
    (tars / "00001.tar").write_bytes(whole[: len(whole) // 2 - 1000])
    items = read_listing(tars, "tars")
    assert items[-1].problem.startswith("damaged archive: ") and items[-1].name == "00001.tar"
    assert shown(items[0]) == "dark"


def test_plain_forms_agree(tmp_path: Path) -> None:
    for name, grey in (("a", GREYS["dark"]), ("b", GREYS["light"])):
        clip(tmp_path / f"{name}.mp4", grey).with_suffix(".txt").write_text(f"clip {name}\n")
    (tmp_path / "c.mp4").write_bytes(b"?")
    plain = read_listing(tmp_path)
    assert captions(plain[:2]) == {"a.mp4": "clip a", "b.mp4": "clip b"}
    assert plain[2].problem == "no caption: there is no c.txt beside it"
    table = tmp_path / "captions.csv"
    table.write_text('path,caption,fps\na.mp4,"clip a",8\nb.mp4,clip b,8\n', encoding="utf-8-sig")
    by_table = read_listing(table)
    assert by_table == read_listing(tmp_path)
    assert [(item.name, item.path, item.caption) for item in by_table] == [
        (item.name, item.path, item.caption) for item in plain[:2]
    ]
    lines = [{"video": item.name, "caption": item.caption, "fps": 8} for item in by_table]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_listing(tmp_path) == by_table


def test_errors_name_the_place_and_the_column(tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text("video,captoin\na.mp4,x\n")
    for layout, words in {
        "plain": "line 2, has no 'caption', only video, captoin; rename 'captoin' to 'caption'",
        "openvid": "line 2, has no 'caption', only video, captoin; rename 'captoin' to 'caption'",
        "webvid": "line 2, has no 'videoid', only video, captoin; rename 'video' to 'videoid'",
    }.items():
        with pytest.raises(DataError, match=words):
            read_listing(table, layout)  # type: ignore[arg-type]
    lines = tmp_path / "list.jsonl"
    lines.write_text('{"video": "a.mp4", "caption": "x"}\n{"video": ')
    with pytest.raises(DataError, match=r"list.jsonl, line 2, is not JSON"):
        read_listing(lines)
    lines.write_text('{"video": "a.mp4", "caption": null}')
    with pytest.raises(DataError, match="no captioned video .a.mp4: no caption: list.jsonl, line 1, has None"):
        read_listing(lines)
    lines.write_text('{"video": 3, "caption": "x"}\n{"video": "a.mp4", "caption": "x"}')
    assert read_listing(lines)[0].problem == "no file name: list.jsonl, line 1, has 3"
    with pytest.raises(DataError, match="no such file or folder"):
        read_listing(tmp_path / "nowhere")
    (tmp_path / "list.xml").touch()
    with pytest.raises(DataError, match=r"ends in .jsonl or .csv"):
        read_listing(tmp_path / "list.xml")
    table.write_text('video,caption\na.mp4,"' + "x" * 200_000)
    with pytest.raises(DataError, match=r"captions.csv is not CSV after line 1: field larger"):
        read_listing(table)
    (tmp_path / "other.csv").touch()
    with pytest.raises(DataError, match=r"which .csv\? It has captions.csv, other.csv"):
        read_listing(tmp_path, "webvid")
    with pytest.raises(
        DataError, match="there is no layout 'imagenet'; choose from plain, openvid, webvid, ucf101, tars"
    ):
        read_listing(tmp_path, "imagenet")  # type: ignore[arg-type]


def test_a_dataset_of_another_layout_asks_for_it(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    with pytest.raises(
        DataError, match=r"\(it lists nothing\). Check that its layout is 'ucf101', or give another one: plain, openvid"
    ):
        read_listing(tmp_path, "ucf101")


def test_the_command_line_knows_every_layout() -> None:
    assert get_args(LayoutName) == tuple(LAYOUTS) == get_args(arguments.LayoutName)


def test_archives_in_a_plain_folder_give_a_hint(tars: Path) -> None:
    with pytest.raises(DataError, match="give the layout tars"):
        read_listing(tars)
    (tars / "none").mkdir()
    with pytest.raises(DataError, match="has no .tar archive"):
        read_listing(tars / "none", "tars")


def test_a_written_list_does_not_say_where_the_dataset_is(tars: Path, openvid: Path, tmp_path: Path) -> None:
    for layout, source in (("tars", tars), ("openvid", openvid)):
        file = tmp_path / f"{layout}.jsonl"
        listing = write_listing(file, source, layout)  # type: ignore[arg-type]
        assert [listing[i] for i in range(len(listing))] == list(read_listing(source, layout))  # type: ignore[arg-type]
        assert str(tmp_path) not in file.read_text()
        moved = source.rename(tmp_path / f"moved-{layout}")
        assert shown(Listing(file, moved)[0]) == "dark"


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_layout_can_be_prepared(layout: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if layout == "plain":
        source, root = tmp_path / "plain", ""
        for name, grey in GREYS.items():
            clip(source / f"{name}.mp4", grey).with_suffix(".txt").write_text(name)
    else:
        source = request.getfixturevalue(layout)
        root = str(source / "videos") if layout == "webvid" else ""
    torch.manual_seed(0)
    model = VideoModel(
        Card(name="tiny", num_frames=2, height=16, width=16), {"codec": FrameAutoencoder(width=8, depth=1)}
    )
    made = prepare(source, tmp_path / "out", model.codec, Preparation(cut=CUT), layout=layout, root=root)  # type: ignore[arg-type]
    assert made.clips == (3 if layout in ("plain", "ucf101") else 2)
    assert len(Latents(path=str(made.folder)).open(model, frozenset({"x0"})).reader) == made.clips  # type: ignore[attr-defined]
    data = Videos(path=str(source), layout=layout, root=root, num_frames=2, height=16, width=16)  # type: ignore[arg-type]
    frames = data.open(model, frozenset({"frames"})).batch(24, Rng(0)).frames
    assert frames is not None
    assert len({round(float(clip.mean()), 1) for clip in frames}) == made.clips  # each is another grey
