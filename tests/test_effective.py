"""Asked for is what happens: what a run really does is written down, and what cannot be had is refused."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.core import Call, Rng, devices
from fewstep.engine import Optim, Parallel, Settings, effective, train
from fewstep.engine.effective import FallbackError, Times, Watch, attention_of, unfused_problem
from fewstep.engine.prepare import prepare
from fewstep.engine.views import Views
from fewstep.methods import DMD2, BackwardSimulation, Reconstruction
from fewstep.models import Lora, VideoModel
from fewstep.models.spread import Spread
from fewstep.world.data import WorldClips
from support_engine import CASES, FRAMES, Everything, small, tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")
DATA = WorldClips(num_frames=FRAMES)
METHOD = DMD2(critic_updates=1, rollout=BackwardSimulation(grids=((1.0, 0.5),), shift=3.0))


# --- what is in effect ----------------------------------------------------------------------------------------------------

CHANGES: dict[str, Settings] = {
    "autocast": small(2, autocast="bf16"),
    "ema": small(2, ema=0.9),
    "lora": small(2, lora=Lora(rank=2)),
    "lora.alpha": small(2, lora=Lora(rank=2, alpha=3.0)),
    "parallel.checkpointing": small(2, parallel=Parallel(checkpointing=True)),
    "optim.lr": small(2, optim={"student": Optim(lr=2e-3)}),
    "optim.type": small(2, optim={"student": Optim(type="muon", lr=1e-3)}),
    "optim.betas": small(2, optim={"student": Optim(lr=1e-3, betas=(0.5, 0.9))}),
    "optim.clip": small(2, optim={"student": Optim(lr=1e-3, clip=0.5)}),
    "optim.weight_decay": small(2, optim={"student": Optim(lr=1e-3, weight_decay=0.1)}),
    "optim.warmup": small(2, optim={"student": Optim(lr=1e-3, warmup=2)}),
    "optim.decay": small(2, optim={"student": Optim(lr=1e-3, decay="cosine")}),
    "optim.critic": small(2, optim={"student": Optim(lr=1e-3), "critic": Optim(lr=5e-3)}),
}


def state_of(settings: Settings, folder: Path) -> dict[str, Any]:
    tree = prepare(tiny_model(), METHOD, DATA, settings, folder).effective.tree()
    return {key: value for key, value in tree.items() if key != "identity"}


def test_settings_show_in_what_is_in_effect_beyond_their_digest(tmp_path: Path) -> None:
    states = [state_of(small(2), tmp_path)] + [state_of(settings, tmp_path) for settings in CHANGES.values()]
    for i, (name, state) in enumerate(zip(["nothing", *CHANGES], states)):
        assert state not in states[:i], f"{name} leaves no trace"


FOR_OTHERS: dict[str, Any] = {"shard": 2, "replicate": 2, "sequence": 2, "offload": True}
"""What one process on a CPU cannot have of `settings.parallel`."""


@pytest.mark.parametrize("name", FOR_OTHERS)
def test_a_spread_that_cannot_be_had_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"settings\.parallel.*{name}"):
        prepare(tiny_model(), METHOD, DATA, small(2, parallel=Parallel(**{name: FOR_OTHERS[name]})), tmp_path)


def test_every_way_to_spread_a_run_is_shown_or_refused() -> None:
    shown = {key.removeprefix("parallel.") for key in CHANGES if key.startswith("parallel.")}
    assert {*FOR_OTHERS, *shown} == {field.name for field in fields(Parallel)}


def test_a_run_writes_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_model(), METHOD, DATA, small(6), tmp_path)
    state = json.loads((tmp_path / "effective.json").read_text())
    assert state["attention"] == ["sdpa-flash, sdpa-flash"] * 2
    assert set(state["weights"]) == {"teacher", "student", "critic", "text", "codec", "features"}
    assert set(state["weights"].values()) == {state["arithmetic"]} == {"float32"}
    assert state["evaluation_times"] == {"2": [1.0, 0.75, 0.0]}
    assert state["training_times"]["student"]["listed"] == [1.0, 0.75]
    assert state["training_times"]["critic"]["count"] > 4 and state["fallbacks"] == []
    said = capsys.readouterr().err
    assert "attention by block: 2 x (sdpa-flash, sdpa-flash)" in said and "student called at t = 1, 0.75" in said


def test_times_of_sampling_that_training_never_saw_are_named(tmp_path: Path) -> None:
    run = prepare(tiny_model(), METHOD, DATA, small(2), tmp_path)
    seen = replace(run.effective, training_times={"student": Times(1, (1.0,), 1.0, 1.0)})
    assert seen.uncalled() == (0.75,)
    assert run.effective.uncalled() == ()  # nothing was watched yet


def test_bf16_kernels_are_found_by_looking(tmp_path: Path) -> None:
    model = tiny_model()
    kernels, unfused = attention_of(model.denoiser, model, small(2, autocast="bf16"))
    assert kernels == ("matmul, matmul",) * 2 and 0 < unfused <= 64


def test_bf16_that_is_slow_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {
        kind: prepare(tiny_model(), METHOD, DATA, small(2, autocast=kind), tmp_path / kind).effective
        for kind in ("bf16", "off")
    }
    for there in (True, False):
        monkeypatch.setattr(devices, "has_bfloat16", lambda there=there: there)
        slow = {kind for kind, state in shown.items() if "float32 is faster" in "".join(state.lines())}
        assert slow == (set() if there else {"bf16"})


def test_watching_changes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [prepare(tiny_model(), CASES["DMD2-everything"], Everything(), small(2), tmp_path) for _ in range(2)]
    runs[1].watch = None
    for run in runs:
        run.iterate()
    assert runs[0].figures == runs[1].figures


def test_a_view_is_called_as_the_network_in_the_runs_way_and_overheard(tmp_path: Path) -> None:
    run = prepare(tiny_model(), METHOD, DATA, small(2), tmp_path)

    def attributes() -> list[dict[str, Any]]:
        return [dict(vars(module)) for network in run.nets.values() for module in network.modules()]

    before = attributes()
    ran: list[Call] = []

    class Noted(Spread):
        def __call__(self, call: Call) -> Call:
            ran.append(call)
            return super().__call__(call)

    views = Views(run.nets, Noted(checkpointing=True), [watch := Watch()])
    seen, student = views.student, run.nets.student
    assert (
        seen == views["student"]
        and views.roles == run.nets.roles
        and (seen.path, seen.kind) == (student.path, student.kind)
    )
    batch, t = run.source.batch(1, Rng(0)), torch.full((1,), 0.5)
    x, said = Rng(0).randn(batch.noise_shape, "x"), Call(step=3, steps=4)
    for ask in (
        lambda net: net(x, t, batch.cond, said).raw,
        lambda net: net.features(x, t, batch.cond, (0,), said)[0],
        lambda net: net.jvp(x, t, batch.cond, x, t, said)[0].raw,
        lambda net: net.jvp(x, t, batch.cond, x, t, said)[1].raw,
    ):
        assert torch.equal(ask(seen), ask(student))
    assert watch.seen == {"student": {0.5}} and ran == [said] * 4
    assert attributes() == before  # nothing is hung on a network


def test_networks_without_attention_have_none(tmp_path: Path) -> None:
    run = prepare(tiny_model(), Reconstruction(), DATA, small(1), tmp_path)
    assert run.effective.attention == () and run.effective.evaluation_times == {}
    run.iterate()


# --- strict, or recorded --------------------------------------------------------------------------------------------------


def test_a_fallback_is_refused_or_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effective, "compile_problem", lambda device: "no compiler here")
    with pytest.raises(FallbackError, match=r"settings\.compile: no compiler here.*--allow-fallback"):
        prepare(tiny_model(), METHOD, DATA, small(1, compile=True), tmp_path / "strict")
    student = train(
        tiny_model(), METHOD, DATA, small(1, compile=True, allow_fallback=True), tmp_path / "lax", quiet=True
    )
    assert student.card.provenance["fallbacks"] == "compile: no compiler here"
    assert VideoModel.from_pretrained(tmp_path / "lax" / "student").card.provenance["fallbacks"]
    state = json.loads((tmp_path / "lax" / "effective.json").read_text())
    assert state["compiles"] is False and state["graphs"] == "not compiled"


def test_attention_that_would_store_every_weight_on_a_gpu_is_a_fallback() -> None:
    assert "30000 keys" in unfused_problem("cuda", 30000)
    assert not unfused_problem("cuda", 256) and not unfused_problem("cpu", 30000)


def test_nothing_falls_back_by_default(tmp_path: Path) -> None:
    run = prepare(tiny_model(), METHOD, DATA, small(1), tmp_path)
    assert run.effective.fallbacks == () and "fallbacks" not in run.student().card.provenance


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_a_gpu(tmp_path: Path) -> None:
    run = prepare(tiny_model(), METHOD, DATA, small(2, device="cuda", autocast="bf16"), tmp_path)
    assert len(run.effective.attention) == 2 and run.effective.device.startswith("cuda")
    kernels = {name for block in run.effective.attention for name in block.split(", ")}
    assert kernels <= {"sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "matmul"}, kernels
    assert run.effective.arithmetic == "bfloat16" and set(run.effective.weights.values()) == {"float32"}
    before = {name: p.detach().clone() for name, p in run.nets.student.named_parameters()}
    run.iterate()
    moved = [name for name, p in run.nets.student.named_parameters() if not torch.equal(p, before[name])]
    assert moved and {p.device.type for p in run.nets.student.parameters()} == {"cuda"}
    assert all(math.isfinite(value) for value in run.figures.values())
