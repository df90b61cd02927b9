"""Does it fit? The arithmetic, the measurement on shapes, and both against what a process really takes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
import support_parallel
from fewstep.cli.plan import planned, variants
from fewstep.core.ledger import Ledger
from fewstep.data import Prompts
from fewstep.engine import Health, Parallel
from fewstep.engine import prepare as preparing
from fewstep.engine.memory import FLOAT, Holding, Means, Phase, Plan, fitting, optimizer_bytes, parse_bytes, remedies
from fewstep.engine.outline import Drawn, Outline
from fewstep.engine.precision import autocast, float32
from fewstep.engine.prepare import prepare
from fewstep.methods import AVDM2, DMD2, Adversary, BackwardSimulation, Consistency, Method, Update
from fewstep.models import Card, FrameAutoencoder, Lora, VideoModel
from fewstep.models.bundle import read_card
from fewstep.models.source import Pretrained
from fewstep.recipe import Recipe
from fewstep.world.data import WorldClips
from support_engine import CASES, FRAMES, TinyImages, small, stored_card, tiny_model
from support_memory import METHOD, settings_of
from support_parallel import METHODS, results
from support_processes import together

TOLERANCE = 0.15
FEW = replace(METHOD, rollout=BackwardSimulation(grids=((1.0, 0.5),)))
"""Two steps of the student's sampler, where their number is not what is asked."""


ONE_CALL = CASES["KnowledgeDistillation"]
"""A student, a teacher and one call per update, where the method is not what is asked: its plan is quickly made."""


def tiny_card(depth: int = 2) -> Card:
    return stored_card(tiny_model(depth=depth))


# --- arithmetic -----------------------------------------------------------------------------------------------------------


def held(role: str, count: int, *, trained: bool) -> Holding:
    own, text = count if trained else 0, role == "text"
    return Holding(
        role=role, network="Net", parameters=count, trained=own, weights=FLOAT * count, optimizer=optimizer_bytes(own),
        gathered=0 if text else FLOAT * count // 5, idles=not text,
    )  # fmt: skip


PLAN = Plan(
    holdings=(
        held("teacher", 100, trained=False), held("student", 100, trained=True), held("critic", 40, trained=True),
        held("text", 50, trained=False),
    ),
    phases=(
        Phase(reads=frozenset({"student"}), gradients={"student": 400}, activations=1000),
        Phase(reads=frozenset({"student", "teacher", "critic"}), gradients={"critic": 160}, activations=900),
    ),
    flops=10**12,
)  # fmt: skip


STATES = {"student": 800, "critic": 320}
WEIGHTS = {"teacher": 400, "student": 400, "critic": 160, "text": 200}


def test_the_peak_is_what_stays_plus_the_fullest_update() -> None:
    stays = sum(WEIGHTS.values()) + sum(STATES.values())
    assert PLAN.resident(PLAN.phases[0]) == PLAN.resident(PLAN.phases[1]) == stays
    assert PLAN.peak.phase.roles == ("student",) and PLAN.peak.bytes == stays + 400 + 1000


@pytest.mark.parametrize(
    ("means", "student", "critic"),
    [
        (Means(stored_text=True), 960 + 1120 + 400 + 1000, 960 + 1120 + 160 + 900),
        (Means(offload=True), 400 + 200 + 400 + 1000, 960 + 200 + 160 + 900),  # states wait: activations are more
        (Means(shard=4), (960 + 1120 + 400) // 4 + 200 + 1000 + 2 * 80, (960 + 1120 + 160) // 4 + 200 + 900 + 80),
        (Means(shard=2, offload=True, stored_text=True), 200 + 200 + 1000 + 2 * 80, 480 + 80 + 900 + 80),
    ],
)  # fmt: skip
def test_means_make_it_smaller(means: Means, student: int, critic: int) -> None:
    plan = PLAN.by(means)
    assert [plan.total(phase) for phase in plan.phases] == [student, critic]


def test_states_that_wait_elsewhere_come_in_when_activations_are_gone() -> None:
    """The fuller of two moments, never both: the backward pass, and the step of the largest optimiser."""
    both = Phase(reads=frozenset(WEIGHTS), gradients={"student": 400, "critic": 160}, activations=0)
    for activations in (0, 799, 801):
        plan = replace(PLAN, phases=(replace(both, activations=activations),), means=Means(offload=True))
        assert plan.peak.bytes == sum(WEIGHTS.values()) + 560 + max(activations, STATES["student"])


def test_what_is_done_between_iterations_may_be_the_fullest_moment() -> None:
    """Beside all that is held, as long as nothing waits elsewhere; then beside who is there to be looked at."""
    check = Phase(reads=frozenset({"student", "critic"}), gradients={}, activations=1500, pause="health check")
    plan = replace(PLAN, pauses=(check,))
    assert plan.peak.phase is check and plan.peak.bytes == sum(WEIGHTS.values()) + sum(STATES.values()) + 1500
    away = plan.by(Means(offload=True))
    assert away.total(check) == 400 + 160 + 200 + 1500
    assert plan.by(Means(shard=4)).total(check) == (960 + 1120) // 4 + 200 + 1500 + 80


def test_what_nothing_cuts_is_whole_on_every_process() -> None:
    heads = replace(held("discriminator", 30, trained=True), gathered=0)
    phase = Phase(reads=frozenset({"discriminator"}), gradients={"discriminator": 120}, activations=10)
    plan = Plan(holdings=(heads,), phases=(phase,), flops=1)
    assert plan.by(Means(shard=8)).peak.bytes == plan.peak.bytes == 120 + 240 + 120 + 10


def test_the_fewest_changes_that_fit_are_found() -> None:
    half = replace(PLAN, phases=(replace(PLAN.phases[0], activations=500),))
    found = remedies({(): PLAN, ("checkpointing",): half}, 4, elsewhere=True)
    assert [r.names for r in fitting(found, 2000)] == [("sharding over 4",), ("checkpointing", "offload")]
    assert {r.names for r in fitting(found, 2300)} >= {("sharding over 4",), ("offload",)}
    assert next(fitting(found, 5000)).names == ()
    assert not list(fitting(found, 10))
    assert not any("offload" in r.names for r in remedies({(): PLAN}, 4, elsewhere=False))


def test_what_is_done_already_or_cannot_be_is_not_offered() -> None:
    whole = tuple(replace(holding, gathered=0) for holding in PLAN.holdings)
    found = remedies({(): replace(PLAN, holdings=whole)}, 4, elsewhere=True)  # a codec is trained
    assert {remedy.names for remedy in found} == {(), ("stored text",), ("offload",), ("stored text", "offload")}
    found = remedies({(): replace(PLAN, holdings=whole, shared=True)}, 4, elsewhere=True)
    assert {remedy.names for remedy in found} == {(), ("stored text",)}
    found = remedies({(): PLAN.by(Means(offload=True))}, 4, elsewhere=True)
    assert all("offload" not in remedy.names and remedy.plan.means.offload for remedy in found) and len(found) == 4


LENT = Plan(
    holdings=(
        Holding(
            role="teacher", network="Net", parameters=100, trained=0, weights=1000, optimizer=0, gathered=200, blocks=800,
            narrow=300, idles=False,
        ),
        Holding(
            role="student", network="Net", parameters=10, trained=10, weights=40, optimizer=80, idles=False
        ),
        held("text", 50, trained=False),
    ),
    phases=(Phase(reads=frozenset({"student"}), gradients={"student": 40}, activations=500, parked=300),),
    pauses=(Phase(pause="picture", reads=frozenset({"student"}), gradients={}, activations=900, merged=400),),
    flops=1, shared=True, again=True,
)  # fmt: skip
"""Adapters over a frozen network of four blocks."""


@pytest.mark.parametrize(
    ("means", "update", "picture", "waiting"),
    [
        (Means(), 1000 + 40 + 80 + 200 + 40 + 500, 1000 + 40 + 80 + 200 + 900, 0),
        (Means(shard=4), 200 + 200 + 120 + 200 + 40 + 500 + 200, 200 + 200 + 120 + 200 + 500 + 200, 0),
        (Means(offload=True), 200 + 40 + 200 + 40 + (500 - 300 + 200), 200 + 40 + 200 + 500 + 200, 800 + 80 + 300),
        (
            Means(offload=True, shard=4), 200 + 40 + 200 + 40 + (500 - 300 + 250), 200 + 40 + 200 + 500 + 250,
            200 + 80 + 300,
        ),
        (Means(narrow=True), 700 + 40 + 80 + 200 + 40 + 500, 700 + 40 + 80 + 200 + 900, 0),
        (Means(narrow=True, shard=4), 200 + 125 + 120 + 200 + 40 + 500 + 125, 200 + 125 + 120 + 200 + 500 + 125, 0),
    ],
)  # fmt: skip
def test_frozen_blocks_are_shared_or_wait(means: Means, update: int, picture: int, waiting: int) -> None:
    """Ends and adapters stay; one whole block is there at a time; nothing is merged to be looked at."""
    plan = LENT.by(means)
    assert [plan.total(phase) for phase in (*plan.phases, *plan.pauses)] == [update, picture]
    assert plan.waiting(plan.phases[0]) == waiting


def test_blocks_come_only_where_they_come_again() -> None:
    names = {remedy.names for remedy in remedies({(): LENT}, 4, elsewhere=True)}
    assert {("offload",), ("sharding over 4",), ("offload", "sharding over 4"), ("frozen in bf16",)} <= names
    names = {remedy.names for remedy in remedies({(): replace(LENT, again=False)}, 4, elsewhere=True)}
    assert ("frozen in bf16",) in names and not any({"offload", "sharding over 4"} & set(each) for each in names)
    narrow = replace(PLAN, holdings=(replace(PLAN.holdings[0], narrow=100), *PLAN.holdings[1:]))
    names = {remedy.names for remedy in remedies({(): narrow}, 4, elsewhere=True)}
    assert ("frozen in bf16", "offload") in names and ("sharding over 4",) in names
    assert not any({"frozen in bf16", "sharding over 4"} <= set(each) for each in names)


def test_time_follows_from_the_rate() -> None:
    assert PLAN.seconds(1e12, 1000) == 1000.0


def test_sizes_are_read() -> None:
    assert parse_bytes("24GB") == parse_bytes("24 GiB") == 24 * 2**30 and parse_bytes("1.5mb") == 3 * 2**19
    for wrong in ("24", "GB", "-1GB", "nanGB", "24XB"):
        with pytest.raises(ValueError, match="24GB"):
            parse_bytes(wrong)


# --- measurement ----------------------------------------------------------------------------------------------------------


def test_a_ledger_counts_memory_once_and_while_it_lives() -> None:
    network = torch.nn.Linear(8, 8)
    with Ledger({"net": network}) as ledger:
        x = torch.zeros(4, 8)
        view = x.view(2, 16)
        assert ledger.live == 4 * 32
        y = network(x)
        assert ledger.live == 2 * 4 * 32 and ledger.reads == {"net"} and ledger.flops == 2 * 4 * 8 * 8
        del x, y
        assert ledger.live == 4 * 32  # the view holds it
        del view
    assert ledger.live == 0 and ledger.peak == 2 * 4 * 32


def test_a_ledger_tells_what_is_left_without_what_is_aside() -> None:
    with Ledger() as ledger:
        ledger.watch("a")
        ledger.watch("a", "b")
        first = ledger.aside(torch.zeros(8), "a")
        second = torch.zeros(16)
        assert (ledger.left("a"), ledger.left("a", "b")) == (4 * 16, 4 * 16)
        ledger.aside(second, "b")
        del first
        third = torch.zeros(32)
        assert (ledger.left("a"), ledger.left("a", "b")) == (4 * (16 + 32), 4 * 32)
        assert ledger.peak == 4 * (16 + 32) and third.sum() == 0


def test_gradients_that_are_shared_come_when_activations_are_there() -> None:
    """Alone, the peak is the end of the backward pass; with small gradients it may be its beginning."""
    update = replace(PLAN.phases[0], activations=100, before=450, parked=80, before_parked=300)
    plan = replace(PLAN, phases=(update,))
    assert plan.total(update) == plan.resident(update) + 400 + 100
    shared = plan.by(Means(shard=4))
    assert shared.total(update) == shared.resident(update) + 100 + min(100 + 300, 450) + 2 * 80
    assert plan.by(Means(shard=40)).total(update) == plan.by(Means(shard=40)).resident(update) + 10 + 450 + 160
    away = plan.by(Means(shard=4, offload=True))
    assert away.total(update) == away.resident(update) + 100 + max(min(20 + 300, 150) + 160, 200)


@pytest.mark.parametrize("name", CASES)
def test_every_method_can_be_planned(name: str) -> None:
    card = tiny_card(
        depth=2 if name in {"AVDM2", "TransitionMatching"} else 1
    )  # an image teacher of two blocks; a head of one
    plan = Outline.of(card, CASES[name], small(20), FRAMES).plan()
    trained = {h.role for h in plan.holdings if h.trained}
    assert trained == {role for phase in plan.phases for role in phase.roles}
    assert all(min(phase.gradients.values()) > 0 and phase.activations > 0 for phase in plan.phases)
    assert plan.flops > 0 and plan.peak.bytes > sum(h.weights for h in plan.holdings)


@pytest.mark.parametrize("others", [{}, {"autocast": "bf16"}, {"lora": Lora(rank=4)}], ids=["plain", "bf16", "lora"])
def test_shapes_hold_what_the_run_holds(others: dict[str, Any], tmp_path: Path) -> None:
    """The same ledger over a real iteration: prompts are shorter there, nothing else differs."""
    method, settings = FEW, small(20, **others)
    plan = Outline.of(tiny_card(), method, settings, FRAMES).plan()
    run = prepare(tiny_model(), method, WorldClips(num_frames=FRAMES), settings, tmp_path)
    run.watch = None
    draws = next((rollout.fullest for rollout in method.rollouts), {})
    batch = run.source.batch(settings.batch, Drawn(settings.seed, draws=draws))
    for phase, update in zip(plan.phases, method.updates(0), strict=True):
        for role, network in run.nets.items():
            network.requires_grad_(role in update.roles)
        with Ledger({**run.nets, **run.model.parts}) as ledger, autocast(settings):
            for terms in update.losses(run.nets, batch, Drawn(settings.seed, draws=draws)):
                with float32(settings):
                    torch.stack(list(terms.values())).sum().backward()
        found = sum(phase.gradients.values()) + phase.activations
        assert found == pytest.approx(ledger.peak, rel=0.1)
        for network in run.nets.values():
            network.zero_grad(set_to_none=True)


@pytest.mark.timeout(900)  # processes that share two cores with other tests
def test_processes_hold_what_is_planned(tmp_path: Path) -> None:
    """Adapters: with shares of the frozen blocks, of the clips, of both; and with flows that wait elsewhere."""
    names = [f"peaks.{spread}" for spread in ("divided", "clips")]
    together(2, tmp_path, support_parallel.main, tmp_path, names)
    for name in names:
        parallel = support_parallel.SPREADS[name.removeprefix("peaks.")]
        settings = replace(support_parallel.PLANNED, parallel=parallel)
        plan = Outline.of(tiny_card(), METHODS["DMD2-adapters"], settings, FRAMES).plan().by(Means(shard=2))
        found = json.loads(results(tmp_path, name)["peaks"])
        for phase in plan.phases:
            planned = plan.total(phase) - plan.resident(phase)
            assert found["+".join(phase.roles)] == pytest.approx(planned, rel=0.1), (name, phase.roles)


def test_what_waits_between_blocks_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "require_mesh", lambda *_: None)
    waiting = Parallel(offload=True, checkpointing=True)
    monkeypatch.setitem(support_parallel.SPREADS, "waiting", waiting)  # type: ignore[arg-type]
    found = json.loads(support_parallel.peaks("waiting", tmp_path)["peaks"])
    outline = Outline.of(
        tiny_card(), METHODS["DMD2-adapters"], replace(support_parallel.PLANNED, parallel=waiting), FRAMES
    )
    plan = outline.plan().by(Means(offload=True))
    assert plan.phases[-1].roles == ("student",) and plan.phases[-1].parked == 4 * 64 * 24 * FLOAT, "one of two inputs"
    for phase in plan.phases:
        left = plan.total(phase) - plan.resident(phase)
        assert phase.parked > 0
        assert found["+".join(phase.roles)] == pytest.approx(left, rel=0.1), phase.roles


def test_narrow_weights_are_planned_without_a_measurement() -> None:
    """As those of a run that has them."""
    settings = small(20, autocast="bf16", lora=Lora(rank=2), health=None)
    plans = [
        Outline.of(tiny_card(), Consistency(), replace(settings, frozen=frozen)).plan()
        for frozen in ("float32", "bf16")
    ]  # type: ignore[arg-type]
    narrow = plans[0].by(Means(narrow=True))
    assert narrow.resident(narrow.phases[0]) == plans[1].resident(plans[1].phases[0])
    assert not any(holding.narrow for holding in plans[1].holdings) and plans[0].holdings[0].narrow > 0
    assert {holding.role for holding in plans[0].holdings if holding.blocks or holding.narrow} == {"teacher"}


WITHOUT_DRAWS = BackwardSimulation(grids=((1.0,),))
"""Every rollout is one call, so that what one iteration does is what every iteration does."""


def test_checks_pictures_and_probes_hold_what_is_planned(tmp_path: Path) -> None:
    """With a codec that holds more than training does. On a CPU the finished columns of a picture lie in the same memory."""
    model, method, file = tiny_model(), FEW, tmp_path / "prompts.txt"
    codec = FrameAutoencoder(width=16, depth=1)
    model = VideoModel(replace(model.card, height=128, width=128), {**model.parts, "codec": codec})
    card = stored_card(model)
    file.write_text("one cat\ntwo cats\nthree\nfour\n", encoding="utf-8")
    settings = small(3, preview_every=3, ema=0.9, health=Health(every=3, prompts=2))
    plan = Outline.of(card, method, settings, probed=6).plan()
    *pauses, checkpoint = plan.pauses
    assert [phase.name for phase in pauses] == ["health check", "picture", "probe"]
    assert all(phase.reads >= {"teacher", "student average", "codec"} for phase in pauses)
    assert checkpoint.name == "checkpoint"
    kept = next(h.weights for h in plan.holdings if h.role == "clips of checks")
    run = prepare(model, method, Prompts(path=str(file)), settings, tmp_path)
    run.iterate()
    assert run.monitor is not None and run.preview is not None
    check, picture, probe = (phase.activations for phase in pauses)
    copies = [tensor.nbytes for tensors in run.state().staged().components.values() for tensor in tensors.values()]
    assert sum(copies) == pytest.approx(plan.copied(checkpoint), rel=0.01)
    with Ledger({**run.nets, **run.model.parts, "average": run.average}) as ledger:
        run.monitor.check(run.student(), 1)
    assert ledger.live == kept and ledger.peak == pytest.approx(kept + check, rel=0.1)
    with Ledger({**run.nets, **run.model.parts, "average": run.average}) as ledger:
        run.preview.draw(run.student())
    assert ledger.peak - ledger.live == pytest.approx(picture, rel=0.1)
    with Ledger({**run.nets, **run.model.parts, "average": run.average}) as ledger:
        run.student()(["a cat"] * 6, num_inference_steps=2, force=True)
    assert ledger.peak == pytest.approx(probe, rel=0.1) and plan.peak.phase.name == "probe"


def test_adapters_are_merged_to_be_looked_at() -> None:
    settings = small(30)
    plans = [Outline.of(tiny_card(), ONE_CALL, replace(settings, lora=lora)).plan() for lora in (None, Lora(rank=4))]
    weights = next(h.weights for h in plans[0].holdings if h.role == "teacher")
    assert [plan.pauses[0].activations for plan in plans] == [plans[0].pauses[0].activations + n for n in (0, weights)]


def test_what_nobody_asks_for_is_not_planned() -> None:
    def pauses(method: Method, **settings: Any) -> list[str]:
        return [phase.name for phase in Outline.of(tiny_card(), method, small(30, **settings))._pauses()]

    plan = Outline.of(tiny_card(), ONE_CALL, small(30, health=None)).plan()
    assert "clips of checks" not in {h.role for h in plan.holdings}
    assert pauses(ONE_CALL, health=None) == ["checkpoint"]  # on a CPU, where its copies take the same memory
    assert pauses(ONE_CALL, health=None, device="cuda") == []
    assert pauses(CASES["FlowMatching"]) == ["checkpoint"]  # it distils nothing: there are no checks
    assert pauses(ONE_CALL) == ["health check", "checkpoint"]


class Glance(torch.nn.Module):
    """A discriminator that costs nothing: a method tells what is done by networks, its small heads are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        return self.weight * features[0].mean((1, 2, 3, 4))


@pytest.mark.parametrize(
    "method",
    [
        DMD2(rollout=WITHOUT_DRAWS, critic_updates=2, adversary=Adversary(weight=0.1, r1=0.1)),
        Consistency(),
        AVDM2(rollout=WITHOUT_DRAWS, frames=1, critic_updates=1),
        AVDM2(rollout=WITHOUT_DRAWS, frames=3, critic_updates=1, image_teacher=TinyImages(depth=6)),
        AVDM2(rollout=WITHOUT_DRAWS, score="video", adversary=None, critic_updates=1),
    ],
    ids=["DMD2", "Consistency", "one frame", "a large image teacher", "video"],
)
def test_a_method_costs_what_its_updates_do(method: Method) -> None:
    """Whatever the length of clips, the size of another teacher and the depth at which features are read."""
    outline = Outline.of(tiny_card(), method, small(4), FRAMES)
    if "discriminator" in outline.nets:
        with outline.mode:
            outline.nets.roles["discriminator"] = Glance()  # type: ignore[index]
    plan = outline.plan()
    done = {phase.roles: phase.flops for phase in plan.phases}
    counted = sum(done[event.roles] for event in method.updates(0) if isinstance(event, Update))
    assert plan.flops == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("grad_calls", [1, 4])
def test_the_planned_peak_covers_every_exit(grad_calls: int) -> None:
    """Calls with gradient add up, so the first exit of a rollout holds less than the last."""
    rollout = BackwardSimulation(grids=((1.0, 0.5), (1.0, 0.75, 0.5, 0.25), (1.0,)), grad_calls=grad_calls)
    outline = Outline.of(tiny_card(depth=1), DMD2(rollout=rollout, critic_updates=1), small(4), FRAMES)
    (update,) = (event for event in outline._kinds() if event.roles == ("student",))
    planned = outline._phase(update).activations
    exits = [(0, 1), (1, 0), (1, 2), (1, 3), (2, 0)]
    held = {(g, e): outline.phase(update, {"grid": g, "exit": e}).activations for g, e in exits}
    assert planned == held[1, 3] == max(held.values())
    assert (held[1, 3] > 1.5 * held[1, 0]) == (grad_calls > 1)


def test_recomputed_blocks_and_adapters_hold_less() -> None:
    card, settings = tiny_card(), small(20, batch=4)
    whole = Outline.of(card, FEW, settings, FRAMES).plan()
    again = Outline.of(card, FEW, replace(settings, parallel=Parallel(checkpointing=True)), FRAMES).plan()
    lora = Outline.of(card, FEW, replace(settings, lora=Lora(rank=2)), FRAMES).plan()
    assert again.peak.bytes < whole.peak.bytes
    assert sum(h.weights + h.optimizer for h in lora.holdings) < sum(h.weights + h.optimizer for h in whole.holdings)
    for phase, other in zip(lora.phases, whole.phases, strict=True):
        assert all(phase.gradients[role] < other.gradients[role] for role in other.gradients)
    assert not any(holding.sharded for holding in lora.holdings)
    for phase in again.phases:  # without gradients the fullest moment is fuller than what is beside all of them
        assert phase.activations <= phase.before <= phase.activations + sum(phase.gradients.values())
        assert 0 < phase.before_parked < phase.before
    assert any(phase.before < phase.activations + sum(phase.gradients.values()) for phase in again.phases)


def test_adapters_are_planned_whole_on_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    card, whole = tiny_card(depth=1), small(20, accumulate=4, health=None)
    lora = replace(whole, lora=Lora(rank=2))
    recipe = Recipe(
        model=Pretrained(source="world"), method=ONE_CALL, data=WorldClips(num_frames=FRAMES), settings=whole
    )
    alone = [planned(recipe, settings, card) for settings in (whole, lora)]
    monkeypatch.setenv("WORLD_SIZE", "4")
    spread = [planned(recipe, settings, card) for settings in (whole, lora)]
    assert spread[0].peak.bytes < alone[0].peak.bytes and spread[1].peak.bytes == alone[1].peak.bytes
    cut = replace(recipe, settings=replace(whole, parallel=Parallel(shard=4)))
    found = variants(cut, card, spread[0])
    assert ("LoRA",) not in found and found["LoRA", "checkpointing"].means.shard == 4
    assert not any(holding.sharded for holding in found["LoRA", "checkpointing"].holdings)
    shared = variants(recipe, card, spread[0], 2)
    assert shared["LoRA",].means.shard == 1 and shared["checkpointing", "clips shared by 2"].means.shard == 2
    assert ("clips shared by 2",) not in shared and len(shared) == 6


def test_clips_without_equal_parts_are_not_offered() -> None:
    settings = small(20, lora=Lora(rank=2), health=None, parallel=Parallel(checkpointing=True))
    recipe = Recipe(model=Pretrained(source="world"), method=FEW, data=WorldClips(num_frames=FRAMES), settings=settings)
    plan = replace(PLAN, shared=True, again=True)
    assert variants(recipe, tiny_card(), plan, 5) == {(): plan}  # two heads


def test_what_stays_whole_and_resident_is_known() -> None:
    outline = Outline.of(tiny_card(), CASES["DMD2-everything"], small(20), FRAMES)
    holdings = [*outline._holdings(), *outline._kept()]
    assert {h.role for h in holdings if not h.sharded} == {"text", "codec", "features", "discriminator"}
    assert {h.role for h in holdings if not h.idles} == {"text", "codec", "features"}


def test_a_codec_is_trained_whole_beside_a_denoiser_that_waits() -> None:
    plan = Outline.of(tiny_card(), CASES["Reconstruction"], small(20), FRAMES).plan()
    assert "denoiser" in {h.role for h in plan.holdings} and not any(h.sharded for h in plan.holdings)
    assert not any("sharding over 4" in remedy.names for remedy in remedies({(): plan}, 4, elsewhere=True))


def test_two_blocks_and_what_is_no_block_are_gathered() -> None:
    card = tiny_card()
    args = card.parts["denoiser"].args | {"depth": 5}
    card = replace(card, parts=card.parts | {"denoiser": replace(card.parts["denoiser"], args=args)})
    outline = Outline.of(card, FEW, small(20, ema=0.9), FRAMES)
    blocks = [sum(p.nbytes for p in block.parameters()) for block in outline.nets.teacher.backbone.blocks]
    whole = sum(p.nbytes for p in outline.nets.teacher.parameters())
    gathered = {h.role: h.gathered for h in outline._holdings() if h.sharded}
    assert gathered == dict.fromkeys(("teacher", "student", "student average", "critic"), whole - 3 * blocks[0])


def test_nothing_is_allocated_for_a_network_of_fourteen_billion_weights() -> None:
    from fewstep.models.spec import Spec

    card = read_card("world")
    parts = dict(card.parts)
    parts["denoiser"] = Spec("VideoDiT", parts["denoiser"].args | {"width": 20480, "heads": 160, "depth": 3})
    plan = Outline.of(replace(card, parts=parts), FEW, settings_of({"batch": 1})).plan()
    assert plan.holdings[0].parameters > 10**10 and plan.peak.bytes > 200 * 2**30


# --- against a process ------------------------------------------------------------------------------------------------------


def taken(given: dict[str, Any]) -> int:
    """Peak memory of a process that runs DMD2 on the built-in model, beyond the program itself."""
    # Freed memory goes back at once, so that what is held is what is counted; by default glibc keeps some of it.
    environment = {
        "PYTHONPATH": str(Path(fewstep.__file__).parents[1]), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # fmt: skip
    bench = Path(__file__).parent / "support_memory.py"
    done = subprocess.run(
        [sys.executable, str(bench), json.dumps(given)], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def predicted(given: dict[str, Any]) -> int:
    return Outline.of(read_card("world"), METHOD, settings_of(given)).plan().peak.bytes


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("given", [{"batch": 6}, {"batch": 6, "lora": 16}], ids=["whole", "lora"])
def test_the_plan_is_what_a_process_takes(given: dict[str, Any]) -> None:
    """Half a minute each; `test_shapes_hold_what_the_run_holds` compares the same plan with a real iteration in a second."""
    assert predicted(given) == pytest.approx(taken(given), rel=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("others", [{}, {"lora": 16}, {"autocast": "bf16"}], ids=["whole", "lora", "bf16"])
def test_the_plan_is_what_a_gpu_takes(others: dict[str, Any]) -> None:
    given = {"batch": 32, "device": "cuda"} | others
    assert predicted(given) == pytest.approx(taken(given), rel=TOLERANCE)


def test_models_are_planned_from_their_cards_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VideoModel, "from_pretrained", lambda *_: pytest.fail("weights were read"))
    assert Outline.of(read_card("world"), ONE_CALL, settings_of({"batch": 1})).plan().peak.bytes > 0
