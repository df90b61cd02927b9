"""The memory of a stream: what each policy keeps, what a chunk reads of it, and where it stands."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import exp

import pytest
import torch
from torch import Tensor

from fewstep.attention import (
    KEEPS,
    BlockCausal,
    CompressCausal,
    CompressedMemory,
    Decaying,
    Dense,
    Everything,
    Facing,
    Importance,
    Int8Memory,
    Keep,
    KVCache,
    MovingSink,
    Prefix,
    Retrieval,
    StateCausal,
    StateMemory,
    Window,
)
from fewstep.attention.kv.decaying import order_of
from fewstep.attention.kv.int8_memory import quantised, restored
from fewstep.attention.kv.slots import prototypes
from fewstep.attention.pattern import Pattern
from fewstep.core import Call, Cond, build
from fewstep.core.build import dump
from fewstep.diffusion import Stream
from fewstep.models.repattern import repattern
from fewstep.models.video_dit import VideoDiT
from test_models import denoiser, far, inputs, small, streamed

KV2 = tuple[tuple[Tensor, Tensor], ...]
LAYERS, HEADS, TOKENS, WIDTH, BYTES = 2, 1, 4, 3, 8
"""Of the keys and values that these tests make; a frame takes `FRAME` bytes."""
FRAME = 2 * LAYERS * HEADS * TOKENS * WIDTH * BYTES
NAMES = {keep.__name__: keep for keep in KEEPS}
LONG = 99
IDENTITIES: list[Keep] = [
    Everything(), Window(window=LONG), Window(window=LONG, sink=3), Prefix(frames=LONG), MovingSink(window=LONG),
    Importance(window=LONG, sink=1), StateMemory(window=LONG), Retrieval(frames=LONG), Facing(frames=LONG),
    Decaying(half=1e9, sink=0), CompressedMemory(window=LONG, ratio=1), Int8Memory(keep=Window(window=LONG, sink=LONG - 3)),
    Int8Memory(keep=Prefix(frames=LONG)),
]  # fmt: skip
"""Every policy where it keeps all frames of a short stream."""
SMALL: list[Keep] = [
    Everything(), Window(window=6), Window(window=7, sink=1), Window(window=5, sink=3), Prefix(frames=3), Prefix(frames=0),
    MovingSink(window=8, sink=2, decay=0.5), StateMemory(window=7, sink=1), Importance(window=7, sink=2),
    CompressedMemory(window=7, sink=1, past=3, ratio=1), CompressedMemory(window=6, sink=2, past=1, ratio=1),
    Importance(window=4), Retrieval(frames=2, recent=2, sink=1), Facing(frames=2, recent=2, sink=1), Decaying(half=1.5, sink=1),
    Decaying(half=0.4, sink=0), Int8Memory(), Int8Memory(keep=Window(window=8, sink=1)), Int8Memory(keep=Prefix(frames=3)),
    Int8Memory(keep=MovingSink(window=8, sink=2)), Int8Memory(keep=Importance(window=7, sink=2)),
    Int8Memory(keep=Retrieval(frames=2, recent=2, sink=1)), Int8Memory(keep=Facing(frames=2, recent=2, sink=1)),
]  # fmt: skip
"""Every policy where it has something to decide."""
CHUNK = 2
every_small = pytest.mark.parametrize("keep", SMALL, ids=str)


def chunk_of(first: int, frames: int = CHUNK, batch: int = 1, seed: int = 0) -> KV2:
    """Keys and values of two layers, four tokens a frame, that are random, and the same for a frame in every chunk."""

    def one(kind: int) -> Tensor:
        made = []
        for frame in range(first, first + frames):
            generator = torch.Generator().manual_seed(1000 * seed + 10 * frame + kind)
            made.append(torch.randn(batch, HEADS, TOKENS, WIDTH, generator=generator, dtype=torch.float64))
        return torch.cat(made, 2)

    return tuple((one(2 * layer), one(2 * layer + 1)) for layer in range(LAYERS))


def poses_of(first: int, frames: int = CHUNK, batch: int = 1) -> Tensor:
    """The camera walks along x and turns around once in 8 frames."""
    number = torch.arange(first, first + frames).double()
    turn = number * torch.pi / 4
    pose = torch.stack([0.1 * number, 0 * turn, 0 * turn, turn.cos(), turn.sin(), 0 * turn], 1)
    return pose.expand(batch, -1, -1)


def after(keep: Keep, chunks: int, batch: int = 1, seed: int = 0) -> KVCache:
    memory = KVCache.empty(keep, CHUNK)
    for index in range(chunks):
        memory = grown(memory, index, batch, seed)
    return memory


def grown(memory: KVCache, index: int, batch: int = 1, seed: int = 0) -> KVCache:
    facing, new = memory.facing(poses_of(CHUNK * index, batch=batch)), chunk_of(CHUNK * index, batch=batch, seed=seed)
    if isinstance(keep := memory.keep, CompressedMemory):  # learned tokens behind each frame: the first of every group
        new = tuple((behind(k, keep.ratio), behind(v, keep.ratio)) for k, v in new)
    return facing.commit(new, CHUNK)


def behind(x: Tensor, ratio: int) -> Tensor:
    frames = x.unflatten(2, (CHUNK, TOKENS))
    return torch.cat([frames, frames[:, :, :, ::ratio]], 3).flatten(2, 3)


def read(memory: KVCache) -> KVCache:
    """What the next chunk reads."""
    return memory.facing(poses_of(int(memory.start.max()), batch=len(memory.layers[0][0]))).read()


def frames_in(memory: KVCache) -> list[int]:
    positions = memory.positions if memory.positions.ndim == 1 else memory.positions[0]
    return sorted(frame for frame in positions.tolist() if frame >= 0)


def held(memory: KVCache) -> dict[int, KV2]:
    """The tokens of each frame that a memory of whole frames holds, of its first sample."""
    positions = memory.positions if memory.positions.ndim == 1 else memory.positions[0]
    tokens = lambda x, slot: x[:1].unflatten(2, (len(positions), -1))[:, :, slot]  # noqa: E731
    return {
        frame: tuple((tokens(k, slot), tokens(v, slot)) for k, v in memory.layers)
        for slot, frame in enumerate(positions.tolist())
        if frame >= 0
    }


def same(a: KV2, b: KV2) -> bool:
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def test_every_policy_has_examples() -> None:
    assert {type(keep) for keep in IDENTITIES} == {type(keep) for keep in SMALL} == set(KEEPS)


@pytest.mark.parametrize("keep", [cls() for cls in KEEPS] + SMALL, ids=str)
def test_a_policy_travels_in_a_card(keep: Keep) -> None:
    stream = Stream(chunks=(CHUNK,), memory=keep)
    assert build(Stream, json.loads(json.dumps(dump(stream))), NAMES) == stream


def test_names_of_policies_are_no_other_names() -> None:
    from fewstep.catalogue import KINDS

    others = {thing.__name__ for kind, things in KINDS.items() for thing in things if kind != "memories"}
    assert not others & set(NAMES)


# --- what every policy promises -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", IDENTITIES, ids=str)
def test_where_a_policy_keeps_all_it_keeps_it_bit_for_bit(keep: Keep) -> None:
    memory = after(keep, 5)
    found = held(read(memory)) if memory.rows is None else None
    if found is None:
        assert same(read(memory).layers, after(Everything(), 5).layers)
        return
    assert list(found) == list(range(10)) or sorted(found) == list(range(10))
    assert all(same(found[frame], chunk_of(frame, 1)) for frame in found)


@pytest.mark.parametrize("keep", IDENTITIES, ids=str)
def test_a_stream_with_all_its_past_is_one_masked_forward(keep: Keep) -> None:
    plain, (x, t, cond) = denoiser(BlockCausal(chunk=CHUNK)), inputs(frames=6)
    net: VideoDiT = repattern(plain, fitting(BlockCausal(chunk=CHUNK), keep)).backbone  # type: ignore[assignment]
    memory = KVCache.empty(keep, CHUNK)
    whole = plain.backbone(x, t, cond).raw
    torch.testing.assert_close(with_poses(net, memory, x, t, cond), whole, atol=1e-10, rtol=0)
    if not keep.leaves_empty:  # no slot is empty, so the same kernels see the same numbers
        every = with_poses(plain.backbone, KVCache.empty(Everything(), CHUNK), x, t, cond)  # type: ignore[arg-type]
        assert torch.equal(with_poses(net, memory, x, t, cond), every)


def fitting(pattern: Pattern, keep: Keep) -> Pattern:
    """A pattern that reads what this policy keeps."""
    if isinstance(keep, CompressedMemory):
        return CompressCausal(chunk=CHUNK, ratio=keep.ratio)
    return StateCausal(chunk=CHUNK, window=keep.window, sink=keep.sink) if isinstance(keep, StateMemory) else pattern


def with_poses(net: VideoDiT, memory: KVCache, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    made = []
    for index, (part, times) in enumerate(zip(x.split(CHUNK, 2), t.split(CHUNK, 1), strict=True)):
        memory = memory.facing(poses_of(CHUNK * index, batch=len(x)))
        out = net(part, times, cond, Call(kv=net.recall(memory, part)))
        memory, _ = memory.commit(out.kv or (), part.shape[2]), made.append(out.raw)
    return torch.cat(made, 2)


@every_small
@pytest.mark.parametrize("pattern", [Dense(), BlockCausal(chunk=CHUNK)], ids=["dense", "causal"])
def test_a_network_reads_what_the_policy_says_and_no_more(keep: Keep, pattern: Dense | BlockCausal) -> None:
    """Attention over exactly these keys, at their own positions: the tokens of every view are the memory's, turned."""
    net, (x, t, cond) = small(fitting(pattern, keep)), inputs(frames=14)
    memory = KVCache.empty(keep, CHUNK)
    for index, (part, times) in enumerate(zip(x.split(CHUNK, 2), t.split(CHUNK, 1), strict=True)):
        memory = memory.facing(poses_of(CHUNK * index, batch=2))
        view, chosen = net.recall(memory, part), memory.read()
        if memory.layers:
            grid = net.grid(part)
            every = torch.arange(CHUNK * index)
            table = net.rotary.table(every, grid, part)
            rows = places(chosen, grid.per_frame)
            for (k, v), (plain, value) in zip(view.layers, chosen.layers, strict=True):
                assert torch.equal(v, value)
                for sample, row in enumerate(rows):
                    there = row >= 0
                    turned = net.rotary.turn(plain[sample : sample + 1, :, there], table[:, row[there]])
                    torch.testing.assert_close(k[sample : sample + 1, :, there], turned, atol=1e-12, rtol=0)
        out = net(part, times, cond, Call(kv=view))
        assert torch.isfinite(out.raw).all()
        memory = memory.commit(out.kv or (), CHUNK)


def places(memory: KVCache, per_frame: int) -> Tensor:
    """Number of each token among all tokens of the stream, `[B, M]`; negative: there is none."""
    positions = memory.positions.expand(2, -1)
    if memory.rows is not None:
        return positions[:, memory.rows[:, 0]] * per_frame + memory.rows[:, 1]
    token = torch.arange(per_frame).repeat(positions.shape[1])
    number = positions.repeat_interleave(per_frame, 1)
    return torch.where(number >= 0, number * per_frame + token, -1)


@every_small
def test_a_commit_leaves_the_memory_as_it_was_and_the_newest_chunk_is_read(keep: Keep) -> None:
    """Over several seeds, to three times any window: the sink is always there, the newest chunk too, nothing twice."""
    for seed in range(4):
        memory = KVCache.empty(keep, CHUNK)
        for index in range(12):
            before, bits = memory, [x.clone() for layer in memory.layers for x in layer]
            memory = grown(memory, index, seed=seed)
            assert all(
                torch.equal(a, b) for a, b in zip((x for layer in before.layers for x in layer), bits, strict=True)
            )
            assert before.start == CHUNK * index and memory.start == CHUNK * (index + 1)
            found = frames_in(read(memory))
            now = CHUNK * (index + 1)
            assert len(set(found)) == len(found) and set(range(min(keep.pinned, now))) <= set(found)
            roll = CHUNK if not isinstance(keep, Window) else keep.window - CHUNK - keep.sink
            assert set(range(now - min(CHUNK, roll), now)) <= set(found) <= set(range(now))
            if memory.rows is None and not isinstance(keep, (Int8Memory, MovingSink)):
                assert all(same(value, chunk_of(frame, 1, seed=seed)) for frame, value in held(read(memory)).items())
            if isinstance(keep, Int8Memory) and not isinstance(keep.keep, MovingSink):
                for frame, value in held(read(memory)).items():
                    for (k, v), (own_k, own_v) in zip(value, chunk_of(frame, 1, seed=seed), strict=True):
                        assert (k - own_k).abs().max() < 0.02 and (v - own_v).abs().max() < 0.02


@every_small
def test_a_stream_goes_on_from_any_memory_bit_for_bit(keep: Keep) -> None:
    """What is continued twice from the same memory is the same, and so is what never stopped."""
    whole, paused = after(keep, 9), after(keep, 4)
    for _ in range(2):
        memory = paused
        for index in range(4, 9):
            memory = grown(memory, index)
        assert same(memory.layers, whole.layers) and torch.equal(memory.positions, whole.positions)
        assert all(torch.equal(a, b) for a, b in zip(memory.notes, whole.notes, strict=True))


def expected_bytes(keep: Keep, frames: int) -> int:
    """Bytes of a memory after so many frames: each policy's formula."""
    numbers = LAYERS * HEADS * WIDTH * BYTES
    match keep:
        case Everything():
            return frames * FRAME
        case Window() | MovingSink() | StateMemory():  # without gates nothing enters the state
            return (keep.window - CHUNK) * FRAME
        case Prefix():
            return (keep.frames + CHUNK) * FRAME
        case Importance():
            return (keep.window - CHUNK) * (FRAME + numbers)
        case Retrieval():
            return frames * (FRAME + numbers)
        case Facing():
            return frames * (FRAME + 6 * 8)
        case CompressedMemory():
            room = keep.window - CHUNK - keep.sink
            whole = min(frames, keep.sink) + min(max(frames - keep.sink, 0), room)
            learned = min(max(frames - keep.sink, 0), room + keep.past)
            return whole * FRAME + learned * FRAME // keep.ratio
        case Decaying():
            ages = [max(frames - CHUNK - frame, 0) for frame in range(frames)]
            tokens = [
                TOKENS if i < keep.sink else round(TOKENS * 2 ** (-age / keep.half)) for i, age in enumerate(ages)
            ]
            return sum(tokens) * FRAME // TOKENS
        case Int8Memory():
            slots = after(keep.keep, frames // CHUNK).positions.shape[-1]
            exact = min(slots, keep.pinned + CHUNK)
            packed = (
                FRAME // BYTES + LAYERS * HEADS * (WIDTH + TOKENS) * 2
            )  # a number each, and a scale per channel and token
            besides = expected_bytes(keep.keep, frames) - slots * FRAME
            return exact * FRAME + (slots - exact) * packed + slots * 8 + besides
    raise AssertionError(keep)


@every_small
def test_bytes_are_the_formula(keep: Keep) -> None:
    for chunks in (1, 3, 10):
        assert after(keep, chunks).nbytes == expected_bytes(keep, CHUNK * chunks), chunks
    if keep.leaves_empty:
        assert after(keep, 1).nbytes == after(keep, 20).nbytes


@pytest.mark.parametrize("keep", [keep for keep in SMALL if keep.leaves_empty], ids=str)
def test_streams_of_different_age_are_one_batch(keep: Keep) -> None:
    young, old = after(keep, 1), after(keep, 5, seed=1)
    both = KVCache.batch([young, old])
    assert both.start.tolist() == [2, 10] and both.positions.shape[0] == 2
    new = [chunk_of(2), chunk_of(10, seed=1)]
    together = tuple((torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(*new, strict=True))
    both = both.commit(together, CHUNK)
    for row, (alone, own) in enumerate(zip((young, old), new, strict=True)):
        alone = alone.commit(own, CHUNK)
        mine, its = (read(m).positions for m in (both, alone))
        assert torch.equal(mine[row], its if its.ndim == 1 else its[0])
        filled = (mine[row] >= 0).repeat_interleave(TOKENS)
        for (k, v), (own_k, own_v) in zip(read(both).layers, read(alone).layers, strict=True):
            assert torch.equal(k[row, :, filled], own_k[0, :, filled])
            assert torch.equal(v[row, :, filled], own_v[0, :, filled])


@every_small
def test_nothing_but_the_sink_is_left_of_what_is_forgotten(keep: Keep) -> None:
    memory = after(keep, 8)
    left = keep.forget(memory, memory.start)
    assert left.start == memory.start and left.keep == keep
    assert frames_in(left) == list(range(keep.pinned))
    if keep.pinned and MovingSink not in (type(keep), type(getattr(keep, "keep", None))) and left.rows is None:
        assert all(same(value, chunk_of(frame, 1)) for frame, value in held(read(left)).items())
    if left.rows is not None:
        for row, (slot, token) in enumerate(left.rows.tolist()):
            own = chunk_of(int(left.positions[slot]), 1)
            assert torch.equal(left.layers[0][0][:, :, row], own[0][0][:, :, token])
    newest = {16, 17} if keep != Window(window=5, sink=3) else set()  # it has room for its sink only
    assert set(frames_in(read(grown(left, 8)))) == {*range(keep.pinned), *newest}


# --- one policy after the other -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [Window(window=5), Window(window=7, sink=1), Window(window=5, sink=3)], ids=str)
def test_a_window_holds_the_first_and_the_last_frames(keep: Window) -> None:
    memory = KVCache.empty(keep, CHUNK)
    for index in range(9):
        memory = grown(memory, index)
        now, last = CHUNK * (index + 1), keep.window - CHUNK - keep.sink
        assert frames_in(memory) == sorted({*range(min(keep.sink, now)), *range(max(0, now - last), now)})


def test_a_ring_overwrites_and_does_not_shift() -> None:
    keep = Window(window=5, sink=1)
    memory = KVCache.empty(keep)
    for frame in range(6):
        before, memory = memory, memory.commit(chunk_of(frame, 1), 1)
    changed = (memory.positions != before.positions).nonzero().flatten().tolist()
    assert len(changed) == 1 and before.positions[changed[0]] == 2 and memory.positions[changed[0]] == 5


def test_a_prefix_and_the_newest_chunk() -> None:
    assert frames_in(after(Prefix(frames=3), 7)) == [0, 1, 2, 12, 13]
    assert frames_in(after(Prefix(frames=0), 7)) == [12, 13]


def test_a_moving_sink_is_the_mean_of_what_left() -> None:
    """Frame by frame, by its own definition; and with decay 1 it is a window, bit for bit."""
    keep = MovingSink(window=8, sink=2, decay=0.75)
    memory, plain = after(keep, 9), after(Window(window=8, sink=2), 9)
    kept, window = held(memory), held(plain)
    assert sorted(kept) == sorted(window) == [0, 1, 14, 15, 16, 17]
    sink = [chunk_of(0, 1), chunk_of(1, 1)]
    for frame in range(2, 14):  # those that left
        sink[frame % 2] = tuple(
            (0.75 * k + 0.25 * new_k, 0.75 * v + 0.25 * new_v)
            for (k, v), (new_k, new_v) in zip(sink[frame % 2], chunk_of(frame, 1), strict=True)
        )
    for frame in (0, 1):
        for (k, v), (expected_k, expected_v) in zip(kept[frame], sink[frame], strict=True):
            torch.testing.assert_close(k, expected_k, atol=1e-12, rtol=0)
            torch.testing.assert_close(v, expected_v, atol=1e-12, rtol=0)
    assert all(same(kept[frame], window[frame]) for frame in (14, 15, 16, 17))
    assert same(after(replace(keep, decay=1.0), 9).layers, plain.layers)


def test_a_moving_sink_stays_within_what_it_has_seen() -> None:
    largest = max(float(k.abs().max()) for frame in range(40) for k, _ in chunk_of(frame, 1))
    memory = after(MovingSink(window=8, sink=2, decay=0.3), 20)
    assert max(float(k.abs().max()) for k, _ in memory.layers) <= largest


def likeness(a: KV2, b: KV2) -> float:
    """The mean cosine of mean keys, over layers and heads."""
    found = []
    for (k, _), (other, _) in zip(a, b, strict=True):
        for head in range(k.shape[1]):
            x, y = k[0, head].mean(0), other[0, head].mean(0)
            found.append(float(x @ y / (x.norm() * y.norm())))
    return sum(found) / len(found)


def test_prototypes_multiply_to_the_mean_cosine() -> None:
    a, b = (tuple((k.expand(2, 3, -1, -1) + torch.randn(2, 3, 1, WIDTH), v) for k, v in chunk_of(f, 1)) for f in (0, 1))
    product = (prototypes(a, 1)[:, 0] * prototypes(b, 1)[:, 0]).sum(-1)
    assert product[0] == pytest.approx(likeness(a, b))


def direction(delta: KV2) -> Tensor:
    return prototypes(delta, delta[0][0].shape[2] // TOKENS).mean(1)


@pytest.mark.parametrize("seed", range(5))
def test_the_least_important_frames_leave(seed: int) -> None:
    """By definition: of the frames that are no sink, those whose likeness to the incoming chunk is lowest."""
    keep = Importance(window=7, sink=1)
    memory = KVCache.empty(keep, CHUNK)
    for index in range(10):
        before, new = frames_in(memory), chunk_of(CHUNK * index, seed=seed)
        memory = memory.commit(new, CHUNK)
        gone = sorted(set(before) - set(frames_in(memory)))
        surplus = max(len(before) + CHUNK - 5, 0)
        score = {f: float(direction(chunk_of(f, 1, seed=seed))[0] @ direction(new)[0]) for f in before if f >= 1}
        assert gone == sorted(sorted(score, key=lambda f: score[f])[:surplus])


@pytest.mark.parametrize("seed", range(3))
def test_the_frames_that_are_most_alike_are_read(seed: int) -> None:
    keep = Retrieval(frames=2, recent=2, sink=1)
    for chunks in range(1, 9):
        memory = after(keep, chunks, seed=seed)
        now = CHUNK * chunks
        assert frames_in(memory) == list(range(now))  # the bank forgets nothing
        newest = direction(chunk_of(now - CHUNK, seed=seed))[0]
        others = range(1, now - 2)
        score = {f: float(direction(chunk_of(f, 1, seed=seed))[0] @ newest) for f in others}
        best = sorted(score, key=lambda f: -score[f])[:2]
        found = read(memory).positions.expand(1, -1)[0].tolist()  # in the order of the stream
        assert found == sorted({0, now - 2, now - 1, *best} if now > 5 else range(now))


def test_frames_that_look_at_the_same_place_are_read() -> None:
    keep = Facing(frames=2, recent=2, sink=1, reach=1000.0)
    memory = after(keep, 10)  # 20 frames; it has turned around every 8
    chosen = frames_in(read(memory))  # for frames 20 and 21
    assert chosen == [0, 12, 13, 18, 19]
    again = memory.facing(poses_of(20)).read()
    assert frames_in(again) == chosen  # the same pose, the same frames
    elsewhere = frames_in(memory.facing(poses_of(16)).read())
    assert elsewhere == [0, 16, 17, 18, 19]
    with pytest.raises(ValueError, match="extra 'pose'; got nothing"):
        memory.read()
    with pytest.raises(ValueError, match=r"got \[1, 1, 6\]"):
        memory.facing(poses_of(20, 1)).commit(chunk_of(20), CHUNK)


def test_a_frame_is_worth_what_one_frame_of_the_chunk_will_see_of_it() -> None:
    """Not what all of them will: a view that one of them has again comes before one that all of them half see."""
    ways = [(1.0, 0.0), (0.0, 1.0), (0.0, -1.0), (0.0, -1.0)]  # frames 0 to 3: right, up, down, down
    pose = torch.tensor([[[0.0, 0.0, 0.0, x, y, 0.0] for x, y in ways]]).double()
    memory = KVCache.empty(Facing(frames=1, recent=2, sink=0), CHUNK)
    for index in range(2):
        memory = memory.facing(pose[:, CHUNK * index : CHUNK * (index + 1)]).commit(chunk_of(CHUNK * index), CHUNK)
    coming = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, -1.0, 0.0]]]).double()
    assert frames_in(memory.facing(coming).read()) == [1, 2, 3]


def test_the_overlap_of_two_views() -> None:
    here = torch.tensor([[1.0, 2.0, 3.0, 0.0, 1.0, 0.0]]).double()
    rows = [[1.0, 2.0, 3.0, 0.0, 5.0, 0.0], [1.0, 2.0, 3.0, 0.0, -1.0, 0.0], [5.0, 2.0, 0.0, 1.0, 0.0, 0.0]]
    there = torch.tensor([rows]).double()
    found = Facing(reach=2.0).overlap(there, here)[0].tolist()
    assert found == pytest.approx([1.0, 0.0, 0.5 * exp(-5 / 2)])


def test_old_frames_have_fewer_tokens() -> None:
    """Which are among those that they had, spread over the frame; the sink has all of them."""
    keep, tokens = Decaying(half=2.0, sink=1), TOKENS
    memory, before = KVCache.empty(keep, CHUNK), dict[int, set[int]]()
    for index in range(6):
        memory = grown(memory, index)
        assert memory.rows is not None
        found: dict[int, set[int]] = {frame: set() for frame in memory.positions.tolist()}
        for row, (slot, token) in enumerate(memory.rows.tolist()):
            frame = int(memory.positions[slot])
            found[frame].add(token)
            for (k, v), (own_k, own_v) in zip(memory.layers, chunk_of(frame, 1), strict=True):
                assert torch.equal(k[:, :, row], own_k[:, :, token]) and torch.equal(v[:, :, row], own_v[:, :, token])
        for frame, own in found.items():
            age = max(CHUNK * index - frame, 0)
            assert len(own) == (tokens if frame == 0 else round(tokens * 2 ** (-age / 2)))
            assert own <= before.get(frame, own)
        before = found
    assert set(before) == {0, 5, 6, 7, 8, 9, 10, 11}  # a frame without tokens is gone


def test_tokens_that_stay_are_spread_over_the_frame() -> None:
    for tokens in (16, 64, 1560):
        rank = order_of(tokens)
        assert sorted(rank.tolist()) == list(range(tokens))
        for left in (4, 7, tokens // 2):
            there = (rank < left).nonzero().flatten().tolist()
            assert max(b - a for a, b in zip(there, [*there[1:], there[0] + tokens])) < 3 * tokens / left


def test_int8_loses_half_a_step_at_most_and_only_once() -> None:
    x = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * 10
    for dim in (3, 4):
        numbers, scale = quantised(x, dim)
        back = restored(numbers, scale, torch.float32)
        assert numbers.dtype == torch.int8 and scale.shape == (*x.shape[:dim], 1, *x.shape[dim + 1 :])
        assert ((back - x).abs() <= 0.5 * scale.float() * 1.001).all()
        assert (back - x).abs().max() > 0
        again, same_scale = quantised(back, dim)
        assert torch.equal(again, numbers) and torch.equal(same_scale, scale)
    assert not restored(*quantised(torch.zeros(1, 1, 1, 2, 2), 3), torch.float32).any()
    tiny = torch.full((1, 1, 1, 2, 2), 1.65e-38)  # bfloat16 has few bits for a scale that small
    assert (quantised(tiny, 3)[0] > 0).all()


def test_what_is_stored_as_int8_is_the_sinks_neighbour_not_the_sink() -> None:
    """The sink and the newest chunk are exact; another frame is off by half a step of its channel or token, however old."""
    keep = Int8Memory(keep=Window(window=12, sink=1))
    memory = after(keep, 4)
    frame = held(read(memory))[4]
    for index in range(4, 6):
        memory = grown(memory, index)
        assert same(held(read(memory))[4], frame)
    exact = {f for f, value in held(read(memory)).items() if same(value, chunk_of(f, 1))}
    assert exact == {0, 10, 11}
    for (k, v), (own_k, own_v) in zip(frame, chunk_of(4, 1), strict=True):
        step_k, step_v = own_k.abs().amax(2, keepdim=True) / 127, own_v.abs().amax(3, keepdim=True) / 127
        assert ((k - own_k).abs() <= 0.51 * step_k).all() and ((v - own_v).abs() <= 0.51 * step_v).all()


def test_a_stream_hardly_changes_with_int8() -> None:
    net, (x, t, cond) = small(BlockCausal(chunk=CHUNK)), inputs(frames=12)
    plain, packed = (with_poses(net, KVCache.empty(keep, CHUNK), x, t, cond) for keep in (Everything(), Int8Memory()))
    off = (plain - packed).square().mean() / plain.square().mean()
    assert 0 < off < 1e-4  # 40 dB


def test_half_precision_is_stored_and_read_as_such() -> None:
    keep, memory = Int8Memory(), KVCache.empty(Int8Memory(), CHUNK)
    for index in range(4):
        memory = memory.commit(tuple((k.bfloat16(), v.bfloat16()) for k, v in chunk_of(CHUNK * index)), CHUNK)
    assert {x.dtype for layer in read(memory).layers for x in layer} == {torch.bfloat16}
    assert memory.layers[0][0].shape[2] == CHUNK * TOKENS and keep.exact(memory) == CHUNK


# --- positions ------------------------------------------------------------------------------------------------------------


def test_positions_by_definition() -> None:
    memory = after(Window(window=8, sink=2), 8)  # 0, 1 and 12 to 15; the next is 16
    stands = {}
    for standing in ("absolute", "window", "sink", "rebased"):
        where, start = replace(memory, standing=standing).stand(17)
        stands[standing] = dict(zip(memory.positions.tolist(), where.tolist(), strict=True)), int(start)
    assert stands["absolute"] == ({0: 0, 1: 1, 12: 12, 13: 13, 14: 14, 15: 15}, 16)
    assert stands["window"] == ({0: 0, 1: 1, 12: 2, 13: 3, 14: 4, 15: 5}, 6)
    assert stands["sink"] == ({0: 10, 1: 11, 12: 12, 13: 13, 14: 14, 15: 15}, 16)
    assert stands["rebased"] == stands["absolute"]  # the sink is at 0 already
    rolling = replace(after(Window(window=6), 8), standing="rebased")
    for longest, first, start in ((18, 12, 16), (17, 0, 4), (None, 12, 16)):
        where, begins = rolling.stand(longest)
        assert int(where.min()) == first and begins == start


@pytest.mark.parametrize("standing", ["absolute", "window", "sink", "rebased"])
def test_while_nothing_has_left_frames_stand_where_they_are(standing: str) -> None:
    for chunks in (0, 1, 3):
        memory = replace(after(Window(window=8, sink=2), chunks), standing=standing)
        where, start = memory.stand(99)
        assert torch.equal(where, memory.positions) and torch.equal(start, memory.start)


def shorter(net: VideoDiT, longest: int | None) -> VideoDiT:
    net.rotary = replace(net.rotary, longest=longest)
    return net


def test_without_a_sink_only_distances_count() -> None:
    """All policies of positions are one model; with a sink, `window` and `sink` are others."""
    x, t, cond = inputs(frames=12)
    net = shorter(small(BlockCausal()), 13)
    for sink, alike in ((0, True), (1, False)):
        made = {
            standing: streamed(net, KVCache.empty(Window(window=4, sink=sink), 1, standing), x, t, cond, 1)
            for standing in ("absolute", "window", "sink", "rebased")
        }
        for standing in ("window", "sink"):
            assert far(made[standing], made["absolute"]) != alike
            if alike:
                torch.testing.assert_close(made[standing], made["absolute"], atol=1e-10, rtol=0)
    short, endless = shorter(small(BlockCausal()), 6), small(BlockCausal())
    moved = streamed(short, KVCache.empty(Window(window=4), 1, "rebased"), x, t, cond, 1)
    plain = streamed(endless, KVCache.empty(Window(window=4)), x, t, cond, 1)
    torch.testing.assert_close(moved, plain, atol=1e-10, rtol=0)


def test_past_the_end_of_the_table_is_refused() -> None:
    net, (x, t, cond) = shorter(small(BlockCausal()), 6), inputs(frames=12)
    with pytest.raises(ValueError, match=r"knows positions of 6 latent frames, not 7.*rebased"):
        streamed(net, KVCache.empty(Window(window=4)), x, t, cond, 1)
    with pytest.raises(ValueError, match="not 7"):  # the sink does not let it move
        streamed(net, KVCache.empty(Window(window=4, sink=1), 1, "rebased"), x, t, cond, 1)
    with pytest.raises(ValueError, match="not 12"):
        net(x, t, cond)
    streamed(net, KVCache.empty(Window(window=4, sink=1), 1, "window"), x, t, cond, 1)


def test_a_chunk_may_begin_anywhere_in_a_window() -> None:
    """Positions in the window are no numbers of frames: chunks are whole ones though the window is no multiple of them."""
    net, (x, t, cond) = small(BlockCausal(chunk=2)), inputs(frames=12)
    made = [
        streamed(net, KVCache.empty(Window(window=5), 2, standing), x, t, cond, 2)
        for standing in ("absolute", "window")
    ]
    torch.testing.assert_close(*made, atol=1e-10, rtol=0)


# --- what is refused ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_committed_is_refused() -> None:
    one = KVCache.empty().commit(chunk_of(0, 1), 1)
    with pytest.raises(ValueError, match="2 layers"):
        one.commit(chunk_of(1, 1)[:1], 1)
    with pytest.raises(ValueError, match="a chunk has frames"):
        one.commit((), 1)
    with pytest.raises(ValueError, match="chunks of 1 frames at most"):
        KVCache.empty(Window(window=4)).commit(chunk_of(0, 2), 2)
    with pytest.raises(ValueError, match="one policy"):
        KVCache.batch([one, KVCache.empty(Window(window=4)).commit(chunk_of(0, 1), 1)])
    with pytest.raises(ValueError, match="one policy"):
        KVCache.batch([after(Window(window=4), 1), replace(after(Window(window=4), 1), standing="sink")])


@pytest.mark.parametrize(
    ("keep", "chunk", "said"),
    [
        (Window(window=3, sink=2), 2, "raise window to 4"),
        (Window(window=2), 2, "raise window to 3"),
        (MovingSink(window=6, sink=2), 3, "raise window to 8"),
        (Importance(window=4, sink=1), 2, "raise window to 5"),
        (Int8Memory(keep=Window(window=2)), 2, "raise window to 3"),
        (Int8Memory(keep=Int8Memory()), 1, "leave out the inner"),
    ],
    ids=str,
)
def test_a_memory_that_cannot_serve_its_chunks_is_refused(keep: Keep, chunk: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KVCache.empty(keep, chunk)
    with pytest.raises(ValueError, match=said):
        Stream(chunks=(1, chunk), memory=keep)


def test_numbers_out_of_bounds_are_refused() -> None:
    for make, said in (
        (lambda: MovingSink(decay=1.5), "decay must be at most 1"),
        (lambda: Window(window=0), "window must be"),
    ):
        with pytest.raises(ValueError, match=said):
            make()


def test_parts_of_frames_are_not_stored_as_int8() -> None:
    with pytest.raises(ValueError, match="Decaying keeps parts of them"):
        after(Int8Memory(keep=Decaying()), 1)


def test_streams_of_different_age_share_no_decaying_memory() -> None:
    memory = replace(KVCache.empty(Decaying(), CHUNK), start=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="streams of one age"):
        memory.commit(chunk_of(0, batch=2), CHUNK)


@dataclass(frozen=True)
class Nothing(Keep):
    """A policy of one's own: the past is forgotten."""

    def commit(self, memory, delta, frames):  # type: ignore[no-untyped-def]
        return replace(memory, start=memory.start + frames)


def test_a_policy_of_ones_own() -> None:
    memory = KVCache.empty(Nothing()).commit(chunk_of(0, 2), 2)
    assert memory.start == 2 and memory.layers == ()
