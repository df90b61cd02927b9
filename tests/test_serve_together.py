"""Viewers whose network calls are made as one: who joins whom, what they get, what goes wrong with one, and who is admitted.

What they get is compared with `model.stream` within one of 255 levels, and less than 1 % of all numbers may differ: a batch is
multiplied in another order, so last bits differ (`test_together.py` compares latents in float64).
"""

from __future__ import annotations

import asyncio
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.models import VideoModel
from fewstep.models.runtime import Runtime
from fewstep.serve.app import Server
from fewstep.serve.limits import Limits
from fewstep.serve.orders import (
    Applies,
    Close,
    Facts,
    Failed,
    Make,
    Open,
    Play,
    Played,
    Progress,
    Save,
    Saved,
    Shown,
    Steer,
)
from fewstep.serve.protocol import Init
from fewstep.serve.worker import Served, Worker, joined_seconds, warm
from support_serve import running, save_streaming, settled
from test_serve_faults import POISON

pytestmark = pytest.mark.usefixtures("single_thread")
BALL, STAR = "a red ball rolls left", "a blue star stays"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_streaming(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture
def model(folder: Path) -> VideoModel:
    """One word of its prompts is not a number."""
    model = VideoModel.from_pretrained(folder)
    with torch.no_grad():
        model.parts["text"].words.weight[model.parts["text"].tokens([POISON])[0, 1]] = float("nan")
    return model


class House:
    """A worker in this process, with a clock that stands still, and what it says."""

    def __init__(self, model: VideoModel, folder: Path, batch: int = 2) -> None:
        self.model, self.heard = model, list[Any]()
        self.here, there = multiprocessing.Pipe()
        self.worker = Worker({"s": model}, there, folder, clock=lambda: 0.0, batch=batch)
        self.calls = list[int]()
        """Clips of each network call."""
        model.denoiser.register_forward_pre_hook(lambda _, inputs: self.calls.append(len(inputs[0])))

    def open(self, name: str, prompt: str = BALL, **options: Any) -> None:
        self.worker.follow(Open(id=name, model="s", prompt=prompt, acknowledged=True, **options))

    def work(self, most: int = 100) -> list[str]:
        """Work until nobody waits; who was due, time and again."""
        due = list[str]()
        while len(due) < most and (name := self.worker.next()) is not None:
            due.append(name)
            self.worker.work(name)
        while self.here.poll(0):
            self.heard.append(self.here.recv())
        return due

    def play(self, *names: str) -> list[str]:
        """These viewers have played what they got; then work."""
        for name in names:
            self.worker.follow(Played(id=name, frames=sum(len(n.frames) for n in self.told(Shown, name))))
        return self.work()

    def told(self, kind: type, name: str) -> list[Any]:
        return [news for news in self.heard if isinstance(news, kind) and news.id == name]

    def frames(self, name: str) -> Tensor:
        return torch.cat([torch.from_numpy(news.frames) for news in self.told(Shown, name)]).int()


@pytest.fixture
def house(model: VideoModel, tmp_path: Path) -> House:
    return House(model, tmp_path)


def alone(folder: Path, chunks: int, prompt: str, seed: int = 0, then: tuple[int, str] | None = None) -> Tensor:
    """The frames of a stream without a server; `then` from a chunk on another prompt."""
    with VideoModel.from_pretrained(folder).stream([prompt], seed=seed) as live:
        if then is not None:
            live.prompt(then[1], chunk=then[0])
        return torch.cat([chunk.frames[0] for chunk in live.frames(chunks)]).int()


def like(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and (a - b).abs().max() <= 1
    assert (a != b).float().mean() < 0.01


def test_viewers_of_different_age_get_what_they_get_alone(house: House, folder: Path) -> None:
    house.open("a")
    house.work()
    assert set(house.calls) == {1}
    house.open("b", STAR, seed=1)
    house.work(2)  # it begins, and is a call further than the chunk before it
    for _ in range(3):
        house.play("a", "b")
    assert house.calls.count(2) > house.calls.count(1) - 9
    many = [len(house.frames(name)) for name in "ab"]
    assert min(many) >= 12 and many[0] != many[1] - 2
    like(house.frames("a"), alone(folder, many[0] // 2, BALL))
    like(house.frames("b"), alone(folder, many[1] // 2, STAR, seed=1))


def test_who_is_due_first_is_never_delayed_and_nobody_is_made_ahead(house: House) -> None:
    """The one that is due is worked for in each call, whoever else could be; a viewer with enough frames joins none."""
    house.open("a", ahead=1)
    house.open("b", STAR, ahead=3)
    house.work()
    assert len(house.told(Shown, "a")) == 1 and len(house.told(Shown, "b")) == 3
    before = len(house.calls)
    house.play("b")
    assert house.calls[before:] and set(house.calls[before:]) == {1} and len(house.told(Shown, "a")) == 1
    before = len(house.calls)
    house.play("a", "b")
    assert 2 in house.calls[before:] and len(house.told(Shown, "a")) == 2


def test_a_batch_has_so_many_streams_and_no_more(model: VideoModel, tmp_path: Path) -> None:
    three = House(model, tmp_path, batch=3)
    for number in range(4):
        three.open(str(number), seed=number)
    three.work()
    three.play(*"0123")
    assert max(three.calls) == 3
    one = House(model, tmp_path, batch=1)
    one.open("a")
    one.open("b", seed=1)
    one.work()
    one.play("a", "b")
    assert set(one.calls) == {1}


def test_a_clip_is_not_made_with_the_calls_of_viewers(house: House) -> None:
    """It would take their time, and it is for later."""
    house.worker.follow(Make(id="c", model="s", prompt=BALL, frames=20))
    house.work(4)
    house.open("a")
    house.open("b", STAR)
    assert "c" not in house.work(6) and len(house.told(Progress, "c")) == 4
    assert 2 in house.calls and 3 not in house.calls
    house.worker.follow(Play(id="b", on=False))
    before = len(house.calls)
    house.play("a")
    assert set(house.calls[before:]) == {1}  # one is paused, the other is alone with a clip


def test_numbers_that_are_no_pictures_end_their_stream_alone(house: House, folder: Path) -> None:
    house.open("ill", BALL)
    house.open("b", STAR, seed=1)
    house.work()
    house.worker.follow(Steer(id="ill", prompt=f"a red {POISON}"))
    for _ in range(3):
        house.play("ill", "b")
    (failed,) = house.told(Failed, "ill")
    assert failed.code == "not_finite"
    chunks = len(house.told(Shown, "b"))
    assert chunks >= 9 and not house.told(Failed, "b")
    like(house.frames("b"), alone(folder, chunks, STAR, seed=1))
    like(house.frames("ill"), alone(folder, len(house.told(Shown, "ill")), BALL))


def test_a_stream_that_is_ended_amid_a_chunk_harms_nobody(house: House, folder: Path) -> None:
    house.open("gone", BALL)
    house.open("b", STAR, seed=1)
    house.work()
    for name in ("gone", "b"):
        house.worker.follow(Played(id=name, frames=6))
    house.work(2)
    together = house.worker._together
    assert house.calls[-1] == 2 and together is not None and together._views is not None
    house.worker.follow(Close(id="gone"))
    assert together._views is None  # nothing of it stays in memory
    house.work()
    house.play("b")
    chunks = len(house.told(Shown, "b"))
    assert chunks >= 9
    like(house.frames("b"), alone(folder, chunks, STAR, seed=1))


def test_a_prompt_that_changes_is_read_apart_from_others(house: House, folder: Path) -> None:
    """The other viewer is not kept waiting for it; later their calls meet again."""
    house.open("a", BALL)
    house.open("b", STAR, seed=1)
    house.work()
    house.worker.follow(Steer(id="a", prompt=STAR))
    tasks = house.worker._tasks
    assert not tasks["a"].joins and tasks["b"].joins
    (applies,) = (news for news in drained(house) if isinstance(news, Applies))
    for _ in range(3):
        house.play("a", "b")
    assert tasks["a"].joins and house.calls[-1] == 2
    house.worker.follow(Steer(id="a", prompt=BALL, chunk=applies.chunk + 50))
    assert tasks["a"].joins  # that is far away
    like(house.frames("a"), alone(folder, len(house.told(Shown, "a")), BALL, then=(applies.chunk, STAR)))
    like(house.frames("b"), alone(folder, len(house.told(Shown, "b")), STAR, seed=1))


def drained(house: House) -> list[Any]:
    house.work(0)
    return house.heard


def test_a_snapshot_from_company_goes_on_without_it(
    house: House, folder: Path, model: VideoModel, tmp_path: Path
) -> None:
    house.open("a", BALL)
    house.open("b", STAR, seed=1)
    house.work()
    house.play("a", "b")
    assert 2 in house.calls
    house.worker.follow(Save(id="b"))
    house.work(0)
    (saved,) = house.told(Saved, "b")
    other = House(model, tmp_path, batch=1)
    other.open("c", snapshot=saved.name)
    other.work()
    like(other.frames("c"), alone(folder, saved.chunk + 3, STAR, seed=1)[2 * saved.chunk :])


def test_a_worker_that_lost_its_pipe_ends(house: House) -> None:
    house.open("a")
    house.open("b")
    house.here.close()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        house.work()


# --- how many are admitted ------------------------------------------------------------------------------------------------


def facts(*joined: float) -> Facts:
    return Facts(
        name="s", role="student", fps=10.0, height=8, width=8, frames=8, steps=(2,), guided=False, takes_image=False,
        chunk_frames=(4, 2), chunk_seconds=0.1, joined_seconds=joined,
    )  # fmt: skip


def test_the_load_of_viewers_is_what_was_measured_of_so_many() -> None:
    """A chunk plays for 0.2 s. Three in a batch take 0.21 s; five are a batch of three and one of two."""
    apart, joined = facts(), facts(0.16, 0.21)
    assert [apart.taken(n) for n in range(4)] == pytest.approx([0, 0.5, 1.0, 1.5])
    assert [joined.taken(n) for n in range(7)] == pytest.approx([0, 0.5, 0.8, 1.05, 1.55, 1.85, 2.1])
    assert joined.load == apart.load == 0.5


@pytest.mark.parametrize(("joined", "admitted"), [((), 2), ((0.16, 0.21), 3), ((0.11, 0.12), 4)])
def test_as_many_viewers_are_admitted_as_their_batches_take(
    joined: tuple[float, ...], admitted: int, folder: Path, tmp_path: Path
) -> None:
    """Up to 1.12: two of 0.5 each; three that take 1.05 together; three that take 0.6 and one of 0.5."""
    server = Server(Served(models=(("s", str(folder)),)), limits=Limits(streams=9, waiting=9), folder=tmp_path)
    viewers, gate, known = server.viewers, server.viewers._gate, facts(*joined)
    gate.full = 1.12

    async def come_and_go() -> None:
        server.supervisor.models["s"] = known
        server.supervisor._up.set()  # no worker: nothing is made
        there = [viewers.join(Init(), "ada") for _ in range(5)]
        assert gate.streams == admitted and gate.load == pytest.approx(known.taken(admitted))
        assert [viewer.active for viewer in there] == [number < admitted for number in range(5)]
        for left in range(4, -1, -1):
            viewers._leave(there[4 - left])
            assert gate.streams == min(left, admitted) and gate.load == pytest.approx(known.taken(min(left, admitted)))

    asyncio.run(come_and_go())


def test_what_a_batch_takes_is_measured_before_the_first_viewer(model: VideoModel) -> None:
    assert warm("s", model).joined_seconds == ()
    calls = list[int]()
    model.denoiser.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    seconds = joined_seconds("s", model, 3)
    assert len(seconds) == 2 and 0 < seconds[0] <= seconds[1]
    assert calls.count(3) >= 6 and calls.count(2) >= 6 and calls.count(1) == 0


@pytest.mark.slow
def test_a_server_counts_viewers_of_one_model_together(folder: Path, tmp_path: Path) -> None:
    """The second one adds what two take together, less what one takes."""
    with running(Server(Served(models=(("tiny", str(folder)),), threads=1, batch=2), folder=tmp_path)) as house:
        gate, known = house.server.viewers._gate, house.server.supervisor.models["tiny"]
        gate.full = 100.0  # room for all, however slow the machine
        known = replace(known, chunk_seconds=0.004, joined_seconds=(0.005,))
        house.on_loop(lambda: house.server.supervisor.models.update(tiny=known))
        viewers = [house.viewer(prompt=prompt, seconds=60) for prompt in (BALL, STAR, BALL)]
        for number, viewer in enumerate(viewers, 1):
            viewer.until("chunk", index=3)
            if number == 3:
                assert gate.load == pytest.approx(known.taken(3)) and known.taken(3) < 3 * known.load
        for left, viewer in zip((2, 1, 0), viewers, strict=True):
            viewer.say("stop")
            viewer.until("done")
            assert settled(lambda left=left: gate.load == pytest.approx(known.taken(left)))


def test_a_batch_of_calls_that_cannot_meet_is_refused(folder: Path) -> None:
    model = VideoModel.from_pretrained(folder, runtime=Runtime())
    stream = replace(model.card.contract.stream, rolling=2, mutual=False, commit="last")
    model = model.with_card(contract=replace(model.card.contract, stream=stream))
    with pytest.raises(ValueError, match="leave --batch out"):
        joined_seconds("s", model, 2)
