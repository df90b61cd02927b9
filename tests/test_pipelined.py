"""A memory for each step, and processes that share the steps of a stream: the stream of one process, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.attention import Importance, StateMemory
from fewstep.core import Batch, Call, Rng, Seeds
from fewstep.diffusion import CFG, DPMpp2M, Exact, Shifted, Stream
from fewstep.methods import SelfForced
from fewstep.models import VideoModel
from fewstep.streaming import Session, Video, cascaded, pipelined
from support_processes import together
from test_streaming import PROMPTS, made, streaming_model

pytestmark = pytest.mark.usefixtures("single_thread")
THREE = (1.0, 0.75, 0.4, 0.0)
STREAM = Stream(window=4, sink=1, commit="levels", positions="sink")


def model_of(stream: Stream = STREAM, guidance: CFG = CFG(), times: tuple[float, ...] = THREE) -> VideoModel:
    model = streaming_model(stream, guidance)
    grid = Exact(grids=(times,), otherwise=Shifted())
    return model.with_card(contract=replace(model.card.contract, grid=grid, steps=len(times) - 1))


@pytest.mark.parametrize("guidance", [CFG(), CFG(scale=3.0)], ids=["plain", "guided"])
def test_a_step_reads_what_the_same_step_of_earlier_chunks_has_made(guidance: CFG) -> None:
    """By hand, with a memory of each step apart; and no call is made only to remember."""
    model = model_of(guidance=guidance)
    network, (cond, uncond), contract = model.reader, model.conditions(PROMPTS), model.card.contract
    session = Session(model, PROMPTS)
    memories, heard = [session._chunks.begin() for _ in range(3)], list[int]()
    with torch.no_grad():
        clip = []
        for index in range(6):
            rng = Seeds((0, 1)).fold(f"chunk/{index}")
            x = rng.randn((2, 4, 1, 8, 8), "start")
            for step, t in enumerate(THREE[:3]):
                view = network.recall(memories[step], x)
                out = guidance(network, x, torch.full((2,), t), cond, uncond, Call(step=step, steps=3, kv=view))
                s = THREE[step + 1]
                x = out.x0
                if s:
                    x = network.path.add_noise(out.x0, rng.randn(x.shape, f"renoise/{step}"), torch.full((2,), s))
                memories[step] = memories[step].commit(out.kv or (), 1)
            clip.append(x)
    model.denoiser.register_forward_hook(lambda *_: heard.append(1))
    chunks = made(session, 6)
    torch.testing.assert_close(torch.cat(chunks, 2), torch.cat(clip, 2), atol=1e-5, rtol=1e-5)
    assert len(heard) == 6 * 3 and contract.stream is not None and contract.stream.commits == 0
    last = made(Session(model_of(replace(STREAM, commit="last"), guidance), PROMPTS), 3)
    assert torch.equal(last[0], chunks[0]) and not torch.equal(last[2], chunks[2])
    assert session.snapshot.memory.nbytes == sum(memory.nbytes for memory in memories)


def test_with_one_step_it_is_what_the_last_step_left() -> None:
    one = [model_of(replace(STREAM, commit=commit), times=(1.0, 0.0)) for commit in ("levels", "last")]  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(*(made(Session(model, PROMPTS), 5) for model in one), strict=True))


def test_it_is_restored_cancelled_and_rolled_out_bit_for_bit() -> None:
    model = model_of()
    whole, session = made(Session(model, PROMPTS), 5), Session(model, PROMPTS)
    made(session, 2)
    paused, given_up = session.snapshot, session.steps()
    next(given_up)
    given_up.close()  # type: ignore[attr-defined]
    assert session.snapshot is paused
    assert all(torch.equal(a, b) for a, b in zip(made(Session(model, paused), 3), whole[2:], strict=True))
    cond = model.conditions(PROMPTS)[0]
    batch, grids = Batch(cond, cond, (4, 5, 8, 8)), (THREE[:3],)
    rollout = SelfForced(stream=STREAM, grids=grids, exit="last")
    assert torch.equal(rollout(model.denoiser, batch, _Numbers((0, 1)), grad=False).x0, torch.cat(whole, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="makes them all; let the rollout have exit: last"):
        replace(rollout, exit="random")(model.denoiser, batch, _Numbers((0, 1)), grad=False)  # type: ignore[arg-type]


class _Numbers(Seeds):
    def integer(self, name: str, high: int) -> int:
        return 0


def sessions() -> dict[str, Session]:
    """What both sides make: from noise, guided, from the middle of a stream, and from a clean frame."""
    middle = Session(model_of(), PROMPTS)
    made(middle, 3)
    given = Session(model_of(replace(STREAM, positions="absolute")), PROMPTS)
    given.begin_with(Rng(0).randn((2, 4, 1, 8, 8), "given"))
    return {
        "noise": Session(model_of(), PROMPTS), "guided": Session(model_of(guidance=CFG(scale=3.0)), PROMPTS, seed=5),
        "middle": Session(middle.model, middle.snapshot), "given": given,
    }  # fmt: skip


def _share(folder: Path) -> None:
    dist.init_process_group("gloo")
    for name, session in sessions().items():
        chunks = list(pipelined(session, 5))
        assert bool(chunks) == (dist.get_rank() == 2)
        if chunks:
            torch.save(torch.cat(chunks, 2), folder / f"{name}.pt")


def test_processes_that_share_the_steps_make_the_stream_of_one(tmp_path: Path) -> None:
    together(3, tmp_path, _share, tmp_path)
    for name, session in sessions().items():
        expected = torch.cat(made(session, 5), 2)
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), expected), name


def _fail(folder: Path) -> None:
    dist.init_process_group("gloo")
    model = model_of(times=(1.0, 0.4, 0.0))
    session, rank = Session(model, PROMPTS), dist.get_rank()
    if rank == 0:
        first: list[Tensor] = []

        def broken(x: Tensor, *rest: Any) -> Any:
            first.append(x)
            if len(first) == 3:
                raise OSError("gone")
            return forward(x, *rest)

        forward, model.denoiser.forward = model.denoiser.forward, broken
        with pytest.raises(OSError, match="gone"):
            list(pipelined(session, 9))
        return  # the process ends
    shown = []
    with pytest.raises(RuntimeError):
        shown.extend(pipelined(session, 9))  # type: ignore[arg-type]
    (folder / "ended").write_text(str(len(shown)))


def test_a_process_that_fails_ends_the_stream_and_not_the_others(tmp_path: Path) -> None:
    together(2, tmp_path, _fail, tmp_path)
    assert (tmp_path / "ended").exists()


def test_what_cannot_be_shared_is_refused() -> None:
    session = Session(model_of(), PROMPTS)
    with pytest.raises(ValueError, match="3 steps need as many processes, not 2"):
        session.require_hops(2)
    with pytest.raises(ValueError, match="set its commit to levels"):
        Session(model_of(replace(STREAM, commit="clean")), PROMPTS).require_hops(3)
    model = model_of()
    other = model.with_card(contract=replace(model.card.contract, sampler=DPMpp2M()))
    with pytest.raises(ValueError, match="DPMpp2M may need more .*; choose Renoise"):
        Session(other, PROMPTS).require_hops(3)
    chosen = Session(model_of(Stream(memory=Importance(window=4), commit="levels")), PROMPTS)
    made(chosen, 1)
    with pytest.raises(ValueError, match="Importance chooses frames by what all steps have made"):
        chosen.require_hops(3)
    with pytest.raises(ValueError, match="leave steps and rolling out"):
        Stream(commit="levels", rolling=2)
    with pytest.raises(ValueError, match="leave steps and rolling out"):
        cascaded(model_of().card.contract, 1)
    with pytest.raises(ValueError, match="leave the video out"):
        next(session.steps(Video(lambda chunk: torch.zeros(2, 4, 1, 8, 8), 0.5)))
    with pytest.raises(ValueError, match="what its steps made"):
        session.require("recache")


def test_states_are_of_each_step_too() -> None:
    """A memory that folds has a state for every step and block, and goes on bit for bit."""
    model = model_of(Stream(memory=StateMemory(window=3, sink=1), commit="levels"))
    session = Session(model, PROMPTS)
    whole = made(session, 6)
    assert len(session.snapshot.memory.states) == 2 * 3
    again = Session(model, PROMPTS)
    made(again, 4)
    assert all(torch.equal(a, b) for a, b in zip(made(Session(model, again.snapshot), 2), whole[4:], strict=True))


def test_a_hop_is_a_step() -> None:
    """In one process: what each level gives is what the next one takes, and what the last one gives is the chunk."""
    session = Session(model_of(), PROMPTS)
    given: list[Tensor] = []
    for level in range(3):
        waiting = iter(given)
        given = list(session.hops(level, 4, lambda shape, waiting=waiting: next(waiting)))  # type: ignore[misc]
    assert torch.equal(torch.cat(given, 2), torch.cat(made(session, 4), 2))
