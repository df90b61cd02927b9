"""`WS /v1/stream` of a real server with a real worker: streams, their control, and what goes wrong."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from websockets.exceptions import ConnectionClosed, InvalidStatus

from fewstep.models import VideoModel
from fewstep.serve.app import Server
from fewstep.serve.keys import Door, Keys
from fewstep.serve.limits import Limits
from fewstep.serve.orders import Applies, Close, Declined, Failed, News, Open, Save, Saved, Steer
from fewstep.serve.worker import Served, Worker
from support_serve import Running, running, save_streaming, settled

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_streaming(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture(scope="module")
def house(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that all tests share, with short patience."""
    limits = Limits(streams=8, waiting=2, seconds=60, idle=1.5, grace=1.0, hello=1.0, messages=40)
    served = Served(models=(("tiny", str(student)),), threads=1)
    with running(Server(served, limits=limits, folder=tmp_path_factory.mktemp("served"))) as house:
        yield house


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "house" in request.fixturenames:
        assert request.getfixturevalue("house").quiet(), "a stream was left"


def test_the_frames_are_those_of_the_model(house: Running, student: Path) -> None:
    viewer = house.viewer(prompt="a red ball", seed=3, seconds=0.2)
    started = viewer.until("started")
    assert (started["fps"], started["steps"], started["chunk_frames"], started["seed"]) == (50.0, 2, [2, 2], 3)
    assert viewer.until("done") == {"type": "done", "chunks": 5, "frames": 10}
    chunks = [told for told in viewer.heard if told["type"] == "chunk"]
    assert [c["index"] for c in chunks] == list(range(5)) and [c["pts"] for c in chunks] == [
        0.0,
        0.04,
        0.08,
        0.12,
        0.16,
    ]
    with VideoModel.from_pretrained(student).stream(["a red ball"], seed=3) as live:
        expected = torch.cat([chunk.frames[0] for chunk in live.frames(5, last=True)])
    assert torch.equal(viewer.frames(), expected)
    viewer.close()


def test_the_fragments_are_one_video(house: Running) -> None:
    viewer = house.viewer(seconds=0.4, media="mp4")
    viewer.until("done")
    with av.open(io.BytesIO(b"".join(viewer.media))) as video:
        frames = list(video.decode(video=0))
    assert len(frames) >= 19 and viewer.media[0][4:8] == b"ftyp"  # the encoder holds back one at most


def test_a_prompt_applies_from_the_chunk_that_is_told(house: Running) -> None:
    viewer = house.viewer(prompt="a red ball", seconds=20)
    viewer.until("chunk")
    viewer.say("prompt", prompt="a blue star", id="x")
    applied = viewer.until("applied", id="x")
    after = viewer.until("chunk", index=applied["chunk"])
    assert (after["prompt"], after["version"]) == ("a blue star", 1)
    assert {c["prompt"] for c in viewer.heard if c["type"] == "chunk" and c["index"] < applied["chunk"]} == {
        "a red ball"
    }
    viewer.say("stop")
    viewer.until("done")


def test_of_a_storm_of_prompts_the_last_one_counts(house: Running) -> None:
    viewer = house.viewer(seconds=20)
    viewer.until("chunk")
    for number in range(20):
        viewer.say("prompt", prompt=f"prompt {number}", id=str(number))
    applied = viewer.until("applied", id="19")
    assert viewer.until("chunk", index=applied["chunk"])["prompt"] == "prompt 19"
    viewer.say("stop")


def test_an_order_that_cannot_be_followed_leaves_the_stream_as_it_is(tmp_path: Path) -> None:
    """A way to change prompts that the student has not, and a disk that takes no snapshot."""
    model = VideoModel.from_pretrained(save_streaming(tmp_path / "student"))
    stream = replace(model.card.contract.stream, commit="last")
    model = model.with_card(contract=replace(model.card.contract, stream=stream))
    here, there = multiprocessing.Pipe()
    worker = Worker({"tiny": model}, there, tmp_path / "gone", clock=lambda: 0.0)

    def told(kind: type[News]) -> Any:
        heard: Any = here.recv()
        while not isinstance(heard, kind):
            heard = here.recv()
        return heard

    worker.follow(Open(id="a", model="tiny", prompt="a red ball"))
    worker.work("a")
    worker.follow(Steer(id="a", prompt="a blue star", how="recache"))
    assert "choose" in told(Declined).message
    worker.follow(Save(id="a"))
    assert told(Saved).bytes
    shutil.rmtree(tmp_path / "gone")
    (tmp_path / "gone").write_text("no folder")
    worker.follow(Save(id="a"))
    assert told(Declined).message == "the server could not write the file; try again later"
    worker.follow(Steer(id="a", prompt="a blue star", token="x"))
    assert told(Applies).token == "x"
    worker.follow(Open(id="b", model="tiny", prompt="a", steps=3))
    assert told(Failed).id == "b" and worker.next() == "a"
    worker.follow(Close(id="a"))


def test_a_paused_stream_makes_nothing_and_goes_on(house: Running) -> None:
    viewer = house.viewer(seconds=20)
    viewer.until("chunk")
    viewer.say("pause")
    with pytest.raises(TimeoutError):
        viewer.until("done", timeout=0.5)
    last = [c["index"] for c in viewer.heard if c["type"] == "chunk"][-1]
    viewer.say("resume")
    assert viewer.until("chunk")["index"] == last + 1
    viewer.say("stop")


def test_a_viewer_that_acknowledges_is_not_left_behind(house: Running) -> None:
    """Three chunks ahead of it, and no further."""
    viewer = house.viewer(seconds=20, ack=True)
    viewer.until("chunk", index=2)
    with pytest.raises(TimeoutError):
        viewer.until("chunk", timeout=0.5)
    viewer.say("ack", frames=4)
    assert viewer.until("chunk")["index"] == 3 and viewer.until("chunk")["index"] == 4
    viewer.say("stop")


def test_a_stream_goes_on_from_a_snapshot(house: Running) -> None:
    viewer = house.viewer(seconds=20, seed=5, ack=True)
    viewer.until("chunk", index=2)
    viewer.say("snapshot")
    saved = viewer.until("saved")
    viewer.say("ack", frames=6)
    viewer.media.clear()
    viewer.until("chunk", index=4)
    expected = viewer.frames()
    viewer.say("stop")
    again = house.viewer(seconds=0.08, snapshot=saved["name"])
    again.until("done")
    assert saved["chunk"] == 3 and torch.equal(again.frames(), expected)
    with urllib.request.urlopen(f"{house.url}/v1/stream/snapshots/{saved['name']}") as file:
        assert len(file.read()) == saved["bytes"]
    for name in ("x", "../../student/card.json", "..%2fclips"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{house.url}/v1/stream/snapshots/{name}")
        assert house.viewer(snapshot=name).until("error")["code"] == "no_snapshot"


def test_a_stream_from_a_snapshot_waits_for_its_viewer_too(house: Running) -> None:
    """Its frames are counted from the stream's beginning, and it is three chunks ahead of its viewer all the same."""
    viewer = house.viewer(seconds=20, ack=True)
    viewer.until("chunk", index=2)
    viewer.say("ack", frames=6)
    viewer.until("chunk", index=5)
    viewer.say("snapshot")
    saved = viewer.until("saved")
    viewer.say("stop")
    again = house.viewer(seconds=20, snapshot=saved["name"], ack=True)
    first = again.until("chunk", index=saved["chunk"])["first"]
    again.until("chunk", index=saved["chunk"] + 2)
    again.say("ack", frames=first + 2)
    assert again.until("chunk")["index"] == saved["chunk"] + 3
    with pytest.raises(TimeoutError):
        again.until("chunk", timeout=0.5)
    again.say("stop")


def test_statistics_come_every_second_also_between_chunks(house: Running) -> None:
    viewer = house.viewer(seconds=20)
    viewer.until("chunk")
    told = [viewer.until("stats", timeout=5) for _ in range(3)]
    assert sum(message["type"] == "chunk" for message in viewer.heard) > 3
    assert told[-1]["streams"] == 1 and told[-1]["memory"] > 1 << 20
    viewer.say("stop")


def test_a_viewer_that_comes_back_misses_nothing(house: Running) -> None:
    viewer = house.viewer(seconds=20, ack=True)
    session = viewer.until("started")["session"]
    viewer.until("chunk", index=1)
    viewer.socket.socket.close()  # without a word
    again = house.viewer(session=session, after=0)
    assert again.until("started")["session"] == session
    assert [again.until("chunk")["index"] for _ in range(2)] == [1, 2]
    again.say("stop")
    again.until("done")
    assert house.viewer(session=session).until("error")["code"] == "no_session"


def test_a_viewer_that_is_gone_frees_its_place(house: Running) -> None:
    viewer = house.viewer(seconds=20)
    viewer.until("chunk")
    viewer.socket.socket.close()
    assert house.quiet()  # after the time of grace


def test_a_viewer_that_leaves_before_it_begins_leaves_nothing(house: Running) -> None:
    for _ in range(5):
        house.connect().close()
        house.viewer().close()


def test_a_viewer_that_leaves_while_it_waits_leaves_nothing(house: Running) -> None:
    gate, viewers = house.server.viewers._gate, house.server.viewers
    house.on_loop(lambda: gate.enter(1.0))
    try:
        viewer = house.viewer(seconds=20)
        viewer.until("queue")
        viewer.socket.socket.close()
        assert settled(lambda: not next(iter(viewers._all.values())).attached)
    finally:
        house.on_loop(lambda: (gate.leave(1.0), viewers._admit()))


def test_wrong_messages_are_answered_and_harm_nobody(house: Running) -> None:
    viewer = house.viewer(seconds=20)
    viewer.until("started")
    for text in ("", "{", '{"type": "fly"}', '{"type": "prompt", "prompt": ""}', '{"type": "init"}'):
        viewer.socket.send(text)
        told = viewer.until("error")
        assert told["code"] == "invalid_message" and not told["fatal"]
    viewer.socket.send(b"\x00\xff")
    assert "messages of clients are text" in viewer.until("error")["message"]
    viewer.until("chunk")
    viewer.say("stop")
    viewer.until("done")


@pytest.mark.parametrize("first", ["", '{"type": "prompt", "prompt": "a"}', b"\x00", '{"type": "init", "steps": 3}'])
def test_a_wrong_first_message_ends_the_connection(house: Running, first: Any) -> None:
    viewer = house.connect()
    viewer.socket.send(first)
    told = viewer.until("error")
    assert told["code"] in ("invalid_message", "invalid_request") and told["fatal"]
    with pytest.raises(ConnectionClosed):
        viewer.until("started")


def test_a_request_that_cannot_be_served_says_what_can(house: Running) -> None:
    assert "trained for 2, 1 steps, not for 3" in house.viewer(steps=3).until("error")["message"]
    assert "at most 60 seconds" in house.viewer(seconds=61).until("error")["message"]
    assert "it serves tiny" in house.viewer(model="other").until("error")["message"]


def test_a_message_that_is_too_large_ends_the_connection(house: Running) -> None:
    viewer = house.viewer(seconds=20)
    viewer.until("started")
    viewer.socket.send("x" * (1 << 17))
    with pytest.raises(ConnectionClosed):
        viewer.until("done")


def test_too_many_messages_end_the_stream(house: Running) -> None:
    viewer = house.viewer(seconds=20)
    viewer.until("started")
    for number in range(60):
        viewer.say("ack", frames=number)
    assert viewer.until("error", fatal=True)["code"] == "too_many_messages"


def test_silence_instead_of_init_ends_the_connection(house: Running) -> None:
    assert house.connect().until("error")["code"] == "timeout"


def test_a_stream_that_nobody_watches_is_ended(house: Running) -> None:
    viewer = house.viewer(seconds=20)
    viewer.until("chunk")
    viewer.say("pause")
    assert viewer.until("error", timeout=10)["code"] == "idle"


def test_more_viewers_than_there_is_room_for_wait_and_are_refused(house: Running) -> None:
    gate = house.server.viewers._gate
    house.on_loop(lambda: gate.enter(1.0))
    try:
        waiting = [house.viewer(seconds=0.1) for _ in range(2)]
        assert [viewer.until("queue")["position"] for viewer in waiting] == [1, 2]
        refused = house.viewer().until("error")
        assert refused["code"] == "busy" and refused["retryable"]
    finally:
        house.on_loop(lambda: (gate.leave(1.0), house.server.viewers._admit()))
    for viewer in waiting:
        viewer.until("done")


def test_a_worker_that_is_killed_is_started_again_and_viewers_are_told(house: Running) -> None:
    viewer = house.viewer(seconds=20)
    viewer.until("chunk")
    pid = house.server.supervisor.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    told = viewer.until("error")
    assert told["code"] == "worker_lost" and told["retryable"]
    assert house.quiet() and not house.server.supervisor.ready
    assert house.viewer().until("error")["code"] == "not_ready"
    assert settled(lambda: house.server.supervisor.ready, 60) and house.server.supervisor.deaths == 1
    assert house.server.supervisor.pid != pid
    house.viewer(seconds=0.1).until("done")


def test_a_worker_that_hangs_is_killed_and_viewers_are_told(house: Running) -> None:
    supervisor = house.server.supervisor
    viewer = house.viewer(seconds=20)
    viewer.until("chunk")
    deaths, patience = supervisor.deaths, supervisor._hangs
    house.on_loop(lambda: setattr(supervisor, "_hangs", 3.0))
    try:
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGSTOP)
        assert viewer.until("error", timeout=30)["code"] == "worker_lost"
    finally:
        house.on_loop(lambda: setattr(supervisor, "_hangs", patience))
    assert settled(lambda: supervisor.ready, 60) and supervisor.deaths == deaths + 1
    house.viewer(seconds=0.1).until("done")


def test_many_silent_connections_harm_nobody(house: Running) -> None:
    silent = [house.connect() for _ in range(200)]
    viewer = house.viewer(seconds=0.2)
    assert viewer.until("done")["chunks"] == 5
    for one in silent:
        assert one.until("error")["code"] == "timeout"
        one.close()
    assert settled(lambda: house.server.metrics.sockets._value.get() <= 1)


def test_keys_are_checked_before_a_connection_is_accepted(student: Path, tmp_path: Path) -> None:
    secret = Keys.add(tmp_path / "keys", "ada")
    door = Door(Keys.read(tmp_path / "keys"))
    with running(
        Server(Served(models=(("tiny", str(student)),), threads=1), door=door, folder=tmp_path / "f")
    ) as house:
        for headers in (
            {},
            {"Authorization": "Bearer x"},
            {"Authorization": f"Bearer {secret}", "Origin": "http://evil"},
        ):
            with pytest.raises(InvalidStatus, match="403"):
                house.connect(additional_headers=headers)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{house.url}/v1/models")
        allowed = house.connect(additional_headers={"Authorization": f"Bearer {secret}"})
        allowed.say("init", seconds=0.1)
        session = allowed.until("started")["session"]
        allowed.until("done")
        word = house.on_loop(lambda: door.ticket("ada"))
        page = house.connect(subprotocols=["fewstep.v1", f"ticket.{word}"])
        assert page.socket.subprotocol == "fewstep.v1"
        page.say("init", session=session)  # what the holder may not have got is still there
        assert page.until("done")["chunks"] == 3
        with pytest.raises(InvalidStatus, match="403"):
            house.connect(subprotocols=["fewstep.v1", f"ticket.{word}"])


def test_a_server_that_ends_says_so(student: Path, tmp_path: Path) -> None:
    with running(Server(Served(models=(("tiny", str(student)),), threads=1), folder=tmp_path)) as house:
        viewer = house.viewer(seconds=20)
        viewer.until("chunk")
        pid = house.server.supervisor.pid
    assert viewer.until("done")["chunks"] >= 1
    assert pid is not None and settled(lambda: not Path(f"/proc/{pid}").exists())


def test_a_model_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    server = Server(Served(models=(("x", str(tmp_path / "nothing")),)), folder=tmp_path)
    with pytest.raises(AssertionError), running(server):
        pass
    assert "no card.json there" in server.supervisor.failure
