"""Snapshots as files: a stream goes on in another process, bit for bit, and only with the model that began it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fewstep.attention import (
    BlockCausal,
    Decaying,
    Dense,
    Facing,
    Importance,
    Int8Memory,
    Keep,
    MovingSink,
    Prefix,
    Retrieval,
)
from fewstep.compress import FrameInput
from fewstep.core import RecipeError
from fewstep.diffusion import Contract, DPMpp2M, Exact, Renoise, Sampler, Shifted, Stream
from fewstep.models import VideoModel
from fewstep.models.repattern import repattern
from fewstep.models.snapshots import load_snapshot, save_snapshot
from support_engine import shaken, tiny_model

MEMORIES: list[Keep] = [
    Prefix(frames=3), MovingSink(window=8, sink=2), Importance(window=7, sink=2), Retrieval(frames=2, recent=2, sink=1),
    Decaying(half=1.5, sink=1), Int8Memory(), Int8Memory(keep=Prefix(frames=3)),
]  # fmt: skip
"""One of each kind that holds more than keys and values; `Facing`, which needs poses, is below."""
pytestmark = pytest.mark.usefixtures("single_thread")


def streaming(**stream: Any) -> VideoModel:
    model = tiny_model()
    chunking = Stream(**({"chunks": (2,), "window": 6, "sink": 2} | stream))
    network = repattern(model.denoiser, BlockCausal(chunk=2, window=chunking.window, sink=chunking.sink))
    grid = Exact(grids=((1.0, 0.5, 0.0),), otherwise=Shifted())
    contract = Contract(sampler=Renoise(), steps=2, grid=grid, stream=chunking)
    return model.with_part("denoiser", network, contract=contract, fps=4.0)


@pytest.mark.parametrize("memory", [None, *MEMORIES], ids=str)
def test_a_stream_goes_on_bit_for_bit(memory: Keep | None, tmp_path: Path) -> None:
    """With every kind of memory, in the middle of a change of prompts, and with a prompt that is to come."""
    model = streaming() if memory is None else streaming(window=0, sink=0, memory=memory)
    with model.stream(["a red ball"], seed=5) as live:
        list(live.frames(1))
        live.prompt("a blue star", how="lerp")
        list(live.frames(2))
        live.prompt("a ring", chunk=5)
        save_snapshot(live.snapshot(), model, tmp_path / "there.safetensors")
        expected = torch.cat([chunk.frames for chunk in live.frames(4)], 1)
    with model.stream(load_snapshot(tmp_path / "there.safetensors", model)) as again:
        chunks = list(again.frames(4))
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks], 1), expected)
    assert [(c.index, c.version) for c in chunks] == [(3, 1), (4, 1), (5, 2), (6, 2)]


@pytest.mark.parametrize("sampler", [Renoise(), DPMpp2M()], ids=["renoise", "multistep"])
def test_chunks_that_are_half_made_go_on(sampler: Sampler, tmp_path: Path) -> None:
    """Several at once, and what a multistep sampler keeps of their last step."""
    model = streaming(rolling=2)
    grid = Exact(grids=((1.0, 0.8, 0.5, 0.3, 0.0),), otherwise=Shifted())
    contract = replace(model.card.contract, grid=grid, steps=4, sampler=sampler)
    model = model.with_part("denoiser", repattern(model.denoiser, Dense()), contract=contract)
    with model.stream(["a red ball"], seed=5) as live:
        list(live.frames(2))
        save_snapshot(live.snapshot(), model, tmp_path / "there.safetensors")
        expected = torch.cat([chunk.frames for chunk in live.frames(3)], 1)
    start = load_snapshot(tmp_path / "there.safetensors", model)
    assert [(flying.index, flying.step) for flying in start.session.window] == [(2, 2)]
    with model.stream(start) as again:
        assert torch.equal(torch.cat([chunk.frames for chunk in again.frames(3)], 1), expected)


def test_what_was_told_and_given_is_in_the_file(tmp_path: Path) -> None:
    """Keys of later frames, and latents that the stream begins with; and a memory by pose."""
    stream = Stream(chunks=(1, 2), memory=Facing(frames=2, recent=2, sink=0))
    keys = FrameInput(name="keys", width=2, default=0.0)
    told = tiny_model().with_card(contract=replace(streaming().card.contract, stream=stream)).transformed(keys)
    shaken(told.denoiser.backbone.signals, 0.3)
    with told.stream(["a red ball"], image=torch.zeros(3, 32, 32)) as live:
        live.control("keys", [[1, 0], [0, 1]], chunk=2)
        live.control("pose", [0.0, 0, 0, 1, 0, 0])
        save_snapshot(live.snapshot(), told, tmp_path / "begin.safetensors")
        list(live.frames(2))
        save_snapshot(live.snapshot(), told, tmp_path / "there.safetensors")
        expected = torch.cat([chunk.frames for chunk in live.frames(3)], 1)
    for name, skipped in (("begin", 2), ("there", 0)):
        with told.stream(load_snapshot(tmp_path / f"{name}.safetensors", told)) as again:
            list(again.frames(skipped))
            assert torch.equal(torch.cat([chunk.frames for chunk in again.frames(3)], 1), expected)


def test_another_model_is_refused(tmp_path: Path) -> None:
    model, path = streaming(), tmp_path / "a.safetensors"
    with model.stream(["a red ball"]) as live:
        list(live.frames(1))
        save_snapshot(live.snapshot(), model, path)
    other = streaming(window=8)
    with pytest.raises(ValueError, match="differs from .* in denoiser, contract;"):
        load_snapshot(path, other)
    with torch.no_grad():
        next(model.denoiser.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="in denoiser; a stream goes on only with the model that began it"):
        load_snapshot(path, model)


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    model, path = streaming(), tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError):
        load_snapshot(path, model)
    path.write_bytes(b"nothing")
    with pytest.raises(RecipeError, match="no safetensors file"):
        load_snapshot(path, model)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no snapshot of a stream"):
        load_snapshot(path, model)
    with model.stream(["a"]) as live:
        snapshot = live.snapshot()
    save_snapshot(snapshot, model, path)
    header = {"model": {"name": model.card.name}, "stream": {"Later": {}}}
    save_file({}, path, {"fewstep.stream": json.dumps(header)})
    with pytest.raises(ValueError, match="'Later', which this version of fewstep does not know"):
        load_snapshot(path, model)
    with pytest.raises(ValueError, match="remembers a object"):
        save_snapshot(replace(snapshot, past=(object(),)), model, path)
