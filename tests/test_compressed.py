"""Learned tokens that stand for frames that have left the window: what they are, where they stand, and what trains them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.attention import BlockCausal, CompressCausal, CompressedMemory, Facing, KVCache, Window
from fewstep.core import Batch, Call, Rng
from fewstep.diffusion import Stream
from fewstep.methods import FlowMatching
from fewstep.methods.base import Nets
from fewstep.methods.histories import TeacherForced
from fewstep.models.backbone import _of_rows
from fewstep.models.repattern import repattern
from fewstep.models.video_dit import VideoDiT
from fewstep.streaming import Session
from support_engine import FRAMES, shaken
from test_models import denoiser, far, inputs, small, streamed
from test_streaming import PROMPTS, made, streaming_model

pytestmark = pytest.mark.usefixtures("single_thread")
SHORT = CompressedMemory(window=4, sink=1, past=3, ratio=3)


def compressing(ratio: int, chunk: int = 1, amount: float = 0.0) -> VideoDiT:
    """The weights of `small(BlockCausal(chunk))`, and new queries; `amount`: off their zeros."""
    net: VideoDiT = repattern(denoiser(BlockCausal(chunk=chunk)), CompressCausal(chunk=chunk, ratio=ratio)).backbone  # type: ignore[assignment]
    for block in net.blocks:
        shaken(block.attention.operation, amount)  # type: ignore[arg-type, union-attr]
    return net


@pytest.mark.parametrize("chunk", [1, 2])
def test_one_token_for_each_is_a_longer_window(chunk: int) -> None:
    """Ratio 1 with the identity as weights: the window and the past together, to three times that."""
    keep, (x, t, cond) = CompressedMemory(window=2 * chunk + 1, sink=1, past=3, ratio=1), inputs(frames=12)
    here = streamed(compressing(1, chunk), KVCache.empty(keep, chunk), x, t, cond, chunk)
    window, plain = Window(window=keep.window + 3, sink=1), small(BlockCausal(chunk=chunk))
    expected = streamed(plain, KVCache.empty(window, chunk), x, t, cond, chunk)
    torch.testing.assert_close(here, expected, atol=1e-10, rtol=0)
    shorter = streamed(plain, KVCache.empty(Window(window=keep.window, sink=1), chunk), x, t, cond, chunk)
    assert far(here, shorter)


def test_a_learned_token_by_hand() -> None:
    """Softmax of the products with one query over a group of three, and two matrices."""
    operation = shaken(CompressCausal(ratio=3).operation(0, 2, 4), 1.0).double()
    k, v = (Rng(0).randn((1, 2, 6, 4), name).double() for name in "kv")
    made_k, made_v = operation.learned(k, v)
    assert made_k.shape == (1, 2, 2, 4)
    for head, group in ((0, 0), (1, 1)):
        keys, values = (x[0, head, 3 * group : 3 * group + 3] for x in (k, v))
        weight = (keys @ operation.query[head] / 2).softmax(0)
        torch.testing.assert_close(made_k[0, head, group], weight @ keys @ operation.maps[0, head])
        torch.testing.assert_close(made_v[0, head, group], weight @ values @ operation.maps[1, head])
    mean, _ = CompressCausal(ratio=3).operation(0, 2, 4).double().learned(k, v)
    torch.testing.assert_close(mean[0, 0, 1], k[0, 0, 3:].mean(0))


@pytest.mark.parametrize("ratio", [3, 1])
def test_a_learned_token_stands_in_the_middle(ratio: int) -> None:
    """A token of three in a row is turned by the angles of the second, and one of two by the mean of both."""
    net, (x, t, cond) = compressing(ratio), inputs(frames=9)
    memory = KVCache.empty(replace(SHORT, ratio=ratio), 1)
    for part, times in zip(x[:, :, :8].split(1, 2), t.split(1, 1), strict=False):
        memory = memory.commit(net(part, times, cond, Call(kv=net.recall(memory, part))).kv or (), 1)
    part, read = x[:, :, 8:], memory.read()
    view, grid = net.recall(memory, part), net.grid(part)
    assert read.rows is not None and grid == (1, 2, 3)
    whole = net.rotary.table(torch.arange(9), grid, part)
    for token, (slot, first, count) in enumerate(read.rows.tolist()):
        middle = int(read.positions[slot]) * 6 + first + (count - 1) // 2
        turned = net.rotary.turn(read.layers[0][0][:, :, token : token + 1], whole[:, middle : middle + 1])
        torch.testing.assert_close(view.layers[0][0][:, :, token : token + 1], turned, atol=1e-12, rtol=0)
    table = torch.stack([torch.tensor([0.3, 1.1, 2.4]).cos(), torch.tensor([0.3, 1.1, 2.4]).sin()])[..., None]
    two = _of_rows(table, torch.tensor([[0, 1, 2], [0, 0, 1]]), 3)
    torch.testing.assert_close(two[:, 0, 0], torch.stack([torch.tensor(1.75).cos(), torch.tensor(1.75).sin()]))
    assert torch.equal(two[:, 1], table[:, 0])


def test_what_is_read_is_the_sink_the_past_and_the_window_and_bytes_are_bounded() -> None:
    net, (x, t, cond) = compressing(3, amount=0.3), inputs(frames=20)
    memory, sizes = KVCache.empty(SHORT, 1), []
    for part, times in zip(x.split(1, 2), t.split(1, 1), strict=True):
        memory = memory.commit(net(part, times, cond, Call(kv=net.recall(memory, part))).kv or (), 1)
        sizes.append(memory.nbytes)
    read = memory.read()
    assert read.rows is not None
    found = [(int(read.positions[slot]), count) for slot, _, count in read.rows.tolist()]
    assert found == [(0, 1)] * 6 + [(f, 3) for f in (15, 16, 17) for _ in range(2)] + [
        (f, 1) for f in (18, 19) for _ in range(6)
    ]
    token = 2 * 3 * 2 * 18 * 8 * 2  # keys and values of three layers, two heads of 18 channels, two clips
    assert max(sizes) == sizes[-1] == sizes[6] == token * (6 + 2 * (6 + 2) + 3 * 2)


def test_training_on_clips_reaches_the_queries() -> None:
    """Chunk by chunk, through what is remembered; not in one call, which cannot have this memory."""
    model = streaming_model(Stream())
    student = repattern(model.denoiser, CompressCausal(ratio=2)).requires_grad_(True)
    for block in student.backbone.blocks:
        shaken(block.attention.operation, 0.1)
    stream = Stream(memory=CompressedMemory(window=2, sink=0, past=2, ratio=2))
    cond = model.conditions(PROMPTS)[0]
    batch = Batch(cond, cond, (4, FRAMES, 8, 8), x0=Rng(0).randn((2, 4, FRAMES, 8, 8), "x0"))
    nets = Nets({"student": student, "teacher": student})
    method = FlowMatching(history=TeacherForced(stream=stream, apart=True))
    (losses,) = method.student_loss(nets, batch, Rng(0))
    losses["flow"].backward()
    for block in student.backbone.blocks:
        for name, parameter in block.attention.operation.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    with pytest.raises(ValueError, match="remembers by CompressedMemory.*TeacherForced with apart: true"):
        list(FlowMatching(history=TeacherForced(stream=stream)).student_loss(nets, batch, Rng(0)))


@pytest.mark.parametrize("stream", [Stream(), Stream(window=3, sink=1), Stream(chunks=(2,), window=4)], ids=str)
def test_chunks_apart_are_chunks_of_one_call(stream: Stream) -> None:
    """Where both can be: equal predictions."""
    model = streaming_model(stream)
    model.denoiser.double()
    x0, x_t = (Rng(0).randn((2, 4, 6, 8, 8), name).double() for name in ("x0", "x_t"))
    t = torch.rand(2, 6 // stream.chunks[0], dtype=torch.float64).repeat_interleave(stream.chunks[0], 1)
    cond = model.conditions(PROMPTS)[0]
    both = [
        TeacherForced(stream=stream, apart=apart).over(model.denoiser, x0)(x_t, t, cond).raw for apart in (True, False)
    ]
    torch.testing.assert_close(*both, atol=1e-10, rtol=0)


def test_a_memory_by_pose_is_trained_on_clips() -> None:
    """Each chunk is told its poses, and reads the frames that it would read in a stream."""
    stream = Stream(memory=Facing(frames=1, recent=1, sink=0, reach=1.0))
    model = streaming_model(stream)
    cond, x = model.conditions(PROMPTS)[0], Rng(0).randn((2, 4, 4, 8, 8), "x")

    def predicted(places: Tensor) -> Tensor:
        pose = torch.cat([places[None, :, None].expand(2, -1, 3), torch.tensor([0.0, 0, 1]).expand(2, 4, -1)], 2)
        told = cond.with_extra({"pose": pose}, framewise=True)
        return TeacherForced(stream=stream, apart=True).over(model.denoiser, x)(x, torch.full((2, 4), 0.5), told).raw

    back, on = predicted(torch.tensor([0.0, 5, 9, 0])), predicted(torch.tensor([0.0, 5, 9, 5]))
    assert torch.equal(back[:, :, :3], on[:, :, :3]) and not torch.equal(back[:, :, 3], on[:, :, 3])


def test_a_stream_is_restored_bit_for_bit() -> None:
    stream = Stream(memory=CompressedMemory(window=3, sink=1, past=2, ratio=2))
    model = streaming_model(stream)
    model = model.with_part(
        "denoiser", repattern(model.denoiser, CompressCausal(ratio=2)), contract=model.card.contract
    )
    session = Session(model, PROMPTS)
    made(session, 5)
    paused = session.snapshot
    rest = made(session, 2)
    assert all(torch.equal(a, b) for a, b in zip(made(Session(model, paused), 2), rest, strict=True))


def test_what_does_not_fit_together_is_refused() -> None:
    x, t, cond = inputs(frames=2)
    net = compressing(3)
    with pytest.raises(ValueError, match="one chunk of 1 frames, not 2"):
        net(x, t, cond)
    one, time = x[:, :, :1], t[:, :1]
    for network, keep in ((net, Window(window=3)), (small(BlockCausal()), SHORT), (net, replace(SHORT, ratio=1))):
        memory = KVCache.empty(keep)
        if keep == Window(window=3):
            memory = memory.commit(net(one, time, cond, Call(kv=net.recall(KVCache.empty(), one))).kv or (), 1)
        with pytest.raises(ValueError, match="give the network the pattern CompressCausal, and the stream memory"):
            network(one, time, cond, Call(kv=network.recall(memory, one)))
    with pytest.raises(ValueError, match="a row of 3 tokens has no groups of 2"):
        compressing(2)(one, time, cond)
    with pytest.raises(
        ValueError, match=r"7 tokens of a frame are not its own and one for each 3.*CompressCausal\(ratio=3\)"
    ):
        KVCache.empty(SHORT).commit(((torch.zeros(1, 1, 7, 2), torch.zeros(1, 1, 7, 2)),), 1)
    with pytest.raises(ValueError, match="leave recompute and rolling out"):
        TeacherForced(stream=Stream(window=3, recompute=True), apart=True)
