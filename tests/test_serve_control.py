"""`WS /v1/stream` of a real server: keys, ways to change a prompt, viewers who come back at the end, and snapshots that stay."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed

from fewstep.models import VideoModel
from fewstep.serve import viewer as viewer_module
from fewstep.serve.app import Server
from fewstep.serve.limits import Limits
from fewstep.serve.media import FragmentedMP4
from fewstep.serve.metrics import Metrics
from fewstep.serve.orders import Applies, Declined, Facts, Failed, Finished, Open, Played, Press, Save, Shown, Steer
from fewstep.serve.protocol import Init
from fewstep.serve.snapshots import SWEEP, SnapshotFiles
from fewstep.serve.tasks import SOON
from fewstep.serve.worker import Served, Worker, warm
from fewstep.streaming import LiveSession
from support_serve import KEYS, Running, Viewer, running, save_streaming, settled

pytestmark = pytest.mark.timeout(180)
BALL, STAR = "a red ball", "a blue star"
LEFT, RIGHT, NONE = [1.0, 0, 0, 0], [0, 1.0, 0, 0], [0.0, 0, 0, 0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"plain": save_streaming(root / "plain"), "steered": save_streaming(root / "steered", keys=KEYS)}


@pytest.fixture(scope="module")
def house(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A student that reads keys, and one that does not."""
    limits = Limits(streams=3, seconds=60, grace=1.0, snapshots=2)
    served = Served(models=tuple((name, str(folder)) for name, folder in folders.items()), threads=1)
    with running(Server(served, limits=limits, folder=tmp_path_factory.mktemp("served"))) as house:
        house.server.viewers._gate.full = 100.0  # room for two streams, however slow the machine
        yield house


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "house" in request.fixturenames:
        house = request.getfixturevalue("house")
        assert house.quiet(), "a stream was left"
        assert settled(lambda: not house.server.viewers._over), "what somebody may come back for is kept for too long"


def made(folder: Path, chunks: int, steer: Callable[[LiveSession], Any], **options: Any) -> torch.Tensor:
    """What the model itself makes."""
    with VideoModel.from_pretrained(folder).stream([BALL], **options) as live:
        steer(live)
        return torch.cat([chunk.frames[0] for chunk in live.frames(chunks)])


def play(viewer: Viewer, chunks: int) -> torch.Tensor:
    """The frames of so many chunks, each acknowledged as soon as it is there. Then the stream is stopped."""
    seen = len(viewer.told("chunk"))
    while seen < chunks:
        chunk = viewer.until("chunk")
        seen += 1
        viewer.say("ack", frames=chunk["first"] + chunk["frames"])
    viewer.say("stop")
    frames = viewer.frames()
    viewer.until("done")
    return frames[: 2 * chunks]


# --- keys -------------------------------------------------------------------------------------------------------------


def test_models_say_which_keys_they_read(house: Running) -> None:
    with urllib.request.urlopen(f"{house.url}/v1/models") as answer:
        models = {model["id"]: model for model in json.load(answer)["data"]}
    assert models["plain"]["keys"] == [] and models["steered"]["keys"] == ["left", "right", "up", "down"]
    assert models["plain"]["switches"] == ["keep", "recache", "clear", "lerp"]
    assert models["steered"]["switches"] == ["keep", "clear", "lerp"]  # a memory that is made anew is told no keys
    viewer = house.viewer(model="steered", seconds=20)
    assert viewer.until("started")["keys"] == ["left", "right", "up", "down"]
    viewer.say("stop")


def test_keys_that_name_their_chunk_make_the_same_frames_whenever_they_come(
    house: Running, folders: dict[str, Path]
) -> None:
    viewer = house.viewer(model="steered", prompt=BALL, seed=3, seconds=20, ack=True)
    viewer.until("started")
    viewer.say("control", keys=[], chunk=6, id="b")
    viewer.say("control", keys=["left", "down"], chunk=4, id="a")
    assert viewer.until("applied", id="b")["chunk"] == 6
    applied = viewer.until("applied", id="a")
    assert (applied["chunk"], applied["keys"], applied["prompt"]) == (4, ["left", "down"], None)
    frames = play(viewer, 8)

    def steer(live: LiveSession) -> None:
        live.control("keys", [1.0, 0, 0, 1.0], chunk=4)
        live.control("keys", NONE, chunk=6)

    assert torch.equal(frames, made(folders["steered"], 8, steer, seed=3))
    assert not torch.equal(frames, made(folders["steered"], 8, lambda live: None, seed=3))
    keys = {chunk["index"]: chunk["keys"] for chunk in viewer.told("chunk")}
    assert [keys[index] for index in range(8)] == [[]] * 4 + [["left", "down"]] * 2 + [[]] * 2


def test_keys_hold_from_the_chunk_that_is_told(house: Running, folders: dict[str, Path]) -> None:
    viewer = house.viewer(model="steered", prompt=BALL, seconds=20)
    viewer.until("chunk")
    viewer.say("control", keys=["right"], id="a")
    first = viewer.until("applied", id="a")["chunk"]
    viewer.say("control", keys=["left"], chunk=0, id="b")  # is begun: the next one that is not
    second = viewer.until("applied", id="b")["chunk"]
    assert 1 <= first <= second
    frames = play(viewer, second + 2)

    def steer(live: LiveSession) -> None:
        live.control("keys", RIGHT, chunk=first)
        live.control("keys", LEFT, chunk=second)

    assert torch.equal(frames, made(folders["steered"], second + 2, steer))


def test_keys_that_nobody_reads_are_refused_and_the_stream_goes_on(house: Running) -> None:
    plain, steered = (house.viewer(model=name, seconds=20) for name in ("plain", "steered"))
    for viewer, message, why in (
        (plain, {"keys": ["left"]}, "plain reads no keys"),
        (steered, {"keys": ["left", "jump"]}, "unknown key jump; steered reads left, right, up, down"),
        (steered, {"keys": [], "chunk": 10**6}, f"is far away; name one of the next {SOON}"),
        (steered, {"keys": "left"}, "keys"),
        (steered, {}, "keys"),
    ):
        viewer.until("chunk")
        viewer.say("control", id="x", **message)
        told = viewer.until("error")
        assert why in told["message"] and not told["fatal"], message
        assert told["id"] == ("x" if isinstance(message.get("keys"), list) else "")
    steered.say("prompt", prompt=STAR, chunk=10**6)
    assert "is far away" in steered.until("error")["message"]
    for viewer in (plain, steered):
        viewer.until("chunk")
        viewer.say("stop")
        viewer.until("done")


def test_keys_that_are_held_stay_in_a_snapshot(house: Running, folders: dict[str, Path]) -> None:
    viewer = house.viewer(model="steered", prompt=BALL, seconds=20, ack=True)
    viewer.until("started")
    viewer.say("control", keys=["up"], chunk=1, id="a")
    viewer.until("applied")
    viewer.until("chunk", index=2)
    viewer.say("snapshot")
    saved = viewer.until("saved")
    viewer.say("stop")
    again = house.viewer(model="steered", seconds=20, snapshot=saved["name"], ack=True)
    frames = play(again, 2)
    expected = made(folders["steered"], 5, lambda live: live.control("keys", [0, 0, 1.0, 0], chunk=1))
    assert saved["chunk"] == 3 and torch.equal(frames, expected[6:])


def test_a_stream_is_as_far_ahead_as_its_viewer_asks(house: Running) -> None:
    """With one chunk ahead, what is pressed is seen two chunks sooner."""
    viewer = house.viewer(model="steered", seconds=20, ack=True, ahead=1)
    viewer.until("chunk")
    with pytest.raises(TimeoutError):
        viewer.until("chunk", timeout=0.5)
    viewer.say("control", keys=["left"], id="a")
    assert viewer.until("applied", id="a")["chunk"] == 1
    viewer.say("ack", frames=1)
    assert viewer.until("chunk")["keys"] == ["left"]
    viewer.say("stop")
    viewer.until("done")


def test_a_model_that_must_be_told_keys_is_told_of_none(tmp_path: Path) -> None:
    """It says of itself that a condition must contain them."""
    model = VideoModel.from_pretrained(save_streaming(tmp_path / "s", keys=replace(KEYS, default=None)))
    assert warm("s", model).keys == ("left", "right", "up", "down")
    here, there = multiprocessing.Pipe()
    worker = Worker({"s": model}, there, tmp_path, clock=lambda: 0.0)
    worker.follow(Open(id="a", model="s", prompt=BALL, chunks=1))
    for _ in range(2):
        worker.work("a")
    heard = here.recv()
    assert isinstance(heard, Shown) and not isinstance(heard, Failed) and heard.keys == ()


def test_a_worker_follows_orders_for_later_chunks_as_far_as_it_must(tmp_path: Path) -> None:
    """The same in this process, where a mistake can be planted: chunks that are named, how far ahead a stream is, snapshots."""
    model = VideoModel.from_pretrained(save_streaming(tmp_path / "s", keys=KEYS))
    here, there = multiprocessing.Pipe()
    worker = Worker({"s": model}, there, tmp_path, clock=lambda: 0.0)

    def news() -> Any:
        assert here.poll(5)
        return here.recv()

    worker.follow(Open(id="a", model="s", prompt=BALL, acknowledged=True, ahead=1))
    worker.follow(Press(id="a", keys=("up", "left"), chunk=1, token="x"))
    assert news() == Applies(id="a", token="x", chunk=1, keys=("up", "left"))
    worker.follow(Steer(id="a", prompt=STAR, chunk=2, token="y"))
    assert news() == Applies(id="a", token="y", chunk=2, prompt=STAR)
    for order in (
        Press(id="a", keys=(), chunk=SOON + 1, token="z"),
        Steer(id="a", prompt=STAR, chunk=10**6, token="z"),
    ):
        worker.follow(order)
        told = news()
        assert isinstance(told, Declined) and told.token == "z" and "is far away" in told.message
    shown = list[Shown]()
    while len(shown) < 4:
        while worker.next() == "a":
            worker.work("a")
        shown.append(news())
        assert not here.poll(0), "it is further ahead than it may be"
        worker.follow(Played(id="a", frames=2 * len(shown)))
    assert [(chunk.index, set(chunk.keys), chunk.prompt) for chunk in shown] == [
        (0, set(), BALL), (1, {"up", "left"}, BALL), (2, {"up", "left"}, STAR), (3, {"up", "left"}, STAR),
    ]  # fmt: skip
    worker.follow(Save(id="a"))
    other = Worker({"s": model.with_card(name="other")}, there, tmp_path, clock=lambda: 0.0)
    other.follow(Open(id="b", model="s", prompt=BALL, snapshot=news().name))
    failed = news()
    assert "differs from 'other'" in failed.message and str(tmp_path) not in failed.message


# --- ways to change a prompt ------------------------------------------------------------------------------------------


def test_each_way_to_change_a_prompt_makes_the_frames_of_the_model(house: Running, folders: dict[str, Path]) -> None:
    seen = list[torch.Tensor]()
    for how in ("keep", "recache", "clear", "lerp"):
        viewer = house.viewer(model="plain", prompt=BALL, seconds=20, ack=True)
        viewer.until("started")
        viewer.say("prompt", prompt=STAR, how=how, chunk=4, id=how)
        applied = viewer.until("applied", id=how)
        assert (applied["chunk"], applied["prompt"], applied["keys"]) == (4, STAR, None)
        seen.append(play(viewer, 6))
        expected = made(folders["plain"], 6, lambda live, how=how: live.prompt(STAR, chunk=4, how=how))
        assert torch.equal(seen[-1], expected), how
        assert all(not torch.equal(seen[-1], other) for other in seen[:-1]), how


def test_a_way_that_the_student_has_not_is_refused(house: Running) -> None:
    viewer = house.viewer(model="steered", seconds=20)
    viewer.until("chunk")
    viewer.say("prompt", prompt=STAR, how="recache", id="x")
    told = viewer.until("error")
    assert "choose keep, clear or lerp" in told["message"] and told["id"] == "x" and not told["fatal"]
    viewer.until("chunk")
    viewer.say("stop")


# --- viewers who are away at the end ----------------------------------------------------------------------------------


def lost(house: Running) -> tuple[str, torch.Tensor]:
    """A stream of five chunks whose connection breaks when it has ended, before its viewer has got the last two."""
    viewer = house.viewer(model="plain", prompt=BALL, seconds=0.2, ack=True)
    session = viewer.until("started")["session"]
    viewer.until("chunk", index=2)
    viewer.say("ack", frames=6)
    assert house.quiet()
    viewer.socket.socket.close()
    return session, viewer.frames()


def test_the_last_chunks_wait_for_a_viewer_who_was_away(house: Running, folders: dict[str, Path]) -> None:
    session, first = lost(house)
    again = house.viewer(session=session, after=2)
    assert again.until("started")["session"] == session
    with suppress(ConnectionClosed):  # where all is sent already
        again.say("resume")  # as the page does
    assert again.until("done") == {"type": "done", "chunks": 5, "frames": 10}
    assert [chunk["index"] for chunk in again.told("chunk")] == [3, 4]
    again.close()
    more = house.viewer(session=session, after=3)  # and its connection breaks once more
    more.until("done")
    assert [chunk["index"] for chunk in more.told("chunk")] == [4]
    assert torch.equal(torch.cat([first, again.frames()]), made(folders["plain"], 5, lambda live: None))


def test_what_nobody_fetches_is_dropped_in_time(house: Running) -> None:
    viewers = house.server.viewers
    session, _ = lost(house)
    assert house.on_loop(lambda: list(viewers._over)) == [session]
    assert settled(lambda: not house.on_loop(lambda: viewers._over), 5)
    assert house.viewer(session=session).until("error")["code"] == "no_session"


def test_only_so_much_is_kept_for_one_holder(house: Running) -> None:
    viewers, patience = house.server.viewers, house.server.limits
    viewers._limits = replace(patience, grace=60.0)
    try:
        sessions = [lost(house)[0] for _ in range(4)]
        assert house.on_loop(lambda: list(viewers._over)) == sessions[1:]  # as many as may run at once
        assert house.viewer(session=sessions[0]).until("error")["code"] == "no_session"
        for session in sessions[1:]:
            house.viewer(session=session, after=3).until("done")
    finally:
        viewers._limits = patience
        house.on_loop(viewers._over.clear)


@pytest.mark.parametrize("chunks", [0, 2])
def test_what_encodes_a_stream_is_freed_with_it(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each encoder of H.264 that is not closed leaves memory, and a server runs for months."""
    facts = Facts(
        name="a", role="student", fps=8.0, height=16, width=16, frames=8, steps=(4,), guided=False, takes_image=False,
        chunk_frames=(2, 2),
    )  # fmt: skip
    closed = list[bool]()

    class Watched(FragmentedMP4):
        def close(self) -> None:
            super().close()
            closed.append(True)

    monkeypatch.setattr("fewstep.serve.viewer.encoder", lambda media, fps: Watched(fps))

    async def watched() -> None:
        files = SnapshotFiles(Path("nowhere"), kept=1.0, most=1)
        viewer = viewer_module.Viewer("ada", Init(media="mp4"), facts, lambda order: None, Metrics(), files)
        for index in range(chunks):
            frames = np.zeros((2, 16, 16, 3), np.uint8)
            news = Shown(
                id="a", index=index, first=2 * index, seconds=0.0, prompt="", version=0, frames=frames, took=(0, 0, 0)
            )
            viewer.news.put_nowait(news)
        viewer.news.put_nowait(Finished(id="a"))
        await viewer.pump()

    asyncio.run(watched())
    assert closed == [True]


# --- snapshots --------------------------------------------------------------------------------------------------------


def written(files: SnapshotFiles, name: str, at: float) -> None:
    (files.folder / name).write_bytes(b"x")
    os.utime(files.folder / name, (at, at))


def test_snapshots_are_kept_for_a_time_and_so_many_of_a_holder(tmp_path: Path) -> None:
    now = [1000.0]
    files = SnapshotFiles(tmp_path, kept=500.0, most=2, clock=lambda: now[0])
    for number, holder in enumerate(("ada", "bob", "ada", "ada")):
        written(files, f"{number}.safetensors", 1000.0 + number)
        files.keep(f"{number}.safetensors", holder)
    found = {
        (name, holder): files.path(f"{name}.safetensors", holder) for name in range(4) for holder in ("ada", "bob")
    }
    assert {key for key, path in found.items() if path} == {(1, "bob"), (2, "ada"), (3, "ada")}
    assert found[3, "ada"] == "of-ada/3.safetensors"
    written(files, "4.safetensors", 1000.0)  # its viewer went before it was written
    now[0] += SWEEP
    files.sweep()
    assert not (tmp_path / "4.safetensors").exists() and files.path("3.safetensors", "ada")
    now[0] = 1502.0
    assert files.path("2.safetensors", "ada") is None and files.path("3.safetensors", "ada")
    files.sweep()
    assert [file.name for file in tmp_path.rglob("*.safetensors")] == ["3.safetensors"]


@pytest.mark.parametrize("name", ["..", "../x.safetensors", "x", "a/b.safetensors", ".safetensors", "x.safetensors\n"])
def test_names_of_snapshots_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    files = SnapshotFiles(tmp_path / "in", kept=1e9, most=2)
    for holder in ("..", "a/../..", "."):
        assert files._of(holder).resolve().parent == (tmp_path / "in").resolve()
        assert files.path(name, holder) is None


def test_snapshots_outlive_the_server_and_no_more_than_they_may(folders: dict[str, Path], tmp_path: Path) -> None:
    served = Served(models=(("plain", str(folders["plain"])),), threads=1)
    with running(Server(served, limits=Limits(snapshots=2), folder=tmp_path)) as house:
        viewer = house.viewer(prompt=BALL, seed=5, seconds=20, ack=True)
        viewer.until("chunk", index=2)
        names = []
        for _ in range(3):
            viewer.say("snapshot")
            names.append(viewer.until("saved")["name"])
        viewer.say("stop")
        assert house.viewer(snapshot=names[0]).until("error")["code"] == "no_snapshot"
    other = Served(models=(("plain", str(folders["plain"])), ("steered", str(folders["steered"]))), threads=1)
    with running(Server(other, limits=Limits(kept=60), folder=tmp_path)) as house:
        for name in names[1:]:
            again = house.viewer(model="plain", seconds=20, snapshot=name, ack=True)
            assert torch.equal(play(again, 2), made(folders["plain"], 5, lambda live: None, seed=5)[6:])
        with urllib.request.urlopen(f"{house.url}/v1/stream/snapshots/{names[1]}") as file:
            assert len(file.read()) > 1000
        told = house.viewer(model="steered", seconds=20, snapshot=names[1]).until("error")
        assert "differs from" in told["message"] and str(tmp_path) not in told["message"]
        file = house.server.snapshots.folder / str(house.server.snapshots.path(names[2], "anybody"))
        os.utime(file, (0, 0))
        assert house.viewer(snapshot=names[2]).until("error")["code"] == "no_snapshot"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{house.url}/v1/stream/snapshots/{names[2]}")
