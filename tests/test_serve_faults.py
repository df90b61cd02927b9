"""What goes wrong with one viewer or one stream of a real server, and must not harm the others."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from websockets.exceptions import ConnectionClosed

from fewstep.models import VideoModel
from fewstep.serve.app import Server
from fewstep.serve.connections import LINGER
from fewstep.serve.limits import Limits
from fewstep.serve.pace import AHEAD
from fewstep.serve.viewer import Viewer as Served
from support_serve import Mute, Running, Stuck, Viewer, running, save_streaming, settled

pytestmark = pytest.mark.timeout(180)
POISON = "poison"
SILENT = 1000


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One word of its prompts is not a number."""
    root = tmp_path_factory.mktemp("models")
    model = VideoModel.from_pretrained(save_streaming(root / "sound", fps=100))
    ids = model.parts["text"].tokens([POISON])[0, 1]
    with torch.no_grad():
        model.parts["text"].words.weight[ids] = float("nan")
    return model.save(root / "student")


@pytest.fixture(scope="module")
def stop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file is there, decoders hang."""
    return tmp_path_factory.mktemp("stop") / "stop"


@pytest.fixture(scope="module")
def house(student: Path, stop: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    limits = Limits(streams=8, seconds=60, grace=1.0, hello=100.0, unread=1.0)
    served = Stuck(models=(("tiny", str(student)),), threads=1, hangs=stop)
    with running(Server(served, limits=limits, folder=tmp_path_factory.mktemp("served"))) as house:
        house.server.viewers._gate.full = 100.0  # room for all, however slow the machine
        yield house


@pytest.fixture(autouse=True)
def leaves_nothing(house: Running) -> Iterator[None]:
    yield
    assert house.quiet(), "a stream was left"


def sockets(house: Running) -> float:
    return float(house.server.metrics.sockets._value.get())


def test_numbers_that_are_no_pictures_end_their_stream_alone(house: Running) -> None:
    """The chunk is refused and its viewer told: there is no black picture. The other stream goes on."""
    other = house.viewer(seconds=20)
    viewer = house.viewer(seconds=20, ack=True)
    viewer.until("started")
    viewer.say("prompt", prompt=f"a red {POISON}", chunk=2, id="x")
    assert viewer.until("applied", id="x")["chunk"] == 2
    told = viewer.until("error", fatal=True)
    assert told["code"] == "not_finite" and not told["retryable"] and "another seed or prompt" in told["message"]
    assert [chunk["index"] for chunk in viewer.told("chunk")] == [0, 1] and len(viewer.media) == 4
    assert len(torch.unique(viewer.frames()[-1])) > 2  # a picture
    seen = other.until("chunk")["index"]
    other.until("chunk", index=seen + 3)
    other.say("stop")
    other.until("done")
    assert house.server.supervisor.deaths == 0


def used() -> int:
    """Bytes of this process, in which the server is."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_viewers_who_never_read_take_little_memory_and_are_dropped_with_a_reason(house: Running) -> None:
    """Their streams wait when their buffers are full; the others do not. One of them reads later, and one never does."""
    metrics = house.server.metrics
    other = house.viewer(seconds=60)
    other.until("chunk")
    reading = threading.Thread(target=read_on, args=(other,), daemon=True)
    reading.start()
    late, never = (Mute(house.port) for _ in range(2))
    for mute in (late, never):
        mute.say("init", seconds=60, seed=9)
    assert settled(lambda: len(muted(house)) == 2)
    mutes = muted(house)
    most, memory, began = 0, used(), time.monotonic()
    while metrics.dropped._value.get() < 2:
        waiting = house.on_loop(lambda: [sum(p.chunk for p in viewer.outbox._queue if p) for viewer in mutes])
        most = max(most, *waiting)
        time.sleep(0.01)
        assert time.monotonic() - began < 30, "they are never dropped"
    assert most <= AHEAD + 3 and used() - memory < 32 << 20
    assert settled(lambda: all(viewer.throttled and not viewer.attached for viewer in mutes))
    assert late.rest().endswith(b"nothing was read for 1 seconds")
    late.close()
    connections = house.web.server_state.connections
    assert settled(lambda: sockets(house) == 1) and house.on_loop(lambda: len(connections)) >= 2
    assert settled(lambda: house.on_loop(lambda: len(connections)) == 1, LINGER + 5), "an open file is left"
    never.close()
    seen = len(other.told("chunk"))
    assert settled(lambda: len(other.told("chunk")) > seen + 3)
    other.say("stop")
    reading.join(20)
    assert other.told("done") and not other.told("error")


def read_on(viewer: Viewer) -> None:
    """All that it is told."""
    with suppress(ConnectionClosed):
        viewer.until("never")


def muted(house: Running) -> list[Served]:
    return house.on_loop(lambda: [viewer for viewer in house.server.viewers._all.values() if viewer.init.seed == 9])


def test_a_thousand_silent_connections_harm_nobody(house: Running) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * SILENT + 500  # both ends are in this process
    if hard < needed:
        pytest.skip(f"this system allows {hard} open files, and {needed} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    threads = threading.active_count()
    try:
        silent = [Mute(house.port) for _ in range(SILENT)]
        assert settled(lambda: sockets(house) == SILENT, 30)
        begun = time.monotonic()
        viewer = house.viewer(seconds=0.2)
        assert viewer.until("done")["chunks"] == 10 and time.monotonic() - begun < 10
        assert sockets(house) >= SILENT and threading.active_count() <= threads + 8
        for one in silent:
            one.close()
        assert settled(lambda: sockets(house) == 0, 30)
        connections = house.web.server_state.connections
        assert settled(lambda: not house.on_loop(lambda: len(connections)), 30)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_decoder_that_hangs_is_ended_and_all_viewers_are_told(house: Running, stop: Path) -> None:
    """The last test here: the worker is started again after it."""
    supervisor = house.server.supervisor
    patience, deaths = supervisor._hangs, supervisor.deaths
    viewers = [house.viewer(seconds=20, seed=seed) for seed in range(2)]
    for viewer in viewers:
        viewer.until("chunk")
    house.on_loop(lambda: setattr(supervisor, "_hangs", 3.0))
    stop.touch()
    try:
        for viewer in viewers:
            told = viewer.until("error", timeout=30)
            assert told["code"] == "worker_lost" and told["retryable"]
    finally:
        stop.unlink()
        house.on_loop(lambda: setattr(supervisor, "_hangs", patience))
    assert house.viewer().until("error")["code"] == "not_ready"
    assert settled(lambda: supervisor.ready, 60) and supervisor.deaths == deaths + 1
    assert house.viewer(seconds=0.1).until("done")["chunks"] == 5
