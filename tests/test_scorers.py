"""Real score and critic of models of other sizes than the student's: who is asked, where it leads, a run with three widths."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep import Recipe
from fewstep.core import Rng
from fewstep.diffusion import CFG, VP
from fewstep.engine import CheckpointError, Health, train
from fewstep.engine.checkpoint import checkpoints
from fewstep.engine.health.monitor import judge_of
from fewstep.engine.nets import lenders, require_alike
from fewstep.engine.outline import Outline
from fewstep.engine.prepare import prepare, require_possible
from fewstep.methods import (
    AVDM2,
    DMD2,
    TDM,
    BackwardSimulation,
    Copy,
    MomentMatching,
    Nets,
    Other,
    Scorers,
    Weak,
)
from fewstep.models import Lora, VideoModel
from fewstep.models.lora import adapters
from fewstep.models.source import Pretrained, Scratch
from support_engine import Everything, Sized, TinyImages, small, stored_card, tiny_model
from support_gaussian import (
    ONE_STEP,
    AffineTableStudent,
    Asked,
    ExactCritic,
    GaussianTeacher,
    f64,
    make_batch,
    normal,
    terms,
)

pytestmark = pytest.mark.usefixtures("single_thread")


LARGE, SMALL = Sized(width=36), Sized(width=12)
SHORT = BackwardSimulation(grids=((1.0, 0.5),))
CRITICS: dict[str, Any] = {"student's": None, "large": "real", "small": SMALL}
WIDTHS = {"student's": 24, "large": 36, "small": 12}
critics = pytest.mark.parametrize("size", CRITICS)


def method(size: str) -> DMD2:
    return DMD2(critic_updates=1, rollout=SHORT, scorers=Scorers(real=LARGE, critic=CRITICS[size]))


# --- whose score ----------------------------------------------------------------------------------------------------------


def test_which_roles_there_are() -> None:
    assert Scorers().roles == {"critic": Copy("teacher")} and Scorers().role == "teacher"
    assert Scorers(real=LARGE).roles == {"real": Other(LARGE), "critic": Copy("teacher")}
    assert list(Scorers(real=LARGE, critic="real").roles.items()) == [("real", Other(LARGE)), ("critic", Copy("real"))]
    assert (
        Scorers(critic=SMALL).roles == {"critic": Other(SMALL, frozen=False)}
        and Scorers(critic=SMALL).role == "teacher"
    )
    assert Scorers(weak=0.25).roles == {"critic": Copy("teacher"), "real": Weak("critic", 0.25)}
    assert Scorers(real=LARGE).role == Scorers(weak=0.25).role == "real"


def gaussians(start: float = 0.0) -> Nets:
    """A student of one step with the real score's width; the run's own model has another mean than the real score."""
    student = AffineTableStudent((1.0,)).fill([(0.4, start)])
    own, real = GaussianTeacher(f64(3.0, -3.0), 0.4), GaussianTeacher(f64(-0.2, 0.7), 0.4)
    return Nets({"student": student, "teacher": own, "real": real, "critic": ExactCritic(student)})


def test_the_student_reaches_the_guided_mean_of_the_larger_model() -> None:
    nets, made = gaussians(), DMD2(rollout=ONE_STEP, guidance=CFG(scale=2.0), scorers=Scorers(real=LARGE))
    optimiser = torch.optim.Adam([nets.student.offset], lr=0.02)
    for step in range(400):
        optimiser.zero_grad()
        terms(made.student_loss(nets, make_batch(16), Rng(0, step)))["matching"].backward()
        optimiser.step()
    assert abs(nets.student.offset.item() - nets["real"].guided_mean(2.0)) < 2e-3


@pytest.mark.parametrize(
    "make",
    [
        lambda scorers: DMD2(rollout=ONE_STEP, scorers=scorers),
        lambda scorers: TDM(rollout=BackwardSimulation(grids=((1.0,),), mode="ode"), scorers=scorers),
        lambda scorers: MomentMatching(steps=(1,), scorers=scorers),
    ],
    ids=["DMD2", "TDM", "MomentMatching"],
)
def test_the_real_score_is_asked_of_the_larger_model_alone(make: Any) -> None:
    nets = Nets({role: Asked(net) for role, net in gaussians().items()})
    plain, made = make(Scorers()), make(Scorers(real=LARGE))
    batch = make_batch(4, x0=normal(4))
    every = [event.losses for event in made.updates(0)]
    for losses in every:
        list(losses(nets, batch, Rng(0)))
    assert nets["real"].questions and not nets.teacher.questions
    assert not any(question.grad for question in nets["real"].questions)
    asked = {work.role: work.forwards for work in made.cost()}
    assert asked == {{"teacher": "real"}.get(work.role, work.role): work.forwards for work in plain.cost()}


# --- a run ----------------------------------------------------------------------------------------------------------------


@critics
@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["whole", "lora"])
def test_networks_of_three_widths_in_one_run(size: str, lora: Lora | None, tmp_path: Path) -> None:
    run = prepare(tiny_model(), method(size), Everything(), small(2, lora=lora), tmp_path)
    widths = {role: run.nets.roles[role].backbone.widths[0] for role in ("student", "teacher", "real", "critic")}
    assert widths == {"student": 24, "teacher": 24, "real": 36, "critic": WIDTHS[size]}
    before = {role: {k: v.clone() for k, v in net.state_dict().items()} for role, net in run.nets.roles.items()}
    begun = {"student's": run.nets.roles["teacher"], "large": LARGE.load().denoiser, "small": SMALL.load().denoiser}[
        size
    ]
    x, t = torch.randn(2, 4, 4, 8, 8), torch.tensor([0.2, 0.7])
    cond = run.model.text.encode(["a red ball", "a blue square"])
    with torch.no_grad():
        assert torch.equal(run.nets.roles["critic"](x, t, cond).raw, begun(x, t, cond).raw), "what the critic starts as"
    run.iterate()
    moved = {
        role for role, net in run.nets.roles.items()
        if any(not torch.equal(v, before[role][k]) for k, v in net.state_dict().items())
    }  # fmt: skip
    assert moved == {"student", "critic"}
    assert bool(adapters(run.nets.roles["critic"])) == (lora is not None)


@critics
def test_it_is_saved_loaded_and_resumed(size: str, tmp_path: Path) -> None:
    settings = small(3, save_every=1)
    student = train(tiny_model(), method(size), Everything(), settings, tmp_path / "a", quiet=True)
    assert student.denoiser.backbone.widths[0] == 24
    told = student.card.provenance
    assert told["real"] == f"tiny {LARGE.load().fingerprint('denoiser')}"
    assert ("critic" in told) == (size == "small")
    again = VideoModel.from_pretrained(tmp_path / "a" / "student")
    assert again.fingerprint("denoiser") == student.fingerprint("denoiser")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "student")
    last = checkpoints(tmp_path / "b" / "checkpoints")[-1]
    assert {"student", "critic"} <= {path.name for path in last.iterdir()} and not (last / "real").exists()
    shutil.rmtree(last)  # killed before the last iteration
    resumed = train(tiny_model(), method(size), Everything(), settings, tmp_path / "b", quiet=True)
    assert resumed.fingerprint("denoiser") == student.fingerprint("denoiser")


def test_a_run_belongs_to_the_models_that_score(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Retrained(Sized):
        def load(self, leave: Any = (), parts: Any = ("denoiser",)) -> VideoModel:
            return replace(SMALL, seed=9).load(leave, parts)

    settings = small(2, save_every=1)
    train(tiny_model(), method("small"), Everything(), settings, tmp_path, quiet=True)
    changed = replace(method("small"), scorers=Scorers(real=LARGE, critic=Retrained(width=12)))
    with pytest.raises(CheckpointError, match="critic weights was"):
        train(tiny_model(), changed, Everything(), settings, tmp_path, quiet=True)


@critics
def test_the_plan_counts_every_width(size: str) -> None:
    parameters = {
        width: sum(p.numel() for p in Sized(width=width).load().denoiser.parameters()) for width in (12, 24, 36)
    }
    own = sum(p.numel() for p in tiny_model().denoiser.parameters())
    plan = Outline.of(Sized(width=24).card(), method(size), small(2)).plan()
    held = {holding.role: holding for holding in plan.holdings}
    assert held["real"].parameters == parameters[36] and held["real"].trained == 0
    assert held["critic"].trained == parameters[WIDTHS[size]] and held["student"].trained == parameters[24] == own
    reads = {phase.roles: phase.reads for phase in plan.phases}
    assert "real" in reads["student",] and not {"real", "teacher"} & reads["critic",]
    less = Outline.of(Sized(width=24).card(), method("small"), small(2)).plan().flops
    assert (plan.flops > less) == (size != "small"), "each role costs what its own network does"


def test_the_plan_counts_what_adapters_of_another_model_are_over() -> None:
    plan = Outline.of(Sized(width=24).card(), method("small"), small(2, lora=Lora(rank=2))).plan()
    held = {holding.role: holding for holding in plan.holdings}
    whole = sum(p.numel() for p in SMALL.load().denoiser.parameters())
    assert held["critic's base"].parameters == whole > held["critic"].parameters > 0
    assert held["critic's base"].trained == 0 and "real's base" not in held


@critics
def test_checks_look_at_the_model_whose_score_is_followed(size: str, tmp_path: Path) -> None:
    """And compare the critic with what it started as: with the real score, if that model is not kept."""
    made, health = method(size), Health(every=1, prompts=2, seeds=2)
    assert (made.critic, judge_of(made), lenders(made)) == ("critic", "real", ("teacher", "real"))
    monitor = prepare(tiny_model(), made, Everything(), small(2, health=health), tmp_path).monitor
    assert monitor is not None
    begun = {"student's": "teacher", "large": "real", "small": "real"}[size]
    x, t, cond = torch.randn(2, 4, 4, 8, 8), torch.tensor([0.2, 0.7]), tiny_model().text.encode(["a", "b"])
    with torch.no_grad():
        assert torch.equal(monitor._unlearnt(x, t, cond).raw, monitor.nets[begun](x, t, cond).raw)
        assert torch.equal(monitor._judge(x, t, cond).raw, monitor.nets["real"](x, t, cond).raw)
    assert judge_of(DMD2()) == "teacher" and judge_of(AVDM2(image_teacher=TinyImages())) == "image_teacher"


# --- refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"critic": "real"}, "real is null; give real a model, or write critic: null"),
        ({"weak": 0.25, "real": LARGE}, "write real: null and critic: null, or weak: 0"),
        ({"weak": 0.25, "critic": SMALL}, "write real: null and critic: null, or weak: 0"),
        ({"weak": 1.0}, "weak"),
    ],
)
def test_scorers_that_contradict_each_other_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scorers(**fields)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Sized(width=36, path=VP()), "has the path VP.*on the same noise path"),
        (
            Sized(width=36, text=32),
            "has text states of width 32, and 'tiny' 16; give a model that was trained with the same",
        ),
    ],
)
@pytest.mark.parametrize("field", ["real", "critic"])
def test_a_model_that_reads_something_else_is_refused(source: Sized, words: str, field: str) -> None:
    made = DMD2(scorers=Scorers(**{field: source}))
    with pytest.raises(ValueError, match=f"the method's {field}: 'tiny' {words}"):
        require_alike(made, LARGE.card())
    require_alike(AVDM2(image_teacher=Sized(width=36, path=VP())), LARGE.card())  # noises its frames on its own path


def test_a_frozen_model_that_is_made_new_is_refused_and_a_critic_is_not() -> None:
    card = stored_card(tiny_model())
    new = Scratch(**{part: spec for part, spec in card.parts.items() if part in Scratch.made})
    for made, role in ((DMD2(scorers=Scorers(real=new)), "real"), (AVDM2(image_teacher=new), "image_teacher")):
        with pytest.raises(ValueError, match=f"the method's {role}: 'scratch' is made new, .*; train it first"):
            require_alike(made, card)
    require_alike(DMD2(scorers=Scorers(critic=new)), card)  # which is trained


def test_a_critic_of_another_size_takes_no_weights_of_the_student() -> None:
    for size in ("large", "small"):
        with pytest.raises(
            ValueError, match="copies weights of the student into the critic, and only one of them is another"
        ):
            require_possible(replace(method(size), align=0.03), small(1), LARGE.card(), None)
    require_possible(replace(method("student's"), align=0.03), small(1), LARGE.card(), None)


def test_a_recipe_names_its_scorers(tmp_path: Path) -> None:
    text = (
        "model: {type: Pretrained}\nmethod: {type: DMD2, scorers: {real: {type: Pretrained, source: large}, critic: %s}}\n"
        "data: {type: WorldClips}\nsettings: {steps: 1}\n"
    )
    path = tmp_path / "recipe.yaml"
    for critic, made in (("real", "real"), ("null", None), ("{type: Pretrained, source: s}", Pretrained(source="s"))):
        path.write_text(text % critic)
        recipe = Recipe.load(path)
        assert recipe.method == DMD2(scorers=Scorers(real=Pretrained(source="large"), critic=made))
        recipe.save(tmp_path / "saved.yaml")
        assert Recipe.load(tmp_path / "saved.yaml") == recipe
    with pytest.raises(FileNotFoundError, match="large: no card.json"):
        recipe.check()
