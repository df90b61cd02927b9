"""The flow head: how often its blocks run, what they read, and that a new one changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.attention import KVCache
from fewstep.caching import SkipMiddle
from fewstep.compress import Experts, FlowHead, Pruned, StepScales, transformed
from fewstep.compress.flow_head import inside
from fewstep.core import Call, Cond, Rng
from fewstep.diffusion import CFG
from fewstep.engine import train
from fewstep.engine.outline import Outline
from fewstep.methods import DMD2, BackwardSimulation
from fewstep.models import Denoiser, VideoModel
from fewstep.models.source import Diffusers
from fewstep.models.video_dit import VideoDiT
from support_engine import FRAMES, Everything, shaken, small, stored_card, tiny_model
from tiny_models import TINY, shared

pytestmark = pytest.mark.usefixtures("single_thread")
SHAPE, RNG = (2, 4, FRAMES, 8, 8), Rng(3)
T = torch.tensor([0.3, 0.9], dtype=torch.float64)


def network(steps: int, blocks: int = 1, depth: int = 3, *, fresh: bool = False) -> Denoiser:
    """In float64; its head knows what it reads, unless it is fresh."""
    model = tiny_model(depth=depth).transformed(FlowHead(blocks=blocks, steps=steps))
    return (model.denoiser if fresh else shaken(model.denoiser, 0.2)).double()  # type: ignore[return-value]


def clip(name: str = "x") -> Tensor:
    return RNG.randn(SHAPE, name).double()


def cond() -> Cond:
    return Cond(RNG.randn((2, 3, 16), "text").double(), torch.ones(2, 3, dtype=torch.bool))


def rolled(denoiser: Denoiser, **call: object) -> Tensor:
    return denoiser(clip(), T, cond(), Call(rng=RNG, **call)).raw  # type: ignore[arg-type]


def answer(denoiser: Denoiser, y_s: Tensor, s: float, r: float) -> Tensor:
    """One run of the head."""
    return denoiser(clip(), T, cond().with_extra(inside(y_s, torch.full_like(T, s), torch.full_like(T, r)))).raw


def inner_noise(step: int = 0) -> Tensor:
    return RNG.randn(SHAPE, f"inner/{step}").double()


@contextmanager
def counted(model: VideoModel) -> Iterator[Counter[int]]:
    """How often each block runs, by its number."""
    runs: Counter[int] = Counter()
    blocks = model.denoiser.backbone.blocks
    hooks = [block.register_forward_hook(lambda *_, i=i: runs.update([i])) for i, block in enumerate(blocks)]
    yield runs
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_new_head_gives_the_teachers_prediction(steps: int) -> None:
    teacher, student = tiny_model().denoiser, tiny_model().transformed(FlowHead(blocks=1, steps=steps)).denoiser
    x = RNG.randn(SHAPE, "x")
    text = Cond(RNG.randn((2, 3, 16), "text"), torch.ones(2, 3, dtype=torch.bool))
    for t in (torch.tensor([0.3, 0.9]), torch.rand(2, FRAMES)):
        assert torch.equal(student(x, t, text, Call(rng=RNG)).raw, teacher(x, t, text).raw)
        far = inside(100 * x, torch.full((2,), 0.7), torch.full((2,), 0.1))
        assert torch.equal(student(x, t, text.with_extra(far)).raw, teacher(x, t, text).raw)


def test_one_run_gives_the_heads_own_answer_to_noise() -> None:
    denoiser = network(1)
    assert torch.equal(rolled(denoiser), answer(denoiser, inner_noise(), 1.0, 0.0))


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_each_run_moves_from_the_noise_by_the_mean_velocity(steps: int) -> None:
    """y_r = y_s - (s - r) (y_1 - head), from y_1 at s = 1 to y_0."""
    denoiser = network(steps)
    y = noise = inner_noise()
    for s, r in pairwise(1 - n / steps for n in range(steps + 1)):
        y = y - (s - r) * (noise - answer(denoiser, y, s, r))
    torch.testing.assert_close(rolled(denoiser), y, rtol=1e-5, atol=1e-6)  # the times are float32
    assert (rolled(denoiser) - answer(denoiser, noise, 1.0, 0.0)).abs().max() > 1e-3


def test_the_head_reads_where_it_is_and_where_it_goes() -> None:
    denoiser, y = network(2), clip("y")
    made = [answer(denoiser, z, s, r) for z, s, r in ((y, 0.9, 0.2), (y, 0.6, 0.2), (y, 0.9, 0.5), (y + 1, 0.9, 0.2))]
    assert all((a - made[0]).abs().max() > 1e-3 for a in made[1:])


def test_what_a_gate_of_zero_lets_through_is_nothing() -> None:
    """y_s reaches the head through the gate alone, and the modulation does not change with it."""
    denoiser = network(2)
    width = denoiser.backbone.width
    with torch.no_grad():
        for values in (denoiser.backbone.flow_head.out.weight, denoiser.backbone.flow_head.out.bias):  # type: ignore[union-attr]
            values[6 * width :] = 0
    y = clip("y")
    assert torch.equal(answer(denoiser, y, 0.9, 0.2), answer(denoiser, y + 1, 0.9, 0.2))
    assert not torch.equal(answer(denoiser, y, 0.9, 0.2), answer(denoiser, y, 0.6, 0.2))


def test_wan_takes_a_head() -> None:
    model = Diffusers(source=str(shared("wan")), text_dtype="float32", **TINY["wan"].size).load()
    student = model.transformed(FlowHead(blocks=1, steps=2))
    x, text = RNG.randn((1, *model.latent_shape()), "x"), model.blank_cond(1)
    for t in (torch.tensor([0.4]), torch.rand(1, x.shape[2])):
        before = model.denoiser(x, t, text).raw
        assert torch.equal(student.denoiser(x, t, text, Call(rng=RNG)).raw, before)
    shaken(student.denoiser.backbone.flow_head, 0.2)  # type: ignore[arg-type]
    with counted(student) as runs, torch.no_grad():
        after = student.denoiser(x, t, text, Call(rng=RNG)).raw
    depth = len(model.denoiser.backbone.blocks)
    assert [runs[i] for i in range(depth)] == [1] * (depth - 1) + [2]
    assert after.isfinite().all() and (after - before).abs().max() > 1e-3


def test_the_backbone_does_not_know_the_head() -> None:
    """Its blocks see x_t, t and the prompt: features of them are the teacher's."""
    teacher = tiny_model(depth=3)
    student = teacher.transformed(FlowHead(blocks=1, steps=2)).denoiser
    shaken(student.backbone.flow_head, 0.2)  # type: ignore[arg-type]
    seen: list[Tensor] = []
    student.backbone.blocks[1].register_forward_hook(lambda _, __, out: seen.append(out.x_BNE))
    x, t = clip().float(), T.float()
    text = Cond(RNG.randn((2, 3, 16), "text"), torch.ones(2, 3, dtype=torch.bool))
    student(x, t, text, Call(rng=RNG))
    (features,) = teacher.denoiser.features(x, t, text, (1,))
    assert torch.equal(seen[0].flatten(), features.permute(0, 2, 3, 4, 1).flatten()) and len(seen) == 1


@pytest.mark.parametrize(("outer", "inner", "head"), [(1, 1, 1), (2, 3, 1), (3, 2, 2), (1, 4, 3)])
def test_blocks_run_as_often_as_the_formula_says(outer: int, inner: int, head: int) -> None:
    """M (1 + (N - 1) H / L) calls of the whole network."""
    depth = 4
    model = tiny_model(depth=depth).transformed(FlowHead(blocks=head, steps=inner))
    with counted(model) as runs:
        model.latents(["a red ball"], num_inference_steps=outer, num_frames=FRAMES, guidance_scale=1.0, force=True)
    assert [runs[i] for i in range(depth)] == [outer] * (depth - head) + [outer * inner] * head
    assert sum(runs.values()) / depth == outer * (1 + (inner - 1) * head / depth)


def test_the_gradient_goes_through_all_runs() -> None:
    """It is the slope of what is made, also along the answers of earlier runs."""
    denoiser = network(3)
    weight = denoiser.backbone.flow_head.out.bias  # type: ignore[union-attr]
    way, step = RNG.randn(tuple(weight.shape), "way").double(), 1e-5
    (slope,) = torch.autograd.grad(rolled(denoiser).square().sum(), weight)  # type: ignore[arg-type]
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * way  # type: ignore[operator, misc]
            sides.append(rolled(denoiser).square().sum())
            weight -= sign * step * way  # type: ignore[operator, misc]
    torch.testing.assert_close((slope * way).sum(), (sides[0] - sides[1]) / (2 * step), rtol=1e-5, atol=0)


def test_noise_is_the_clips_own_in_every_step() -> None:
    model = tiny_model(depth=3).transformed(FlowHead(blocks=1, steps=2))
    shaken(model.denoiser, 0.2)
    prompts = ["a red ball", "a blue box"]
    both = model.latents(prompts, num_frames=FRAMES, seed=[5, 9])
    alone = model.latents(prompts[1:], num_frames=FRAMES, seed=[9])
    torch.testing.assert_close(both[1:], alone)
    denoiser = network(2)
    first, second = (rolled(denoiser, step=step, steps=2) for step in (0, 1))
    assert (first - second).abs().max() > 1e-3


def test_guidance_reads_one_noise_for_both_prompts() -> None:
    denoiser, other = network(2), replace(cond(), text=clip("none").flatten()[: 2 * 3 * 16].reshape(2, 3, 16))
    made = [
        CFG(scale=3.0)(denoiser, clip(), T, cond(), other, Call(rng=RNG), calls=calls).raw for calls in ("one", "two")
    ]
    torch.testing.assert_close(*made)


def test_a_call_without_random_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"draws noise in every call.*VideoModel\.latents.*BackwardSimulation"):
        network(2)(clip(), T, cond())


def test_streams_and_caches_are_refused() -> None:
    denoiser = network(2)
    view = denoiser.recall(KVCache(start=torch.tensor(0)), clip())
    with pytest.raises(ValueError, match="makes whole clips"):
        rolled(denoiser, kv=view)
    model = tiny_model(depth=4).transformed(FlowHead(blocks=1, steps=2))
    with pytest.raises(ValueError, match="a cache policy takes each block to run once"):
        model.latents(["a red ball"], num_frames=FRAMES, runner=SkipMiddle().begin())


def test_a_head_that_cannot_be_is_refused() -> None:
    model, head = tiny_model(depth=2), FlowHead(blocks=1, steps=2)
    with pytest.raises(ValueError, match="a head of 2 blocks leaves none of the network's 2"):
        model.transformed(FlowHead(blocks=2, steps=2))
    with pytest.raises(ValueError, match="has a flow head already"):
        model.transformed(head, FlowHead(blocks=1, steps=3))
    for after, words in ((Pruned(blocks=(0,)), "put Pruned before FlowHead"), (Experts(boundaries=(0.5,)), "experts")):
        with pytest.raises(ValueError, match=words):
            tiny_model(depth=4).transformed(head, after)
    assert tiny_model(depth=4).transformed(Pruned(blocks=(0,)), head).denoiser.backbone.flow_head is not None
    with pytest.raises(ValueError, match="must be at least 1|1 to"):
        FlowHead(blocks=0, steps=2)
    bare = VideoDiT(width=24, depth=2, heads=2, text_width=16)
    bare.takes_signals = False  # type: ignore[misc]
    with pytest.raises(ValueError, match="VideoDiT has no flow head.*take VideoDiT or Wan"):
        transformed(bare, [head])


def test_layers_that_know_the_step_are_in_the_head_too() -> None:
    model = tiny_model(depth=3).transformed(StepScales(steps=2), FlowHead(blocks=1, steps=2))
    assert model.latents(["a red ball"], num_frames=FRAMES, num_inference_steps=2).isfinite().all()


def test_distribution_matching_trains_through_it(tmp_path: Path) -> None:
    """DMD2 as it is: the student's sampler draws the inner noise. The student is planned, saved and sampled as it was trained."""
    model, head = tiny_model(depth=3), FlowHead(blocks=1, steps=2)
    method = DMD2(critic_updates=1, rollout=BackwardSimulation(grids=((1.0, 0.5),), mode="ode"))
    settings = small(3, transforms=(head,))
    student = train(model, method, Everything(), settings, tmp_path / "run", quiet=True)
    assert student.card.transforms == (head,)
    assert student.denoiser.backbone.flow_head.out.weight.any()  # type: ignore[union-attr, operator]
    saved = VideoModel.from_pretrained(student.save(tmp_path / "student"))
    clips = [m.latents(["a red ball"], num_frames=FRAMES) for m in (student, saved)]
    assert torch.equal(*clips)
    plain, headed = (Outline.of(stored_card(model), method, s, FRAMES).plan() for s in (small(3), settings))
    own = sum(p.numel() for p in student.denoiser.parameters())
    assert [each.parameters for each in headed.holdings if each.role == "student"] == [own]
    assert headed.flops > plain.flops
