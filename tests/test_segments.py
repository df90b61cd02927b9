"""StreamDiT's multistep distillation: one step per chunk of a rolling window does what the guided teacher did in several."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.attention import KVCache
from fewstep.core import Batch, Call, Cond, KVView, Rng, Seeds
from fewstep.core.build import build, dump
from fewstep.diffusion import CFG, DDIM, Contract, Prediction, Shifted, Stream, uniform_grid
from fewstep.diffusion.path import broadcast
from fewstep.engine import train
from fewstep.methods import HISTORIES, METHODS, DiffusionForced, MovingBuffer, Nets, Progressive, TeacherForced, Work
from fewstep.streaming import Chunks, Rolling, Session
from fewstep.world.data import WorldClips
from support_engine import small, tiny_model
from support_gaussian import RF, Asked, GaussianTeacher, cond_of, f64, minimise, terms
from test_rolling import Heard
from test_streaming import PROMPTS

pytestmark = pytest.mark.usefixtures("single_thread")
N, FACTOR, SHIFT, SCALE = 4, 3, 3.0, 2.0
STREAM = Stream(chunks=(2,), rolling=N, commit="nothing")
SHAPE, FRAMES = (1, 8, 1, 1), 8
MEANS, STD = f64(-0.5, 0.8), 0.4
COARSE, FINE = uniform_grid(N, SHIFT), uniform_grid(N * FACTOR, SHIFT)
METHOD = Progressive(
    stages=((N, 1),),
    factor=FACTOR,
    guidance=CFG(scale=SCALE),
    shift=SHIFT,
    history=MovingBuffer(stream=STREAM, parts=(1, N)),
)


class Windowed(GaussianTeacher):
    """The exact denoiser of frames that are independent of each other, as a rolling window calls it."""

    def recall(self, memory: KVCache, x_t: Tensor, call: Call = Call()) -> KVView:
        return KVView((), memory.positions, memory.start)


class Table(nn.Module):
    """`x0 = scale[i] x + offset[i]` of a frame at `COARSE[i]`."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.scale, self.offset = (
            RF,
            nn.Parameter(torch.zeros(N).double()),
            nn.Parameter(torch.zeros(N).double()),
        )

    recall = Windowed.recall

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        i = (t.double()[..., None] - f64(*COARSE[:-1])).abs().argmin(-1)
        return Prediction(
            broadcast(self.scale[i], x_t) * x_t.double() + broadcast(self.offset[i], x_t), "x0", x_t, t, RF
        )


def batch(size: int = 16) -> Batch:
    x0 = MEANS[1] + STD * Rng(0).randn((size, *SHAPE), "x0").double()
    return Batch(cond_of(1, size), cond_of(0, size), SHAPE, x0=x0)


def fitted() -> Table:
    """The exact optimum of the method, over clips of both numbers of parts."""
    teacher, student = Windowed(MEANS, STD).requires_grad_(False), Table()

    def loss() -> Tensor:
        nets = Nets({"student": student, "stage": teacher, "teacher": teacher})
        each = [terms(update.losses(nets, batch(), Rng(0, step))) for step in range(3) for update in METHOD.updates(0)]  # type: ignore[union-attr]
        return sum((found["halving"] for found in each), torch.zeros(()))

    minimise(list(student.parameters()), loss)
    assert float(loss().detach()) < 1e-10
    return student


def test_a_step_lands_where_the_guided_steps_of_its_segment_end() -> None:
    """In closed form: of a Gaussian all steps are affine, and guidance is another mean."""
    student, teacher = fitted(), Windowed(MEANS, STD)
    mean, apart = teacher.guided_mean(SCALE), list[float]()
    for i, (u, s) in enumerate(pairwise(COARSE)):
        scale, offset = teacher.compose_affine(FINE[FACTOR * i : FACTOR * (i + 1) + 1], mean)
        ratio = s / u
        mine = [((1 - s) - ratio * (1 - u)) * float(v.detach()) for v in (student.scale[i], student.offset[i])]
        assert mine[0] + ratio == pytest.approx(scale, abs=1e-5) and mine[1] == pytest.approx(offset, abs=1e-5)
        apart.append(abs(teacher.compose_affine((u, s), mean)[0] - scale))
    assert max(apart) > 0.02, "several steps are not one"


def test_its_stream_is_the_teachers_in_fewer_calls() -> None:
    """From the same noise every chunk is the same clip, in one call per chunk of the window instead of three guided ones."""
    student, teacher, found = fitted(), Windowed(MEANS, STD), list[tuple[Tensor, int]]()
    old = Contract(
        grid=Shifted(shift=SHIFT), sampler=DDIM(), steps=N * FACTOR, guidance=CFG(scale=SCALE), stream=STREAM
    )
    new = METHOD.contract(old)
    assert new.stream == STREAM and new.steps == N and new.guidance == CFG() and new.times() == pytest.approx(COARSE)
    for network, contract in ((teacher, old), (student, new)):
        heard = Heard(network)
        rolling = Rolling(chunks=Chunks.of(heard, contract))
        with torch.no_grad():
            chunks = list(rolling.take(6, (1, 1, 1), cond_of(1, 2), cond_of(0, 2), Seeds((0, 1))))
        found.append((torch.cat(chunks, 2), len(heard.calls)))
        assert rolling.turns == (FACTOR if network is teacher else 1)
    assert torch.allclose(found[0][0].double(), found[1][0].double(), atol=1e-4)
    assert found[0][1] == FACTOR * found[1][1] == FACTOR * (N + 5)


def test_the_teacher_makes_the_steps_of_a_window_all_at_once() -> None:
    """Every call of the teacher is on the whole window, whose parts are each as far in their own segment."""
    method = replace(METHOD, history=MovingBuffer(stream=STREAM, parts=(N,)))
    nets = Nets({name: Asked(Windowed(MEANS, STD)) for name in ("student", "stage")})
    terms(method.student_loss(N, CFG(), nets, batch(2), Rng(0)))
    assert len(nets.stage.questions) == FACTOR and len(nets.student.questions) == 1
    for step, question in enumerate(nets.stage.questions):
        times = [FINE[FACTOR * (N - 1 - frame // 2) + step] for frame in range(FRAMES)]
        assert question.t.tolist() == [pytest.approx(times)] * 2 and not question.grad
    asked = nets.student.questions[0]
    assert torch.equal(asked.t, nets.stage.questions[0].t) and torch.equal(asked.x_t, nets.stage.questions[0].x_t)


def test_a_factor_of_two_is_progressive_distillation() -> None:
    assert Progressive().factor == 2 and Progressive().cost() == (Work("student", 3), Work("stage", 2.5))
    assert METHOD.cost() == (Work("student", 3), Work("stage", 2 * FACTOR))
    Progressive(stages=((9, 1), (3, 1), (1, 1)), factor=3)
    with pytest.raises(ValueError, match=r"1/3 of the steps of the one before, got \[9, 4\]"):
        Progressive(stages=((9, 1), (4, 1)), factor=3)
    with pytest.raises(ValueError, match="factor must be at least 2"):
        Progressive(factor=1)
    with pytest.raises(ValueError, match="write history.clean: 0"):
        Progressive(history=DiffusionForced(clean=0.5))
    names: dict[str, Any] = {cls.__name__: cls for cls in (*METHODS, *HISTORIES)}
    assert build(Progressive, dump(METHOD), names) == METHOD


def test_a_teacher_that_rolls_is_distilled_into_a_student_that_rolls(tmp_path: Path) -> None:
    stream = Stream(chunks=(1,), rolling=4, commit="nothing")
    history = MovingBuffer(stream=stream, parts=(1, 4))
    teacher = tiny_model()
    contract = Contract(grid=Shifted(shift=SHIFT), steps=12, guidance=CFG(scale=2.0), stream=stream)
    teacher = teacher.with_part("denoiser", teacher.denoiser, contract=contract)
    method = Progressive(stages=((4, 2),), factor=3, shift=SHIFT, history=history)
    student = train(teacher, method, WorldClips(num_frames=4), small(steps=2), tmp_path, quiet=True)
    session = Session(student, PROMPTS)
    assert method.contract(Contract()).stream == method.contract_at(Contract(), 0).stream == stream
    assert session.counts(3) == (4, 1, 1) and student.card.contract.calls() < teacher.card.contract.calls()
    assert torch.cat(list(session.take(3)), 2).isfinite().all()


def test_both_networks_read_chunks_as_the_history_says() -> None:
    asked: list[Any] = []

    class Noted(DiffusionForced):
        def over(self, network: Any, x0: Tensor) -> Any:
            asked.append((network, x0))
            return network

    nets, given = Nets({name: Windowed(MEANS, STD) for name in ("student", "stage")}), batch(2)
    method = Progressive(stages=((4, 1),), history=Noted(stream=Stream(chunks=(2,))), guidance=CFG())
    terms(method.student_loss(4, CFG(), nets, given, Rng(0)))
    assert {id(network) for network, _ in asked} == {id(nets.stage), id(nets.student)}
    assert all(x0 is given.x0 for _, x0 in asked)
    forced = Progressive(stages=((4, 1),), history=TeacherForced(), guidance=CFG())
    assert forced.cost() == (Work("student", 6), Work("stage", 4)), "two calls each: the clean clip, and the noisy one"
