"""Checks in the course of a run: what they see, what they do, and that they change nothing else."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fewstep.cli import main
from fewstep.core import Rng
from fewstep.diffusion import CFG, KINDS, Kind, Prediction, RectifiedFlow, Trig, target
from fewstep.engine import CheckpointError, Health, Optim, prepare, train
from fewstep.engine import nets as building
from fewstep.engine.checkpoint import RunState, checkpoints
from fewstep.engine.health import Record, judge, monitor, read_record, weights
from fewstep.engine.health.heard import Heard, Terms
from fewstep.engine.health.measure import Gauge, apart, decode, drift, error, singled
from fewstep.engine.health.verdict import ASKED
from fewstep.engine.health.vitals import Verdict
from fewstep.engine.log import RunLog, read_metrics
from fewstep.methods import DMD2, BackwardSimulation, Method
from fewstep.methods.rollouts import NESTED
from fewstep.models import Card, Lora, VideoModel
from fewstep.models.lora import adapt, adapters, duplicate, merge
from fewstep.world.grammar import world_prompts
from support_engine import CASES, TWO_GRIDS, Everything, small, tiny_model
from support_health import OtherShift, coarse_weights, frozen_critic, other_path

pytestmark = pytest.mark.usefixtures("single_thread")

OFTEN = Health(every=3, prompts=2)
METHOD = CASES["DMD2"]
"""Two warm-up iterations of its critic, then one and two steps."""


class Stopped(Exception):
    """The plug was pulled."""


def run(output: Path, steps: int = 6, method: Method = METHOD, **others: Any) -> Record:
    settings = small(steps, **({"health": OFTEN} | others))
    train(tiny_model(), method, Everything(), settings, output, quiet=True)
    record = read_record(output)
    assert record is not None
    return record


def scripted(*words: str) -> Any:
    """Verdicts that are written down."""
    return mock.patch.object(monitor, "judge", side_effect=[Verdict(word, "as written") for word in words])  # type: ignore[arg-type]


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_student_that_goes_on_is_compared_with_where_it_began(tmp_path: Path) -> None:
    began, (often, path) = tiny_model(), (replace(OFTEN, every=6), tmp_path / "began")
    with torch.no_grad():
        for weight in began.denoiser.parameters():
            weight.mul_(1.5)
    began.save(path)
    anew = run(tmp_path / "anew", health=often).newest
    on = run(tmp_path / "on", health=often, start=str(path)).newest
    assert on.teacher == anew.teacher and on.untrained == anew.untrained and on.start != anew.start


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("health") / "run"
    run(folder, steps=7, method=CASES["DMD2-everything"])
    return folder


def test_a_check_at_every_interval_and_at_the_end(examined: Path) -> None:
    record = read_record(examined)
    assert record is not None and [check.vitals.step for check in record.checks] == [3, 6, 7]
    assert sorted(path.name for path in (examined / "health").iterdir()) == ["000003.png", "000006.png", "000007.png"]
    now = record.checks[-1].vitals
    assert now.grid == "1, 2" and set(now.moved) == {"student", "critic", "discriminator"}
    assert min(now.moved.values()) > 0.99 and now.coarse is not None and now.coarse < 0.01
    assert now.change is not None and 0 < now.change < 0.01
    assert now.critic is not None and now.lag is not None and now.cosine is not None and -1 <= now.cosine <= 1
    assert len(now.looks.by_frame) == 4 and now.looks.accuracy is not None
    assert record.newest.teacher.distance == 0 and record.newest.start != record.newest.untrained
    assert [check.verdict for check in record.checks] == [
        judge(record.history[: i + 1], record.newest) for i in range(3)
    ]


def test_the_figures_are_logged(examined: Path) -> None:
    rows = {row["step"]: row for row in read_metrics(examined / "metrics.jsonl")}
    assert "health/diversity" in rows[3] and "health/moved/critic" in rows[6] and "health/lag" in rows[7]
    assert not any(name.startswith("health/") for name in rows[4])


def test_watch_shows_verdict_figures_and_losses(examined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(examined)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"step 7 of 7, .* ended", said) and re.search(
        r"(improving|unclear|stalled|diverging|collapsing) at step 7", said
    )
    for name in ("accuracy", "diversity", "lag", "critic moved", "loss/matching", "teacher, same steps"):
        assert name in said, name
    assert main(["watch", str(examined / "student")]) == 2 and "is not a run" in capsys.readouterr().err


def test_the_report_draws_both_reference_lines(examined: Path) -> None:
    from fewstep.evaluate.page import health

    charts = dict(health.curves(examined))
    assert charts["Diversity"].count('class="mark"') == 2 and "teacher, same steps" in charts["Diversity"]
    assert "Critic's lag: that error on new samples, relative to old samples" in charts
    assert (health.said(examined) or "").startswith("<b>") and "base64" in health.picture(examined)
    assert health.said(examined / "student") is None and health.curves(examined / "student") == []


# --- nothing else changes ---------------------------------------------------------------------------------------------


def test_examining_changes_no_number_and_a_stopped_run_says_the_same(tmp_path: Path) -> None:
    """Weights equal those of a run that is not examined; checks equal those of a run that was not stopped."""
    common: dict[str, Any] = {"save_every": 2, "ema": 0.9, "accumulate": 2}
    train(tiny_model(), METHOD, Everything(), small(6, health=None, **common), tmp_path / "blind", quiet=True)
    whole = run(tmp_path / "whole", 6, **common)
    pulled = mock.patch.object(RunLog, "advance", side_effect=[*[None] * 5, Stopped])  # after the check of iteration 6
    with pulled, pytest.raises(Stopped):
        run(tmp_path / "stopped", 6, **common)
    resumed = run(tmp_path / "stopped", 6, **common)
    assert resumed == whole and [check.vitals.step for check in whole.checks] == [3, 6]
    states = [RunState.load(checkpoints(tmp_path / n / "checkpoints")[-1]) for n in ("blind", "whole", "stopped")]
    assert states[1].values == states[2].values and states[0].values["health"] is None
    for name, tensors in states[0].components.items():
        for key, tensor in tensors.items():
            assert all(torch.equal(tensor, state.components[name][key]) for state in states[1:]), f"{name}: {key}"


# --- policies ---------------------------------------------------------------------------------------------------------


def test_a_collapse_ends_the_run_with_its_best_student(tmp_path: Path) -> None:
    method = CASES["Consistency"]
    with scripted("improving", "collapsing", "collapsing", "improving"):
        record = run(tmp_path / "run", 12, method)
    assert [check.vitals.step for check in record.checks] == [3, 6, 9]
    assert record.checks[-1].done == ("the run stops: two checks in a row found a collapse",)
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-000009"
    weights_of = lambda part: (tmp_path / "run" / part / "denoiser.safetensors").read_bytes()  # noqa: E731
    assert weights_of("student") == weights_of("best")
    kept = (tmp_path / "run" / "health.json").read_bytes()
    run(tmp_path / "run", 12, method)  # the same run: it has ended
    assert (tmp_path / "run" / "health.json").read_bytes() == kept
    (tmp_path / "run" / "best" / "card.json").unlink()
    with pytest.raises(CheckpointError, match="the best student so far, is gone"):
        run(tmp_path / "run", 12, method)


def test_policies_can_be_left_out(tmp_path: Path) -> None:
    with scripted(*["collapsing"] * 4):
        record = run(tmp_path, 12, CASES["Consistency"], health=replace(OFTEN, stop_on_collapse=False, keep_best=False))
    assert len(record.checks) == 4 and not (tmp_path / "best").exists()


def test_a_lagging_critic_gets_more_updates(tmp_path: Path) -> None:
    """Twice and three times as many while it lags, one less at each check when it does not; and the resumed run agrees."""
    with mock.patch.object(monitor, "lags", side_effect=[True, True, True, False, False]):
        record = run(tmp_path, 15, save_every=15)
    assert [check.done for check in record.checks] == [
        ("each critic update is done 2 times",),
        ("each critic update is done 3 times",),
        (),
        ("each critic update is done 2 times",),
        ("each critic update is done once",),
    ]
    optimizer = RunState.load(checkpoints(tmp_path / "checkpoints")[-1]).components["critic.optim"]
    steps = {int(value) for key, value in optimizer.items() if "/step/" in key}
    assert steps == {2 * 3 * (1 + 2 + 3 + 3 + 2)}  # two updates in each of three iterations, times the turns


def test_a_critic_of_single_frames_is_tested_on_them_and_helped(tmp_path: Path) -> None:
    """Beside the image teacher that it began as, which is another model on another path; and it is announced."""
    shapes: dict[str, set[int]] = {"image_critic": set(), "image_teacher": set()}
    made = building.build_nets

    def noted(*arguments: Any) -> Any:
        nets = made(*arguments)
        for role, seen in shapes.items():
            nets[role].register_forward_pre_hook(lambda _, given, seen=seen: seen.add(given[0].shape[2]))
        return nets

    method = replace(CASES["AVDM2"], critic_updates=1)
    with (
        mock.patch.object(building, "build_nets", noted),
        mock.patch.object(monitor, "lags", side_effect=[True, True]),
        mock.patch.object(RunLog, "say") as said,
    ):
        record = run(tmp_path, 6, method)
    assert shapes == {"image_critic": {1}, "image_teacher": {1}}
    first = record.checks[0].vitals
    assert first.critic is not None and first.lag is not None and first.asked is not None
    assert [check.done[0] for check in record.checks] == [f"each critic update is done {n} times" for n in (2, 3)]
    assert any("gives the critic more updates" in call.args[0] for call in said.call_args_list)


def test_a_critic_that_has_learnt_nothing_is_as_good_as_what_it_began_as() -> None:
    """On frames: error of a copy over error of the original is one, and single frames are what is compared."""
    model = tiny_model()
    gauge = Gauge.of(model, tuple(world_prompts(2, 0.5, 0)), 2, 3, nullcontext)
    clips = gauge.sample(model, (2,)).latents
    one, two, other = gauge.errors((model.denoiser, duplicate(model.denoiser), tiny_model(1).denoiser), clips, model, 2)
    assert one == two != other
    rows, (frames,) = singled(2, clips)
    assert rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and torch.equal(frames[1, :, 0], clips[0, :, -1])
    assert gauge.errors((model.denoiser,), clips, model) != [one] and len(singled(99, clips)[0]) == clips.shape[2] * 4


def test_runs_that_distil_nothing_are_not_examined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = small(3, health=OFTEN)
    for case, reason in (("FlowMatching", "does not distil"), ("Reconstruction", "trains the codec")):
        train(tiny_model(), CASES[case], Everything(), settings, tmp_path / case)
        assert reason in " ".join(capsys.readouterr().err.split()) and read_record(tmp_path / case) is None


def test_every_run_without_checks_has_its_reason() -> None:
    silent, settings = tiny_model(), small(3, health=OFTEN)
    del silent.parts["text"], silent.parts["codec"]
    for reason, arguments in {
        "settings.health is null": (tiny_model(), METHOD, small(3, health=None)),
        "the run has 2 iterations, fewer": (tiny_model(), METHOD, small(2, health=OFTEN)),
        "the model has no codec and no text": (silent, METHOD, settings),
        "Silent uses no prompts": (tiny_model(), type("Silent", (DMD2,), {"needs": frozenset()})(), settings),
        "": (tiny_model(), METHOD, settings),
    }.items():
        said = monitor.unexamined(*arguments)
        assert said.startswith(reason) and bool(said) == bool(reason)


def test_what_is_not_measured_is_said_with_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A compiled run cannot compare the gradients of its terms: log, record, `watch` and the report say so."""
    from fewstep.evaluate.page import health

    compiled = mock.patch.object(monitor.Monitor, "uncompared", "settings.compile: as written")
    with compiled, mock.patch.object(RunLog, "say") as said:
        record = run(tmp_path, 3, CASES["DMD2-everything"])
    found = record.checks[-1].vitals
    assert found.cosine is None and found.unmeasured == {"cosine": "settings.compile: as written"}
    wanted = "not measured: cosine (settings.compile: as written)"
    assert any(f"step 3: {record.checks[-1].verdict}; {wanted}" in call.args[0] for call in said.call_args_list)
    assert main(["watch", str(tmp_path)]) == 0 and wanted in " ".join(capsys.readouterr().out.split())
    assert "Not measured: cosine" in (health.said(tmp_path) or "")


def test_why_gradients_are_not_compared(tmp_path: Path) -> None:
    several = prepare.prepare(
        tiny_model(), CASES["DMD2-everything"], Everything(), small(3, health=OFTEN), tmp_path
    ).monitor
    assert several is not None and several.uncompared == ""
    several.settings = replace(several.settings, compile=True)
    assert several.uncompared.startswith("settings.compile")
    several.settings, several.processes = replace(several.settings, compile=False), replace(several.processes, world=2)
    assert several.uncompared.startswith("several processes")
    assert several._unmeasured == {}  # no two terms have been seen yet
    several.names = {"matching", "adversarial"}
    assert set(several._unmeasured) == {"cosine"}
    several.gauge = replace(several.gauge, scenes=None)
    assert set(several._unmeasured) == {"accuracy", "cosine"}


def test_heed_tells_clips_of_other_prompts() -> None:
    """The teacher's own clips have 1; dealt to other prompts they have less than none, all alike they have none."""
    model = tiny_model()
    gauge = Gauge.of(model, tuple(world_prompts(4, 0.5, 0)), 2, 8, nullcontext)
    frames = (torch.arange(4.0) / 4).repeat_interleave(2)[:, None, None, None, None] + 0.02 * torch.rand(
        8, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    assert gauge._heed(frames, frames) == pytest.approx(1.0)
    assert (gauge._heed(frames.roll(2, 0), frames) or 0) < 0.1
    assert gauge._heed(frames[:2].repeat(4, 1, 1, 1, 1), frames) == pytest.approx(0.0, abs=0.05)
    assert gauge._heed(torch.cat([frames, frames]), frames) == pytest.approx(1.0)  # two step counts
    alone = Gauge.of(model, ("a red ball",), 2, 8, nullcontext)
    assert alone._heed(frames[:2], frames[:2]) is None


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="settings.health.seeds must be at least 2, got 1"):
        Health(seeds=1)
    with pytest.raises(ValueError, match="settings.health.every must be at least 1"):
        Health(every=0)


# --- spoiled runs, as far as a tiny model shows them ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "reason", "spoil", "rate"),
    [
        ("stalled", "bfloat16", coarse_weights, 1e-5),
        ("diverging", "the critic does not learn", frozen_critic, 1e-3),
        ("diverging", "another path", other_path, 1e-3),
        ("diverging", "learning rate", None, 0.1),
    ],
)
def test_a_spoiled_run_is_named(word: str, reason: str, spoil: Any, rate: float, tmp_path: Path) -> None:
    method = DMD2(critic_updates=2, rollout=BackwardSimulation(grids=NESTED))
    optim = {"student": Optim(lr=rate), "critic": Optim(lr=1e-3)}
    with spoil() if spoil is not None else mock.patch.dict({}):
        record = run(tmp_path, 8, method, optim=optim, batch=8, health=Health(every=8, prompts=2))
    assert record.checks[-1].verdict.word == word and reason in record.checks[-1].verdict.reason


def test_times_that_training_does_not_visit_are_named() -> None:
    """The rule on its own: it waits for more calls than a tiny run has."""
    heard = Heard()
    for t in (1.0, 0.9, 0.75, 0.5):
        for _ in range(60):
            heard.hear("student", torch.ones(4, 1, 1, 1, 1), torch.full((4,), t))
        heard.drain()
    assert heard.unseen((1.0, 0.75, 0.5, 0.25)) == (0.25,)
    heard.forget()
    assert heard.unseen((1.0, 0.88, 0.25)) == (0.25,) and heard.recent == {}
    again = Heard()
    again.restore(json.loads(json.dumps(heard.state())))
    assert again.unseen((0.25, 1.0)) == (0.25,)
    assert OtherShift(rollout=TWO_GRIDS).contract(Card(name="x").contract).trained[2] == (1.0, 0.5, 0.0)


# --- measurements -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "least", "most"), [(RectifiedFlow(), 0.95, 1.05), (Trig(), 1.4, 1.7)])
@pytest.mark.parametrize("garish", [0.5, 1.0, 2.0])
def test_inputs_on_another_path_hold_another_amount_of_noise(
    path: Any, least: float, most: float, garish: float
) -> None:
    """However dull or garish is what was noised."""
    rng, heard = Rng(0), Heard()
    for t in (0.5, 0.75, 1.0):
        x0, eps, times = rng.randn((64, 4, 4, 4, 4), "x"), rng.randn((64, 4, 4, 4, 4), "eps"), torch.full((64,), t)
        heard.hear("student", path.add_noise(garish * x0, eps, times), times)
    heard.drain()
    found = heard.noise(RectifiedFlow())
    assert found is not None and least < found < most
    heard.forget()
    assert heard.noise(RectifiedFlow()) is None


def test_strong_guidance_asks_for_other_clips_than_the_teachers() -> None:
    model = VideoModel.from_pretrained("world")
    prompts = tuple(world_prompts(2, 0.5, 0))
    gauge = Gauge.of(model, prompts, 2, 4, nullcontext)
    clips = gauge.sample(model, (4,)).latents
    weak, usual, far = (gauge.asked(CFG(scale=scale), model.denoiser, clips, model) for scale in (1.0, 2.5, 30.0))
    assert 0.8 < weak < usual < 1.3 and far > 2 * ASKED


def test_what_the_student_is_fed_is_heard_and_nothing_else() -> None:
    heard, x, t = Heard(), Rng(1).randn((1, 4, 4, 8, 8), "x"), torch.tensor([0.5])
    heard.hear("student", x, t)
    heard.hear("student", x, frames := torch.rand(1, x.shape[2]))
    heard.hear("critic", x, t)
    assert len(heard.notes) == 2 and float(heard.notes[0][1]) == pytest.approx(float(x.square().mean()))
    assert heard.notes[1][1].shape == frames.shape


def test_opposite_terms_have_opposite_gradients() -> None:
    layer = torch.nn.Linear(3, 2)
    out = layer(torch.ones(1, 3)).sum()
    terms = Terms()
    terms.add({"up": out, "down": -2 * out}, layer)
    assert terms.cosine() == pytest.approx(-1.0) and Terms().cosine() is None
    (out * 1).backward()  # the graph is still there


def test_adapters_are_judged_by_the_weights_they_make(tmp_path: Path) -> None:
    network = adapt(base := tiny_model().denoiser, lora := Lora(rank=2), Rng(0))
    before = weights.sample(network)
    assert weights.moved(before, weights.sample(network)) == 0
    with torch.no_grad():
        for layer in adapters(network).values():
            layer.lora_B.weight += 1
    merged = merge(base, network)
    made = [merged.get_submodule(name).weight.flatten() for name in adapters(network)]
    assert torch.equal(weights.sample(network), torch.cat(made))
    check = run(tmp_path, 3, lora=lora).checks[-1]
    assert set(check.vitals.moved) == {"student", "critic"} and check.vitals.moved["student"] > 0.9
    assert check.vitals.change is not None and 0 < check.vitals.change < 0.1


def test_weights_that_stand_still_are_counted() -> None:
    layer = torch.nn.Linear(64, 64)
    before = weights.sample(layer)
    assert weights.moved(before, before) == 0 and weights.change(before, before) == 0
    assert weights.coarse(before) < 0.01 and weights.coarse(before.bfloat16().float()) == 1
    with torch.no_grad():
        layer.weight += 0.1 * layer.weight.norm() / 64
    after = weights.sample(layer)
    assert weights.moved(before, after) == pytest.approx(64 / 65, abs=0.01)
    assert 0.05 < weights.change(before, after) < 0.2
    assert len(weights.sample(torch.nn.Linear(1024, 1024))) < 2 * weights.SAMPLED


def test_large_frames_are_judged_small() -> None:
    model = tiny_model()
    assert decode(model, torch.zeros(1, 4, 2, 30, 52)).shape == (1, 3, 2, 36, 64)
    assert decode(model, torch.zeros(1, 4, 2, 8, 8)).shape == (1, 3, 2, 32, 32)


def test_clips_are_compared_with_the_teachers_of_the_same_prompt() -> None:
    gauge = Gauge(("a", "b", "c"), None, seeds=2, batch=2, precision=nullcontext)
    colours = torch.tensor([-0.8, -0.75, 0.0, 0.05, 0.7, 0.8]).reshape(6, 1, 1, 1, 1).expand(6, 3, 4, 16, 16)
    other = gauge._distance(colours.roll(2, 0), colours)
    assert gauge._distance(colours, colours) == pytest.approx(0, abs=1e-6) and other > 1
    both = gauge._distance(torch.cat([colours, colours.roll(2, 0)]), colours)
    assert both == pytest.approx(other / 2, rel=1e-4)  # the mean over step counts


def test_clips_are_compared_with_the_teachers_of_the_same_noise_at_every_step_count() -> None:
    reference = 2 * Rng(0).randn((4, 2, 3, 4, 4), "x")
    away = reference + torch.tensor([0.0, 1.0, 1.0, 2.0])[:, None, None, None, None]
    assert apart(reference, reference) == 0
    assert apart(torch.cat([reference, away]), reference) == pytest.approx((6 / 8) ** 0.5 / 2, rel=0.1)
    assert apart(reference.roll(1, 0), reference) == pytest.approx(2**0.5, rel=0.1)  # clips of other noise


def test_drift_is_in_units_of_the_reference() -> None:
    reference = Rng(0).randn((8, 4, 4, 8, 8), "x")
    assert drift(reference, reference) == 0 and drift(reference + 0.5, reference) == pytest.approx(0.5, rel=0.02)
    assert drift(4 * reference + 2, 4 * reference) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_that_of_the_networks_own_output(kind: Kind) -> None:
    x0, eps, t, path = Rng(0).randn((2, 4, 3, 2, 2), "x0"), Rng(0).randn((2, 4, 3, 2, 2), "eps"), torch.rand(2), Trig()
    truth = Prediction(target(kind, x0, eps, t, path), kind, path.add_noise(x0, eps, t), t, path)
    assert error(truth, x0, eps) == 0 and error(truth.with_raw(truth.raw + 2), x0, eps) == pytest.approx(4, rel=1e-5)
