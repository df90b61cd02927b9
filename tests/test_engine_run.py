"""The loop: who moves, what a gradient is, what stops a run, and what a run leaves behind."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.core import Batch, Losses, Rng
from fewstep.core.finite import NonFiniteError
from fewstep.data.base import Data, Source
from fewstep.diffusion import CFG, VP, NoisePath, RectifiedFlow, Trig, Uniform
from fewstep.engine import CheckpointError, Optim, Parallel, Settings, WorldProbe, train
from fewstep.engine.checkpoint import RunState, checkpoints
from fewstep.engine.log import RunLog, read_metrics
from fewstep.engine.nets import build_nets, trained_roles
from fewstep.engine.optim import RoleOptimizer, learning_rate
from fewstep.engine.outline import Outline
from fewstep.engine.prepare import prepare, require_possible
from fewstep.engine.preview import HEAD
from fewstep.engine.run import Run
from fewstep.methods import DMD2, Adversary, Copy, FlowMatching, KnowledgeDistillation, Method, Nets, Sync, Update
from fewstep.models import Backbone, Card, FeatureHeads, VideoModel, fingerprint
from fewstep.models.averaging import blend
from support_engine import CASES, FRAMES, LONG, Everything, TinyImages, small, stored_card, tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")


def prepared(tmp_path: Path, method: Method, settings: Settings, data: Data = Everything()) -> Run:
    return prepare(tiny_model(), method, data, settings, tmp_path)


@dataclass(frozen=True, kw_only=True)
class Denoise(Method):
    """Predict clean latents from half noise that depends on nothing but the clip."""

    cite: ClassVar[str] = "none"
    spoil: str = ""
    """`loss` or `gradient` becomes NaN in the third iteration; `nothing` gives the critic a loss of the student."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"prompts", "x0"})

    def aux(self) -> dict[str, Copy]:
        return {"critic": Copy("teacher")}

    def updates(self, step: int) -> Iterator[Update | Sync]:
        spoil = self.spoil if step == 2 else ""
        yield Update(
            ("critic",), lambda nets, batch, rng: self.losses(nets, batch, "" if self.spoil != "nothing" else spoil)
        )
        yield Update(("student",), lambda nets, batch, rng: self.losses(nets, batch, spoil))

    def losses(self, nets: Nets, batch: Batch, spoil: str) -> Iterator[Losses]:
        assert batch.x0 is not None
        trained = nets[next(role for role, net in nets.roles.items() if next(net.parameters()).requires_grad)]
        if spoil == "nothing":
            yield {"free": torch.zeros((), requires_grad=True)}
            return
        out = trained(batch.x0.flip(2), torch.full((len(batch),), 0.5), batch.cond).x0
        if spoil == "gradient":
            out = out + (out - out.detach()).clamp_min(0).sqrt()  # value unchanged, slope infinite
        yield {"first": (out - batch.x0).square().mean()}
        again = trained(batch.x0, torch.full((len(batch),), 0.3), batch.cond).x0
        yield {"second": (again - batch.x0).abs().mean() * (float("nan") if spoil == "loss" else 1.0)}


@dataclass(frozen=True, kw_only=True)
class Cut(Data):
    """The same clips whether they come as one batch or as one micro-batch per place."""

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "x0"})

    def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
        return _Cut(Everything().open(model, needs))


@dataclass(frozen=True)
class _Cut:
    whole: Source

    def batch(self, size: int, rng: Rng) -> Batch:
        every = self.whole.batch(6, rng.at(place=0))
        rows = slice(rng.place * size, (rng.place + 1) * size)
        assert every.x0 is not None
        return replace(every, cond=every.cond[rows], uncond=every.uncond[rows], x0=every.x0[rows])


# --- gradients --------------------------------------------------------------------------------------------------------


def test_micro_batches_add_up_to_the_large_batch(tmp_path: Path) -> None:
    runs = [
        prepared(tmp_path, Denoise(), small(1, batch=batch, accumulate=accumulate), Cut())
        for batch, accumulate in ((6, 1), (2, 3))
    ]
    gradients = []
    for run in runs:
        seen: dict[str, torch.Tensor] = {}
        clip = run.optimizers["student"].clip

        def spy(run: Run = run, seen: dict[str, torch.Tensor] = seen, clip: Any = clip) -> torch.Tensor:
            seen.update({name: p.grad.clone() for name, p in run.nets.student.named_parameters() if p.grad is not None})
            return clip()

        run.optimizers["student"].clip = spy  # type: ignore[method-assign]
        run.iterate()
        gradients.append(seen)
    whole, summed = gradients
    assert whole.keys() == summed.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-7)
    assert runs[0].figures == pytest.approx(runs[1].figures, rel=1e-5)  # losses are averaged, not the last one shown


def test_the_gradient_of_a_role_is_clipped_as_a_whole() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer = RoleOptimizer(network, Optim(clip=0.5), 10)
    assert float(optimizer.clip()) == pytest.approx(3.0 * 12**0.5)
    norm = torch.stack([p.grad.square().sum() for p in network.parameters() if p.grad is not None]).sum().sqrt()
    assert float(norm) == pytest.approx(0.5, rel=1e-4)


def test_clipping_one_role_does_not_see_the_other(tmp_path: Path) -> None:
    optim = {"student": Optim(clip=1e-3), "critic": Optim(clip=1e3)}
    run = prepared(tmp_path, Denoise(), small(2, optim=optim))
    step, norms = RoleOptimizer.step, {}

    def noted(self: RoleOptimizer, number: int) -> float:
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        norms[self.optim.clip] = float(torch.nn.utils.get_total_norm(gradients))
        return step(self, number)

    with mock.patch.object(RoleOptimizer, "step", noted):
        run.iterate()
    assert norms == pytest.approx({1e-3: 1e-3, 1e3: run.figures["grad/critic"]}, rel=1e-3)
    assert run.figures["grad/student"] == pytest.approx(run.figures["grad/critic"])  # equal before clipping
    assert all(p.grad is None for net in run.nets.values() for p in net.parameters())


@dataclass(frozen=True, kw_only=True)
class Drawing(Denoise):
    """Notes one random number per call of a loss, and whether loss and backward pass run under autocast."""

    drawn: list[float]
    autocast: list[bool]

    def updates(self, step: int) -> Iterator[Update | Sync]:
        yield Update(("critic",), self.noted)
        yield Update(("student",), self.noted)

    def noted(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        self.drawn.append(float(rng.randn((1,), "number")))
        for terms in self.losses(nets, batch, ""):
            self.autocast.append(torch.is_autocast_enabled("cpu"))
            yield {name: Noted.apply(term, self.autocast) for name, term in terms.items()}


class Noted(torch.autograd.Function):
    """The same number; its backward pass says whether it is under autocast."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, noted: list[bool]) -> torch.Tensor:
        ctx.noted = noted
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.noted.append(torch.is_autocast_enabled("cpu"))
        return grads[0], None


def numbers(tmp_path: Path, seed: int) -> list[float]:
    method = Drawing(drawn=[], autocast=[])
    run = prepared(tmp_path, method, small(2, accumulate=3, seed=seed))
    for _ in range(2):
        run.iterate()
    return method.drawn


def test_noise_differs_between_seeds_iterations_updates_and_micro_batches(tmp_path: Path) -> None:
    first, again, other = (numbers(tmp_path, seed) for seed in (0, 0, 1))
    assert first == again and len({*first, *other}) == 2 * (2 * 2 * 3)


def test_data_differ_between_iterations_and_micro_batches(tmp_path: Path) -> None:
    run = prepared(tmp_path, Denoise(), small(2, accumulate=3))
    seen: list[torch.Tensor] = []
    with mock.patch.object(
        Run, "update", side_effect=lambda _, batches, __: seen.extend(b.x0 for b, _ in batches) or []
    ):
        run.iterate()
        run.iterate()
    distinct = {x0.numpy().tobytes() for x0 in seen}
    assert len(seen) == 2 * 2 * 3 and len(distinct) == 2 * 3, "both updates of an iteration see the same"


@pytest.mark.parametrize("autocast", ["off", "bf16"])
def test_networks_follow_autocast_and_gradients_do_not(autocast: Any, tmp_path: Path) -> None:
    method = Drawing(drawn=[], autocast=[])
    prepared(tmp_path, method, small(1, autocast=autocast)).iterate()
    assert method.autocast == [autocast == "bf16", False] * 4


def test_every_role_has_its_own_optimiser_or_the_students(tmp_path: Path) -> None:
    student = Optim(lr=1e-3, clip=3.0)
    critic = Optim(type="muon", lr=2e-4, betas=(0.5, 0.6), weight_decay=0.1, clip=0.5)
    run = prepared(tmp_path, Denoise(), small(1, optim={"student": student, "critic": critic}))
    assert {role: optimizer.optim for role, optimizer in run.optimizers.items()} == {
        "student": student,
        "critic": critic,
    }
    run.iterate()
    assert (run.figures["lr/student"], run.figures["lr/critic"]) == (1e-3, 2e-4)
    alone = prepared(tmp_path, Denoise(), small(1, optim={"student": student}))
    assert alone.optimizers["critic"].optim == student


def only(name: str, value: torch.Tensor, optim: Optim) -> tuple[torch.nn.Parameter, RoleOptimizer]:
    """One weight of that name, and its optimiser."""
    network: torch.nn.Module = torch.nn.Module()
    for part in name.split(".")[:-1][::-1]:
        outer = torch.nn.Module()
        if not list(network.children()):
            network.register_parameter("weight", torch.nn.Parameter(value.clone()))
        outer.add_module(part, network)
        network = outer
    (parameter,) = network.parameters()
    return parameter, RoleOptimizer(network, optim, 10)


def stepped(parameter: torch.nn.Parameter, optimizer: RoleOptimizer, gradient: torch.Tensor) -> torch.Tensor:
    parameter.grad = gradient.clone()
    optimizer.step(0)
    assert parameter.grad is None
    return parameter.detach().clone()


def test_betas_are_how_long_adamw_remembers() -> None:
    """With none it moves by the learning rate against the last gradient, whatever came before."""
    one = torch.ones(3, 3)
    parameter, optimizer = only("embed.weight", one, Optim(lr=0.1, betas=(0.0, 0.0)))
    torch.testing.assert_close(stepped(parameter, optimizer, 5 * one), 0.9 * one)
    torch.testing.assert_close(stepped(parameter, optimizer, -0.01 * one), one)
    parameter, optimizer = only("embed.weight", one, Optim(lr=0.1, betas=(0.9, 0.9)))
    stepped(parameter, optimizer, 5 * one)
    assert float(stepped(parameter, optimizer, -0.01 * one).max()) < 0.9


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weights_decay_only_where_asked_for(kind: Any) -> None:
    one = torch.ones(4, 4)
    for decay in (0.0, 0.5):
        parameter, optimizer = only("blocks.0.weight", one, Optim(type=kind, lr=0.1, weight_decay=decay))
        torch.testing.assert_close(stepped(parameter, optimizer, 0 * one), one * (1 - 0.1 * decay))


@pytest.mark.parametrize("shape", [(128, 128), (64, 256), (256, 64)])
def test_muons_updates_are_as_large_as_adamws(shape: tuple[int, int]) -> None:
    """0.2 of the learning rate, whatever the shape (2502.16982); Newton-Schulz is rough."""
    parameter, optimizer = only("blocks.0.weight", torch.zeros(shape), Optim(type="muon", lr=1.0))
    change = stepped(parameter, optimizer, torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert 0.13 < float(change.square().mean().sqrt()) < 0.27


@pytest.mark.parametrize(("norm", "expected"), [(0.1, 0.1), (3.0, 0.5)])
def test_small_gradients_are_not_clipped(norm: float, expected: float) -> None:
    parameter, optimizer = only("embed.weight", torch.zeros(2, 2), Optim(clip=0.5))
    parameter.grad = torch.full((2, 2), norm / 2)
    assert float(optimizer.clip()) == pytest.approx(norm)
    assert float(parameter.grad.norm()) == pytest.approx(expected, rel=1e-4)


def test_the_gradient_of_an_update_is_that_of_the_sum_of_its_terms(tmp_path: Path) -> None:
    run = prepared(tmp_path, Denoise(), small(1))
    weight = next(run.nets.student.parameters()).requires_grad_()
    run.backward({"first": 2 * weight.sum(), "second": 3 * weight.sum()}, ("student",))
    assert weight.grad is not None and weight.grad.unique().tolist() == [5.0]
    run.backward({"third": weight.sum()}, ("student",))
    assert weight.grad.unique().tolist() == [6.0], "graphs of one update add up"


def test_the_learning_rate_of_an_iteration_is_its_own(tmp_path: Path) -> None:
    run = prepared(tmp_path, Denoise(), small(3, optim={"student": Optim(lr=1e-3, warmup=3)}))
    rates = []
    for _ in range(3):
        run.iterate()
        rates.append(run.figures["lr/student"])
        group = run.optimizers["student"].parts["adamw"].param_groups[0]
        assert group["lr"] == rates[-1]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3])


def test_a_sync_moves_its_target_only(tmp_path: Path) -> None:
    class Following(Denoise):
        def updates(self, step: int) -> Iterator[Update | Sync]:
            yield Update(("student",), lambda nets, batch, rng: self.losses(nets, batch, ""))
            yield Sync("critic", "student", 0.75)

    run = prepared(tmp_path, Following(), small(1))
    before = {k: v.clone() for k, v in run.nets.critic.state_dict().items()}
    run.iterate()
    for name, value in run.nets.student.state_dict().items():
        torch.testing.assert_close(run.nets.critic.state_dict()[name], 0.75 * before[name] + 0.25 * value)
    assert any(not torch.equal(before[name], value) for name, value in run.nets.student.state_dict().items())


def test_muon_is_for_the_matrices_inside_the_blocks() -> None:
    network = tiny_model().denoiser
    optimizer = RoleOptimizer(network, Optim(type="muon"), 10)
    names = {id(p): name for name, p in network.named_parameters()}
    by = {
        kind: {names[id(p)] for group in part.param_groups for p in group["params"]}
        for kind, part in optimizer.parts.items()
    }
    assert by["muon"] == {
        name for name, p in network.named_parameters()
        if name.startswith("backbone.blocks.") and p.ndim == 2 and not name.endswith("table")
    }  # fmt: skip
    assert by["adamw"] == set(names.values()) - by["muon"] and "backbone.patches.weight" in by["adamw"]


def test_moments_wait_on_the_cpu_and_come_back() -> None:
    parameter, optimizer = only("embed.weight", torch.ones(2, 2), Optim(lr=0.1))
    optimizer.rest = True
    places: list[str | None] = []
    move = optimizer._move
    optimizer._move = lambda part, where: (places.append(where), move(part, where))  # type: ignore[method-assign, func-returns-value]
    for _ in range(2):
        stepped(parameter, optimizer, torch.ones(2, 2))
    assert places == [None, "cpu"] * 2
    assert {value.device.type for value in optimizer.state().values()} == {"cpu"}


def test_roles_begin_frozen_and_equal(tmp_path: Path) -> None:
    model = tiny_model()
    torch.manual_seed(0)
    nets = build_nets(model, DMD2(adversary=Adversary()), seed=3)
    assert not any(p.requires_grad for net in nets.values() for p in net.parameters())
    assert fingerprint(nets.student) == fingerprint(nets.critic) == fingerprint(nets.teacher)
    assert not {p.data_ptr() for p in nets.student.parameters()} & {p.data_ptr() for p in nets.critic.parameters()}
    torch.manual_seed(1)
    again, other = (build_nets(model, DMD2(adversary=Adversary()), seed=seed) for seed in (3, 4))
    assert fingerprint(nets.discriminator) == fingerprint(again.discriminator) != fingerprint(other.discriminator)
    images = TinyImages().load()
    mixed = build_nets(model, CASES["AVDM2"], seed=3, others={"image_teacher": images})
    assert fingerprint(mixed.image_critic) == fingerprint(images.denoiser) != fingerprint(mixed.teacher)


def test_averages_blend_numbers_and_copy_counters() -> None:
    def network(value: float, count: int) -> torch.nn.Module:
        made = torch.nn.BatchNorm1d(2)
        with torch.no_grad():
            made.weight.fill_(value)
            made.running_mean.fill_(value)  # type: ignore[union-attr]
            made.num_batches_tracked.fill_(count)  # type: ignore[union-attr]
        return made

    target, source = network(1.0, 3), network(2.0, 7)
    blend(target, source, 0.75)
    assert target.weight.tolist() == target.running_mean.tolist() == [1.25, 1.25]  # type: ignore[union-attr]
    assert int(target.num_batches_tracked) == 7 and source.weight.tolist() == [2.0, 2.0]  # type: ignore[arg-type]


# --- who moves --------------------------------------------------------------------------------------------------------


def test_only_the_named_roles_move_and_train(tmp_path: Path) -> None:
    run = prepared(tmp_path, LONG, small(9))
    prints = lambda: {role: fingerprint(net) for role, net in run.nets.items()}  # noqa: E731
    modes = {}
    for _ in range(LONG.warmup):
        before = prints()
        run.iterate()
        after = prints()
        assert {role for role in after if after[role] != before[role]} == {"critic"}
        modes |= {role: net.training for role, net in run.nets.items()}
    assert modes == {"teacher": False, "student": False, "critic": True}
    assert not any(p.requires_grad for role in ("teacher", "student") for p in run.nets[role].parameters())
    before = prints()
    run.iterate()
    after = prints()
    assert {role for role in after if after[role] != before[role]} == {"critic", "student"}
    assert [role for role, net in run.nets.items() if net.training] == ["student"]


def test_heads_are_made_for_the_layers_asked_for(tmp_path: Path) -> None:
    run = prepared(tmp_path, DMD2(adversary=Adversary(layers=(0, -1))), small(1))
    assert isinstance(run.nets.discriminator, FeatureHeads) and len(run.nets.discriminator.heads) == 2


def test_average_follows_its_formula(tmp_path: Path) -> None:
    run = prepared(tmp_path, Denoise(), small(3, ema=0.15, optim={"student": Optim(lr=0.1)}))
    expected = {k: v.clone() for k, v in run.nets.student.state_dict().items()}
    for decay in (1 / 10, 0.15, 0.15):  # 2/11 is more than 0.15
        run.iterate()
        for name, value in run.nets.student.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    assert run.average is not None
    for name, value in run.average.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert run.student().denoiser is run.average


def test_an_average_that_waits_is_brought_in_to_be_used_alone(tmp_path: Path) -> None:
    """Not to be saved; and updates do not find it there. (The meta device stands for one that is not the CPU.)"""
    run = prepare(tiny_model(), CASES["DMD2"], Everything(), small(3, ema=0.9), tmp_path)
    assert run.average is not None
    places: list[str] = []
    run.average.to = lambda place: places.append(str(place)) or run.average  # type: ignore[method-assign, assignment]
    run.settings = replace(run.settings, parallel=Parallel(offload=True))
    run.iterate()
    run.keep(tmp_path / "kept")
    assert places == ["cpu"]
    run.settings = replace(run.settings, device="meta")
    assert run.student().denoiser is run.average and places == ["cpu", "meta"]
    run.settings = replace(run.settings, device="cpu")
    with mock.patch.object(Run, "update", side_effect=lambda *_: places.append("update") or []):
        run.iterate()
    assert places[2:4] == ["cpu", "update"]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weights_and_moments_stay_float32_under_autocast(kind: Any, tmp_path: Path) -> None:
    settings = small(5, autocast="bf16", ema=0.9, optim={"student": Optim(type=kind)})
    run = prepared(tmp_path, LONG, settings)
    before = {name: p.detach().clone() for name, p in run.nets.student.named_parameters()}
    for _ in range(5):  # with calls under no_grad before the one that carries gradient
        run.iterate()
    state = run.state().components
    assert {t.dtype for tensors in state.values() for t in tensors.values()} == {torch.float32}
    still = [name for name, p in run.nets.student.named_parameters() if torch.equal(before[name], p)]
    assert still == []
    slots = {key.split("/")[1] for key in state["student.optim"]}
    assert slots == {"step", "exp_avg", "exp_avg_sq"} | ({"momentum_buffer"} if kind == "muon" else set())


def test_learning_rate_is_a_function_of_the_step() -> None:
    optim = Optim(lr=1.0, warmup=3, decay="cosine")
    assert [learning_rate(optim, step, 13) for step in range(3)] == pytest.approx([0.25, 0.5, 0.75])
    assert learning_rate(optim, 3, 13) == 1.0
    assert learning_rate(optim, 8, 13) == pytest.approx(0.5)
    constant = Optim(lr=1.0, warmup=3)
    assert [learning_rate(constant, step, 13) for step in (3, 8, 12)] == [1.0, 1.0, 1.0]
    middle = {decay: learning_rate(Optim(lr=2.0, warmup=4, decay=decay), 8, 20) for decay in ("linear", "cosine")}  # type: ignore[arg-type]
    assert 1.4 < middle["linear"] < 1.6 and 1.65 < middle["cosine"] < 1.75  # a quarter of the way after the warm-up


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_last_iteration_trains_and_the_one_after_would_not(decay: Any, warmup: int) -> None:
    optim = Optim(lr=1.0, warmup=warmup, decay=decay)
    rates = [learning_rate(optim, step, 10) for step in range(warmup, 11)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-2] > 0 and rates[-1] == 0


# --- what stops a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [("loss", "step 2, loss second of student"), ("gradient", "step 2, gradient norm of student")],
)
def test_a_number_that_is_none_stops_the_run(spoil: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=message):
        train(tiny_model(), Denoise(spoil=spoil), Everything(), small(5, save_every=1), tmp_path, quiet=True)
    found = checkpoints(tmp_path / "checkpoints")
    assert found[-1].name == "step-000002"
    state = RunState.load(found[-1])
    assert all(bool(t.isfinite().all()) for tensors in state.components.values() for t in tensors.values())
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_nothing_has_moved_when_the_run_stops(tmp_path: Path) -> None:
    run = prepared(tmp_path, Denoise(spoil="gradient"), small(5))
    for _ in range(2):
        run.iterate()
    before = fingerprint(run.nets.student)
    with pytest.raises(NonFiniteError):
        run.iterate()
    assert fingerprint(run.nets.student) == before


def test_a_bad_probe_figure_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 1, probe figure rule of student"):
        train(tiny_model(), Denoise(), Everything(), small(2), tmp_path, probe=Scripted([float("nan")]), quiet=True)


@pytest.mark.parametrize(
    ("method", "others", "message"),
    [
        (CASES["Reconstruction"], {"compile": True}, "settings.compile is for denoisers"),
        (CASES["ReadAttributes-features"], {"preview_every": 1}, "settings.preview_every is for denoisers"),
        (CASES["Reconstruction"], {"optim": {"student": Optim(type="muon")}}, "give its role an entry of type adamw"),
        (DMD2(adversary=Adversary()), {"optim": {"student": Optim(type="muon")}}, "this FeatureHeads trains none"),
        (DMD2(), {"optim": {"student": Optim(type="muon", frozen=("blocks",))}}, "this Denoiser trains none"),
        (DMD2(), {"optim": {"student": Optim(only=("motion",))}}, "only: no parameter of this Denoiser has 'motion'"),
        (
            DMD2(),
            {"optim": {"student": Optim(frozen=("motion",))}},
            "frozen: no parameter of this Denoiser has 'motion'",
        ),
        (
            DMD2(),
            {"optim": {"student": Optim(only=("cross",), frozen=("blocks",))}},
            "leave no parameter of this Denoiser",
        ),
        (
            DMD2(),
            {"optim": {"student": Optim(lr_of={"motion": 1e-4})}},
            "lr_of: no parameter of this Denoiser has 'motion'",
        ),
        (
            DMD2(),
            {"optim": {"student": Optim(lr_of={"cross": 1.0, "cross.q": 1.0})}},
            "cross and cross.q are both part of",
        ),
        (
            CASES["DMD2"],
            {"optim": {"critc": Optim()}},
            r"settings.optim.critc: no such role is trained; did you mean critic\?",
        ),
        (Denoise(spoil="nothing"), {}, "this update trains Denoiser, and no loss of the update depends on it"),
        (DMD2(warmup=3), {}, "DMD2 does not train the student within settings.steps: 3 .it trains only critic."),
        (CASES["Progressive"], {}, "the student of 1 steps. begins after 7 iterations; give it 10, or at least 8"),
    ],
)
def test_what_would_do_nothing_is_refused(method: Method, others: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny_model(), method, Everything(), small(3, **others), tmp_path, quiet=True)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DMD2(guidance=CFG(scale=math.nan)), "CFG.scale must be a finite number, got nan"),
        (DMD2(score_density=Uniform(low=-1.0)), "Uniform.low must be at least 0, got -1.0"),
        (DMD2(adversary=Adversary(density=Uniform(shift=-3.0))), "Uniform.shift must be more than 0, got -3.0"),
        (KnowledgeDistillation(huber=-1.0), "KnowledgeDistillation.huber must be more than 0, got -1.0"),
    ],
)
def test_numbers_out_of_bounds_are_refused_in_python_too(method: Method, message: str) -> None:
    """A recipe file cannot hold them, and an object that a method holds need not check itself."""
    with pytest.raises(ValueError, match=message):
        require_possible(method, small(3), tiny_model().card, None)


@pytest.mark.parametrize("path", [RectifiedFlow(), Trig()])
def test_noise_that_hides_the_clean_clip_is_no_prediction(path: NoisePath) -> None:
    """Without signal at t = 1 a prediction of the noise gives an infinite x0, of which a run would only say NaN."""
    with pytest.raises(
        ValueError, match="has no signal: at t = 1, where students begin; give a model of kind flow, v or x0"
    ):
        require_possible(DMD2(), small(3), tiny_model(0, path, "eps").card, None)
    for fits in (tiny_model(0, VP(), "eps"), tiny_model(0, path, "v"), tiny_model(0, path, "x0")):
        require_possible(DMD2(), small(3), fits.card, None)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_parts_of_a_network_have_their_own_learning_rate(kind: str, tmp_path: Path) -> None:
    """Halving the rate of a part equals halving it for all, there; elsewhere nothing changes."""
    moved = {}
    for case, optim in {
        "all": Optim(type=kind, lr=2e-3, warmup=2),
        "half": Optim(type=kind, lr=1e-3, warmup=2),
        "part": Optim(type=kind, lr=2e-3, warmup=2, lr_of={"attention": 1e-3}),
    }.items():
        run = prepared(tmp_path, Denoise(), small(1, optim={"student": optim}))
        before = {name: p.detach().clone() for name, p in run.nets.student.named_parameters()}
        run.iterate()
        assert run.figures["lr/student"] == pytest.approx(optim.lr / 3)
        moved[case] = {name: p.detach() - before[name] for name, p in run.nets.student.named_parameters()}
    assert any("attention" in name for name in moved["part"])
    for name, change in moved["part"].items():
        assert torch.equal(change, moved["half" if "attention" in name else "all"][name]), name
    assert "0.001 for attention" in run.effective.optimizers["student"]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_part_of_a_network_is_trained_alone(kind: str, tmp_path: Path) -> None:
    """The rest stays bit for bit as it was, and has no gradients and no moments, in the plan and when a run is taken up again."""
    optim = Optim(type=kind, lr=2e-3, only=("attention", "cross"), frozen=("cross.q",), weight_decay=0.1)

    def trained(name: str) -> bool:
        return ("attention" in name or "cross" in name) and "cross.q" not in name

    run = prepared(tmp_path, CASES["FlowMatching"], small(4, optim={"student": optim}))
    before = {name: p.detach().clone() for name, p in run.nets.student.named_parameters()}
    for _ in range(2):
        run.iterate()
    moved = {name for name, p in run.nets.student.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if trained(name)} and 0 < len(moved) < len(before)
    state = run.optimizers["student"].state()
    assert {key.split("/", 2)[2] for key in state} == moved
    assert all((p.grad is None) or name in moved for name, p in run.nets.student.named_parameters())
    again = prepared(tmp_path / "again", CASES["FlowMatching"], small(4, optim={"student": optim})).optimizers[
        "student"
    ]
    assert again.allocate(state.keys()).keys() == state.keys()
    moments = sum(tensor.nbytes for key, tensor in state.items() if key.split("/")[1] != "step")
    outline = Outline.of(stored_card(tiny_model()), CASES["FlowMatching"], small(4, optim={"student": optim}), FRAMES)
    (student,) = (held for held in outline.plan().holdings if held.role == "student")
    assert student.trained == sum(before[name].numel() for name in moved) and student.optimizer == moments
    assert "only attention and cross" in run.effective.optimizers["student"]


def test_progressive_may_end_with_its_last_stage_begun(tmp_path: Path) -> None:
    student = train(tiny_model(), CASES["Progressive"], Everything(), small(8), tmp_path, quiet=True)
    assert student.card.contract.trained == {1: (1.0, 0.0)}


def test_a_probe_that_cannot_work_is_refused_up_front(tmp_path: Path) -> None:
    model = tiny_model()
    model.save(tmp_path / "eyes")
    probe = WorldProbe(features=str(tmp_path / "eyes"))
    train(model, Denoise(), Everything(), small(1), tmp_path / "fits", probe=replace(probe, prompts=2), quiet=True)
    with pytest.raises(ValueError, match="judges clips, and this run trains the codec; leave probe out"):
        train(model, CASES["Reconstruction"], Everything(), small(1), tmp_path / "codec", probe=probe, quiet=True)
    large = VideoModel(replace(model.card, height=64, width=64), model.parts)
    with pytest.raises(ValueError, match="32 x 32, and model 'tiny' makes 64 x 64"):
        train(large, Denoise(), Everything(), small(1), tmp_path / "large", probe=probe, quiet=True)
    blind = VideoModel(model.card, {k: v for k, v in model.parts.items() if k != "features"}).save(tmp_path / "blind")
    with pytest.raises(ValueError, match="has no features; it has denoiser"):
        train(
            model, Denoise(), Everything(), small(1), tmp_path / "b", probe=WorldProbe(features=str(blind)), quiet=True
        )
    assert not any((tmp_path / name).exists() for name in ("codec", "large", "b"))


@pytest.mark.parametrize("field", ["steps", "batch", "accumulate", "log_every", "keep_last"])
def test_settings_are_checked(field: str) -> None:
    with pytest.raises(ValueError, match=f"settings.{field} must be at least 1, got 0"):
        Settings(**{"steps": 1, field: 0})
    with pytest.raises(ValueError, match="preview_every must be at least 0"):
        Settings(steps=1, preview_every=-1)


# --- what a run leaves behind -----------------------------------------------------------------------------------------


@dataclass
class Scripted:
    """A probe whose verdicts are written down; larger is better."""

    rules: list[float]
    every: int = 1
    calls: int = 0

    def check(self, card: Card, part: str) -> None: ...

    def __call__(self, student: VideoModel) -> dict[str, float]:
        self.calls += 1
        return {"rule": self.rules[self.calls - 1]}

    def better(self, scores: Mapping[str, float], best: Mapping[str, float]) -> bool:
        return not best or scores["rule"] > best["rule"]


def test_the_best_is_returned_and_not_the_last(tmp_path: Path) -> None:
    reference = prepared(tmp_path, Denoise(), small(4))
    prints = []
    for _ in range(4):
        reference.iterate()
        prints.append(fingerprint(reference.nets.student))
    probe = Scripted([0.1, 0.7, 0.3, 0.6])
    student = train(tiny_model(), Denoise(), Everything(), small(4), tmp_path / "run", probe=probe, quiet=True)
    assert fingerprint(student.denoiser) == prints[1] != prints[3]
    assert student.card.scores == {"rule": 0.7}
    assert fingerprint(VideoModel.from_pretrained(tmp_path / "run" / "best").denoiser) == prints[1]
    last = train(tiny_model(), Denoise(), Everything(), small(4), tmp_path / "last", quiet=True)
    assert fingerprint(last.denoiser) == prints[3]


def test_the_best_before_a_stop_still_counts_after_it(tmp_path: Path) -> None:
    class Stopping(Scripted):
        def __call__(self, student: VideoModel) -> dict[str, float]:
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().__call__(student)

    settings = small(4, save_every=3)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), Denoise(), Everything(), settings, tmp_path, probe=Stopping([0.1, 0.7, 0.3]), quiet=True)
    best = fingerprint(VideoModel.from_pretrained(tmp_path / "best").denoiser)
    student = train(tiny_model(), Denoise(), Everything(), settings, tmp_path, probe=Scripted([0.6]), quiet=True)
    assert student.card.scores == {"rule": 0.7} and fingerprint(student.denoiser) == best
    (tmp_path / "best").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="the best student so far, is gone"):
        train(tiny_model(), Denoise(), Everything(), settings, tmp_path, probe=Scripted([0.6]), quiet=True)


def test_previews_are_pictures_of_student_beside_teacher(tmp_path: Path) -> None:
    model = tiny_model()
    calls = []
    original = model.latents
    model.latents = lambda prompts, **options: calls.append(tuple(prompts)) or original(prompts, **options)  # type: ignore[func-returns-value,method-assign]
    train(model, CASES["DMD2"], Everything(), small(5, preview_every=2), tmp_path, quiet=True)
    names = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert names == ["000002.png", "000004.png", "000005.png"]
    assert len(calls) == 1 and len(calls[0]) == 4  # the teacher's clips are sampled once per run
    picture = np.asarray(Image.open(tmp_path / "previews" / names[0]))
    # four prompts; columns: student at 1 step, student at 2 steps, teacher; 4 frames of 32 x 32, three times enlarged
    assert picture.shape == (HEAD + 4 * 96, 3 * (FRAMES * 96 + 4), 3)
    last = np.asarray(Image.open(tmp_path / "previews" / names[-1]))
    teacher = slice(2 * (FRAMES * 96 + 4), None)
    assert np.array_equal(picture[:, teacher], last[:, teacher])
    assert not np.array_equal(picture[:, : teacher.start], last[:, : teacher.start])
    assert picture.std() > 1


def test_pictures_of_large_clips_are_made_smaller() -> None:
    from fewstep.engine.preview import sheet

    assert sheet([torch.zeros(1, 3, 9, 480, 832)] * 2).shape == (96, 2 * (6 * 166 + 4), 3)


def test_no_previews_unless_asked_for(tmp_path: Path) -> None:
    train(tiny_model(), Denoise(), Everything(), small(1), tmp_path, quiet=True)
    assert not (tmp_path / "previews").exists()


def test_rows_hold_their_own_iteration_only(tmp_path: Path) -> None:
    probe = Scripted([0.5, 0.6, 0.6], every=3)
    settings = small(8, log_every=2)
    train(tiny_model(), Denoise(), Everything(), settings, tmp_path, probe=probe, quiet=True)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 8]
    assert [row.get("probe/rule") for row in rows] == [None, 0.5, None, 0.6, 0.6]
    usual = {"step", "time", "loss/first", "loss/second", "grad/student", "grad/critic", "lr/student", "lr/critic"}
    assert all(row.keys() - {"probe/rule"} == usual for row in rows)
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with RunLog(tmp_path, resume_step=0, total=9, quiet=True) as log:
        for step in range(1, 6):
            log.write(step, {"loss/a": float(step)})
    with log.path.open("a") as file:
        file.write('{"step": 6, "los')  # torn by a kill
    with RunLog(tmp_path, resume_step=3, total=9, quiet=True) as log:
        log.write(4, {"loss/a": 40.0})
    assert [(row["step"], row["loss/a"]) for row in read_metrics(log.path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_holds_the_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_model(), Denoise(), Everything(), small(3), tmp_path, quiet=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    for tag in ("loss/first", "grad/student", "lr/critic"):
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(r["step"], pytest.approx(r[tag])) for r in rows]


def test_missing_tensorboard_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with RunLog(tmp_path, resume_step=0, total=1, quiet=False) as log:
        log.write(1, {"loss/a": 1.0})
    assert "tensorboard is not installed" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "tensorboard").exists()
    with RunLog(tmp_path, resume_step=0, total=1, quiet=True):
        pass
    assert capsys.readouterr().err == ""


def test_a_trained_codec_knows_the_statistics_of_its_latents(tmp_path: Path) -> None:
    model = train(tiny_model(), CASES["Reconstruction"], Everything(), small(3), tmp_path, quiet=True)
    frames = Everything().open(model, frozenset({"frames"})).batch(32, Rng(5)).frames
    assert frames is not None
    latents = model.codec.encode(frames)
    assert bool((latents.mean((0, 2, 3, 4)).abs() < 0.5).all()) and bool(
        ((latents.std((0, 2, 3, 4)) - 1).abs() < 0.5).all()
    )


def test_a_student_of_a_student_stays_one(tmp_path: Path) -> None:
    teacher = tiny_model()
    first = train(teacher, CASES["Consistency"], Everything(), small(1), tmp_path / "first", quiet=True)
    again = train(first, CASES["Consistency"], Everything(), small(1), tmp_path / "again", quiet=True)
    pretrained = train(tiny_model(), FlowMatching(), Everything(), small(1), tmp_path / "teacher", quiet=True)
    assert [model.card.role for model in (first, again, pretrained)] == ["student", "student", "teacher"]


def test_every_variant_of_a_block_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Roles, batch sizes, grad modes and autocast make more variants of one block than torch allows by default."""

    class Sizes(Scripted):
        def __call__(self, student: VideoModel) -> dict[str, float]:
            for count in (1, 2, 3, 5):
                student(["a red circle"] * count)
            return super().__call__(student)

    def traced(self: Backbone, *, hooked: bool = False) -> None:
        """The variants are counted before code is generated, which takes minutes."""
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False, backend="eager")

    monkeypatch.setattr(Backbone, "compile_blocks", traced)
    torch._dynamo.reset()
    settings = small(4, compile=True, autocast="bf16", preview_every=2)
    probe, method = Sizes([0.0] * 4), replace(LONG, warmup=1)
    with torch._dynamo.config.patch(recompile_limit=8):  # monkeypatch would take the setting away afterwards
        train(tiny_model(), method, Everything(), settings, tmp_path, probe=probe, quiet=True)
    torch._dynamo.reset()


def test_trained_roles_are_those_that_some_step_trains() -> None:
    assert trained_roles(DMD2(adversary=Adversary(), warmup=3), 3) == ("critic", "discriminator")
    assert trained_roles(DMD2(adversary=Adversary(), warmup=3), 10**9) == ("critic", "discriminator", "student")
    assert trained_roles(CASES["Progressive"], 10) == ("student",)


def test_compile_is_refused_where_nothing_can_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.engine.effective.compile_problem", lambda device: "no compiler here")
    with pytest.raises(ValueError, match=r"settings\.compile: no compiler here"):
        train(tiny_model(), CASES["FlowMatching"], Everything(), small(1, compile=True), tmp_path, quiet=True)
