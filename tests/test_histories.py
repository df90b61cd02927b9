"""Training on stored clips, all chunks in one call, equals a stream that makes them one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.attention import BlockCausal, Decaying, KVCache, Retrieval
from fewstep.core import Batch, Call, Cond, KVView, Pairs, Rng
from fewstep.core.call import Causal
from fewstep.diffusion import CFG, Contract, Stream
from fewstep.methods import Consistency, FlowMatching, FromData, FromPairs
from fewstep.methods.flow_matching import weights
from fewstep.methods.histories import DiffusionForced, History, TeacherForced, WholeClip
from fewstep.methods.targets import pseudo_huber
from fewstep.models import VideoModel
from fewstep.models.repattern import repattern
from fewstep.streaming.blocks import keep_of
from support_engine import tiny_model
from test_streaming import PROMPTS

pytestmark = pytest.mark.usefixtures("single_thread")
STREAMS = {
    "frames": Stream(), "chunks": Stream(chunks=(2,)), "first alone": Stream(chunks=(1, 2)),
    "window": Stream(chunks=(2,), window=4), "sink": Stream(chunks=(1,), window=4, sink=1),
    "late window": Stream(chunks=(1, 2), window=5, sink=2),
}  # fmt: skip
FRAMES = {"first alone": 7, "late window": 9}


@pytest.fixture
def model() -> VideoModel:
    model = tiny_model()
    model.denoiser.double().eval()
    return model


def clip(model: VideoModel, frames: int, seed: int) -> Tensor:
    return torch.randn(2, 4, frames, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_after_the_other(model: VideoModel, stream: Stream, x_t: Tensor, t: Tensor, read: Tensor, at: Tensor) -> Tensor:
    """What a stream predicts for the chunks of `x_t`, when it remembers those of `read` at times `at`."""
    cond, _ = model.conditions(PROMPTS)
    memory, made, bounds = KVCache.empty(keep_of(stream), max(stream.chunks)), [], [0]
    for length in stream.lengths(x_t.shape[2]):
        bounds.append(bounds[-1] + length)
    for low, high in pairwise(bounds):
        view = model.denoiser.recall(memory, x_t[:, :, low:high])
        made.append(model.denoiser(x_t[:, :, low:high], t[:, low:high], cond, Call(kv=view)).x0)
        committed = model.denoiser(read[:, :, low:high], at[:, low:high], cond, Call(kv=view)).kv
        memory = memory.commit(committed, high - low)
    return torch.cat(made, 2)


def per_chunk(stream: Stream, frames: int) -> Tensor:
    lengths = stream.lengths(frames)
    times = torch.rand(2, len(lengths), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return times.repeat_interleave(torch.tensor(lengths), 1)


@pytest.mark.parametrize("name", STREAMS)
def test_diffusion_forcing_is_a_stream_that_remembers_noised_chunks(name: str, model: VideoModel) -> None:
    stream, frames = STREAMS[name], FRAMES.get(name, 8)
    x_t, t = clip(model, frames, 1), per_chunk(stream, frames)
    forced = DiffusionForced(stream=stream).over(model.denoiser, x_t)
    here = forced(x_t, t, model.conditions(PROMPTS)[0]).x0
    assert torch.allclose(here, one_after_the_other(model, stream, x_t, t, x_t, t), atol=1e-10)


@pytest.mark.parametrize("name", STREAMS)
def test_teacher_forcing_is_a_stream_that_remembers_clean_chunks(name: str, model: VideoModel) -> None:
    """Also three times as long as the window."""
    stream, frames = STREAMS[name], FRAMES.get(name, 8)
    x0, x_t, t = clip(model, frames, 1), clip(model, frames, 2), per_chunk(stream, frames)
    here = TeacherForced(stream=stream).over(model.denoiser, x0)(x_t, t, model.conditions(PROMPTS)[0]).x0
    assert torch.allclose(here, one_after_the_other(model, stream, x_t, t, x0, t * 0), atol=1e-10)


@pytest.mark.parametrize("which", ["clean", "noised"])
def test_nothing_of_a_chunk_leaks_into_earlier_ones_and_no_clean_chunk_into_itself(
    which: str, model: VideoModel
) -> None:
    stream, cond = Stream(chunks=(2,)), model.conditions(PROMPTS)[0]
    x0, x_t, t = clip(model, 8, 1), clip(model, 8, 2), per_chunk(stream, 8)
    before = TeacherForced(stream=stream).over(model.denoiser, x0)(x_t, t, cond).x0
    changed = x0 if which == "clean" else x_t
    changed[:, :, 4:6] += 1.0
    after = TeacherForced(stream=stream).over(model.denoiser, x0)(x_t, t, cond).x0
    moved = [not torch.equal(before[:, :, f : f + 2], after[:, :, f : f + 2]) for f in (0, 2, 4, 6)]
    assert moved == ([False, False, False, True] if which == "clean" else [False, False, True, False])


def test_guidance_reads_the_clean_clip_with_both_prompts(model: VideoModel) -> None:
    stream, (cond, uncond) = Stream(chunks=(2,)), model.conditions(PROMPTS)
    x0, x_t, t = clip(model, 4, 1), clip(model, 4, 2), per_chunk(stream, 4)
    forced = TeacherForced(stream=stream).over(model.denoiser, x0)
    apart = [forced(x_t, t, c).raw for c in (cond, uncond)]
    both = CFG(scale=3.0)(forced, x_t, t, cond, uncond).raw
    assert torch.allclose(both, apart[1] + 3.0 * (apart[0] - apart[1]), atol=1e-12)


def test_a_causal_network_does_in_chunks_what_it_does_by_its_pattern(model: VideoModel) -> None:
    network = repattern(model.denoiser, BlockCausal(chunk=2))
    x_t, t, cond = clip(model, 8, 1), per_chunk(Stream(chunks=(2,)), 8), model.conditions(PROMPTS)[0]
    forced = DiffusionForced(stream=Stream(chunks=(2,))).over(network, x_t)
    assert torch.allclose(forced(x_t, t, cond).x0, network(x_t, t, cond).x0, atol=1e-12)


def test_both_calls_of_teacher_forcing_carry_gradient(model: VideoModel) -> None:
    """The clean chunks are read through weights that are trained, too."""
    x0, x_t, t = (clip(model, 4, 1), clip(model, 4, 2), per_chunk(Stream(chunks=(2,)), 4))
    x0.requires_grad_(True)
    made = TeacherForced(stream=Stream(chunks=(2,))).over(model.denoiser, x0)(x_t, t, model.conditions(PROMPTS)[0]).x0
    (grad,) = torch.autograd.grad(made[:, :, 2:].sum(), x0)
    assert grad[:, :, :2].abs().sum() > 0 and not grad[:, :, 2:].any()


# --- in methods -----------------------------------------------------------------------------------------------------------

HALVES = Stream(chunks=(2,))


def batch_of(model: VideoModel, frames: int = 4, **fields: Any) -> Batch:
    cond, uncond = model.conditions(PROMPTS)
    return Batch(cond=cond, uncond=uncond, latent_shape=(4, frames, 8, 8), x0=clip(model, frames, 1), **fields)


@dataclass
class Heard:
    """A network that keeps what it is called with."""

    network: Any
    calls: list[tuple[Tensor, Tensor, Call]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Any:
        self.calls.append((x_t, t, call))
        return self.network(x_t, t, cond, call)


def nets_of(model: VideoModel, *roles: str) -> tuple[Any, dict[str, Heard]]:
    heard = {role: Heard(model.denoiser) for role in roles}
    return SimpleNamespace(**heard), heard


def test_every_chunk_has_a_time_of_its_own(model: VideoModel) -> None:
    nets, heard = nets_of(model, "student")
    list(FlowMatching(history=TeacherForced(stream=HALVES)).student_loss(nets, batch_of(model), Rng(0)))
    (clean, zero, first), (_, t, second) = heard["student"].calls
    assert torch.equal(clean, clip(model, 4, 1)) and not zero.any() and first.kv is not None and not first.kv.layers
    assert t.shape == (2, 4) and torch.equal(t[:, ::2], t[:, 1::2]) and len(t.unique()) == 4
    assert second.kv is not None and second.kv.positions.tolist() == [0, 1, 2, 3] and int(second.kv.start) == 0


def test_a_model_that_streams_is_no_image_model() -> None:
    with pytest.raises(ValueError, match="image_fraction: 0"):
        FlowMatching(image_fraction=0.1, history=TeacherForced())


def test_chunks_without_noise_teach_nothing_and_the_others_count_as_a_mean(model: VideoModel) -> None:
    t = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.2, 0.2, 0.7, 0.7]])
    weight = weights(t)
    assert weight is not None and torch.allclose(weight, torch.tensor([[0.0, 0, 1, 1], [1, 1, 1, 1]]) * 8 / 6)
    assert weights(t[:, 0]) is None
    nets, heard = nets_of(model, "student")
    history = DiffusionForced(stream=HALVES, clean=0.5)
    for step in range(8):
        list(FlowMatching(history=history).student_loss(nets, batch_of(model), Rng(0, step)))
    share = torch.cat([t for _, t, _ in heard["student"].calls]).eq(0).double().mean()
    assert 0.3 < share < 0.7


def test_causal_consistency_is_consistency_of_each_chunk_after_clean_ones(model: VideoModel) -> None:
    """Teacher, target and student all read the clip's own clean chunks, with memories of their own weights."""
    method = Consistency(history=TeacherForced(stream=HALVES), guidance=CFG(scale=2.0), intervals=8)
    nets, heard = nets_of(model, "student", "teacher", "target")
    batch = batch_of(model)
    (losses,) = method.student_loss(nets, batch, Rng(0))
    x_t, t, _ = heard["student"].calls[1]
    s = t - 1 / 8
    assert torch.equal(heard["teacher"].calls[1][0], torch.cat([x_t, x_t]))

    def each(x: Tensor, at: Tensor) -> Tensor:
        return one_after_the_other(model, HALVES, x, at, batch.require("x0"), at * 0)

    cond, uncond = model.conditions(PROMPTS)
    over = TeacherForced(stream=HALVES).over(model.denoiser, batch.require("x0"))
    real = CFG(scale=2.0)(over, x_t, t, cond, uncond)
    target = torch.where((s.abs() < 1e-9)[:, None, :, None, None], real.x0, each(real.step_to(s), s))
    assert losses["consistency"].item() == pytest.approx(pseudo_huber(each(x_t, t), target, 1e-3).item(), rel=1e-6)


def test_from_data_clean_chunks_are_as_they_were(model: VideoModel) -> None:
    """CausVid: levels of the student's grid, and no noise, chunk by chunk; what has no noise is its own prediction."""
    rollout, clean, seen = FromData(grids=((1.0, 0.5),), history=DiffusionForced(stream=HALVES, clean=0.4)), 0, set()
    for step in range(6):
        rolled = rollout(model.denoiser, batch_of(model), Rng(0, step), grad=False)
        still = rolled.t == 0
        clean += int(still.sum())
        seen |= set(rolled.t.flatten().tolist())
        same = (rolled.x0 == clip(model, 4, 1)).all(1).flatten(2).all(2)
        assert torch.equal(same, still)
    assert clean and seen == {0.0, 0.5, 1.0}


def test_diffusion_forcing_reads_the_noised_chunks_and_calls_once(model: VideoModel) -> None:
    heard, x0 = Heard(model.denoiser), clip(model, 4, 1)
    DiffusionForced(stream=HALVES).over(heard, x0)(clip(model, 4, 2), torch.ones(2), model.conditions(PROMPTS)[0])
    assert [call.kv for *_, call in heard.calls] == [None]


@pytest.mark.parametrize(
    "history", [DiffusionForced(stream=HALVES), TeacherForced(stream=HALVES)], ids=["diffusion", "teacher"]
)
def test_stored_states_chunk_by_chunk(history: History, model: VideoModel) -> None:
    """Each frame's input is its state at its own time; clean chunks are endpoints."""
    states = torch.stack([clip(model, 4, seed) for seed in (7, 8, 9)], 1)
    pairs, heard = Pairs(states=states, times=(1.0, 0.5, 0.0)), Heard(model.denoiser)
    rollout = FromPairs(grids=((1.0, 0.5),), history=history)
    rolled = rollout(heard, batch_of(model, pairs=pairs), Rng(3), grad=False)
    assert rolled.t.shape == (2, 4) and set(rolled.t.flatten().tolist()) == {1.0, 0.5}
    for row in range(2):
        for frame in range(4):
            state = pairs.times.index(rolled.t[row, frame].item())
            assert torch.equal(rolled.x_t[row, :, frame], states[row, state, :, frame])
    if isinstance(history, TeacherForced):
        assert torch.equal(heard.calls[0][0], states[:, -1])
    assert rollout.contract(Contract()).stream == HALVES


def test_each_index_is_drawn_once_for_all_frames_of_a_chunk() -> None:
    clips = torch.zeros(3, 1, 7, 1, 1)
    index = DiffusionForced(stream=Stream(chunks=(1, 3))).index(9, clips, Rng(0))
    assert index.shape == (3, 7) and all(
        len(set(row[1:4].tolist())) == 1 == len(set(row[4:].tolist())) for row in index
    )
    assert torch.equal(WholeClip().index(9, clips, Rng(0)), Rng(0).integers((3,), "index", 9))


# --- refused --------------------------------------------------------------------------------------------------------------


def test_what_one_call_cannot_be_is_refused(model: VideoModel) -> None:
    x, t, cond = clip(model, 4, 1), torch.zeros(2, dtype=torch.float64), model.conditions(PROMPTS)[0]
    moving = DiffusionForced(stream=Stream(window=3, sink=1, positions="window")).over(model.denoiser, x)
    with pytest.raises(ValueError, match="absolute"):
        moving(x, t, cond)
    chosen = DiffusionForced(stream=Stream(memory=Retrieval())).over(model.denoiser, x)
    with pytest.raises(ValueError, match="remembers by Retrieval"):
        chosen(x, t, cond)
    net, whole = model.denoiser, Call(kv=model.denoiser.recall(KVCache.empty(), x))
    halved = KVCache.empty(Decaying(half=1.0, sink=0)).commit(net(x[:, :, :1], t, cond, whole).kv, 1)
    for _ in range(2):
        halved = halved.commit(net(x[:, :, :1], t, cond, whole).kv, 1)
    with pytest.raises(ValueError, match="parts of them"):
        net(x, t, cond, Call(causal=Causal((2, 2)), kv=net.recall(halved, x)))
    with pytest.raises(ValueError, match="not 3"):
        DiffusionForced(stream=HALVES).over(model.denoiser, x)(x[:, :, :3], t, cond)
    with pytest.raises(ValueError, match="remembers 'last'"):
        TeacherForced(stream=Stream(commit="last"))
    with pytest.raises(ValueError, match=r"4 frames cannot have chunks of \[3\]"):
        model.denoiser(x, t, cond, Call(causal=Causal((3,))))
    ages = KVView((), torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="one age"):
        model.denoiser(x, t, cond, Call(causal=Causal((2, 2)), kv=ages))
