"""Plans of a stream: which clips fit, how many steps a chunk takes, and how the prompt is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.attention import (
    BlockCausal,
    Decaying,
    Dense,
    Everything,
    Int8Memory,
    KVCache,
    MovingSink,
    Prefix,
    Retrieval,
    Window,
)
from fewstep.core import Call, Cond, Seeds, build
from fewstep.diffusion import CFG, Contract, Exact, Renoise, Shifted, StepCountError, Stream
from fewstep.models import VideoModel
from fewstep.models.repattern import repattern
from fewstep.streaming import Chunks, Session, fitting
from fewstep.streaming.blocks import keep_of
from fewstep.streaming.switch import Fade, mixed
from support_engine import tiny_model
from test_streaming import PROMPTS, made, streaming_model

OTHERS = ["a green cross turns", "a yellow square falls"]
GRIDS = ((1.0, 0.0), (1.0, 0.5, 0.0), (1.0, 0.75, 0.5, 0.25, 0.0))


def wan(frames: int) -> int:
    """Latent frames, four frames each after the first."""
    if frames % 4 != 1:
        raise ValueError("not 4n + 1")
    return (frames + 3) // 4


# --- clips of whole chunks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "frames", "said"),
    [
        (
            (3,),
            121,
            r"chunks have 3 latent frames, and 121 frames are 31 latent.*117 frames \(30 .*or 129 frames \(33 latent frames\)$",
        ),
        (
            (1, 3),
            117,
            r"chunks have 1, then 3 .*117 frames are 30 latent frames.*109 frames \(28 latent frames\) or 121 frames \(31",
        ),
        ((3,), 120, r"120 frames are not whole latent frames; ask for 117 frames \(30 latent frames\) or 129"),
        ((3,), 1, r"1 frames are 1 latent frames.*ask for 9 frames \(3 latent frames\)$"),
    ],
)
def test_what_does_not_fit_is_told_what_would(chunks: tuple[int, ...], frames: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fitting(Stream(chunks=chunks), frames, wan)


def test_what_fits_is_a_list_of_chunks() -> None:
    assert fitting(Stream(chunks=(3,)), 33, wan) == (3, 3, 3)
    assert fitting(Stream(chunks=(1, 3)), 25, wan) == (1, 3, 3)


def test_the_chunk_that_begins_at_a_frame() -> None:
    stream = Stream(chunks=(1, 2))
    assert [stream.index(frame) for frame in (0, 1, 3, 5)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"no chunk of \[1, 2\] latent frames begins at frame 4"):
        stream.index(4)


# --- steps of a chunk -----------------------------------------------------------------------------------------------------


def stepped(stream: Stream, grids: tuple[tuple[float, ...], ...] = GRIDS, guidance: CFG = CFG()) -> VideoModel:
    model = tiny_model()
    contract = Contract(
        sampler=Renoise(), steps=2, grid=Exact(grids=grids, otherwise=Shifted()), guidance=guidance, stream=stream
    )
    pattern = BlockCausal(chunk=stream.chunks[0]) if len(stream.chunks) == 1 else Dense()
    return model.with_part("denoiser", repattern(model.denoiser, pattern), contract=contract)


def test_each_chunk_takes_its_own_number_of_steps() -> None:
    """The first chunk is one of four steps, the others are made from the same memory in one."""
    model = stepped(Stream(steps=(4, 1), window=3))
    session, four, one = Session(model, PROMPTS), *(stepped(Stream(window=3)) for _ in range(2))
    first = list(session.steps())
    assert [step.steps for step in first] == [4] * 4
    assert torch.equal(first[-1].x, made(Session(four, PROMPTS, num_inference_steps=4), 1)[0])
    for _ in range(2):
        paused = session.snapshot
        second = list(session.steps())
        assert [step.steps for step in second] == [1]
        assert torch.equal(second[-1].x, made(Session(one, paused, num_inference_steps=1), 1)[0])
    assert session.counts(4) == (4, 1, 1, 1)


def test_calls_are_those_of_a_chunk_in_the_long_run() -> None:
    contract = stepped(Stream(steps=(4, 1)), guidance=CFG(scale=3.0)).card.contract
    assert contract.calls() == 2 and contract.calls(4) == 8 and stepped(Stream()).card.contract.calls() == 2


def test_a_clip_counts_the_steps_of_all_its_chunks() -> None:
    model = stepped(Stream(chunks=(2,), steps=(4, 2, 1)))
    steps = list(model.sampling(PROMPTS, num_frames=8))
    assert [step.index for step in steps] == list(range(8)) and {step.steps for step in steps} == {4 + 2 + 1 + 1}
    whole = torch.cat(made(Session(model, PROMPTS), 4), 2)
    assert torch.equal(steps[-1].x, whole)


def test_numbers_of_steps_that_cannot_be_are_refused() -> None:
    with pytest.raises(StepCountError, match="3"):
        stepped(Stream(steps=(4, 3)))
    with pytest.raises(ValueError, match="at least 1 step"):
        Stream(steps=(2, 0))
    model = stepped(Stream(steps=(4, 2)))
    with pytest.raises(StepCountError, match="take 4, 2 steps; leave the step count out, not 1"):
        Session(model, PROMPTS, num_inference_steps=1)
    assert Session(model, PROMPTS, num_inference_steps=2).counts(3) == (4, 2, 2)  # its default: its own plan
    forced = Session(model, PROMPTS, num_inference_steps=1, force=True)
    assert forced.counts(3) == (1, 1, 1) and len(list(forced.steps())) == 1


def test_streams_of_one_batch_take_as_many_steps() -> None:
    model = stepped(Stream(steps=(4, 4, 2), window=3))
    loop = Chunks.of(model.reader, model.card.contract)
    ages = [Session(model, [prompt]) for prompt in PROMPTS]
    memories = []
    for age, session in zip((1, 2), ages, strict=True):
        made(session, age)
        memories.append(session.snapshot.memory)
    (cond, uncond), x = model.conditions(PROMPTS), torch.zeros(2, 4, 1, 8, 8)
    with pytest.raises(ValueError, match="different numbers of steps"):
        next(loop.chunk(KVCache.batch(memories), x, cond, uncond, Seeds((0, 1))))


# --- memories made anew ---------------------------------------------------------------------------------------------------


def double(stream: Stream, guidance: CFG = CFG()) -> tuple[VideoModel, Chunks]:
    """A model in float64, and its loop without a network's runtime in between."""
    model = stepped(stream, guidance=guidance)
    model.denoiser.double().eval().requires_grad_(False)
    return model, Chunks.of(model.denoiser, model.card.contract)


def clip(frames: int, seed: int = 3) -> Tensor:
    return torch.randn(2, 4, frames, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def committed(model: VideoModel, loop: Chunks, latents: Tensor, cond: Cond) -> KVCache:
    memory = loop.begin()
    for x in latents.split(max(loop.stream.chunks), 2):
        call = Call(kv=model.denoiser.recall(memory, x))
        memory = memory.commit(model.denoiser(x, torch.zeros(2).double(), cond, call).kv, x.shape[2])
    return memory


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_memory_made_anew_is_a_forward_over_the_last_latents(chunk: int) -> None:
    """And not what was carried on: those keys and values had read more than a window."""
    model, loop = double(Stream(chunks=(chunk,), window=2 * chunk + 2))
    old, new = (model.conditions(prompts)[0] for prompts in (PROMPTS, OTHERS))
    latents, x = clip(8), clip(chunk, seed=4)
    carried = committed(model, loop, latents, old)
    last = latents[:, :, -4:]
    again = loop.recache(carried, last, new, new, Seeds((0, 1)))
    assert torch.equal(again.positions.sort().values, carried.positions.sort().values) and again.start == carried.start
    t = torch.full((2, chunk), 0.7).double()
    masked = repattern(model.denoiser, BlockCausal(chunk=chunk, window=2 * chunk + 2))
    times = torch.cat([torch.zeros(2, 4).double(), t], 1)
    whole = masked(torch.cat([last, x], 2), times, new).x0[:, :, -chunk:]
    read = lambda memory: model.denoiser(x, t, new, Call(kv=model.denoiser.recall(memory, x))).x0  # noqa: E731
    torch.testing.assert_close(read(again), whole, atol=1e-10, rtol=0)
    same = loop.recache(carried, last, old, old, Seeds((0, 1)))
    assert (read(same) - read(carried)).abs().max() > 1e-6


@pytest.mark.parametrize(
    "stream",
    [Stream(window=6), Stream(window=6, sink=2), Stream(chunks=(1, 2), window=8), Stream()],
    ids=["window", "sink", "uneven", "all"],
)
def test_before_the_window_slides_the_same_prompt_changes_nothing(stream: Stream) -> None:
    """Bit for bit, also with guidance, and with noise on what is remembered if it is the same noise."""
    for guidance in (CFG(), CFG(scale=3.0)):
        session = Session(stepped(stream, guidance=guidance), PROMPTS)
        made(session, 3)
        before = session.snapshot
        session.steer(PROMPTS, "recache")
        for (k, v), (own_k, own_v) in zip(session.snapshot.memory.layers, before.memory.layers, strict=True):
            torch.testing.assert_close(k, own_k, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(v, own_v, atol=1e-6, rtol=1e-6)
        session.steer(OTHERS, "recache")
        k, own_k = session.snapshot.memory.layers[1][0], before.memory.layers[1][0]
        assert (k - own_k).abs().max() > 1e-4
        assert torch.equal(session.snapshot.memory.positions, before.memory.positions)


def sink_of(memory: KVCache) -> list[Tensor]:
    slots = (memory.positions < memory.keep.pinned) & (memory.positions >= 0)
    rows = slots.repeat_interleave(memory.layers[0][0].shape[2] // len(slots))
    return [x[:, :, rows] for layer in memory.layers for x in layer]


def test_an_old_sink_stays_or_is_forgotten() -> None:
    model, loop = double(Stream(window=4, sink=1))
    old, new = (model.conditions(prompts)[0] for prompts in (PROMPTS, OTHERS))
    latents = clip(8)
    carried = committed(model, loop, latents, old)
    kept = loop.recache(carried, latents[:, :, -4:], new, new, Seeds((0, 1)))
    assert sorted(kept.positions.tolist()) == [0, 6, 7]
    assert all(torch.equal(a, b) for a, b in zip(sink_of(kept), sink_of(carried), strict=True))
    gone = loop.recache(carried, latents[:, :, -4:], new, new, Seeds((0, 1)), sink=False)
    assert sorted(gone.positions.tolist()) == [-1, 6, 7]


@pytest.mark.parametrize(
    "keep",
    [Everything(), Prefix(frames=2), MovingSink(window=6, sink=1), Retrieval(frames=1, recent=1, sink=1),
     Decaying(half=1.0, sink=1), Int8Memory(keep=Window(window=4, sink=1))],
    ids=str,
)  # fmt: skip
def test_every_memory_can_be_made_anew(keep: Any) -> None:
    session = Session(stepped(Stream(memory=keep)), PROMPTS)
    made(session, 7)
    before = session.snapshot
    session.steer(OTHERS, "recache")
    after = session.snapshot
    assert after.memory.start == before.memory.start and torch.equal(after.memory.positions, before.memory.positions)
    assert before.latents is not None and before.latents.shape[2] == (7 if keep.span is None else min(keep.span, 7))
    made(session, 2)


def test_a_snapshot_holds_the_latents_that_a_chunk_may_read() -> None:
    uneven, short = Stream(chunks=(1, 2), window=6, sink=1), Stream(chunks=(2,), window=3)
    for stream, chunks, frames in ((uneven, 5, 6), (short, 4, 2), (Stream(), 4, 4)):
        session = Session(stepped(stream), PROMPTS)
        latents = torch.cat(made(session, chunks), 2)
        assert session.snapshot.latents is not None
        assert torch.equal(session.snapshot.latents, latents[:, :, -frames:])


def test_what_the_last_step_left_cannot_be_made_anew() -> None:
    session = Session(stepped(Stream(commit="last", window=3)), PROMPTS)
    made(session, 2)
    with pytest.raises(ValueError, match="choose another switch"):
        session.steer(OTHERS, "recache")
    model, loop = double(Stream(window=4))
    memory = committed(model, loop, clip(3), model.conditions(PROMPTS)[0])
    both = KVCache.batch([memory, memory])
    with pytest.raises(ValueError, match="different age"):
        loop.recache(both, clip(3), *model.conditions(PROMPTS), Seeds((0, 1)))


# --- other prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["keep", "recache", "clear", "lerp"])
def test_a_switch_is_restored_bit_for_bit(how: Any) -> None:
    """Also half-way: a snapshot knows the change that is under way, and the latents to make a memory from."""
    model = stepped(Stream(window=4, sink=1), guidance=CFG(scale=2.0))
    session = Session(model, PROMPTS)
    before = made(session, 3)
    paused = session.snapshot
    session.steer(OTHERS, how, over=3)
    switched = made(session, 1)
    halfway = session.snapshot
    switched += made(session, 3)
    assert all(torch.equal(a, b) for a, b in zip(made(Session(model, halfway), 3), switched[1:], strict=True))
    again = Session(model, paused)
    again.steer(OTHERS, how, over=3)
    assert all(torch.equal(a, b) for a, b in zip(made(again, 4), switched, strict=True))
    plain = Session(model, PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(made(plain, 3), before, strict=True))
    assert not torch.equal(made(plain, 1)[0], switched[0])


def test_switches_differ() -> None:
    model = stepped(Stream(window=4, sink=1))
    found = []
    for how in ("keep", "recache", "clear", "lerp"):
        session = Session(model, PROMPTS)
        made(session, 4)
        session.steer(OTHERS, how)  # type: ignore[arg-type]
        found += made(session, 1)
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_a_hard_cut_leaves_the_sink_alone() -> None:
    session = Session(stepped(Stream(window=4, sink=1)), PROMPTS)
    made(session, 5)
    before = session.snapshot.memory
    session.steer(OTHERS, "clear")
    memory = session.snapshot.memory
    assert sorted(memory.positions.tolist()) == [-1, -1, 0] and memory.start == 5
    assert all(torch.equal(a, b) for a, b in zip(sink_of(memory), sink_of(before), strict=True))


def test_prompts_fade_chunk_by_chunk() -> None:
    a, b, c = ("a",), ("b",), ("c",)
    fade = Fade(before=((a, 1.0),), since=2, over=4)
    assert [fade.at(chunk, b) for chunk in (1, 2, 4, 5, 9)] == [
        ((a, 1.0),), ((a, 0.75), (b, 0.25)), ((a, 0.25), (b, 0.75)), ((b, 1.0),), ((b, 1.0),),
    ]  # fmt: skip
    again = Fade(before=fade.at(3, b), since=4, over=2)
    assert again.at(4, c) == ((a, 0.25), (b, 0.25), (c, 0.5))


def test_conditions_between_two_prompts() -> None:
    """Weighted states; padding counts as zeros; a token is read where one prompt has it."""
    text = torch.randn(2, 1, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    masks = torch.tensor([[[True, True, False]], [[True, False, False]]])
    given = [Cond(x, m, {"pooled": x[:, 0], "size": torch.tensor([[7]])}) for x, m in zip(text, masks, strict=True)]
    both = mixed(given, [0.25, 0.75])
    torch.testing.assert_close(both.text[0, 0], 0.25 * text[0, 0, 0] + 0.75 * text[1, 0, 0])
    torch.testing.assert_close(both.text[0, 1], 0.25 * text[0, 0, 1])
    assert not both.text[0, 2].any() and both.mask.tolist() == [[True, True, False]]
    torch.testing.assert_close(both.extra["pooled"], 0.25 * text[0, :, 0] + 0.75 * text[1, :, 0])
    assert both.extra["size"].tolist() == [[7]] and mixed(given[:1], [1.0]) is given[0]
    with pytest.raises(ValueError, match="one shape"):
        mixed([given[0], Cond(text[1, :, :2], masks[1, :, :2], given[1].extra)], [0.5, 0.5])


def test_a_session_fades_and_arrives() -> None:
    """The first chunk is of the mix, the last of the new prompt alone; a second change starts from where the first one was."""
    model = stepped(Stream(window=3))
    session = Session(model, PROMPTS)
    made(session, 1)
    session.steer(OTHERS, "lerp", over=2)
    middle = session._conditions_of(1)[0]
    old, new = (model.conditions(prompts)[0] for prompts in (PROMPTS, OTHERS))
    expected = mixed([old, new], [0.5, 0.5])
    assert torch.equal(middle.text, expected.text) and torch.equal(middle.mask, expected.mask)
    assert torch.equal(session._conditions_of(2)[0].text, new.text)
    made(session, 1)
    session.steer(PROMPTS, "lerp", over=2)
    assert session.snapshot.fade == Fade(before=((tuple(PROMPTS), 0.5), (tuple(OTHERS), 0.5)), since=2, over=2)


@pytest.mark.parametrize("how", ["recache", "clear", "lerp"])
def test_a_memory_is_not_changed_under_a_chunk_that_is_being_made(how: Any) -> None:
    session = Session(stepped(Stream(window=3)), PROMPTS)
    made(session, 2)
    steps = session.steps()
    next(steps)
    with pytest.raises(ValueError, match=f"finish its steps or close them before '{how}'"):
        session.steer(OTHERS, how)
    session.steer(OTHERS)
    steps.close()
    session.steer(OTHERS, how)
    list(session.steps())
    session.steer(PROMPTS, how)  # the chunk is finished and remembered


def test_a_switch_that_cannot_be_changes_nothing() -> None:
    session = Session(stepped(Stream(commit="last", window=3)), PROMPTS)
    made(session, 2)
    before = session.snapshot
    with pytest.raises(ValueError, match="choose another switch"):
        session.steer(OTHERS, "recache")
    assert session.snapshot is before
    plain = Session(stepped(Stream(commit="last", window=3)), PROMPTS)
    assert torch.equal(made(plain, 3)[-1], made(session, 1)[0])


def test_other_switches_are_refused() -> None:
    session = Session(stepped(Stream()), PROMPTS)
    with pytest.raises(ValueError, match="one of keep, recache, clear, lerp, not 'melt'"):
        session.steer(OTHERS, "melt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 chunk, not 0"):
        session.steer(OTHERS, "lerp", over=0)
    session.steer(OTHERS, "recache")  # before the first chunk there is nothing to make anew
    assert session.snapshot.memory.layers == ()


# --- what chunks owe each other -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_masked_forward_is_a_stream_that_remembers_at_those_times(chunk: int) -> None:
    """Diffusion forcing: each chunk has its own time, and is remembered as it was read (T1)."""
    model, loop = double(Stream(chunks=(chunk,)))
    cond, x = model.conditions(PROMPTS)[0], clip(6)
    times = torch.linspace(0.9, 0.2, 6 // chunk).double().repeat_interleave(chunk).expand(2, -1)
    whole = repattern(model.denoiser, BlockCausal(chunk=chunk))(x, times, cond).x0
    memory, parts = loop.begin(), []
    for part, t in zip(x.split(chunk, 2), times.split(chunk, 1), strict=True):
        out = model.denoiser(part, t, cond, Call(kv=model.denoiser.recall(memory, part)))
        memory = memory.commit(out.kv, chunk)
        parts.append(out.x0)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-12, rtol=0)


def test_a_later_prompt_leaves_earlier_chunks_as_they_were() -> None:
    """Whatever happens to chunk j, the chunks before it are the same, bit for bit (T4)."""
    model = streaming_model(Stream(window=3, sink=1))
    whole, session = made(Session(model, PROMPTS), 5), Session(model, PROMPTS)
    first = made(session, 2)
    session.steer(OTHERS, "clear")
    rest = made(session, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, whole[:2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(rest, whole[2:], strict=True))


def test_cards_from_before_are_read() -> None:
    tree = {"chunks": [2], "window": 8, "sink": 2, "commit": "clean", "context_time": 0.0, "positions": "window"}
    stream = build(Stream, tree)
    assert stream == Stream(chunks=(2,), window=8, sink=2, positions="window")
    assert keep_of(stream) == Window(window=8, sink=2)


def test_the_contract_names_what_is_remembered() -> None:
    assert keep_of(Stream(memory=Int8Memory(keep=Window(window=4)))) == Int8Memory(keep=Window(window=4))
    with pytest.raises(ValueError, match="window=3 and sink=1; set them in memory"):
        Stream(memory=Window(), window=3, sink=1)
