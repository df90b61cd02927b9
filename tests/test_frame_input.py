"""An input for every latent frame: it reaches its frame, one call per clip equals chunk by chunk, and nothing looks ahead."""

from __future__ import annotations

from dataclasses import replace
from math import cos, sin

import pytest
import torch
from torch import Tensor

from fewstep.attention import BlockCausal, KVCache
from fewstep.compress import FrameInput, ScalarInput, transformed
from fewstep.compress.frame_input import Signal
from fewstep.core import Batch, Call, Cond, Rng
from fewstep.core.call import Causal
from fewstep.diffusion import CFG, Contract, Exact, Renoise, Shifted, Stream
from fewstep.methods import FlowMatching
from fewstep.methods.base import Nets
from fewstep.methods.frames import fold_frames
from fewstep.methods.histories import TeacherForced
from fewstep.methods.rollouts import SelfForced
from fewstep.models import VideoModel
from fewstep.models.repattern import repattern
from fewstep.streaming import Session
from support_engine import FRAMES, shaken, tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")
KEYS = FrameInput(name="keys", width=3)
PROMPTS = ["a red ball rolls left", "a blue star stays"]
STREAM = Stream(chunks=(2,))


def reading(stream: Stream = STREAM, guidance: CFG = CFG(), **told: float) -> VideoModel:
    """The tiny model, which streams in two steps and reads three numbers per frame."""
    model = tiny_model().transformed(replace(KEYS, **told))
    shaken(model.denoiser.backbone.signals, 0.1)
    contract = Contract(
        sampler=Renoise(), steps=2, grid=Exact(grids=((1.0, 0.5, 0.0),), otherwise=Shifted()), guidance=guidance, stream=stream,
    )  # fmt: skip
    pattern = BlockCausal(chunk=max(stream.chunks), window=stream.window, sink=stream.sink)
    return model.with_part("denoiser", repattern(model.denoiser, pattern), contract=contract)


def held(frames: int, seed: int = 0) -> Tensor:
    return Rng(seed).rand((2, frames, 3), "keys")


def told(model: VideoModel, keys: Tensor) -> Cond:
    return model.conditions(PROMPTS)[0].with_extra({"keys": keys}, framewise=True)


def test_a_frame_has_its_own_numbers() -> None:
    """Closed form: the waves of every number, through one layer, on the modulation of this frame and no other."""
    signal = shaken(Signal(KEYS, 5)).double()
    keys, before = held(4).double(), Rng(1).randn((2, 1, 6, 5), "modulation").double()
    made = signal(before, {"keys": keys}, 4)
    rates = [30.0 ** (i / 7) for i in range(8)]
    for b, f in ((0, 0), (1, 3)):
        angles = [[float(keys[b, f, k]) * rate for rate in rates] for k in range(3)]
        read = torch.tensor([wave for each in angles for wave in (*map(cos, each), *map(sin, each))]).double()
        added = (signal.out.weight @ read + signal.out.bias).view(6, 5)
        torch.testing.assert_close(made[b, f], before[b, 0] + added, rtol=1e-6, atol=1e-6)
    per_frame = signal(before.expand(2, 4, 6, 5), {"keys": keys}, 4)  # where each frame has a time of its own already
    assert torch.equal(per_frame, made)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("per_frame", [False, True], ids=["clip", "frames"])
def test_a_fresh_one_is_the_identity_bit_for_bit(batch: int, per_frame: bool) -> None:
    plain, rng = tiny_model(), Rng(3)
    changed, x = plain.transformed(KEYS), rng.randn((batch, 4, 6, 8, 8), "x")
    t = rng.rand((batch, 6) if per_frame else (batch,), "t")
    cond = plain.blank_cond(batch).with_extra({"keys": rng.rand((batch, 6, 3), "keys")}, framewise=True)
    for call in (Call(), Call(causal=Causal((2, 4)))):
        assert torch.equal(changed.denoiser(x, t, cond, call).raw, plain.denoiser(x, t, cond, call).raw)


def test_one_call_is_chunk_by_chunk() -> None:
    """In training all chunks of a clip are one call; in a stream each has a call of its own, and its own part of the numbers."""
    model, x, keys = reading(), Rng(1).randn((2, 4, 6, 8, 8), "x"), held(6)
    model.denoiser.double()
    x, t, whole = x.double(), torch.rand(2, 6, dtype=torch.float64), told(model, keys.double())
    whole = replace(whole, text=whole.text.double())
    at_once = model.denoiser(x, t, whole, Call(causal=Causal((2, 2, 2)))).raw
    memory, parts = KVCache.empty(), []
    for first in (0, 2, 4):
        part = slice(first, first + 2)
        view = model.denoiser.recall(memory, x[:, :, part])
        made = model.denoiser(x[:, :, part], t[:, part], whole.during(first, 2), Call(kv=view))
        memory = memory.commit(made.kv or (), 2)
        parts.append(made.raw)
    torch.testing.assert_close(torch.cat(parts, 2), at_once, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("guidance", [CFG(), CFG(scale=3.0)], ids=["plain", "guided"])
def test_actions_after_the_end_of_a_chunk_never_change_it(guidance: CFG) -> None:
    model, keys = reading(guidance=guidance), held(6)
    other = torch.cat([keys[:, :4], held(2, seed=9)], 1)
    streams = []
    for given in (keys, other):
        session, made = Session(model, PROMPTS), []
        for chunk in range(3):
            *_, last = session.steps(extra={"keys": given[:, 2 * chunk : 2 * chunk + 2]})
            made.append(last.x)
        streams.append(made)
    for chunk, (a, b) in enumerate(zip(*streams, strict=True)):
        assert torch.equal(a, b) == (chunk < 2), chunk
    x, t = Rng(1).randn((2, 4, 6, 8, 8), "x"), torch.full((2, 6), 0.5)
    calls = [model.denoiser(x, t, told(model, given), Call(causal=Causal((2, 2, 2)))).raw for given in (keys, other)]
    assert torch.equal(calls[0][:, :, :4], calls[1][:, :, :4]) and not torch.equal(*calls)


def test_a_clip_of_a_stream_has_the_numbers_of_the_whole_clip() -> None:
    """`latents` with conditions that are ready is the session that is told chunk by chunk, bit for bit."""
    model, keys = reading(), held(FRAMES)
    clip = model.latents(told(model, keys), num_frames=FRAMES, seed=[0, 1])
    session, made = Session(model, PROMPTS, seed=0), []
    for chunk in range(2):
        *_, last = session.steps(extra={"keys": keys[:, 2 * chunk : 2 * chunk + 2]})
        made.append(last.x)
    assert torch.equal(clip, torch.cat(made, 2))
    with pytest.raises(ValueError, match=r"tells 'keys' of 4 latent frames, and frame 5 is asked for"):
        model.latents(told(model, keys), num_frames=6)


def test_a_rollout_is_the_stream_with_the_same_numbers() -> None:
    model, keys = reading(), held(FRAMES)
    cond = told(model, keys)
    batch, rng = Batch(cond, cond, (4, FRAMES, 8, 8)), Rng(4)
    rollout = SelfForced(stream=STREAM, exit="last", grids=((1.0, 0.5),))
    rolled = rollout(model.denoiser, batch, rng, grad=False)
    other = torch.cat([keys[:, :2], held(2, seed=9)], 1)
    changed = rollout(model.denoiser, replace(batch, cond=told(model, other)), rng, grad=False)
    assert torch.equal(rolled.x0[:, :, :2], changed.x0[:, :, :2]) and not torch.equal(rolled.x0, changed.x0)


def test_training_on_clips_reaches_the_layer() -> None:
    model = tiny_model().transformed(KEYS)
    student, cond = model.denoiser, told(model, held(FRAMES))
    nets = Nets({"student": student, "teacher": student})
    batch = Batch(cond, cond, (4, FRAMES, 8, 8), x0=Rng(0).randn((2, 4, FRAMES, 8, 8), "x0"))
    (losses,) = FlowMatching(history=TeacherForced(stream=STREAM)).student_loss(nets, batch, Rng(0))
    losses["flow"].backward()
    (signal,) = student.backbone.signals
    assert signal.out.weight.grad is not None and signal.out.weight.grad.abs().sum() > 0


def test_single_frames_are_told_their_own_numbers() -> None:
    """`image_fraction`: each still has the numbers that its frame has in the clip."""
    model, keys = reading(), held(FRAMES)
    number = torch.arange(FRAMES, dtype=torch.float32).expand(2, FRAMES)
    keys[:, :, 0] = number + 10 * torch.arange(2.0)[:, None]
    cond, heard = told(model, keys), list[tuple[Tensor, Tensor]]()
    clips = keys[:, None, :, :1, None].expand(2, 4, FRAMES, 8, 8)
    stills = fold_frames(clips, 3, Rng(0))
    assert torch.equal(stills.of(cond).extra["keys"][:, 0, 0], stills.clips[:, 0, 0, 0, 0])
    assert len(stills.of(cond)) == 6 and torch.equal(stills.of(cond).text, cond.text[stills.rows])
    model.denoiser.register_forward_pre_hook(lambda _, args: heard.append((args[0], args[2].extra["keys"])))
    batch = Batch(cond, told(model, keys), (4, FRAMES, 8, 8), x0=clips)
    nets = Nets({"student": model.denoiser, "teacher": model.denoiser})
    list(FlowMatching(image_fraction=1.0, images_per_clip=2).student_loss(nets, batch, Rng(0)))
    ((x, seen),) = heard
    assert x.shape[:3] == (4, 4, 1) and seen.shape == (4, 1, 3)


def test_what_is_missing_or_of_another_shape_is_named() -> None:
    model = reading()
    cond, x, t = model.conditions(PROMPTS)[0], torch.zeros(2, 4, 6, 8, 8), torch.full((2,), 0.5)
    with pytest.raises(ValueError, match=r"'keys' of every latent frame.*\[2, 6, 3\].*default"):
        model.denoiser(x, t, cond)
    with pytest.raises(ValueError, match=r"must be \[2, 6, 3\].*got \[2, 4, 3\]"):
        model.denoiser(x, t, cond.with_extra({"keys": held(4)}))
    silent = reading(default=0.5)
    said = cond.with_extra({"keys": torch.full((2, 6, 3), 0.5)})
    assert torch.equal(silent.denoiser(x, t, cond).raw, silent.denoiser(x, t, said).raw)
    assert not torch.equal(silent.denoiser(x, t, cond).raw, silent.denoiser(x, t, told(silent, held(6))).raw)


def test_it_is_refused_where_it_would_do_nothing() -> None:
    beat, scalar = FrameInput(name="beat"), ScalarInput(name="beat")
    for both in ((beat, beat), (beat, scalar), (scalar, beat)):
        with pytest.raises(ValueError, match=r"reads .*'beat' already"):
            tiny_model().transformed(*both)
    network = tiny_model().denoiser.backbone
    network.takes_signals = False  # type: ignore[misc]
    with pytest.raises(ValueError, match="VideoDiT takes no inputs for its frames"):
        transformed(network, [KEYS])
    for wrong in ({"name": "two words"}, {"name": "k", "width": 0}, {"name": "k", "width": 2, "words": ("up", "up")}):
        with pytest.raises(ValueError, match="must be|need as many"):
            FrameInput(**wrong)


def test_conditions_remember_what_is_told_of_frames() -> None:
    cond = tiny_model().blank_cond(2).with_extra({"keys": held(6)}, framewise=True).with_extra({"g": torch.ones(2)})
    for same in (cond[:1], cond.to("cpu"), Cond.cat([cond, cond]), cond.where(torch.tensor([True, False]), cond)):
        assert same.framewise == {"keys"} and same.during(4, 2).extra["keys"].shape[1:] == (2, 3)
    assert torch.equal(cond.during(1, 3).extra["keys"], held(6)[:, 1:4]) and cond.during(1, 3).extra["g"].shape == (2,)
