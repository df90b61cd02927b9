"""Context forcing: who judges a clip reads the frames that the student remembered, byte for byte, and no loss is on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.attention import Facing, Int8Memory, KVCache, MovingSink, Retrieval
from fewstep.core import Batch, Call, Rng
from fewstep.core.call import Causal
from fewstep.diffusion import CFG, Stream, Uniform
from fewstep.engine import train
from fewstep.engine.nets import build_nets
from fewstep.engine.prepare import require_going_on
from fewstep.methods import AVDM2, DMD2, AdversarialDistillation, Adversary, Nets, Rolled, SelfForced
from fewstep.methods.rollouts.context import Context
from fewstep.methods.targets import denoising, distribution_matching, mse
from fewstep.streaming import Session
from fewstep.world.data import WorldClips
from support_engine import FRAMES, small, tiny_model
from support_gaussian import terms
from test_self_forced import TWO, Heard, Late, rolled_by
from test_streaming import PROMPTS, streaming_model

pytestmark = pytest.mark.usefixtures("single_thread")
STREAMS = {
    "sink and window": Stream(chunks=(2,), window=6, sink=2), "all": Stream(chunks=(2,)), "frames": Stream(window=3, sink=1),
    "retrieved": Stream(memory=Retrieval(frames=1, recent=1, sink=1)), "re-indexed": Stream(window=3, positions="window"),
}  # fmt: skip


def forced(stream: Stream, **others: Any) -> SelfForced:
    return SelfForced(**({"stream": stream, "grids": TWO, "exit": "last", "clips": 3, "context": True} | others))


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_judges_read_the_frames_that_the_student_remembered_byte_for_byte(stream: Stream) -> None:
    """The union over the chunks of the clip of what each has read from before it, each frame once, at time 0."""
    model = streaming_model(stream)
    whole = torch.cat(list(Session(model, PROMPTS).take(len(stream.lengths(12)))), 2)
    heard, teacher = Heard(model.denoiser.requires_grad_(True)), Heard(tiny_model().denoiser)
    rolled = rolled_by(heard, model, forced(stream), Late((0, 1), stretch=4))
    context, begin = rolled.context, 4 * stream.length(0)
    assert context is not None and context.start == begin and torch.equal(rolled.x0, whole[:, :, begin : begin + 4])
    for row in range(2):
        kept = [call.kv for grad, _, _, call, _ in heard.calls if grad]
        if stream.positions == "absolute":
            read = {int(p) for view in kept for p in view.positions.expand(2, -1)[row] if 0 <= p < begin}
            assert context.frames[row].tolist() == sorted(read)
        frames = context.frames[row][context.frames[row] >= 0]
        assert torch.equal(context.latents[row, :, : len(frames)], whole[row, :, frames]) and len(frames) >= 1
    assert not context.latents.requires_grad
    cond, uncond = model.conditions(PROMPTS)
    x_t, t = torch.randn(rolled.x0.shape), torch.tensor([0.3, 0.8])
    CFG(scale=2.0)(context.over(teacher), x_t, t, cond, uncond)
    (_, clean, zero, first, _), (_, noised, time, second, _) = teacher.calls
    assert torch.equal(clean, torch.cat([context.latents] * 2)) and not zero.any() and first.kv is not None
    assert torch.equal(noised, torch.cat([x_t] * 2)) and torch.equal(time, torch.cat([t] * 2)), (
        "with its own frames alone"
    )
    assert second.kv is not None and second.kv.slots == context.frames.shape[1]
    moved = context.frames if stream.positions == "absolute" else torch.arange(context.frames.shape[1]).expand(2, -1)
    assert torch.equal(second.kv.positions, moved.repeat(2, 1)), "where the student places them"


def test_a_clip_after_its_context_is_one_call_on_both() -> None:
    """To rounding: clean frames at time 0, each of which reads earlier ones, then the clip, which reads them and itself."""
    model = tiny_model()
    network, (cond, _) = model.denoiser.double(), model.conditions(PROMPTS)
    old, x_t = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64), torch.randn(2, 4, 4, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    context = Context(old, torch.arange(3).expand(2, -1), 3, "absolute", 0)
    here = context.over(network)(x_t, t, cond).x0
    times = torch.cat([torch.zeros(2, 3, dtype=torch.float64), t[:, None].expand(-1, 4)], 1)
    both = network(torch.cat([old, x_t], 2), times, cond, Call(causal=Causal((1, 1, 1, 4)))).x0
    assert torch.allclose(here, both[:, :, 3:], atol=1e-10)
    assert not torch.allclose(here, network(x_t, t, cond).x0, atol=1e-3), "it is read"


def test_frames_stand_where_they_were() -> None:
    """A context that is further away is read otherwise; moved together with the clip it is the same."""
    model = tiny_model()
    network, (cond, _) = model.denoiser.double(), model.conditions(PROMPTS)
    old, x_t = torch.randn(2, 4, 2, 8, 8, dtype=torch.float64), torch.randn(2, 4, 4, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)

    def seen(first: int, start: int, standing: Any = "absolute") -> Tensor:
        frames = torch.tensor([[0, first]]).expand(2, -1)
        return Context(old, frames + (start - 9), start, standing, 0).over(network)(x_t, t, cond).x0

    assert torch.allclose(seen(3, 9), seen(3, 20), atol=1e-10)
    assert not torch.allclose(seen(3, 9), seen(7, 9), atol=1e-4)
    assert torch.allclose(seen(3, 9, "window"), seen(7, 9, "window"), atol=1e-10), "re-indexed: next to each other"


def test_where_samples_remember_different_frames_each_reads_its_own() -> None:
    """The first has two frames, the second one: what fills its place is not read."""
    model = tiny_model()
    network, (cond, _) = model.denoiser.double(), model.conditions(PROMPTS)
    before = list(torch.randn(2, 4, 4, 8, 8, dtype=torch.float64).split(1, 2))

    def read(*frames: int) -> KVCache:
        return KVCache(positions=torch.tensor(frames))

    stream, x_t, t = (
        Stream(window=3),
        torch.randn(2, 4, 2, 8, 8, dtype=torch.float64),
        torch.tensor([0.3, 0.8]).double(),
    )
    per_sample = [KVCache(positions=torch.tensor([[0, 2], [3, 3]]))]
    together = Context.of(stream, before, per_sample)
    assert together is not None and together.frames.tolist() == [[0, 2], [3, -1]]
    made = together.over(network)(x_t, t, cond).x0
    for row, frames in enumerate(((0, 2), (3,))):
        one = slice(row, row + 1)
        alone = Context.of(stream, [frame[one] for frame in before], [read(*frames)])
        assert alone is not None and torch.allclose(
            alone.over(network)(x_t[one], t[one], cond[one]).x0, made[one], atol=1e-10
        )
    joined = Context.of(stream, before, [read(0, 9), read(1, 4)])
    assert joined is not None and joined.frames.tolist() == [[0, 1]] * 2, "frames of the clip are not in it"
    assert Context.of(stream, [], [read()]) is None and Context.of(stream, before, [read(4)]) is None


class Last(Rng):
    """Random numbers whose stretch is the last one."""

    def integer(self, name: str, high: int) -> int:
        return high - 1 if name == "stretch" else super().integer(name, high)


LAST = Last(3)


def test_losses_are_on_the_clip_alone_and_judges_read_its_context() -> None:
    """The critic's regression and the difference of scores, where teacher and critic are called with the context."""
    stream = Stream(chunks=(2,), window=6, sink=2)
    model = streaming_model(stream)
    rollout, asked = forced(stream, exit="random"), {}
    roles = {"student": model, "teacher": tiny_model(1), "critic": tiny_model(2)}
    nets = {name: Heard(role.denoiser.requires_grad_(name == "student")) for name, role in roles.items()}
    cond, uncond = model.conditions(PROMPTS)
    batch, method = Batch(cond, uncond, (4, 4, 8, 8)), DMD2(rollout=rollout, guidance=CFG(scale=2.0))
    found = terms(method.student_loss(Nets(nets), batch, LAST))["matching"]  # type: ignore[arg-type]
    rolled = rollout(roles["student"].denoiser, batch, LAST.fold("student"), grad=True)
    assert (
        isinstance(rolled, Rolled) and rolled.context is not None and rolled.clip is rolled.x0 and rolled.keep is None
    )
    x_t, t = nets["critic"].calls[1][1:3]
    for role in ("teacher", "critic"):
        asked[role] = nets[role].calls
        assert torch.equal(asked[role][0][1][:2], rolled.context.latents) and asked[role][1][1].shape[2] == 4
    with torch.no_grad():
        real, fake = (rolled.context.over(roles[role].denoiser) for role in ("teacher", "critic"))
        real, fake = CFG(scale=2.0)(real, x_t, t, cond, uncond).x0, fake(x_t, t, cond).x0
    torch.testing.assert_close(found, distribution_matching(rolled.x0, real, fake))
    again = terms(method.critic_loss(0, Nets(nets), batch, LAST))["denoising"]  # type: ignore[arg-type]
    x_t, t = nets["critic"].calls[3][1:3]
    with torch.no_grad():
        rolled = rollout(roles["student"].denoiser, batch, LAST.fold("critic/0"), grad=False)
        assert rolled.context is not None
        eps = LAST.fold("critic/0").randn(rolled.x0.shape, "eps")
        expected = denoising(rolled.context.over(roles["critic"].denoiser)(x_t, t, cond), rolled.x0, eps)
    torch.testing.assert_close(again, expected)


def test_the_teachers_opinion_of_a_clip_reads_its_context() -> None:
    """ADD's line of a stream; the discriminator is shown the clip alone."""
    stream = Stream(chunks=(2,), window=6, sink=2)
    model, rollout = streaming_model(stream), forced(stream)
    method = AdversarialDistillation(
        rollout=rollout, distillation=1.0, guidance=CFG(), adversary=Adversary(clean=True, density=Uniform())
    )
    nets, rng = Nets({**build_nets(tiny_model(1), method, seed=0), "student": model.denoiser}), LAST.fold("student")
    cond, uncond = model.conditions(PROMPTS)
    batch = Batch(cond, uncond, (4, 4, 8, 8), x0=torch.zeros(2, 4, 4, 8, 8))
    found = terms(method.student_loss(nets, batch, LAST))["distillation"].detach()
    rolled = rollout(model.denoiser, batch, rng, grad=False)
    assert rolled.context is not None
    t = method.distillation_density.sample(2, rng)
    with torch.no_grad():
        x_t = nets["teacher"].path.add_noise(rolled.x0, rng.randn(rolled.x0.shape, "eps"), t)
        real, alone = (ask(x_t, t, cond).x0 for ask in (rolled.context.over(nets["teacher"]), nets["teacher"]))
    torch.testing.assert_close(found, mse(rolled.x0, real, 1 - t))
    assert abs(float(found - mse(rolled.x0, alone, 1 - t))) > 1e-6


def test_the_beginning_of_a_stream_has_no_context() -> None:
    stream = Stream(chunks=(2,), window=6, sink=2)
    model = streaming_model(stream)
    assert rolled_by(model.denoiser, model, forced(stream), Late((0, 1), stretch=0)).context is None
    without = rolled_by(model.denoiser, model, forced(stream, context=False), Late((0, 1), stretch=3))
    assert without.context is None and torch.equal(
        without.x0, rolled_by(model.denoiser, model, forced(stream), Late((0, 1), stretch=3)).x0
    )


def test_an_overlap_is_part_of_the_clip_and_not_of_its_context() -> None:
    stream = Stream(chunks=(2,), window=6, sink=2)
    model = streaming_model(stream)
    rolled = rolled_by(model.denoiser, model, forced(stream, overlap=2), Late((0, 1), stretch=3))
    assert rolled.past is not None and rolled.context is not None
    assert rolled.context.frames.tolist() == [[0, 1, 4, 5]] * 2 and rolled.context.start == 6


def test_memory_by_pose_is_shown_and_the_poses_are_not() -> None:
    stream = Stream(chunks=(2,), memory=Facing(frames=2, recent=2, sink=0))
    model = streaming_model(stream)
    cond, uncond = model.conditions(PROMPTS)
    places = torch.tensor([0.0, 0, 9, 9, 5, 5, 0, 0, 9, 9, 0, 0])[None, :, None].expand(2, -1, 3)
    pose = torch.cat([places, torch.tensor([0.0, 0, 1]).expand(2, 12, -1)], 2)
    told = [each.with_extra({"pose": pose}, framewise=True) for each in (cond, uncond)]
    rolled = forced(stream)(model.denoiser, Batch(*told, (4, 4, 8, 8)), Late((0, 1), stretch=3), grad=False)  # type: ignore[arg-type]
    assert rolled.context is not None and rolled.context.frames.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    x_t = torch.randn(2, 4, 4, 8, 8)
    network = tiny_model().denoiser
    rolled.context.over(network)(x_t, torch.ones(2), told[0])
    keys = cond.with_extra({"keys": torch.zeros(2, 4, 4)}, framewise=True)
    with pytest.raises(ValueError, match="reads keys of every frame, .* write context: false"):
        rolled.context.over(network)(x_t, torch.ones(2), keys)


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(ValueError, match="context comes before a later stretch"):
        SelfForced(context=True)
    for memory in (MovingSink(window=3, sink=1), Int8Memory()):
        with pytest.raises(ValueError, match=f"{type(memory).__name__} remembers less than whole frames"):
            SelfForced(stream=Stream(memory=memory), clips=2, context=True)
    with pytest.raises(ValueError, match="AVDM2 would show its networks neither"):
        require_going_on(AVDM2(rollout=forced(Stream())), small(1))


def test_a_student_is_trained_with_it(tmp_path: Path) -> None:
    stream = Stream(chunks=(2,), memory=Retrieval(frames=1, recent=1, sink=1))
    method = DMD2(critic_updates=1, rollout=forced(stream, clips=2))
    student = train(tiny_model(), method, WorldClips(num_frames=FRAMES), small(steps=3), tmp_path, quiet=True)
    assert student.card.contract.stream == stream
    assert student.latents(PROMPTS, num_frames=8).isfinite().all()
