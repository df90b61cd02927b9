"""Training on streams that are longer than a clip: what is seen and not trained, and what goes on from update to update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.attention import Importance, Int8Memory, MovingSink, Window
from fewstep.core import Batch, Carried, Rng
from fewstep.diffusion import CFG, Stream, Uniform
from fewstep.engine import Optim, Parallel, Settings, train
from fewstep.engine.checkpoint import Checkpoint, RunState, checkpoints
from fewstep.engine.outline import Outline
from fewstep.engine.prepare import prepare, require_possible
from fewstep.methods import (
    AVDM2,
    DMD2,
    AdversarialDistillation,
    Adversary,
    Feedback,
    Nets,
    Reward,
    Rolled,
    Rollout,
    SelfForced,
    StreamingLong,
)
from fewstep.methods.targets import dmd_normaliser
from fewstep.models import VideoModel
from fewstep.streaming import Session
from fewstep.world.data import WorldClips
from support_engine import FRAMES, die, small, tiny_model
from support_gaussian import Asked, FreeClips, GaussianTeacher, MeanHead, Plain, cond_of, conds_of, f64, terms
from test_memory import tiny_card
from test_self_forced import STREAMS, TWO, Heard, Late, rolled_by
from test_streaming import PROMPTS, streaming_model

pytestmark = pytest.mark.usefixtures("single_thread")
OTHERS = ["a green ring moves up", "a white square rolls right"]
IGNORED = ["a black ring stays", "a red star moves down"]
WINDOW = Stream(window=3, sink=1)
PAIRS = Stream(chunks=(2,), window=4)


# --- seen and not trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stream", "overlap"), [(PAIRS, 2), (Stream(), 3)], ids=["a chunk", "three chunks"])
def test_the_overlap_of_a_later_stretch_is_seen_and_not_trained(stream: Stream, overlap: int) -> None:
    """It is made as in sampling, with all steps; the beginning of a stream has none."""
    model = streaming_model(stream)
    model.denoiser.requires_grad_(True)
    rollout = SelfForced(stream=stream, grids=TWO, clips=3, overlap=overlap)
    whole = torch.cat(list(Session(model, PROMPTS).take(len(stream.lengths(12)))), 2)
    first = rolled_by(model.denoiser, model, replace(rollout, exit="last"), Late((0, 1), stretch=0))
    assert first.past is None and first.keep is None and first.clip is first.x0 and first.x0.shape[2] == 4
    heard, begin = Heard(model.denoiser), stream.length(0)
    later = rolled_by(heard, model, replace(rollout, exit="last"), Late((0, 1), stretch=1))
    assert later.past is not None and not later.past.requires_grad and later.x0.requires_grad
    assert torch.equal(later.clip.detach(), whole[:, :, begin : begin + 4])
    assert later.past.shape[2] == overlap and later.noise is not None and later.noise.shape[2] == 4 - overlap
    assert sum(grad for grad, *_ in heard.calls) == (4 - overlap) // stream.length(0)
    early = rolled_by(model.denoiser, model, rollout, Late((0, 1), stretch=1))
    assert early.exit == 0 and early.past is not None and torch.equal(early.past, later.past)
    assert rollout.whole is False and replace(rollout, overlap=0).whole


def test_weights_of_frames_have_mean_one_and_leave_the_past_out() -> None:
    new, past = torch.randn(2, 1, 3, 2, 2), torch.randn(2, 1, 2, 2, 2)
    rolled = Rolled(new, new, torch.ones(2), past=past)
    assert torch.equal(rolled.keep, torch.tensor([[0.0, 0, 5 / 3, 5 / 3, 5 / 3]] * 2))
    error = torch.randn_like(rolled.clip)
    assert torch.allclose((rolled.keep[:, None, :, None, None] * error).mean(), error[:, :, 2:].mean(), atol=1e-7)


@dataclass(frozen=True, kw_only=True)
class Given(Rollout):
    """The student's clips after a past that is given."""

    past: Any = None
    labels: Any = None

    def __call__(self, student: Any, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        x0 = student(rng.randn(batch.noise_shape, "noise").double(), torch.ones(len(batch)), batch.cond).x0
        conds = (conds_of(self.labels), cond_of(0, len(batch)))
        return Rolled(x0 if grad else x0.detach(), x0, torch.ones(len(batch)), past=self.past, conds=conds)


def test_losses_look_at_the_new_frames_and_networks_at_the_whole_clip_with_its_own_prompts() -> None:
    """The spec's gradient, m g / |m|, with the normaliser of the whole clip; and the critic's mean over new frames."""
    shape, labels = (1, 3, 4, 4), [2, 1]
    past = Rng(9).randn((2, 1, 2, 4, 4), "past").double()
    student, means = FreeClips((2, *shape)), f64(-0.2, 0.7, 1.5)
    asked: dict[str, list[tuple[Tensor, Any]]] = {"teacher": [], "critic": []}

    class Noted(GaussianTeacher):
        def __init__(self, role: str, spread: float) -> None:
            super().__init__(means if role == "teacher" else means + 0.4, spread)
            self.role = role

        def forward(self, x_t: Tensor, t: Tensor, cond: Any, *rest: Any) -> Any:
            asked[self.role].append((x_t, cond))
            return super().forward(x_t, t, cond, *rest)

    nets = Nets({"student": student, "teacher": Noted("teacher", 0.4), "critic": Noted("critic", 0.5)})
    batch = Batch(conds_of([1, 1]), cond_of(0, 2), shape)
    density = Uniform(low=0.4, high=0.5)
    method = DMD2(
        rollout=Given(past=past, labels=labels), guidance=CFG(), score_density=density, critic_density=density
    )
    terms(method.student_loss(nets, batch, Rng(0)))["matching"].backward()
    ((x_t, cond),), ((seen, _),) = asked["teacher"], asked["critic"]
    assert torch.equal(x_t, seen) and torch.equal(cond.text, conds_of(labels).text)
    t = density.sample(2, Rng(0).fold("student"))
    real, fake = (GaussianTeacher(m, s)(x_t, t, cond).x0 for m, s in ((means, 0.4), (means + 0.4, 0.5)))
    clip = torch.cat([past, student.clips.detach()], 2)
    gap = dmd_normaliser(clip, real).reshape(-1, 1, 1, 1, 1) * (fake - real)
    torch.testing.assert_close(student.clips.grad, gap[:, :, 2:] / student.clips.numel())
    asked["critic"].clear()
    loss = terms(method.critic_loss(0, nets, batch, Rng(0)))["denoising"]
    ((x_t, cond),) = asked["critic"]
    t = density.sample(2, Rng(0).fold("critic/0"))
    eps = Rng(0).fold("critic/0").randn(clip.shape, "eps")
    error = (GaussianTeacher(means + 0.4, 0.5)(x_t, t, cond).raw - (eps - clip)).square()
    torch.testing.assert_close(loss, error[:, :, 2:].mean())


def test_what_dmd2_holds_sees_the_stream_with_its_own_prompts_and_the_reward_sees_new_frames() -> None:
    shape, labels, mine = (1, 3, 4, 4), [2, 1], [1, 1]
    past = Rng(9).randn((2, 1, 2, 4, 4), "past").double()
    networks: dict[str, nn.Module] = {"student": FreeClips((2, *shape)), "discriminator": MeanHead(), "codec": Plain()}
    for role, std in (("teacher", 0.4), ("critic", 0.5)):
        networks[role] = Asked(GaussianTeacher(f64(-0.2, 0.7, 1.5), std).requires_grad_(False))
    nets = Nets(networks)
    real = Rng(3).randn((2, 1, 5, 4, 4), "real").double()
    batch = Batch(conds_of(mine), cond_of(0, 2), shape, x0=real)
    method = DMD2(
        rollout=Given(past=past, labels=labels),
        adversary=Adversary(),
        feedback=Feedback(reward=NewFrames()),
        guidance=CFG(),
    )
    terms(method.critic_loss(0, nets, batch, Rng(0)))
    true, made = nets.teacher.questions[-2:]
    (asked,) = nets.critic.questions
    assert true.labels == mine and made.labels == asked.labels == labels and torch.equal(made.x_t, asked.x_t)
    losses = terms(method.student_loss(nets, batch, Rng(0)))
    scored, judged = nets.critic.questions[-1], nets.teacher.questions[-1]
    assert judged.labels == labels and torch.equal(judged.x_t, scored.x_t) and judged.x_t.shape[2] == 5
    assert float(losses["reward"]) == pytest.approx(-0.1 * (2 + 3)), "the label of its own prompt, and three new frames"


@dataclass(frozen=True, kw_only=True)
class NewFrames(Reward):
    """The number of the frames that it sees, and the label of the first clip's prompt."""

    def score(self, frames: Tensor, batch: Batch, nets: Nets) -> Tensor:
        return torch.full((len(frames),), batch.cond.text[0, 0, 0].item() + frames.shape[2], dtype=torch.float64)


def test_a_discriminator_sees_a_later_part_with_its_past_and_its_own_prompts() -> None:
    """AAPT's long clips, judged in parts that overlap; real clips keep their prompts. ADD's line counts new frames alone."""
    shape, labels, mine = (1, 3, 4, 4), [2, 1], [1, 1]
    past, student = Rng(9).randn((2, 1, 2, 4, 4), "past").double(), FreeClips((2, *shape))
    teacher = Asked(GaussianTeacher(f64(-0.2, 0.7, 1.5), 0.4))
    nets = Nets({"student": student, "teacher": teacher, "discriminator": MeanHead()})
    real = Rng(3).randn((2, 1, 5, 4, 4), "real").double()
    batch, guidance = Batch(conds_of(mine), cond_of(2, 2), shape, x0=real), CFG(scale=2.0)
    method = AdversarialDistillation(
        rollout=Given(past=past, labels=labels), adversary=Adversary(clean=True, density=Uniform()), guidance=guidance,
        distillation=2.5, distillation_density=Uniform(low=0.6, high=0.7),
    )  # fmt: skip
    terms(method.discriminator_loss(0, nets, batch, Rng(0)))
    clip = torch.cat([past, student.clips.detach()], 2)
    assert [question.labels for question in teacher.questions] == [mine, labels]
    assert torch.equal(teacher.questions[0].x_t, real) and torch.equal(teacher.questions[1].x_t, clip)
    losses = terms(method.student_loss(nets, batch, Rng(0)))
    *_, shown, asked = teacher.questions
    assert torch.equal(shown.x_t, clip) and shown.labels == labels and asked.labels == [*labels, 0, 0]
    losses["distillation"].backward()
    x_t, t = asked.x_t[:2], asked.t[:2]
    opinion = guidance(teacher.net, x_t, t, conds_of(labels), cond_of(0, 2)).x0[:, :, 2:]
    gap = 2.5 * (1 - t.double()).reshape(-1, 1, 1, 1, 1) * 2 * (student.clips.detach() - opinion)
    torch.testing.assert_close(student.clips.grad, gap / student.clips.numel())


def test_a_student_that_streams_learns_from_parts_of_longer_clips(tmp_path: Path) -> None:
    """One frame at a time, a logit per frame, pairs of logits and both penalties: AAPT, in a run."""
    judge = Adversary(loss="relativistic", density=Uniform(), trained=True, clean=True, head="frames", r1=1.0, r2=1.0)
    rollout = SelfForced(stream=WINDOW, grids=((1.0,),), clips=2, overlap=1)
    method = AdversarialDistillation(rollout=rollout, adversary=judge)
    run = prepare(tiny_model(), method, WorldClips(num_frames=FRAMES), small(2, health=None), tmp_path)
    before = {role: [p.clone() for p in run.nets.roles[role].parameters()] for role in method.aux() | {"student": None}}
    for _ in range(2):
        run.iterate()
    for role, weights in before.items():
        moved = zip(weights, run.nets.roles[role].parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in moved), role
    assert before.keys() == {"student", "eyes", "discriminator"}


def test_what_a_discriminator_cannot_judge_in_a_stream_is_refused() -> None:
    pairs = Adversary(loss="relativistic", density=Uniform())
    for method in (DMD2, AdversarialDistillation):
        with pytest.raises(ValueError, match="pairs of one prompt, and StreamingLong goes on with prompts of earlier"):
            method(rollout=StreamingLong(), adversary=pairs)
    context = SelfForced(stream=PAIRS, clips=2, context=True)
    with pytest.raises(ValueError, match="a discriminator does not read it; write context: false"):
        AdversarialDistillation(rollout=context, adversary=pairs)
    AdversarialDistillation(rollout=context, adversary=pairs, distillation=1.0)


def test_a_plan_measures_the_stretch_with_most_frames_that_are_trained() -> None:
    """A later one reads more, and trains fewer if it has an overlap."""
    found = {}
    for overlap in (0, 1):
        rollout = SelfForced(stream=WINDOW, grids=((1.0,),), clips=2, overlap=overlap)
        outline = Outline.of(tiny_card(depth=1), DMD2(rollout=rollout), small(1, health=None, batch=1), FRAMES)
        *_, student = outline.method.updates(0)
        first, last = (outline.phase(student, {"stretch": stretch}).activations for stretch in (0, 2**31))
        assert outline.phase(student, rollout.fullest).activations == max(first, last)
        found[overlap] = first < last
    assert found == {0: True, 1: False}


def test_an_overlap_that_cannot_be_is_refused(tmp_path: Path) -> None:
    model = streaming_model(PAIRS)
    with pytest.raises(ValueError, match="overlap of 1 frames is not whole chunks"):
        rolled_by(model.denoiser, model, SelfForced(stream=PAIRS, clips=2, overlap=1), Late((0, 1), stretch=1))
    with pytest.raises(ValueError, match="overlap of 4 frames is not whole chunks"):
        rolled_by(model.denoiser, model, SelfForced(stream=PAIRS, clips=2, overlap=4), Late((0, 1), stretch=1))
    with pytest.raises(ValueError, match="more clips"):
        SelfForced(overlap=2)
    method = AVDM2(rollout=SelfForced(clips=2, overlap=1))
    with pytest.raises(ValueError, match="AVDM2 would show its networks neither"):
        prepare(tiny_model(), method, WorldClips(num_frames=FRAMES), small(1), tmp_path)


# --- a stream that goes on ------------------------------------------------------------------------------------------------

LONG = StreamingLong(stream=WINDOW, grids=TWO, exit="last", length=10, overlap=1)
"""A clip of 4 frames, then two of 3 new ones."""


def going_on(
    model: VideoModel,
    rollout: StreamingLong,
    calls: int,
    prompts: Mapping[int, list[str]] | None = None,
    **options: Any,
) -> tuple[list[Rolled], Carried]:
    """So many calls with one thing carried; call n has the prompts `prompts[n]`, or the usual ones."""
    carried, found = options.pop("carried", None) or Carried(), []
    network = options.pop("network", model.denoiser)
    for call in range(options.pop("since", 0), calls):
        cond, uncond = model.conditions((prompts or {}).get(call, PROMPTS))
        batch = Batch(cond=cond, uncond=uncond, latent_shape=(4, 4, 8, 8), carried=carried)
        found.append(rollout(network, batch, Rng(7, call), grad=options.get("grad", False)))
    return found, carried


def seeds_of(calls: int = 0) -> tuple[int, ...]:
    return tuple(Rng(7, calls).integers((2,), "seeds", 2**62).tolist())


@pytest.mark.parametrize(
    "stream", [s for s in STREAMS.values() if s.chunks == (1,)], ids=[n for n in STREAMS if n != "chunks"]
)
def test_its_clips_are_a_session_bit_for_bit(stream: Stream) -> None:
    """Call after call, until the length is reached; then another stream begins."""
    model = streaming_model(stream)
    rolled, carried = going_on(model, replace(LONG, stream=stream, switch=False), 4)
    whole = torch.cat(list(Session(model, PROMPTS, seed=seeds_of()).take(10)), 2)
    assert torch.equal(torch.cat([r.x0 for r in rolled[:3]], 2), whole)
    assert [r.clip.shape[2] for r in rolled] == [4, 4, 4, 4] and rolled[0].past is None and rolled[3].past is None
    assert torch.equal(rolled[1].clip, whole[:, :, 3:7]) and torch.equal(rolled[2].clip, whole[:, :, 6:10])
    again = torch.cat(list(Session(model, PROMPTS, seed=seeds_of(3)).take(4)), 2)
    assert torch.equal(rolled[3].x0, again) and carried.part("stream")["clip"] == 1


def test_prompts_switch_once_at_the_drawn_clip_with_a_memory_made_anew() -> None:
    """As `Session.steer(how="recache")` at that frame; the prompts are those of the batch of that moment."""
    model, seen = streaming_model(WINDOW), set()
    for seed_step in range(6):
        carried, rolled = Carried(), list[Rolled]()
        switch = 1 + Rng(7, seed_step).integer("switch", 2)
        seen.add(switch)
        for call in range(3):
            cond, uncond = model.conditions({0: PROMPTS, switch: OTHERS}.get(call, IGNORED))
            batch = Batch(cond=cond, uncond=uncond, latent_shape=(4, 4, 8, 8), carried=carried)
            rolled.append(LONG(model.denoiser, batch, Rng(7, seed_step + 10 * call), grad=False))
        session = Session(model, PROMPTS, seed=seeds_of(seed_step))
        before = 4 if switch == 1 else 7
        expected = list(session.take(before))
        session.steer(OTHERS, "recache")
        expected += list(session.take(10 - before))
        assert torch.equal(torch.cat([r.x0 for r in rolled], 2), torch.cat(expected, 2))
        old, new = (model.conditions(p)[0].text for p in (PROMPTS, OTHERS))
        shown = [r.of(batch).cond.text for r in rolled]
        assert all(torch.equal(text, new if call >= switch else old) for call, text in enumerate(shown))
    assert seen == {1, 2}


def test_a_stream_without_a_switch_keeps_its_prompts_whatever_the_batches_say() -> None:
    model = streaming_model(WINDOW)
    plain, _ = going_on(model, replace(LONG, switch=False), 3)
    others, _ = going_on(model, replace(LONG, switch=False), 3, {1: OTHERS, 2: OTHERS})
    assert all(torch.equal(a.x0, b.x0) for a, b in zip(plain, others, strict=True))


def test_only_new_frames_carry_gradient_and_nothing_that_is_carried_does() -> None:
    model = streaming_model(WINDOW)
    model.denoiser.requires_grad_(True)
    heard = Heard(model.denoiser)
    (_, second, _), carried = going_on(model, replace(LONG, length=13), 3, network=heard, grad=True)
    assert second.x0.requires_grad and second.past is not None and not second.past.requires_grad
    assert not any(x.requires_grad for x in carried.tensors.values())
    graded = [call for call in heard.calls if call[0]]
    assert len(graded) == 4 + 3 + 3
    for _, _, _, call, _ in graded:
        assert call.kv is not None and not any(x.requires_grad for layer in call.kv.layers for x in layer)


@pytest.mark.parametrize(
    "keep",
    [Window(window=3, sink=1), MovingSink(window=3, sink=1), Importance(window=3), Int8Memory(keep=Window(window=3))],
)
def test_what_is_carried_does_not_grow_with_the_stream(keep: Any) -> None:
    model, sizes = streaming_model(Stream(memory=keep)), []
    carried = Carried()
    for calls in range(1, 7):
        going_on(model, replace(LONG, stream=Stream(memory=keep), length=100), calls, carried=carried, since=calls - 1)
        sizes.append(sum(x.nbytes for x in carried.tensors.values()))
    assert len(set(sizes[1:])) == 1, sizes


def test_a_stream_that_was_stored_and_read_goes_on_bit_for_bit() -> None:
    model = streaming_model(Stream(memory=Int8Memory(keep=Window(window=4, sink=1)), positions="sink"))
    rollout = replace(
        LONG, stream=Stream(memory=Int8Memory(keep=Window(window=4, sink=1)), positions="sink"), length=16
    )
    straight, _ = going_on(model, rollout, 5)
    _, carried = going_on(model, rollout, 2)
    copy = Carried({name: x.clone() for name, x in carried.tensors.items()})
    again, _ = going_on(model, rollout, 5, carried=copy, since=2)
    assert all(torch.equal(a.x0, b.x0) for a, b in zip(again, straight[2:], strict=True))


def test_what_is_not_carried_is_missed() -> None:
    model = streaming_model(WINDOW)
    cond, uncond = model.conditions(PROMPTS)
    with pytest.raises(ValueError, match="this batch has no carried"):
        LONG(model.denoiser, Batch(cond, uncond, (4, 4, 8, 8)), Rng(0), grad=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"length": 3}, "length must be at least 4"),
        ({"overlap": 4}, "overlap below it"),
        ({"stream": Stream(chunks=(2,))}, "not whole chunks"),
    ],
)
def test_clips_that_cannot_be_are_refused(change: dict[str, Any], says: str) -> None:
    model = streaming_model(change.get("stream", WINDOW))
    with pytest.raises(ValueError, match=says):
        going_on(model, replace(LONG, **change), 2)


def test_a_stream_that_remembers_its_last_step_cannot_switch() -> None:
    with pytest.raises(ValueError, match="switch: false"):
        StreamingLong(stream=Stream(commit="last"))
    StreamingLong(stream=Stream(commit="last"), switch=False)


# --- in a run -------------------------------------------------------------------------------------------------------------

METHOD = DMD2(critic_updates=2, rollout=StreamingLong(stream=WINDOW, grids=TWO, length=13, overlap=1))
"""Streams of four clips, and three updates in an iteration."""


def settings_of(steps: int) -> Settings:
    """Two micro-batches: two streams, which go on over every checkpoint."""
    return small(steps, save_every=1, accumulate=2, health=None, optim={"student": Optim(lr=1e-3)})


def streaming_run(output: Path) -> VideoModel:
    return train(tiny_model(), METHOD, WorldClips(num_frames=FRAMES), settings_of(3), output, quiet=True)


def assert_same(a: RunState, b: RunState) -> None:
    assert a.components.keys() == b.components.keys() and {name[0] for name in a.components["carried"]} == {"0", "1"}
    for name, tensors in a.components.items():
        assert tensors.keys() == b.components[name].keys()
        assert all(torch.equal(x, b.components[name][key]) for key, x in tensors.items()), name


def test_a_resumed_run_goes_on_with_its_streams_bit_for_bit(tmp_path: Path) -> None:
    """A checkpoint lies between the third and the fourth clip of a stream."""
    runs = [prepare(tiny_model(), METHOD, WorldClips(num_frames=FRAMES), settings_of(2), tmp_path) for _ in range(2)]
    runs[0].iterate()
    folder = runs[0].state().save(tmp_path)
    assert all(int(runs[0].carried[place].part("stream")["clip"]) == 3 for place in (0, 1))
    runs[1].restore(Checkpoint.open(folder))
    for run in runs:
        run.iterate()
    assert runs[0].figures == runs[1].figures
    assert_same(runs[0].state(), runs[1].state())


@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_streams_bit_for_bit(tmp_path: Path) -> None:
    streaming_run(tmp_path / "straight")
    die(streaming_run, "iteration", 3, tmp_path / "killed")
    assert len(checkpoints(tmp_path / "killed" / "checkpoints")) > 0
    streaming_run(tmp_path / "killed")
    a, b = (RunState.load(checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("straight", "killed"))
    assert_same(a, b)


def test_each_place_has_a_stream_of_its_own_that_all_updates_go_on_with(tmp_path: Path) -> None:
    run = prepare(tiny_model(), METHOD, WorldClips(num_frames=FRAMES), small(2, accumulate=2, health=None), tmp_path)
    run.iterate()
    kept = [run.carried[place].part("stream") for place in (0, 1)]
    assert not torch.equal(kept[0]["seeds"], kept[1]["seeds"])
    assert [int(part["clip"]) for part in kept] == [3, 3]
    run.iterate()  # the second update of this iteration begins another stream
    assert [int(run.carried[place].part("stream")["clip"]) for place in (0, 1)] == [2, 2]


def test_a_run_that_carries_nothing_has_the_checkpoints_that_it_had(tmp_path: Path) -> None:
    run = prepare(tiny_model(), DMD2(critic_updates=1), WorldClips(num_frames=FRAMES), small(1, health=None), tmp_path)
    run.iterate()
    assert "carried" not in run.state().components


@pytest.mark.slow
def test_a_plan_counts_a_stream_that_goes_on() -> None:
    """Its chunks read a whole window from the first on, which those of a first clip do not: the update after is measured."""
    stream, found = Stream(window=7), []
    for rollout in (
        StreamingLong(stream=stream, grids=TWO, overlap=1, switch=False),
        SelfForced(stream=stream, grids=TWO),
    ):
        method = DMD2(critic_updates=1, rollout=rollout)
        outline = Outline.of(tiny_card(depth=1), method, small(1, health=None, batch=1), FRAMES)
        found.append(outline.phase(next(iter(method.updates(0))), rollout.fullest).activations)
    assert found[0] > found[1]


def test_processes_that_share_a_clip_carry_none() -> None:
    settings = small(1, parallel=Parallel(sequence=2), accumulate=1)
    with pytest.raises(ValueError, match=r"settings\.parallel\.sequence: 1"):
        require_possible(METHOD, settings, tiny_card(), None)
    require_possible(DMD2(rollout=SelfForced()), settings, tiny_card(), None)
