"""Students that make low-resolution clips sharp: the low clips, where training and sampling begin, and what is minimised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor
from torch.nn import functional as F

from fewstep.cli import main
from fewstep.core import Batch, Rng, Seeds
from fewstep.core.pixels import covering
from fewstep.data import Degradation, Videos, read_video, to_floats, to_pixels, write_video
from fewstep.diffusion import CFG, DDIM, Contract, Euler, FromVideo, Stream, Trained, Uniform, uniform_grid
from fewstep.engine import Health, WorldProbe, train
from fewstep.evaluate import Entry, Suite, evaluate
from fewstep.methods import DMD2, Adversary, FromLow, LatentPixel, Nets, TimeAwareDistillation
from fewstep.methods.rollouts.base import Rolled
from fewstep.models import VideoModel
from fewstep.models.videos import video_for, video_of
from fewstep.streaming import Session, Video
from fewstep.world.data import WorldClips
from support_engine import FRAMES, Everything, small, tiny_model
from support_gaussian import (
    AffineTableStudent,
    Asked,
    Counting,
    FreeClips,
    GaussianTeacher,
    MeanHead,
    cond_of,
    conds_of,
    f64,
    minimise,
    terms,
    total,
)

B, SHAPE, STD = 4, (1, 3, 4, 4), 0.4
MEANS, LABELS = f64(-0.2, 0.7, 1.5), [1, 2, 1, 1]
TEACHER = Contract(sampler=Euler(), steps=40, guidance=CFG(scale=5.0))


def frames(seed: int = 0, size: int = 16, clips: int = 2) -> Tensor:
    return 2 * Rng(seed).rand((clips, 3, FRAMES, size, size), "frames") - 1


def clips(name: str) -> Tensor:
    return Rng(3).randn((B, *SHAPE), name).double()


def batch() -> Batch:
    return Batch(conds_of(LABELS), cond_of(0, B), SHAPE, x0=clips("sharp"), low=clips("low"))


def student_of(rollout: FromLow, seed: int = 0) -> VideoModel:
    model = tiny_model(seed)
    return model.with_card(contract=rollout.contract(model.card.contract), role="student")


# --- low-resolution clips -------------------------------------------------------------------------------------------------


def test_a_pixel_of_a_low_clip_is_the_mean_of_a_square_in_8_bits() -> None:
    sharp, low = frames(), Degradation(factor=4)(frames(), Rng(0))
    assert low.shape == (2, 3, FRAMES, 4, 4)
    corner = sharp[1, 2, 3, 4:8, 8:12].mean()
    assert abs(float(low[1, 2, 3, 1, 2] - corner)) <= 0.5 / 127.5 + 1e-6
    levels = (low + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match=r"16 x 16 cannot be reduced by 3; let low.factor be a divisor"):
        Degradation(factor=3)(sharp, Rng(0))
    with pytest.raises(ValueError, match="noise must be at least 0"):
        Degradation(noise=-0.1)


def test_low_clips_are_a_function_of_the_random_stream() -> None:
    degradation, sharp = Degradation(factor=2, blur=1.5, noise=0.2), frames()
    first = degradation(sharp, Rng(0, 3))
    torch.manual_seed(1)
    assert torch.equal(first, degradation(sharp, Rng(0, 3)))
    assert not torch.equal(first, degradation(sharp, Rng(0, 4)))
    assert torch.equal(Degradation()(sharp, Rng(0)), Degradation()(sharp, Rng(1)))  # nothing of it is random


def test_every_clip_has_noise_of_its_own_strength_up_to_the_given_one() -> None:
    gray = torch.zeros(64, 3, 4, 16, 16)
    spread = Degradation(factor=1, noise=0.2)(gray, Rng(0)).flatten(1).std(1)
    assert 0.15 < float(spread.max()) <= 0.21 and float(spread.min()) < 0.05
    assert abs(float(spread.mean()) - 0.1) < 0.02


def test_the_blur_is_a_gaussian_of_its_own_width_in_each_clip() -> None:
    point = torch.full((32, 3, 1, 33, 33), -1.0)
    point[..., 16, 16] = 1.0
    degradation = Degradation(factor=1, blur=2.0)
    widths = 2.0 * Rng(0).rand((32,), "blur")
    made = (degradation(point, Rng(0)) + 1)[:, 0, 0]
    place, clip = torch.arange(33) - 16.0, int((widths - 1.5).abs().argmin())  # 8 bits show the middle of a wide one
    column = made[clip].sum(0) / made[clip].sum()
    assert abs(float((column * place**2).sum().sqrt()) - float(widths[clip])) < 0.15
    assert len(made[:, 16, 16].unique()) > 10
    gray = torch.full((2, 3, 1, 8, 8), 0.2)
    assert float((degradation(gray, Rng(0)) - 0.2).abs().max()) <= 0.5 / 127.5 + 1e-6, "edges are repeated"


def test_low_latents_are_those_of_the_same_clips() -> None:
    model, data = tiny_model(), WorldClips(num_frames=FRAMES, low=Degradation(factor=2, noise=0.1))
    made = data.open(model, frozenset({"prompts", "low", "frames", "x0"})).batch(2, Rng(5, 7))
    low = data.low(made.frames, Rng(5, 7).fold("low"))
    assert low.shape[-1] == 16 and made.low is not None
    with torch.no_grad():
        assert torch.equal(made.low, model.codec.encode(covering(low, (32, 32))))
    alone = data.open(model, frozenset({"low"})).batch(2, Rng(5, 7))
    assert torch.equal(alone.low, made.low) and alone.x0 is None and alone.frames is None
    plain = data.open(model, frozenset({"x0"})).batch(2, Rng(5, 7))
    assert torch.equal(plain.x0, made.x0) and plain.low is None
    with pytest.raises(ValueError, match="a pool keeps only latents of sharp clips"):
        replace(data, pool=4).open(model, frozenset({"low"}))


def test_low_latents_of_video_files(tmp_path: Path) -> None:
    model, folder = tiny_model(), tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a.mp4", frames(size=32)[0], fps=8)
    (folder / "a.txt").write_text("a clip")
    data = Videos(path=str(folder), num_frames=FRAMES, height=32, width=32, low=Degradation(factor=2, noise=0.1))
    made = data.open(model, frozenset({"prompts", "low", "frames"})).batch(1, Rng(2))
    low = data.low(made.frames, Rng(2).fold("low"))
    with torch.no_grad():
        assert torch.equal(made.low, model.codec.encode(covering(low, (32, 32))))


# --- where it begins ------------------------------------------------------------------------------------------------------


def test_the_low_latents_are_the_input_at_their_time_as_they_are() -> None:
    student = Counting(AffineTableStudent((0.4,)))
    rolled = FromLow(cond_drop=1.0)(student, batch(), Rng(0), grad=True)
    ((grad, x_t, t),) = student.calls
    assert grad and torch.equal(x_t, clips("low")) and t.tolist() == [0.4] * B
    assert rolled.exit == 0 and rolled.grid == (0.4,) and rolled.x0.requires_grad
    assert not FromLow()(student, batch(), Rng(0), grad=False).x0.requires_grad
    shifted = FromLow(shift=3.0)(student, batch(), Rng(0), grad=False)
    torch.testing.assert_close(shifted.t, torch.full((B,), 1.2 / 1.8, dtype=torch.float64))


@pytest.mark.parametrize(("noise", "amount"), [(0.25, 0.25), (None, 0.4)])
def test_noise_is_that_of_its_own_time(noise: float | None, amount: float) -> None:
    rolled = FromLow(noise=noise)(FreeClips((B, *SHAPE)), batch(), Rng(0, 2), grad=False)
    eps = Rng(0, 2).randn((B, *SHAPE), "noise").double()
    torch.testing.assert_close(rolled.x_t, (1 - amount) * clips("low") + amount * eps)
    assert rolled.t.tolist() == [0.4] * B


def test_a_share_of_the_clips_has_no_prompt() -> None:
    low = torch.zeros(200, 1, 1, 1, 1, dtype=torch.float64)
    some = Batch(cond_of(1, 200), cond_of(0, 200), (1, 1, 1, 1), low=low)
    for share in (0.0, 0.3, 1.0):
        network = Asked(GaussianTeacher(MEANS, STD))
        FromLow(cond_drop=share)(network, some, Rng(0), grad=False)
        assert abs(network.questions[0].labels.count(0) / 200 - share) < (0.08 if 0 < share < 1 else 1e-9)


@pytest.mark.parametrize(
    "rollout", [FromLow(), FromLow(grids=((0.6,),), noise=None, cond_drop=0.0), FromLow(shift=3.0, noise=None)]
)
def test_sampling_begins_where_training_does(rollout: FromLow) -> None:
    """The rollout is the sampler of the contract, bit for bit, also as a model that is given a video."""
    model = student_of(rollout)
    data = WorldClips(num_frames=FRAMES)
    some = data.open(model, frozenset({"prompts", "low"})).batch(2, Rng(0))
    seeds, contract = Seeds((3, 4)), model.card.contract
    noise = seeds.randn(some.low.shape, "start")
    x_t = some.low if rollout.noise == 0 else (1 - rollout.time) * some.low + rollout.time * noise
    with torch.no_grad():
        told = model.conditions(some.prompts, guided=False)[0]
        wanted = model.denoiser(x_t, torch.full((2,), rollout.time), told).x0
    made = model.latents(some.prompts, video=Video(lambda _: some.low), seed=(3, 4))
    torch.testing.assert_close(made, wanted, atol=1e-6, rtol=0)
    assert contract.times() == (rollout.time, 0.0) and contract.counts == (1,) and contract.guidance == CFG()
    assert contract.grid == Trained(
        grid=FromVideo(time=rollout.time, noise=rollout.time if rollout.noise is None else 0), steps=(1,)
    )


def test_a_video_of_any_size_is_scaled_as_in_training() -> None:
    model = student_of(FromLow())
    low = Degradation(factor=4)(frames(size=32), Rng(0))
    video = video_of(model, low)
    with torch.no_grad():
        assert torch.equal(video.latents(0), model.codec.encode(covering(low, (32, 32))))
    assert model([""] * 2, video=video).shape == (2, 3, FRAMES, 32, 32)
    with pytest.raises(ValueError, match=r"clips are floating-point numbers \[B, 3, F, H, W\]"):
        video_of(model, low[0])
    both = model([""] * 2, video=video_of(model, low[:1]))  # one clip for both prompts
    torch.testing.assert_close(both[1], model([""], video=video_of(model, low[:1]))[0])
    with pytest.raises(ValueError, match="chunk 0 has latents .* was given as"):
        model([""] * 3, video=video)


def test_a_file_is_made_sharp_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student_of(FromLow()).save(tmp_path / "student")
    write_video(tmp_path / "low.mp4", frames(clips=1)[0], fps=8)
    arguments = ["sample", str(tmp_path / "student"), "--output", str(tmp_path / "a.webp"), "--scale", "1", "--quiet"]
    assert main([*arguments, "--video", str(tmp_path / "low.mp4")]) == 0
    model = VideoModel.from_pretrained(tmp_path / "student")
    low = to_floats(read_video(tmp_path / "low.mp4", FRAMES, size=(32, 32)))[None]
    pixels = to_pixels(model([""], video=video_of(model, low)))[0]
    with Image.open(tmp_path / "a.webp") as picture:
        shown = [torch.from_numpy(np.array(frame.convert("RGB"))) for frame in ImageSequence.Iterator(picture)]
    assert torch.equal(torch.stack(shown), pixels)
    again = ["sample", "--like", str(tmp_path / "a.webp"), "--output", str(tmp_path / "b.webp"), "--quiet"]
    assert main(again) == 0 and (tmp_path / "a.webp").stat().st_size == (tmp_path / "b.webp").stat().st_size
    capsys.readouterr()
    for wrong, said in (
        (["--prompt", "a red ball"], "give video (--video)"),
        (["--prompt", "a red ball", "--strength", "0.5"], "--strength is that of the change of a --video"),
        (["--video", str(tmp_path / "low.mp4"), "--strength", "0.5"], "begins with a video at a time of its own, 0.4"),
        ([], "give at least one --prompt"),
    ):
        assert main([*arguments, *wrong]) != 0
        assert said in " ".join(capsys.readouterr().err.split())


def test_such_a_student_cannot_begin_with_noise(tmp_path: Path) -> None:
    model = student_of(FromLow())
    with pytest.raises(ValueError, match=r"begins with the latents of a video.*give video \(--video\)"):
        model([""])
    with pytest.raises(ValueError, match="a suite has only prompts"):
        evaluate([Entry(name="student", model=model)], Suite(prompts=2), tmp_path / "suite")
    with pytest.raises(ValueError, match="a probe samples from noise"):
        train(
            tiny_model(),
            LatentPixel(),
            Everything(),
            small(1),
            tmp_path / "run",
            probe=WorldProbe(prompts=1),
            quiet=True,
        )
    with pytest.raises(ValueError, match="no low-resolution|none was given"):
        video_for(model, None)


def test_any_student_may_change_a_clip() -> None:
    """Video-to-video: a whole clip starts at the first time that is not above the strength, with the noise of that time."""
    model, clip = tiny_model(), frames(size=32)
    latents = video_of(model, clip).latents(0)
    steps = list(model.sampling(["a red ball"] * 2, video=video_of(model, clip, 0.7), seed=3))
    noise = Seeds((3, 4)).randn(latents.shape, "start")
    t = model.card.contract.times()[1]
    assert len(steps) == 2 and steps[0].prediction.t.tolist() == [pytest.approx(t)] * 2
    torch.testing.assert_close(steps[0].prediction.x_t, (1 - t) * latents + t * noise)
    full = model.latents(["a red ball"] * 2, video=video_of(model, clip), seed=3)
    assert torch.equal(full, model.latents(["a red ball"] * 2, seed=3)), "at strength 1 nothing of the clip is left"


def test_chunks_are_trained_in_one_call_as_they_are_streamed() -> None:
    stream = Stream(chunks=(1, 2), window=3, commit="last")
    rollout = FromLow(cond_drop=0.0, stream=stream)
    model = tiny_model()
    model = model.with_card(contract=rollout.contract(model.card.contract), num_frames=5)
    low = Rng(0).randn((2, 4, 5, 8, 8), "low")
    cond, null = model.conditions(["a red ball", "a blue box"])
    with torch.no_grad():
        whole = rollout(model.denoiser, Batch(cond, null, (4, 5, 8, 8), low=low), Rng(0), grad=False).x0
    session = Session(model, ["a red ball", "a blue box"])
    made = torch.cat(list(session.take(3, video_for(model, low))), 2)
    torch.testing.assert_close(made, whole, atol=2e-5, rtol=1e-5)
    clip = model.latents(["a red ball", "a blue box"], video=video_for(model, low))
    assert torch.equal(clip, made)
    with pytest.raises(ValueError, match="begins with the latents of a video"):
        next(Session(model, ["a red ball"]).steps())


def test_refused_starts() -> None:
    for grids in (((1.0, 0.5),), ((0.4,), (0.6,)), ((0.0,),), ((1.2,),)):
        with pytest.raises(ValueError, match="grids has one time above 0, and 1 at most"):
            FromLow(grids=grids)
    with pytest.raises(ValueError, match="write stream.commit: last"):
        FromLow(stream=Stream())
    with pytest.raises(ValueError, match="noise must be less than 1"):
        FromLow(noise=1.0)
    with pytest.raises(
        ValueError, match=r"noise: null is the noise of the time in grids, 1\.0.*give grids a time below 1"
    ):
        FromLow(noise=None, grids=((1.0,),))
    with pytest.raises(ValueError, match=r"noise 0\.5 is above the time 0\.4 in grids.*write noise: null"):
        FromLow(noise=0.5)
    assert FromLow(noise=0.4).noise == 0.4
    assert FromLow(grids=((1.0,),)).grid == FromVideo(time=1.0, noise=0.0)


# --- regression (DOVE) ----------------------------------------------------------------------------------------------------


def test_the_fixed_point_is_the_best_prediction_of_the_sharp_clip() -> None:
    """low = x0 + noise of variance 0.25, x0 of N(0.7, 1): E[x0 | low] = 0.7 + 0.8 (low - 0.7), for a large batch."""
    n = 20_000
    x0 = 0.7 + Rng(1).randn((n, 1, 1, 1, 1), "x0").double()
    low = x0 + 0.5 * Rng(1).randn((n, 1, 1, 1, 1), "low").double()
    networks = Nets({"student": AffineTableStudent((0.4,))})
    many = Batch(cond_of(1, n), cond_of(0, n), (1, 1, 1, 1), x0=x0, low=low)
    (update,) = LatentPixel().updates(0)
    assert update.roles == ("student",)
    minimise(list(networks.student.parameters()), total(update, networks, many, Rng(0)))
    covariance = torch.cov(torch.stack([low.flatten(), x0.flatten()]))
    scale = float(covariance[0, 1] / covariance[0, 0])
    assert networks.student.scale.item() == pytest.approx(scale, abs=1e-8) and scale == pytest.approx(0.8, abs=0.02)
    assert networks.student.offset.item() == pytest.approx(float(x0.mean() - scale * low.mean()), abs=1e-8)


class Twice(torch.nn.Module):
    """A codec that doubles."""

    def decode(self, latents: Tensor) -> Tensor:
        return 2 * latents


def test_pixels_count_in_0_to_1_and_motion_from_frame_to_frame() -> None:
    sharp = Rng(4).randn((B, *SHAPE), "frames").double()
    given = replace(batch(), frames=sharp)
    networks = Nets({"student": FreeClips((B, *SHAPE)), "codec": Twice()})
    method = LatentPixel(latents=0.5, pixels=3.0, motion=2.0)
    losses = terms(method.student_loss(networks, given, Rng(0)))
    x = networks.student.clips.detach()
    error = (2 * x - sharp) / 2
    torch.testing.assert_close(losses["latents"].detach(), 0.5 * (x - clips("sharp")).square().mean())
    torch.testing.assert_close(losses["pixels"].detach(), 3.0 * error.square().mean())
    steps = error[:, :, 1:] - error[:, :, :-1]
    torch.testing.assert_close(losses["motion"].detach(), 2.0 * steps.abs().mean())
    sum(losses.values()).backward()
    assert networks.student.clips.grad is not None


def test_a_clip_of_one_frame_has_no_motion() -> None:
    shape = (B, 1, 1, 4, 4)
    sharp, low = (Rng(4).randn(shape, name).double() for name in ("frames", "low"))
    given = Batch(conds_of(LABELS), cond_of(0, B), shape[1:], low=low, frames=sharp)
    networks = Nets({"student": FreeClips(shape), "codec": Twice()})
    losses = terms(LatentPixel(latents=0.0, pixels=1.0, motion=1.0).student_loss(networks, given, Rng(0)))
    assert set(losses) == {"pixels"} and losses["pixels"].isfinite()
    with pytest.raises(ValueError, match="clips of one frame have no motion, and motion alone is trained"):
        terms(LatentPixel(latents=0.0, motion=1.0).student_loss(networks, given, Rng(0)))


def test_a_regression_needs_what_it_compares() -> None:
    assert LatentPixel().needs == {"prompts", "low", "x0"} and LatentPixel().aux() == {}
    second = LatentPixel(latents=0.0, pixels=1.0)
    assert second.needs == {"prompts", "low", "frames"} and set(second.aux()) == {"codec"}
    assert LatentPixel(latents=0.0, motion=1.0).needs == {"prompts", "low", "frames"}
    with pytest.raises(ValueError, match="nothing is trained"):
        LatentPixel(latents=0.0)


# --- the teacher's scores (TAD-SR) ----------------------------------------------------------------------------------------

TAD = TimeAwareDistillation(rollout=FromLow(noise=None), guidance=CFG(scale=2.5), adversary=None)


def teacher() -> Asked:
    return Asked(GaussianTeacher(MEANS, STD).requires_grad_(False))


def test_the_teacher_walks_from_the_students_own_latents() -> None:
    networks, rng = Nets({"student": FreeClips((B, *SHAPE)), "teacher": teacher()}), Rng(0).fold("student")
    method = replace(TAD, teacher_steps=3, guidance=CFG())
    rolled = method.rollout(networks.student, batch(), rng, grad=False)
    y = method.wanted(networks, batch(), rolled, rng)
    assert [q.t[0].item() for q in networks.teacher.questions] == pytest.approx([0.4 * t for t in uniform_grid(3)[:-1]])
    assert networks.teacher.questions[0].labels == LABELS and torch.equal(networks.teacher.questions[0].x_t, rolled.x_t)
    for i, label in enumerate(LABELS):
        scale, offset = networks.teacher.net.compose_affine((0.4, 0.4 * 2 / 3, 0.4 / 3, 0.0), float(MEANS[label]))
        torch.testing.assert_close(y[i], scale * rolled.x_t[i] + offset, atol=1e-6, rtol=0)
    assert not y.requires_grad


def test_without_steps_the_sharp_clip_takes_the_teachers_place() -> None:
    networks = Nets({"student": FreeClips((B, *SHAPE)), "teacher": teacher()})
    method = replace(TAD, teacher_steps=0, score=0.0, rollout=FromLow())
    losses = terms(method.student_loss(networks, batch(), Rng(0)))
    x = networks.student.clips.detach()
    assert set(losses) == {"regression"} and not networks.teacher.questions
    torch.testing.assert_close(losses["regression"].detach(), (x - clips("sharp")).square().mean())
    assert method.needs == {"prompts", "low", "x0"}


def test_a_student_that_makes_its_teachers_clip_gets_no_gradient_at_all() -> None:
    """Exactly 0, of real networks: the student is its teacher, which makes one step without guidance."""
    student, teacher = tiny_model(), tiny_model()
    data = WorldClips(num_frames=FRAMES).open(student, frozenset({"prompts", "low"})).batch(2, Rng(0))
    method = replace(TAD, rollout=FromLow(noise=None, cond_drop=0.0), teacher_steps=1, guidance=CFG())
    for guidance in (CFG(), CFG(scale=2.5)):  # of the scores alone
        networks = Nets({"student": student.denoiser, "teacher": teacher.denoiser.requires_grad_(False)})
        rolled = method.rollout(networks.student, data, Rng(0, 1).fold("student"), grad=False)
        guided = replace(method, guidance=guidance)
        gap = guided.gap(networks, data, rolled.x0, rolled.x0.clone(), Rng(0))
        assert torch.equal(gap, torch.zeros_like(gap))
    losses = terms(method.student_loss(networks, data, Rng(0, 1)))
    sum(losses.values()).backward()
    assert set(losses) == {"regression", "score"} and float(losses["score"].detach()) == 0
    assert all(bool((p.grad == 0).all()) for p in student.denoiser.parameters() if p.grad is not None)
    other = Nets({"student": tiny_model(seed=1).denoiser, "teacher": teacher.denoiser})
    assert float(terms(method.student_loss(other, data, Rng(0, 1)))["score"].detach()) > 0


def test_the_score_term_is_the_difference_of_two_predictions_of_one_network() -> None:
    """Of a Gaussian: a s (x - y) / (a^2 std^2 + s^2), whatever the guidance and the noise."""
    networks, rng = Nets({"student": FreeClips((B, *SHAPE)), "teacher": teacher()}), Rng(0)
    x, y = clips("x"), clips("y")
    gap = TAD.gap(networks, batch(), x, y, rng)
    mine, its = networks.teacher.questions
    u = TAD.score_density.sample(B, rng)
    assert torch.equal(mine.t, its.t) and torch.equal(mine.t[:B], u) and bool(((u >= 0.02) & (u <= 0.2)).all())
    u = u.double().reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close((mine.x_t - its.x_t)[:B], (1 - u) * (x - y), atol=1e-6, rtol=0)  # one noise
    variance = (1 - u) ** 2 * STD**2 + u**2
    torch.testing.assert_close(gap, (1 - u) * u / variance * (x - y), atol=1e-5, rtol=1e-5)
    assert mine.labels == [*LABELS, *[0] * B] and not mine.grad and not its.grad


def test_the_students_gradient_is_the_regressions_and_the_scores() -> None:
    networks = Nets({"student": FreeClips((B, *SHAPE)), "teacher": teacher()})
    method, rng = replace(TAD, teacher_steps=1, regression=0.5, score=2.0), Rng(0).fold("student")
    sum(terms(method.student_loss(networks, batch(), Rng(0))).values()).backward()
    x = networks.student.clips.detach()
    rolled = method.rollout(networks.student, batch(), rng, grad=False)
    y = method.wanted(networks, batch(), rolled, rng)
    wanted = 0.5 * 2 * (x - y) + 2.0 * method.gap(networks, batch(), x, y, rng)
    torch.testing.assert_close(networks.student.clips.grad, wanted / x.numel())


def test_the_discriminator_calls_sharp_clips_real_at_all_times() -> None:
    adversary = Adversary(weight=0.5, loss="hinge", density=Uniform(low=0.3, high=0.9))
    method = replace(TAD, teacher_steps=0, score=0.0, adversary=adversary)
    networks = Nets({"student": FreeClips((B, *SHAPE)), "teacher": teacher(), "discriminator": MeanHead()})
    own, update = method.updates(0)
    assert own.roles == ("discriminator",) and update.roles == ("student",)
    losses = terms(own.losses(networks, batch(), Rng(0)))
    real, fake = networks.teacher.questions
    for seen, clean in ((real, clips("sharp")), (fake, networks.student.clips.detach())):
        t = seen.t.double().reshape(-1, 1, 1, 1, 1)
        assert abs(float(((seen.x_t - (1 - t) * clean) / t).std()) - 1) < 0.2
    there, made = (seen.x_t.flatten(1).mean(1) for seen in (real, fake))
    torch.testing.assert_close(losses["discriminator"], F.relu(1 - there).mean() + F.relu(1 + made).mean())
    adversarial = terms(update.losses(networks, batch(), Rng(0)))["adversarial"]
    adversarial.backward()
    t = networks.teacher.questions[-1].t.double().reshape(-1, 1, 1, 1, 1)
    x = networks.student.clips
    torch.testing.assert_close(x.grad, (-0.5 / B * (1 - t) / x[0].numel()).expand_as(x))


def test_refused_teachers() -> None:
    with pytest.raises(ValueError, match="write rollout.noise: null, or teacher_steps: 0"):
        TimeAwareDistillation(rollout=FromLow())
    with pytest.raises(ValueError, match="adversary.density is null"):
        TimeAwareDistillation(adversary=Adversary())
    student, asked, judged = TimeAwareDistillation().cost()
    assert student.forwards == 4 and asked.forwards == 2 * (15 + 2) and judged.forwards == 4
    assert [work.role for work in replace(TAD, teacher_steps=0, score=0.0).cost()] == ["student"]


# --- runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LatentPixel(), DMD2(critic_updates=1, rollout=FromLow(noise=None))])
def test_a_run_draws_checks_and_returns_a_student_for_low_clips(method: LatentPixel | DMD2, tmp_path: Path) -> None:
    """Pictures and health checks give the student low clips of the run's data."""
    settings = small(2, preview_every=1, health=Health(every=1, prompts=2))
    made = train(tiny_model(), method, Everything(), settings, tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "previews" / "000002.png").is_file()
    assert (tmp_path / "run" / "health" / "000002.png").is_file()
    again = VideoModel.from_pretrained(tmp_path / "run" / "student")
    assert again.card.contract == made.card.contract == method.rollout.contract(tiny_model().card.contract)
    low = Degradation()(frames(size=32), Rng(0))
    assert again([""] * 2, video=video_of(again, low)).shape == (2, 3, FRAMES, 32, 32)


def test_rolled_has_what_a_method_reads() -> None:
    rolled = FromLow()(FreeClips((B, *SHAPE)), batch(), Rng(0), grad=True)
    assert isinstance(rolled, Rolled) and rolled.before == () and rolled.past is None
    assert isinstance(rolled.noise, Tensor) and FromLow().needs == {"low"} and FromLow().work == 3
    assert FromLow(mode="ode").contract(TEACHER).sampler == DDIM()
