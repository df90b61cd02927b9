"""Networks: identities in float64, equivalences of one forward in its several uses, codecs and encoders."""

from __future__ import annotations

import copy
import json
import shutil
import zlib
from dataclasses import replace
from typing import TypeVar
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from fewstep.attention import BlockCausal, Dense, Grid3, Importance, Int8Memory, Keep, KVCache, Window
from fewstep.attention.pattern import Pattern
from fewstep.core import Call, Cond, KVView, RecipeError
from fewstep.diffusion import RectifiedFlow
from fewstep.models import (
    NETWORKS,
    BlockHead,
    ClipFeatures,
    Denoiser,
    FeatureHeads,
    FrameAutoencoder,
    JointHead,
    QueryHead,
    Spec,
    TextEncoder,
    VideoDiT,
    VideoModel,
)  # fmt: skip
from fewstep.models.rotary import FrameRotary, turn_pairs
from fewstep.models.spread import Spread
from fewstep.models.video_dit import patchify, unpatchify

FRAMES, TEXT = 6, 16
Network = TypeVar("Network", bound=nn.Module)


def awake(network: Network, seed: int = 0) -> Network:
    """The network with every parameter moved, so that no zero-initialised gate hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return network


def small(pattern: Pattern = Dense(), width: int = 36, **args: int) -> VideoDiT:
    torch.manual_seed(0)
    net = VideoDiT(channels=3, width=width, depth=3, heads=2, text_width=TEXT, pattern=pattern, **args)
    return awake(net).double()


def denoiser(pattern: Pattern = Dense(), **args: int) -> Denoiser:
    return Denoiser(small(pattern, **args), RectifiedFlow(), "flow")


def inputs(batch: int = 2, frames: int = FRAMES) -> tuple[Tensor, Tensor, Cond]:
    """Latents, a time per frame, and prompts of different lengths."""
    torch.manual_seed(1)
    mask = torch.arange(5)[None] < torch.tensor([3, 5])[:batch, None]
    cond = Cond(torch.randn(batch, 5, TEXT, dtype=torch.float64), mask)
    return torch.randn(batch, 3, frames, 4, 6, dtype=torch.float64), torch.rand(batch, frames).double(), cond


def far(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-4)


def test_default_size_and_zero_start() -> None:
    net = VideoDiT()
    assert 2e6 < sum(p.numel() for p in net.parameters()) < 5e6
    cond = Cond(torch.randn(1, 24, 128), torch.ones(1, 24, dtype=torch.bool))
    x = torch.randn(1, 4, 2, 8, 8)
    state = net.embed(x, torch.rand(1), cond)
    assert torch.equal(net.blocks[0](state).x_BNE, state.x_BNE)
    assert not net(x, torch.rand(1), cond).raw.any()


def test_every_parameter_learns_once_awake() -> None:
    net = small()
    x, t, cond = inputs()
    net(x, t, cond).raw.square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_block_is_its_equation() -> None:
    """`x + gate attention(norm(x) (1 + scale) + shift)`, then the text, then the MLP; written out, in order."""
    net, (x, t, cond) = small(), inputs(batch=1)
    state, block = net.embed(x, t[:, 0], cond), net.blocks[1]
    made = block(state).x_BNE
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (block.table + state.context.modulation_BG6E)[0, 0]

    def norm(y: Tensor) -> Tensor:
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    def heads(y: Tensor, scale: Tensor | None = None) -> Tensor:
        y = y.reshape(1, -1, 2, 18).transpose(1, 2)
        return y if scale is None else y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale

    def turned(y: Tensor) -> Tensor:
        cos, sin = FrameRotary(18, 100.0).table(torch.arange(FRAMES), state.grid, y)
        pairs = torch.complex(y[..., :9], y[..., 9:]) * torch.complex(cos, sin)
        return torch.cat([pairs.real, pairs.imag], -1)

    def read(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = q @ k.mT / 18**0.5
        return ((scores if mask is None else scores.where(mask, -torch.inf)).softmax(-1) @ v).transpose(1, 2).flatten(2)

    y, own, cross = state.x_BNE, block.attention, block.cross
    q, k, v = own.qkv(norm(y) * (1 + scale_a) + shift_a).chunk(3, -1)
    mixed = read(turned(heads(q, own.query_scale)), turned(heads(k, own.key_scale)), heads(v))
    y = y + gate_a * own.out(mixed)
    k, v = cross.kv(cond.text).chunk(2, -1)
    q = heads(cross.q(norm(y)), cross.query_scale)
    y = y + cross.out(read(q, heads(k, cross.key_scale), heads(v), cond.mask[:, None, None]))
    y = y + gate_m * block.mlp(norm(y) * (1 + scale_m) + shift_m)
    torch.testing.assert_close(made, y, rtol=1e-9, atol=1e-9)


def test_time_reaches_the_head() -> None:
    net, (x, t, cond) = small(), inputs()
    state = net.embed(x, t[:, 0], cond)
    later = replace(state, time_BGE=net.embed(x, t[:, 0] + 0.3, cond).time_BGE)
    assert far(net.head(later), net.head(state))


def test_blocks_are_computed_again_only_where_asked_for() -> None:
    net, (x, t, cond) = small(), inputs()
    calls: list[int] = []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointing, expected in ((False, 3), (True, 6)):
        calls.clear()
        net(x, t, cond, Spread(checkpointing=checkpointing)(Call())).raw.sum().backward()
        assert len(calls) == expected
    calls.clear()
    with torch.no_grad():
        net(x, t, cond, Spread(checkpointing=True)(Call()))
    assert len(calls) == 3


def test_one_time_per_clip_is_the_same_time_on_every_frame() -> None:
    net, (x, t, cond) = small(), inputs()
    per_clip, per_frame = net(x, t[:, 0], cond).raw, net(x, t[:, :1].expand(-1, FRAMES), cond).raw
    torch.testing.assert_close(per_clip, per_frame, atol=1e-12, rtol=0)
    assert far(per_frame, net(x, t, cond).raw)
    with pytest.raises(ValueError, match="time must be"):
        net(x, t[:, :2], cond)


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_causal_forward_equals_streaming_with_cache(chunk: int) -> None:
    """The last chunk may be short; every chunk is committed with its own time."""
    net, (x, t, cond) = small(BlockCausal(chunk=chunk)), inputs()
    whole, cache, parts = net(x, t, cond).raw, KVCache.empty(), []
    for start in range(0, FRAMES, chunk):
        now = slice(start, start + chunk)
        out = net(x[:, :, now], t[:, now], cond, Call(kv=net.recall(cache, x)))
        assert out.kv is not None
        cache = cache.commit(out.kv, x[:, :, now].shape[2])
        parts.append(out.raw)
    assert cache.start == FRAMES and cache.positions.tolist() == list(range(FRAMES))
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-10, rtol=0)


def test_streaming_several_chunks_at_once() -> None:
    net, (x, t, cond) = small(BlockCausal(chunk=2)), inputs()
    first = net(x[:, :, :2], t[:, :2], cond, Call(kv=net.recall(KVCache.empty(), x)))
    rest = net(x[:, :, 2:], t[:, 2:], cond, Call(kv=net.recall(KVCache.empty().commit(first.kv, 2), x)))
    torch.testing.assert_close(rest.raw, net(x, t, cond).raw[:, :, 2:], atol=1e-10, rtol=0)


def test_the_past_and_its_distance_matter() -> None:
    net, (x, t, cond) = small(BlockCausal(chunk=1)), inputs()
    first = net(x[:, :, :1], t[:, :1], cond, Call(kv=net.recall(KVCache.empty(), x)))
    here, there = (
        net(x[:, :, 1:2], t[:, 1:2], cond, Call(kv=net.recall(KVCache.empty().commit(first.kv, 1), x))).raw,
        net(x[:, :, 1:2], t[:, 1:2], cond, Call(kv=net.recall(KVCache.empty(), x))).raw,
    )
    assert far(here, there)
    swapped = net(x[:, :, [1, 0, 2, 3, 4, 5]], t[:, [1, 0, 2, 3, 4, 5]], cond).raw
    assert far(swapped[:, :, 5], net(x, t, cond).raw[:, :, 5])


def streamed(net: VideoDiT, memory: KVCache, x: Tensor, t: Tensor, cond: Cond, chunk: int) -> Tensor:
    parts = []
    for part, times in zip(x.split(chunk, 2), t.split(chunk, 1), strict=True):
        out = net(part, times, cond, Call(kv=net.recall(memory, part)))
        assert out.kv is not None
        memory = memory.commit(out.kv, part.shape[2])
        parts.append(out.raw)
    return torch.cat(parts, 2)


@pytest.mark.parametrize(("chunk", "window", "sink"), [(1, 3, 0), (1, 3, 1), (2, 4, 1), (2, 5, 3)])
def test_a_window_with_sink_is_one_masked_forward(chunk: int, window: int, sink: int) -> None:
    """To three times the window; the last chunk may be short."""
    pattern = BlockCausal(chunk=chunk, window=window, sink=sink)
    net, (x, t, cond) = small(pattern), inputs(frames=3 * window)
    whole = net(x, t, cond).raw
    torch.testing.assert_close(streamed(net, pattern.begin(), x, t, cond, chunk), whole, atol=1e-10, rtol=0)
    assert far(whole, small(BlockCausal(chunk=chunk))(x, t, cond).raw)


def test_without_a_sink_only_distances_count() -> None:
    """A window that is re-indexed is the same model where there is no sink, and another one where there is."""
    net, (x, t, cond) = small(BlockCausal()), inputs(frames=9)
    for sink, alike in ((0, True), (1, False)):
        kept = [
            streamed(net, KVCache.empty(Window(window=4, sink=sink), standing=on), x, t, cond, 1)
            for on in ("absolute", "window")
        ]
        assert far(*kept) != alike
        if alike:
            torch.testing.assert_close(*kept, atol=1e-10, rtol=0)


def test_streams_of_different_age_share_a_call() -> None:
    net, keep = small(BlockCausal()), Window(window=4, sink=1)
    x, t, cond = inputs(frames=7)
    memories = []
    for row, age in ((0, 2), (1, 6)):
        memory = KVCache.empty(keep)
        for frame in range(age):
            now = slice(frame, frame + 1)
            part = x[row : row + 1, :, now]
            out = net(part, t[row : row + 1, now], cond[row : row + 1], Call(kv=net.recall(memory, part)))
            memory = memory.commit(out.kv, 1)
        memories.append(memory)
    now, both = x[:, :, 6:], KVCache.batch(memories)
    together = net(now, t[:, 6:], cond, Call(kv=net.recall(both, now))).raw
    for row, memory in enumerate(memories):
        one = slice(row, row + 1)
        alone = net(now[one], t[one, 6:], cond[one], Call(kv=net.recall(memory, now[one]))).raw
        torch.testing.assert_close(together[one], alone, atol=1e-12, rtol=0)
    nobody = KVCache.empty(keep)
    assert far(together[:1], net(now[:1], t[:1, 6:], cond[:1], Call(kv=net.recall(nobody, now[:1]))).raw)


@pytest.mark.parametrize(
    "keep", [Window(window=5, sink=1), Importance(window=5), Int8Memory(keep=Window(window=5))], ids=str
)
def test_one_compiled_graph_serves_every_fill_of_a_ring(keep: Keep) -> None:
    """The first chunk has no past; from the second on every chunk, every block and every age has the same graph."""
    net, (x, t, cond) = small(BlockCausal()), inputs(frames=9)
    plain, counter = streamed(net, KVCache.empty(keep), x, t, cond, 1), CompileCounter()
    torch._dynamo.reset()
    for block in net.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(streamed(net, KVCache.empty(keep), x, t, cond, 1), plain, atol=1e-10, rtol=0)
    assert counter.frame_count == 2


def test_the_past_is_turned_once_for_all_calls_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, t, cond) = small(BlockCausal()), inputs(frames=3)
    first = net(x[:, :, :2], t[:, :2], cond, Call(kv=net.recall(KVCache.empty(), x)))
    view, turned = net.recall(KVCache.empty().commit(first.kv, 2), x[:, :, 2:]), []
    turn = FrameRotary.turn
    monkeypatch.setattr(FrameRotary, "turn", lambda self, x, table: turned.append(x.shape[2]) or turn(self, x, table))
    net(x[:, :, 2:], t[:, 2:], cond, Call(kv=view))
    assert set(turned) == {6}  # tokens of the one new frame


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_nothing_leaks_from_the_future(chunk: int) -> None:
    net, (x, t, cond) = small(BlockCausal(chunk=chunk)), inputs()
    for frame in (2, 5):
        other_x, other_t = x.clone(), t.clone()
        other_x[:, :, frame] += 1
        other_t[:, frame] += 0.3
        before, after, safe = net(x, t, cond).raw, net(other_x, other_t, cond).raw, frame // chunk * chunk
        assert torch.equal(before[:, :, :safe], after[:, :, :safe])
        for later in range(safe, FRAMES):
            assert far(before[:, :, later], after[:, :, later])


def test_one_chunk_is_dense() -> None:
    x, t, cond = inputs()
    causal, dense = small(BlockCausal(chunk=FRAMES)), small(Dense())
    torch.testing.assert_close(causal(x, t, cond).raw, dense(x, t, cond).raw, atol=1e-12, rtol=0)
    assert far(small(BlockCausal(chunk=2))(x, t, cond).raw, dense(x, t, cond).raw)


def test_output_kv_only_when_a_view_is_given() -> None:
    net, (x, t, cond) = small(), inputs()
    assert net(x, t, cond).kv is None
    made = net(x, t, cond, Call(kv=net.recall(KVCache.empty(), x)))
    assert made.kv is not None
    assert len(made.kv) == 3
    assert made.kv[0][0].shape == (2, 2, FRAMES * 6, 18)
    torch.testing.assert_close(made.raw, net(x, t, cond).raw, atol=1e-12, rtol=0)


def test_a_view_that_offers_nothing_has_no_past() -> None:
    view = KVView((), torch.arange(3), torch.tensor(3))
    assert view.slots == 0 and view.layer(2) is None


def test_masked_text_is_not_read_and_real_text_is() -> None:
    net, (x, t, cond) = small(), inputs()
    out = net(x, t, cond).raw
    padding, words = cond.text.clone(), cond.text.clone()
    padding[~cond.mask] = 100.0
    assert torch.equal(net(x, t, Cond(padding, cond.mask)).raw, out)
    words[:, 1] += 1
    assert far(net(x, t, Cond(words, cond.mask)).raw, out)
    pooled_only = words.clone()
    pooled_only[:, 0], pooled_only[:, 1] = cond.text[:, 1], cond.text[:, 0]
    assert torch.allclose(
        net(x, t, Cond(pooled_only, cond.mask)).raw, out
    )  # words carry no order here: the encoder adds it


def test_clips_of_a_batch_do_not_meet() -> None:
    net, (x, t, cond) = small(), inputs()
    torch.testing.assert_close(net(x[1:], t[1:], cond[1:]).raw, net(x, t, cond).raw[1:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_position_matters_along_every_axis(axis: int) -> None:
    """Without positions, rolling the tokens would roll the output."""
    net, (x, t, cond) = small(), inputs()
    shift = 1 if axis == 2 else 2
    rolled = net(x.roll(shift, axis), t[:, 0], cond).raw.roll(-shift, axis)
    assert far(rolled, net(x, t[:, 0], cond).raw)


def test_only_differences_of_position_are_read() -> None:
    q, k = torch.randn(2, 1, 1, 24, 18, dtype=torch.float64)
    rotary = FrameRotary(18, 100.0, halves=True)
    rotate = rotary.turn
    early, late = (rotary.table(start + torch.arange(4), Grid3(4, 2, 3), q) for start in (0, 5))
    scores = rotate(q, early) @ rotate(k, early).mT
    torch.testing.assert_close(rotate(q, late) @ rotate(k, late).mT, scores, atol=1e-10, rtol=0)
    assert far(rotate(q, late) @ rotate(k, early).mT, scores)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiling", [False, True])
def test_pairs_turn_by_the_formula_in_every_type(dtype: torch.dtype, compiling: bool) -> None:
    """As complex numbers, or by the formula that the compiler takes."""
    x, angle = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    expected = torch.empty_like(x)
    for pair in range(4):
        c, s = angle[:, pair].cos(), angle[:, pair].sin()
        expected[..., 2 * pair] = x[..., 2 * pair] * c - x[..., 2 * pair + 1] * s
        expected[..., 2 * pair + 1] = x[..., 2 * pair] * s + x[..., 2 * pair + 1] * c
    with mock.patch.object(torch.compiler, "is_compiling", return_value=compiling):
        made = turn_pairs(x.to(dtype), torch.stack([angle.cos(), angle.sin()]).to(dtype))
    assert made.dtype == dtype
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(made.double(), expected, rtol=close, atol=close)


def test_wrong_latents_are_refused() -> None:
    _, t, cond = inputs()
    with pytest.raises(ValueError, match="multiples of 2"):
        small()(torch.zeros(2, 3, FRAMES, 5, 6).double(), t, cond)
    with pytest.raises(ValueError, match="even number"):
        VideoDiT(width=30, heads=2)


@pytest.mark.parametrize("per_frame", [False, True])
def test_jvp_is_the_derivative(per_frame: bool) -> None:
    net, (x, t, cond) = denoiser(), inputs()
    t = 0.2 + 0.6 * (t if per_frame else t[:, 0])
    dx, dt, h = torch.randn_like(x), torch.randn_like(t), 1e-6
    primal, tangent = net.jvp(x, t, cond, dx, dt)
    torch.testing.assert_close(primal.raw, net(x, t, cond).raw, atol=1e-12, rtol=0)
    difference = (net(x + h * dx, t + h * dt, cond).raw - net(x - h * dx, t - h * dt, cond).raw) / (2 * h)
    assert (tangent.raw - difference).norm() / difference.norm() < 1e-6
    primal.raw.square().sum().backward()
    assert net.backbone.patches.weight.grad.any()


def test_time_derivative_is_tame() -> None:
    """The fastest feature turns 100 radians per unit of t, in the float32 of training too."""
    net = VideoDiT(depth=2)
    awake(net)
    cond = Cond(torch.randn(1, 3, 128), torch.ones(1, 3, dtype=torch.bool))
    x, t = torch.randn(1, 4, 2, 4, 4), torch.tensor([0.5])
    _, tangent = Denoiser(net, RectifiedFlow(), "flow").jvp(x, t, cond, torch.zeros_like(x), torch.ones(1))
    assert tangent.raw.isfinite().all()
    assert tangent.raw.abs().max() < 100 * net(x, t, cond).raw.abs().max()


def test_features_stop_early_and_carry_gradient() -> None:
    net, (x, t, cond) = denoiser(), inputs()
    x.requires_grad_()
    last, first = net.features(x, t, cond, [-1, 0])
    assert last.shape == first.shape == (2, 36, FRAMES, 2, 3)
    state = net.backbone.embed(x, t, cond)
    first_state = net.backbone.blocks[0](state)
    assert torch.equal(first[1, :, 2, 1, 2], first_state.x_BNE[1, 2 * 6 + 1 * 3 + 2])
    last_state = net.backbone.blocks[2](net.backbone.blocks[1](first_state))
    assert torch.equal(last[1, :, 2, 1, 2], last_state.x_BNE[1, 2 * 6 + 1 * 3 + 2])
    first.square().sum().backward()
    assert x.grad.any()
    net.backbone.blocks[1].forward = net.backbone.blocks[2].forward = None
    assert torch.equal(net.features(x, t, cond, [0])[0], first)
    for bad in ([], [3], [-4]):
        with pytest.raises(ValueError, match="layers"):
            net.features(x, t, cond, bad)


def test_head_inverts_the_patching_of_embed() -> None:
    x = torch.randn(2, 3, 4, 6, 8)
    tokens = patchify(x, 2)
    assert torch.equal(tokens[0, 1 * 12 + 2 * 4 + 3], x[0, :, 1, 4:6, 6:8].flatten())
    assert torch.equal(unpatchify(tokens, Grid3(4, 3, 4), 2), x)


def test_autocast_keeps_float32_at_the_ends() -> None:
    net = Denoiser(awake(VideoDiT(depth=2)), RectifiedFlow(), "flow")
    cond = Cond(torch.randn(2, 3, 128), torch.ones(2, 3, dtype=torch.bool))
    x, t = torch.randn(2, 4, 2, 8, 8), torch.rand(2)
    exact = net(x, t, cond).raw
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(x, t, cond).raw
        start = net.backbone.embed(x, t, cond).x_BNE
    precise = copy.deepcopy(net.backbone).double().embed(x.double(), t.double(), cond).x_BNE
    torch.testing.assert_close(start.double(), precise, rtol=1e-5, atol=1e-5)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() / exact.norm() < 0.05


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_equal_eager_ones_and_copies_start_eager() -> None:
    net, (x, t, cond) = denoiser(), inputs()
    twin = copy.deepcopy(net)
    net.backbone.compile_blocks()
    torch.testing.assert_close(net(x, t, cond).raw, twin(x, t, cond).raw, atol=1e-10, rtol=0)
    clone = copy.deepcopy(net)
    assert clone.state_dict().keys() == twin.state_dict().keys()
    awake(clone, seed=3)
    assert far(clone(x, t, cond).raw, net(x, t, cond).raw)
    dx, dt = torch.randn_like(x), torch.ones_like(t)
    torch.testing.assert_close(net.jvp(x, t, cond, dx, dt)[1].raw, twin.jvp(x, t, cond, dx, dt)[1].raw)


def test_feature_heads() -> None:
    heads = FeatureHeads([32, 16], [0, -1])
    volumes = [torch.randn(3, 32, 4, 8, 8, requires_grad=True), torch.randn(3, 16, 4, 4, 4, requires_grad=True)]
    logits = heads(volumes)
    assert logits.shape == (3, 2)
    logits[:, 0].sum().backward()
    assert volumes[0].grad.any()
    assert not volumes[1].grad.any()
    assert heads([torch.randn(1, 32, 1, 4, 4), torch.randn(1, 16, 1, 2, 2)]).shape == (1, 2)
    head = heads.heads[1]
    torch.testing.assert_close(logits[:, 1:], head.logit(head.convs(volumes[1]).mean((2, 3, 4))))
    with pytest.raises(ValueError, match="shorter"):
        heads(volumes[:1])


def test_autoencoder_is_equivariant_on_the_torus() -> None:
    codec = awake(FrameAutoencoder(width=16)).double()
    codec.set_statistics(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    frames = torch.rand(2, 3, 3, 16, 24).double() * 2 - 1
    latents = codec.encode(frames)
    assert latents.shape == (2, *codec.latent_shape(3, 16, 24))
    shifted = codec.encode(frames.roll((4, -8), (3, 4)))
    torch.testing.assert_close(shifted, latents.roll((1, -2), (3, 4)), atol=1e-10, rtol=0)
    again = codec.decode(latents.roll((1, -2), (3, 4)))
    torch.testing.assert_close(again, codec.decode(latents).roll((4, -8), (3, 4)), atol=1e-10, rtol=0)
    assert far(codec.encode(frames.roll(1, 4)), latents)


def test_autoencoder_statistics_and_frames() -> None:
    codec = awake(FrameAutoencoder(width=16)).double()
    frames = torch.rand(2, 3, 3, 16, 16).double()
    raw = codec.encode_raw(frames)
    codec.set_statistics(raw.mean((0, 2, 3, 4)), raw.std((0, 2, 3, 4)))
    latents = codec.encode(frames)
    assert latents.mean((0, 2, 3, 4)).abs().max() < 1e-6
    assert (latents.std((0, 2, 3, 4)) - 1).abs().max() < 1e-6
    torch.testing.assert_close(codec.decode(latents), codec.decode_raw(raw), atol=1e-10, rtol=0)
    for clip, frame in ((0, 1), (1, 0), (1, 2)):
        alone = codec.encode(frames[clip : clip + 1, :, frame : frame + 1])
        torch.testing.assert_close(alone, latents[clip : clip + 1, :, frame : frame + 1], atol=1e-12, rtol=0)
    assert {"mean", "std"} <= codec.state_dict().keys()
    with pytest.raises(ValueError, match="positive"):
        codec.set_statistics(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="multiples of 4"):
        codec.latent_shape(1, 30, 32)


def test_text_encoder_reads_any_text() -> None:
    encoder = TextEncoder(attribute_sizes=(6, 8))
    prompts = ["", "a small red ring", "Ein kleiner roter Ring", "小さな赤い輪", "🙂 !?", "word " * 100]
    cond = encoder.encode(prompts)
    assert cond.text.shape == (6, 24, 128)
    assert cond.mask.sum(1).tolist() == [1, 5, 5, 2, 1, 24]
    assert [logits.shape for logits in encoder.classify(cond)] == [(6, 6), (6, 8)]
    assert torch.equal(encoder.tokens(["A Small RED ring!"]), encoder.tokens(["a small red ring"]))
    assert zlib.crc32(b"bright") % 4096 == zlib.crc32(b"dark") % 4096
    assert not torch.equal(encoder.tokens(["bright"]), encoder.tokens(["dark"]))
    assert encoder.encode([]).text.shape == (0, 24, 128)


def test_text_padding_does_not_leak_and_order_matters() -> None:
    encoder = TextEncoder().double()
    alone = encoder.encode(["red ring"])
    with torch.no_grad():
        encoder.words.weight[0] += 100
    assert torch.equal(encoder.encode(["red ring"]).text, alone.text)
    assert not alone.text[:, 3:].any()
    together = encoder.encode(["red ring", "a much longer prompt with many words"])
    torch.testing.assert_close(together.text[0], alone.text[0], atol=1e-12, rtol=0)
    assert far(encoder.encode(["ring red"]).text[:, 0], alone.text[:, 0])


def test_clip_features_see_motion() -> None:
    torch.manual_seed(0)
    eye = ClipFeatures(attribute_sizes=(3,)).double()
    frame = torch.rand(1, 3, 32, 32).double()
    right = torch.stack([frame.roll(2 * i, 3) for i in range(8)], 2)
    features = eye(right)
    assert features.shape == (1, eye.width) == (1, 128)
    volume = nn.functional.silu(eye.norm(eye.blocks(eye.stem(right))))
    assert volume.shape[2] == 2
    torch.testing.assert_close(features, volume.mean((2, 3, 4)))
    assert far(eye(right.flip(2)), features)
    assert eye.classify(right)[0].shape == (1, 3)
    assert eye(right[:, :, :1]).shape == (1, 128)
    torch.testing.assert_close(eye(right.roll(8, 4)), features, atol=1e-10, rtol=0)


def test_joint_head_brings_layers_of_any_size_and_width_together() -> None:
    head = JointHead([32, 8, 16])
    volumes = [torch.randn(2, 32, 3, 8, 8), torch.randn(2, 8, 3, 8, 8), torch.randn(2, 16, 3, 4, 4)]
    volumes = [volume.requires_grad_() for volume in volumes]
    logits = head(volumes)
    assert logits.shape == (2, 3 * 2 * 2)
    assert logits.min() < 0 < logits.max(), "logits, not probabilities"
    logits[:, 0].sum().backward()
    assert all(volume.grad is not None and volume.grad.any() for volume in volumes)


@pytest.mark.parametrize("kind", [FeatureHeads, JointHead])
def test_heads_of_convolutions_see_the_order_of_frames(kind: type[nn.Module]) -> None:
    """A head that sees single frames gives a clip the same mean logit in any order, and teaches no motion (SF-V, 2406.04324)."""
    torch.manual_seed(0)
    head = (FeatureHeads([16, 8], [0, -1]) if kind is FeatureHeads else JointHead([16, 8])).double()
    volumes = [torch.randn(2, width, 4, 8, 8, dtype=torch.float64) for width in (16, 8)]
    mixed = head([volume[:, :, [2, 0, 3, 1]] for volume in volumes])
    assert ((mixed.mean(1) - head(volumes).mean(1)).abs() > 1e-6).all()


def test_block_head_is_attention_of_all_patches_at_the_coarsest_size() -> None:
    torch.manual_seed(0)
    head = BlockHead([32, 8], hidden=24, heads=2)
    volumes = [torch.randn(2, 32, 3, 4, 4), torch.randn(2, 8, 3, 2, 2)]
    assert torch.equal(head(volumes), torch.zeros(2, 3 * 2 * 2)), "fresh, it has no opinion"
    head = awake(head)
    plain = head(volumes)
    volumes = [volume.requires_grad_() for volume in volumes]
    head(volumes)[:, 0].sum().backward()
    assert all(volume.grad is not None and volume.grad.flatten(3).any(-1).any(1).all() for volume in volumes), (
        "each logit has seen all frames of all layers"
    )
    assert torch.allclose(head([volumes[0] * 5, volumes[1]]), plain, atol=1e-4), (
        "layers count alike, whatever their scale"
    )
    turned = head([volume.flip(2) for volume in volumes]).unflatten(1, (3, 4)).flip(1).flatten(1)
    assert far(turned, plain), "the order of frames counts"
    assert torch.allclose(head([volume[1:] for volume in volumes]), plain[1:], atol=1e-5), "clips do not see each other"


def test_a_query_head_is_attention_of_one_learned_query_per_layer() -> None:
    """Softmax attention written out, for one head; a fresh network says 0."""
    torch.manual_seed(0)
    head, volumes = QueryHead([6, 8], hidden=4, heads=1), [torch.randn(2, 6, 3, 4, 4), torch.randn(2, 8, 3, 2, 2)]
    assert torch.equal(head(volumes), torch.zeros(2, 1)), "fresh, it has no opinion"
    head, found = awake(head), []
    for query, volume in zip(head.queries, volumes, strict=True):
        tokens = F.layer_norm(F.adaptive_avg_pool3d(volume, (3, 2, 2)).flatten(2).transpose(1, 2), volume.shape[1:2])
        k, v = query.key_value(tokens).chunk(2, -1)
        share = (k @ query.query.flatten() / 2).softmax(-1)
        found.append(query.out((share[..., None] * v).sum(1)))
    wanted = head.logit(F.layer_norm(torch.cat(found, -1), (8,)))
    assert wanted.abs().min() > 1e-3 and torch.allclose(head(volumes), wanted, atol=1e-5)
    head(volumes).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


def test_a_framewise_query_head_judges_each_frame_by_itself() -> None:
    torch.manual_seed(0)
    head, whole = (awake(QueryHead([6, 8], hidden=8, heads=2, framewise=each)) for each in (True, False))
    volumes = [torch.randn(2, width, 3, 2, 2) for width in (6, 8)]
    logits = head(volumes)
    assert logits.shape == (2, 3) and whole(volumes).shape == (2, 1)
    whole.load_state_dict(head.state_dict())
    alone = [whole([volume[:, :, f : f + 1] for volume in volumes]) for f in range(3)]
    assert torch.allclose(logits, torch.cat(alone, 1), atol=1e-6), "one query, frame by frame"
    assert Spec.of(head).build()(volumes).shape == (2, 3), "also when it is built again"
    assert far(alone[0], alone[1])


EXAMPLES = (
    small(BlockCausal(chunk=2)),
    FeatureHeads([16, 8], [1, -1]),
    JointHead([16, 24]),
    BlockHead([16, 24], hidden=32, heads=2),
    QueryHead([16, 24], hidden=32, heads=2, framewise=True),
    FrameAutoencoder(width=16),
    TextEncoder(attribute_sizes=(2, 3)),
    ClipFeatures(width=16),
)


@pytest.mark.parametrize("network", EXAMPLES, ids=lambda n: type(n).__name__)
def test_spec_builds_the_same_network(network: nn.Module) -> None:
    spec = Spec.of(network)
    built = Spec(spec.type, json.loads(json.dumps(spec.args))).build()
    assert type(built) in NETWORKS
    assert Spec.of(built) == spec
    built.load_state_dict(network.state_dict())
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in network.named_parameters()}
    if isinstance(built, VideoDiT):
        assert built.pattern == BlockCausal(chunk=2)


def test_spec_refuses_the_unknown_and_suggests() -> None:
    with pytest.raises(RecipeError, match="did you mean VideoDiT"):
        Spec("VideoDit").build()
    with pytest.raises(RecipeError, match="did you mean width"):
        Spec("VideoDiT", {"widht": 8}).build()


@pytest.mark.parametrize("prompts", ["a red ball", []])
def test_one_text_is_no_list_of_prompts(prompts: list[str]) -> None:
    """It would be as many clips as it has letters."""
    with pytest.raises(ValueError, match="prompts are a list of texts, one for each clip"):
        VideoModel.from_pretrained("world")(prompts, num_inference_steps=1)
