"""A window and a state of what has left it: the rule, its parallel form, and a stream that equals one call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fewstep.attention import BlockCausal, Grid3, KVCache, Site, StateCausal, StateMemory, Window
from fewstep.attention.delta_rule import BLOCK, folded
from fewstep.core import Batch, Call, KVView, Rng
from fewstep.core.call import Causal
from fewstep.diffusion import Stream
from fewstep.methods import FlowMatching
from fewstep.methods.base import Nets
from fewstep.methods.histories import DiffusionForced, TeacherForced
from fewstep.models.repattern import repattern
from fewstep.models.video_dit import VideoDiT
from support_engine import FRAMES, shaken
from test_models import denoiser, far, inputs, small, streamed
from test_streaming import streaming_model

pytestmark = pytest.mark.usefixtures("single_thread")
PATTERNS = [StateCausal(window=3, sink=0), StateCausal(window=4, sink=1), StateCausal(chunk=2, window=6, sink=2)]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def fresh(pattern: StateCausal) -> VideoDiT:
    """The weights of `small(pattern.local)`, and new gates."""
    return repattern(denoiser(pattern.local), pattern).backbone  # type: ignore[return-value]


def learned(net: VideoDiT, strength: float | None = None) -> VideoDiT:
    """Off the zeros of its gates; with the strength 0 nothing is written."""
    for operation in operations(net):
        shaken(operation, 0.5)
        if strength == 0:
            operation.biases.data[0] = -math.inf
    return net


def operations(net: VideoDiT) -> Iterator[nn.Module]:
    return (block.attention.operation for block in net.blocks)  # type: ignore[union-attr, return-value]


def begun(pattern: StateCausal) -> KVCache:
    return KVCache.empty(pattern.memory, pattern.chunk)


@pytest.mark.parametrize("tokens", [1, 7, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize("decay", [0.0, 0.02, 3.0])
def test_many_tokens_at_once_are_the_recurrence(tokens: int, decay: float) -> None:
    """Token by token: M <- a M (I - b k k') + b v k', also where almost all is forgotten; with finite gradients."""
    rng = Rng(0)
    k, v = rng.randn((2, 3, tokens, 5), "k").double(), rng.randn((2, 3, tokens, 4), "v").double()
    start = rng.randn((2, 3, 4, 5), "M").double()
    gone, strength = -decay * rng.rand((2, 3, tokens), "a").double(), rng.rand((2, 3, tokens), "b").double()
    state, one = start, torch.eye(5).double()
    for t in range(tokens):
        key = (k[:, :, t] / k[:, :, t].norm(dim=-1, keepdim=True))[..., None]
        a, b = gone[:, :, t, None, None].exp(), strength[:, :, t, None, None]
        state = a * state @ (one - b * key @ key.mT) + b * v[:, :, t, :, None] @ key.mT
    k.requires_grad_()
    made = folded(start, k, v, gone, strength)
    torch.testing.assert_close(made, state, atol=1e-10, rtol=1e-10)
    single = folded(*(x.detach().float() for x in (start, k, v, gone, strength)))
    torch.testing.assert_close(single.double(), state, atol=1e-5, rtol=1e-4)
    made.sum().backward()
    assert k.grad is not None and torch.isfinite(k.grad).all()


def test_a_key_that_was_written_with_strength_one_gives_its_value_back() -> None:
    """The delta rule replaces what a key held before."""
    k, v = torch.eye(3, dtype=torch.float64)[None, None], torch.arange(9.0).double().view(1, 1, 3, 3)
    twice = torch.cat([k, k], 2), torch.cat([v, v + 10], 2)
    none, full = torch.zeros(1, 1, 6).double(), torch.ones(1, 1, 6).double()
    state = folded(torch.zeros(1, 1, 3, 3).double(), *twice, none, full)
    torch.testing.assert_close(k @ state.mT, v + 10)


@every_pattern
def test_without_strength_or_scale_it_is_the_window(pattern: StateCausal) -> None:
    """Bit for bit, in one call and chunk by chunk: fresh, and where nothing is ever written."""
    x, t, cond = inputs(frames=12)
    window = small(pattern.local)
    whole, parts = window(x, t, cond).raw, streamed(window, pattern.local.begin(), x, t, cond, pattern.chunk)
    for net in (fresh(pattern), learned(fresh(pattern), strength=0)):
        assert torch.equal(net(x, t, cond).raw, whole)
        assert torch.equal(streamed(net, begun(pattern), x, t, cond, pattern.chunk), parts)


@every_pattern
def test_a_stream_is_one_call_on_the_whole_clip(pattern: StateCausal) -> None:
    """To three times the window; also of streams of different age in one batch, and as training on clips makes it."""
    net, (x, t, cond) = learned(fresh(pattern)), inputs(frames=3 * pattern.window)
    whole = net(x, t, cond).raw
    torch.testing.assert_close(streamed(net, begun(pattern), x, t, cond, pattern.chunk), whole, atol=1e-10, rtol=0)
    assert far(whole, small(pattern.local)(x, t, cond).raw)
    lengths = (pattern.chunk,) * (x.shape[2] // pattern.chunk)
    causal = Causal(lengths, pattern.window - pattern.sink - pattern.chunk, pattern.sink)
    torch.testing.assert_close(net(x, t, cond, Call(causal=causal)).raw, whole, atol=1e-10, rtol=0)


@every_pattern
def test_a_state_changes_nothing_before_a_frame_has_left(pattern: StateCausal) -> None:
    net, (x, t, cond) = learned(fresh(pattern)), inputs(frames=3 * pattern.window)
    here, plain = net(x, t, cond).raw, small(pattern.local)(x, t, cond).raw
    assert torch.equal(here[:, :, : pattern.window], plain[:, :, : pattern.window])
    assert (here - plain)[:, :, pattern.window :].abs().amax((0, 1, 3, 4)).min() > 1e-6


def test_streams_of_different_age_are_one_batch() -> None:
    pattern = PATTERNS[1]
    net, (x, t, cond) = learned(fresh(pattern)), inputs(frames=9)
    alone = [streamed(net, begun(pattern), x[i : i + 1], t[i : i + 1], cond[i : i + 1], 1) for i in (0, 1)]
    memories = []
    for row, age in ((0, 2), (1, 8)):  # nothing has left the first
        memory, own = begun(pattern), slice(row, row + 1)
        for frame in range(age):
            part, time = x[own, :, frame : frame + 1], t[own, frame : frame + 1]
            out = net(part, time, cond[own], Call(kv=net.recall(memory, part)))
            memory = memory.commit(out.kv or (), 1)
        memories.append(memory)
    assert not memories[0].states[0].any() and memories[1].states[0].any()
    both, parts = KVCache.batch(memories), torch.stack([x[0, :, 2:3], x[1, :, 8:9]])
    made = net(parts, torch.stack([t[0, 2:3], t[1, 8:9]]), cond, Call(kv=net.recall(both, parts)))
    expected = torch.cat([alone[0][:, :, 2:3], alone[1][:, :, 8:9]])
    torch.testing.assert_close(made.raw, expected, atol=1e-10, rtol=0)
    grown = both.commit(made.kv or (), 1)
    for row, memory in enumerate(memories):
        own = tuple((k[row : row + 1], v[row : row + 1]) for k, v in made.kv or ())
        for state, its in zip(grown.states, memory.commit(own, 1).states, strict=True):
            torch.testing.assert_close(state[row : row + 1], its, atol=1e-12, rtol=0)


def test_what_is_read_of_a_state_by_hand() -> None:
    """Line 4 of the docstring, for one head and one query, with numbers."""
    operation = shaken(StateCausal(window=4, sink=1).operation(0, 1, 3), 1.0).double()
    q, state = torch.tensor([0.0, 3.0, 4.0]).double(), Rng(0).randn((3, 3), "M").double()
    made = operation.reading(q.view(1, 1, 1, 3), state.view(1, 1, 3, 3), torch.tensor(6))[0, 0, 0]
    found = state @ (q / 5)
    found = found / (found.square().mean() + 1e-6).sqrt() * operation.scale[0]
    gate = (operation.gates[2, 0] @ q + operation.biases[2, 0]).sigmoid()
    router = 1 - torch.exp(-torch.log1p(operation.router[0].exp()) * 6 / 4)
    torch.testing.assert_close(made, found * gate * router)
    shares = [operation.reading(q.view(1, 1, 1, 3), state.view(1, 1, 3, 3), torch.tensor(n)).norm() for n in (0, 1, 9)]
    assert shares[0] == 0 < shares[1] < shares[2]


def test_the_gates_of_a_token_by_hand() -> None:
    """Line 2 of the docstring: a token fades, and never grows."""
    operation = shaken(StateCausal(window=4, sink=1).operation(0, 1, 3), 1.0).double()
    k = Rng(0).randn((1, 1, 5, 3), "k").double()
    decay, strength = operation.written(k)
    products = k[0, 0] @ operation.gates[:2, 0].T + operation.biases[:2, 0]
    torch.testing.assert_close(strength[0, 0], 1 / (1 + torch.exp(-products[:, 0])))
    torch.testing.assert_close(decay[0, 0], -operation.rate[0].exp() * torch.log1p(products[:, 1].exp()))
    assert (decay < 0).all()


def test_bytes_are_constant() -> None:
    """The window with two gates per token and head, and D x D numbers per layer and head in at least 32 bits."""
    pattern = PATTERNS[2]
    net, (x, t, cond) = learned(fresh(pattern)), inputs(frames=20)
    memory, sizes = begun(pattern), []
    for part, times in zip(x.split(2, 2), t.split(2, 1), strict=True):
        out = net(part, times, cond, Call(kv=net.recall(memory, part)))
        memory = memory.commit(out.kv or (), 2)
        sizes.append(memory.nbytes)
    tokens, width, heads, layers, batch = 6, 18, 2, 3, 2
    expected = 8 * batch * layers * heads * (4 * tokens * (2 * width + 2) + width**2)
    assert set(sizes) == {expected}


def test_one_call_trains_every_parameter() -> None:
    pattern = StateCausal(window=2, sink=0)
    model = streaming_model(Stream(window=2))
    student = repattern(model.denoiser, pattern).requires_grad_(True)
    for operation in operations(student.backbone):  # type: ignore[arg-type]
        shaken(operation, 0.1)
    cond = model.conditions(["a red ball", "a blue star"])[0]
    batch = Batch(cond, cond, (4, FRAMES, 8, 8), x0=Rng(0).randn((2, 4, FRAMES, 8, 8), "x0"))
    history = DiffusionForced(stream=Stream(memory=pattern.memory))
    nets = Nets({"student": student, "teacher": student})
    (losses,) = FlowMatching(history=history).student_loss(nets, batch, Rng(0))
    losses["flow"].backward()
    for operation in operations(student.backbone):  # type: ignore[arg-type]
        for name, parameter in operation.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    with pytest.raises(ValueError, match="StateMemory.*DiffusionForced"):
        list(FlowMatching(history=TeacherForced(stream=history.stream)).student_loss(nets, batch, Rng(0)))


def test_a_cut_forgets_the_state() -> None:
    pattern, (x, t, cond) = PATTERNS[1], inputs(frames=8)
    net, memory = learned(fresh(pattern)), begun(PATTERNS[1])
    for part, times in zip(x.split(1, 2), t.split(1, 1), strict=True):
        out = net(part, times, cond, Call(kv=net.recall(memory, part)))
        memory = memory.commit(out.kv or (), 1)
    assert len(memory.states) == 3 and memory.keep.forget(memory, memory.start).states == ()


def test_what_does_not_fit_together_is_refused() -> None:
    x, t, cond = inputs(frames=1)
    for pattern, keep, said in (
        (
            BlockCausal(),
            StateMemory(window=4, sink=1),
            "BlockCausal does not read; give .* StateCausal, or .* a window",
        ),
        (PATTERNS[1], Window(window=4, sink=1), "StateCausal reads a state.*memory: {type: StateMemory"),
    ):
        net = small(pattern)
        memory = KVCache.empty(keep).commit(net(x, t, cond, Call(kv=net.recall(KVCache.empty(), x))).kv or (), 1)
        with pytest.raises(ValueError, match=said):
            net(x, t, cond, Call(kv=net.recall(memory, x)))
    with pytest.raises(ValueError, match="raise window to 5"):
        StateCausal(chunk=2, window=4, sink=1)
    operation = PATTERNS[0].operation(0, 4, 6)
    share: tuple[Tensor, Tensor, Tensor] = (torch.zeros(1, 2, 4, 6),) * 3
    with pytest.raises(ValueError, match="all heads of one process"):
        operation.finish(share[0], share, Site(Grid3(1, 2, 2), call=Call(kv=replace(_view()))))


def _view() -> KVView:
    return KVView((), torch.empty(0, dtype=torch.long), torch.tensor(0), states=())
