"""Every field counts: one of a recipe is in its hash, and one of anything that people configure is read by who does the work."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from fewstep.attention import BlockCausal
from fewstep.catalogue import classes
from fewstep.compress import Repatterned, StepScales
from fewstep.core.build import digest, dump
from fewstep.data import ByCentroid, Cut, Keep, PairPlan, Part, Preparation, make_pairs, pairs_cost
from fewstep.data import prepare as encode
from fewstep.diffusion import Contract, FreeNoise, Stream, Timesteps
from fewstep.engine import Health, Optim, Parallel, Settings, train
from fewstep.engine.effective import settle
from fewstep.engine.prepare import prepare
from fewstep.evaluate import Entry, RealClips, Suite, evaluate
from fewstep.methods import (
    DMD2,
    HISTORIES,
    MATCHINGS,
    METHODS,
    PSO,
    REWARDS,
    ROLLOUTS,
    TDM,
    Adversary,
    DiffusionForced,
    ErrorRecycling,
    Feedback,
    FlowMatching,
    FromLow,
    LatentPixel,
    Method,
    MotionReward,
    MovingBuffer,
    Reweighting,
    Scorers,
    SelfForced,
    TeacherForced,
    WorldReward,
)
from fewstep.models import Lora
from fewstep.models.source import Pretrained, Scratch
from fewstep.models.spec import Spec
from fewstep.world.parts import ByAttribute
from support_engine import CASES, Everything, Sized, small, tiny_model
from support_evaluate import guided_teacher
from support_videos import make_videos

pytestmark = pytest.mark.usefixtures("single_thread")

# --- in the hash ----------------------------------------------------------------------------------------------------------


def held(thing: Any) -> Iterator[Any]:
    """`thing` and every dataclass below it."""
    if is_dataclass(thing) and not isinstance(thing, type):
        yield thing
        for field in fields(thing):
            value = getattr(thing, field.name)
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
            for item in inner:
                yield from held(item)


def whole() -> dict[type, Any]:
    """One object of every dataclass that a recipe can hold, by class."""
    made: dict[type, Any] = {}
    starts: list[Any] = [
        Settings(steps=3, optim={"student": Optim()}, lora=Lora()),
        Pretrained(),
        Scratch(denoiser=Spec("VideoDiT"), codec="world", contract=Contract(grid=Timesteps(), stream=Stream())),
        Repatterned(pattern=BlockCausal(chunk=1)),
        StepScales(steps=4),
        ErrorRecycling(past=0.0),
        FreeNoise(),
        Part(by=ByAttribute(of=2), index=0),
        ByCentroid(of=2, path="x"),
        *(cls(**{f.name: "x" for f in fields(cls) if f.default is f.default_factory}) for cls in _plain()),
    ]
    for start in starts:
        for thing in held(start):
            made.setdefault(type(thing), thing)
    return made


def _plain() -> list[type]:
    """Classes that are made from their defaults, and from text where they have none."""
    chosen = []
    for cls in classes():
        if is_dataclass(cls) and cls not in (Settings, Scratch, Pretrained):
            hints = get_type_hints(cls)
            lacking = [
                f for f in fields(cls) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            ]
            if all(hints[f.name] is str for f in lacking):
                chosen.append(cls)
    return chosen


def others(value: Any, hint: Any) -> Iterator[Any]:
    """Values unlike `value` that the annotation allows."""
    arms = list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]
    for arm in arms:
        if get_origin(arm) is Literal:
            yield from (choice for choice in get_args(arm) if choice != value)
        elif arm is bool:
            yield not value
        elif arm is int:
            yield (value if isinstance(value, int) else 0) + 1
        elif arm is float:
            yield (value if isinstance(value, float) else 1.0) * 0.37 + 0.013
        elif arm is str:
            yield f"{value}-other"
        elif arm is NoneType and value is not None:
            yield None
        elif get_origin(arm) in (tuple, list) and isinstance(value, tuple):
            yield from (value[:-1], value + value[-1:]) if value else ((1,), (1.0,), ("qkv",))
        elif get_origin(arm) is tuple and value is None:
            yield (0.5, 1.0)
        elif get_origin(arm) is dict and isinstance(value, dict):
            yield dict(list(value.items())[:-1]) if value else {"other": "x"}
            yield value | {"other": next(iter(value.values()), "x")}
        elif isinstance(arm, type) and is_dataclass(arm) and value is None:
            yield from (thing for cls, thing in whole().items() if issubclass(cls, arm))
        elif isinstance(arm, type):
            yield from (thing for cls, thing in whole().items() if issubclass(cls, arm) and thing != value)
    if is_dataclass(value):
        hints = get_type_hints(type(value))
        for field in fields(value):
            for other in others(getattr(value, field.name), hints[field.name]):
                try:
                    yield replace(value, **{field.name: other})
                except (ValueError, TypeError):
                    continue


FIELDS = [
    (cls, field.name)
    for cls in whole()
    for field in fields(cls)
    if field.init and cls is not Parallel and (cls, field.name) != (Settings, "parallel")
]
"""How a run is spread is no part of its hash: it has a test of its own."""


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=[f"{cls.__name__}.{name}" for cls, name in FIELDS])
def test_changing_a_field_changes_the_hash_or_raises(cls: type, name: str) -> None:
    thing = whole()[cls]
    tried = 0
    for other in others(getattr(thing, name), get_type_hints(cls)[name]):
        tried += 1
        try:
            changed = replace(thing, **{name: other})
        except (ValueError, TypeError):
            continue
        assert digest(dump(changed)) != digest(dump(thing)), f"{cls.__name__}.{name} = {other!r} is not in the recipe"
    assert tried, f"this test knows no other value of {cls.__name__}.{name}"


def test_the_walk_meets_every_class_of_the_catalogue() -> None:
    walked = set(whole())
    missed = {cls.__name__ for cls in classes() if is_dataclass(cls)} - {cls.__name__ for cls in walked}
    assert missed <= {"Grid", "Experts"}  # they have no defaults, and their one field is a tuple of numbers
    assert {Settings, Optim, Lora} <= walked


# --- read -----------------------------------------------------------------------------------------------------------------

ASIDE = {"dataclasses", "fewstep.core.build"}
"""Modules that read every field of anything: to copy, compare or print it."""
OWN = {"__post_init__", "__repr__", "__eq__", "__hash__"}


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """`unread(classes, action)`: the fields of the classes that nobody reads while `action` is done."""

    def listen(heard: set[tuple[str, str]], cls: type) -> None:
        def read(self: Any, name: str) -> Any:
            frame = sys._getframe(1)
            if frame.f_globals["__name__"] not in ASIDE and frame.f_code.co_name not in OWN:
                heard.add((type(self).__name__, name))
            return object.__getattribute__(self, name)

        monkeypatch.setattr(cls, "__getattribute__", read)

    def names(chosen: tuple[type, ...], action: Callable[[], object]) -> set[str]:
        heard: set[tuple[str, str]] = set()
        for cls in chosen:
            listen(heard, cls)
        action()
        monkeypatch.undo()
        return {
            f"{cls.__name__}.{f.name}" for cls in chosen for f in fields(cls) if (cls.__name__, f.name) not in heard
        }

    return names


def test_a_field_that_is_only_checked_or_printed_is_found(unread: Callable[..., set[str]]) -> None:
    @dataclasses.dataclass(frozen=True)
    class Deaf:
        heard: int = 1
        dead: int = 1

        def __post_init__(self) -> None:
            if self.dead < 1:
                raise ValueError("at least 1")

    assert unread((Deaf,), lambda: (Deaf().heard, repr(Deaf()), dataclasses.asdict(Deaf()))) == {"Deaf.dead"}


def test_methods_and_rollouts_read_every_field(unread: Callable[..., set[str]], tmp_path: Path) -> None:
    cases: dict[str, Method] = {**CASES}
    cases["images"] = FlowMatching(image_fraction=1.0)
    cases["low chunks"] = LatentPixel(rollout=FromLow(stream=Stream(commit="last")))
    cases["long"] = DMD2(critic_updates=1, rollout=SelfForced(clips=2, overlap=1))
    for rollout in ROLLOUTS:
        cases[rollout.__name__] = DMD2(critic_updates=1, rollout=rollout())
    for matching in MATCHINGS:
        adversary = Adversary(r2=1.0) if matching.judged else None
        cases[matching.__name__] = DMD2(critic_updates=1, adversary=adversary, matching=matching())
    for reward in REWARDS:
        cases[reward.__name__] = DMD2(critic_updates=1, feedback=Feedback(reward=reward()))
    cases["above"] = TDM(interval="above")
    cases["reweighting"] = DMD2(critic_updates=1, reweighting=Reweighting(reward=MotionReward()))
    cases["feedback"] = DMD2(critic_updates=1, feedback=Feedback(reward=MotionReward(), ceiling=1.0, frames=2))
    cases["online pairs"] = PSO(reward=WorldReward(), candidates=3)
    cases["scorers"] = DMD2(critic_updates=1, scorers=Scorers(real=Sized(width=36), critic=Sized(width=12)))
    recycling = ErrorRecycling(past=0.0)
    cases["recycling"] = FlowMatching(recycling=recycling)
    cases["teacher forced"] = FlowMatching(history=TeacherForced())
    buffer = Stream(chunks=(1,), rolling=4, commit="nothing")
    cases["moving buffer"] = FlowMatching(history=MovingBuffer(stream=buffer, parts=(1, 4)))
    cases["diffusion forced"] = FlowMatching(history=DiffusionForced(clean=0.5))

    def action() -> None:
        for name, method in cases.items():
            iterations = {"Progressive": 8, "ProgressiveAdversarial": 2}.get(name, 3 if isinstance(method, DMD2) else 1)
            run = prepare(tiny_model(), method, Everything(), small(iterations, health=None), tmp_path / name)
            method.cost()
            for _ in range(iterations):
                run.iterate()
            run.student()

    assert not unread(
        (
            *METHODS,
            *MATCHINGS,
            Adversary,
            Scorers,
            *ROLLOUTS,
            *HISTORIES,
            *REWARDS,
            Reweighting,
            Feedback,
            ErrorRecycling,
        ),
        action,
    )


def test_settings_read_every_field(unread: Callable[..., set[str]], tmp_path: Path) -> None:
    health = Health(every=2, prompts=1)
    muon = Optim(type="muon", lr_of={"blocks": 1e-3}, warmup=1)
    runs = (
        small(2, ema=0.9, preview_every=2, save_every=1, health=health, optim={"student": muon}),
        small(2, lora=Lora(rank=2), health=None),
    )

    def action() -> None:
        for number, settings in enumerate(runs):
            train(tiny_model(), DMD2(critic_updates=1), Everything(), settings, tmp_path / str(number), quiet=True)
        settle({"compile": "no compiler here"}, replace(runs[0], allow_fallback=True))

    assert not unread((Settings, Optim, Parallel, Health, Lora), action)


def test_a_suite_reads_every_field(unread: Callable[..., set[str]], tmp_path: Path) -> None:
    teacher, videos = guided_teacher(steps=2, num_frames=4), make_videos(tmp_path / "videos", 4)
    rows = [Entry(name="teacher", model=teacher), Entry(name="teacher 1", model=teacher, steps=1)]
    quick: dict[str, Any] = {"prompts": 4, "latency_runs": 1, "latency_budget": 0.1, "features": "pooled"}
    suites = (
        Suite(seeds_per_prompt=1, **quick),
        Suite(seeds_per_prompt=1, real=RealClips(path=str(videos)), **quick),
    )

    def action() -> None:
        for number, suite in enumerate(suites):
            evaluate(rows, suite, tmp_path / str(number))

    assert not unread((Suite, Entry, RealClips), action)


def test_plans_for_data_read_every_field(unread: Callable[..., set[str]], tmp_path: Path) -> None:
    teacher, videos = guided_teacher(steps=2, num_frames=4), make_videos(tmp_path / "videos", 2)
    cut, keep = Cut(num_frames=4, height=16, width=16), Keep(min_seconds=0.1, max_seconds=9.0, min_motion=0.0)

    def action() -> None:
        encode(videos, tmp_path / "latents", teacher.codec, Preparation(cut=cut, keep=keep))
        plan = PairPlan(times=(1.0, 0.5, 0.0))
        pairs_cost(teacher, 1, plan)
        make_pairs(teacher, ("a red ball",), tmp_path / "pairs", plan)

    assert not unread((Preparation, Cut, Keep, PairPlan), action)
