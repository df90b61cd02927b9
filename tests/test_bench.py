"""The benchmark of a training step counts what it says it counts: on a tiny model, in the engine's own loop."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.compress import FrameInput
from fewstep.core.pixels import covering
from fewstep.data import Degradation
from fewstep.diffusion import CFG, Stream
from fewstep.evaluate.features.extractors import feature_map
from fewstep.methods import DMD2, FromLow
from fewstep.metrics import frechet, psnr, sharpness
from fewstep.models import VideoModel
from fewstep.world.actions import random_keys
from fewstep.world.checker import Checker
from fewstep.world.data import WorldClips
from fewstep.world.grammar import describe
from support_engine import FRAMES, tiny_model
from test_streaming import streaming_model

pytestmark = pytest.mark.usefixtures("single_thread")
Bench = Callable[[str], ModuleType]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Imports a script of `bench/` by its name, with the others beside it."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent.parent / "bench")])
    return importlib.import_module


@pytest.fixture
def train_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`bench/train_step.py` with a tiny model in place of its own."""
    module = bench("train_step")
    monkeypatch.setattr(module, "load", lambda name: (tiny_model(), WorldClips(num_frames=FRAMES)))
    return module


@pytest.mark.parametrize("changes", [{}, {"guidance": CFG(scale=1.0), "critic_updates": 1}], ids=["guided", "unguided"])
def test_the_calls_of_a_cycle_are_what_the_method_says_they_cost(
    changes: dict[str, object], train_step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    method: DMD2 = replace(train_step.METHOD, **changes)
    monkeypatch.setattr(train_step, "METHOD", method)
    found = train_step.measure(train_step.Case(batch=2, rounds=2))
    assert found["counted"] == found["cost"] == sum(work.forwards for work in method.cost())


class Operations(TorchDispatchMode):
    """A clock on which every operation takes a second, however busy the machine is."""

    seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seconds += 1
        return func(*args, **(kwargs or {}))


def test_phases_add_up_to_the_cycle_and_nothing_stays_behind(
    train_step: ModuleType, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring = bench("measuring")
    with Operations() as operations:
        monkeypatch.setitem(measuring.CLOCKS, "wall", lambda: operations.seconds)
        found = train_step.measure(train_step.Case(batch=2, rounds=2))
    assert sum(found["phases"].values()) == found["medians"]["cycle"] > 1000
    assert {"student", "teacher", "critic", "backward", "optimizer", "average", "data"} <= found["phases"].keys()
    assert found["memory"]["peak"] > 0


def test_a_recipe_is_measured_on_the_adapter_of_wan(
    train_step: ModuleType, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class and the recipe that a GPU measures, at toy size."""
    pytest.importorskip("diffusers", reason="needs the extra diffusers")
    measuring = bench("measuring")
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8}
    monkeypatch.setattr(measuring, "WAN", small | {"freq_dim": 16, "ffn_dim": 32, "num_layers": 1})
    monkeypatch.setattr(measuring, "WAN_CLIP", (4, 2, 4, 4))
    monkeypatch.setattr(train_step, "load", measuring.load)
    recipe = "wan21_1p3b/dmd2"
    case = train_step.Case(model="wan-1.3b", recipe=recipe, rounds=2)
    assert case.settings.accumulate == 1 and case.settings.parallel.checkpointing and case.settings.autocast == "bf16"
    found = train_step.measure(case)
    assert found["cost"] == 35 and 25 <= found["counted"] <= 45
    assert {"student", "teacher", "critic", "backward", "optimizer"} <= found["phases"].keys()
    assert found["medians"]["cycle"] > 0 and found["memory"]["peak"] > 0
    with pytest.raises(ValueError, match="batch: with a recipe these are its own"):
        train_step.Case(recipe=recipe, batch=2)


def test_shards_of_one_process_train_as_the_whole_network(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part that a GPU runs, at toy size: the same losses and weights, and nothing of the group stays behind."""
    pytest.importorskip("diffusers", reason="needs the extra diffusers")
    gpu = bench("gpu")
    monkeypatch.setattr(gpu, "TEXT", (6, 8))
    monkeypatch.setattr(gpu, "WAN", gpu.WAN | {"attention_head_dim": 12, "text_dim": 8, "freq_dim": 16})
    cut: list[bool] = []
    step = gpu.RoleOptimizer.step

    def watched(self: Any, number: int) -> float:
        cut.append(any(isinstance(p, gpu.DTensor) for p in self.network.parameters()))
        return float(step(self, number))

    monkeypatch.setattr(gpu.RoleOptimizer, "step", watched)
    found = gpu.PARTS["shards"][0](gpu.Options(device="cpu", small=True))
    assert cut == [False] * gpu.STEPS + [True] * gpu.STEPS
    assert found["whole"]["losses"] == found["shards"]["losses"] and len(set(found["whole"]["losses"])) == gpu.STEPS
    assert found["same bits"] and found["largest relative difference of a weight"] == 0
    assert min(found[name]["s per step"] for name in ("whole", "shards")) > 0
    assert not gpu.dist.is_initialized()


def test_a_gpu_that_is_not_there_is_said_to_be(train_step: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_step.main(train_step.Case(model="wan-1.3b")) == 0
    assert "skipped" in capsys.readouterr().out


@pytest.mark.parametrize("case", [{}, {"model": "wan-1.3b", "small": True, "steps": 1}], ids=["world", "wan"])
def test_the_figures_of_a_stream(case: dict[str, Any], bench: Bench) -> None:
    if case:
        pytest.importorskip("diffusers", reason="needs the extra diffusers")
    stream = bench("stream")
    found = stream.measure(stream.Case(chunk=1, window=2, sink=0, rounds=1, chunks=2, **case))
    assert found["network calls"] == (2 if case else 3) and found["chunk over its network calls"] >= 1
    for where in ("decoded beside", "decoded between"):
        rate, between = found[where]["frames per second"], found[where]["between chunks, ms"]
        frames = 4 if case else 1
        assert 1000 * frames / between["p99"] <= rate * 1.01 and found[where]["of a chunk, ms"]["denoise"] > 0
    assert 0 < found["first frame, ms"]["p50"] <= found["first frame, ms"]["p99"]


def test_obeyed_keys_are_counted(bench: Bench) -> None:
    """On a model that was not trained: shares lie between 0 and 1, and an object that stands still obeys where no key is held."""
    actions = bench("actions")
    model = tiny_model().transformed(FrameInput(name="keys", width=4, default=0.0))
    found = actions.measure(model, actions.Case(student="", clips=5, frames=FRAMES, steps=1, at_once=3))
    dice = torch.Generator().manual_seed(0)
    scenes = actions.sample_scenes(5, dice)
    actions.Variation.sample(5, dice)
    keys = random_keys(len(scenes), FRAMES, dice)
    assert found["still"][0] == pytest.approx(float((keys[:, 1:].sum(2) == 0).double().mean()), abs=1e-3)
    assert {"obeyed", "chance", "nothing", "rendered", "seen"} < found.keys() and 0 <= found["obeyed"][0] <= 1


def test_a_stream_that_begins_with_an_image_follows_a_beat_from_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a model that was not trained, whose first frame is the real clip's."""
    actions, begun = bench("actions"), list[Tensor]()
    beat = FrameInput(name="beat", back=2, ahead=2, default=0.5)
    stream = streaming_model(Stream(chunks=(1, 2), window=5, sink=1)).card.contract
    model = tiny_model().with_card(contract=stream).transformed(beat)
    begin_with = actions.Session.begin_with
    monkeypatch.setattr(actions.Session, "begin_with", lambda self, x: (begun.append(x), begin_with(self, x)))
    found = actions.measure(model, actions.Case(student="", signal="beat", clips=3, frames=5, at_once=2))
    assert [len(latents) for latents in begun] == [2, 1] * 2 and begun[0].shape[2] == 1
    assert found["still"] == [0, 0, 0]


def test_a_server_that_grows_is_told_from_one_that_does_not(bench: Bench) -> None:
    """Closed form on a line, whose beginning does not count; and of 200 rows of noise about 1 in 40 seems to grow."""
    soaking = bench("soaking")
    seconds = [36.0 * number for number in range(100)]
    line = soaking.trend(seconds, [5.0 if t < 700 else 3 + 2 * t / 3600 for t in seconds])
    assert line.slope == pytest.approx(2) and line.interval == pytest.approx((2, 2)) and line.grows
    noise = torch.randn(200, 100, generator=torch.Generator().manual_seed(0)).tolist()
    grow = sum(soaking.trend(seconds, row).grows for row in noise)
    assert 0 < grow <= 12
    assert not soaking.trend(seconds, [-t for t in seconds]).grows
    with pytest.raises(ValueError, match="too few"):
        soaking.trend(seconds[:20], seconds[:20])


@pytest.fixture
def msd(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`bench/msd.py` with few clips."""
    module = bench("msd")
    monkeypatch.setattr(module, "fitted", lambda settings: settings)
    monkeypatch.setattr(module, "SUITE", replace(module.SUITE, prompts=12, seeds_per_prompt=2, latency_runs=1))
    return module


def test_students_of_parts_share_a_budget_or_have_one_each(msd: ModuleType) -> None:
    apart, shared = msd.Case(parts=4), msd.Case(parts=4, together=True)
    alone = msd.recipe_of(apart, None)
    assert alone.data.part is None and alone.method.rollout.grids == ((1.0,),)
    assert msd.recipe_of(shared, None).settings.steps == msd.recipe_of(apart, 3).settings.steps == alone.settings.steps
    assert msd.recipe_of(shared, 3).settings.steps == alone.settings.steps // 4
    assert msd.recipe_of(shared, 3).data.part.index == 3
    assert len({msd.folder(case, index) for case in (apart, shared) for index in range(4)}) == 8


def test_students_of_parts_are_judged_on_their_own_prompts(
    msd: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    teacher = VideoModel.from_pretrained("world")
    monkeypatch.setattr(msd, "student", lambda case, index: teacher)
    case = msd.Case(output=str(tmp_path))
    found = msd.main(case)
    parts = [found["part 0"], found["part 1"]]
    assert sum(part["prompts"] for part in parts) == 12
    for part in parts:
        assert part["its own"]["distance"] == part["one student"]["distance"] > 50, "a teacher in one step"
    asked = [
        set(
            json.loads((tmp_path / f"figures-{msd.folder(case, index)}" / "results.json").read_text())["suite"]["texts"]
        )
        for index in (0, 1)
    ]
    assert [{case.by.part(text) for text in texts} for texts in asked] == [{0}, {1}]


@pytest.fixture
def upscaling(bench: Bench) -> ModuleType:
    """`bench/upscaling.py`."""
    return bench("upscaling")


class Enlarging:
    """A student that scales its video up, and keeps what it is asked."""

    def __init__(self) -> None:
        self.prompts, self.seeds = list[str](), list[int]()

    def __call__(self, prompts: list[str], *, video: Tensor, seed: int) -> Tensor:
        self.prompts += prompts
        self.seeds += range(seed, seed + len(prompts))
        return covering(video, (32, 32))


def test_figures_of_upscaling_are_those_of_the_metrics(upscaling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student that does what bicubic does has its figures; they are computed here from the clips themselves."""
    student = Enlarging()
    monkeypatch.setattr(upscaling, "opened", lambda name: student)
    monkeypatch.setattr(upscaling, "video_of", lambda student, frames: frames)
    case = upscaling.Case(students=("mine",), clips=5, at_once=2, low=Degradation(factor=4))
    found, clips = upscaling.measure(case), upscaling.Clips.of(case)
    assert found["mine"] == found["mine, with prompt"] == found["bicubic"]
    assert student.prompts == [""] * 5 + [describe(scene) for scene in clips.scenes]
    assert student.seeds == [0, 1, 2, 3, 4] * 2, "a clip's noise does not depend on how many are made at once"
    scaled, features = (
        covering(clips.low, (32, 32)).clamp(-1, 1),
        feature_map("auto", (32, 32), torch.device("cpu")).map,
    )
    assert found["mine"]["psnr"][0] == pytest.approx(float(psnr(scaled, clips.sharp).mean()), abs=1e-3)
    ratio = float(sharpness(scaled).mean() / sharpness(clips.sharp).mean())
    assert found["mine"]["sharpness"][0] == pytest.approx(ratio, abs=1e-3) and 0.1 < ratio < 0.9
    assert found["mine"]["distance"] == pytest.approx(frechet(features(scaled), features(clips.sharp)), abs=1e-2)
    assert found["mine"]["accuracy"] == float(Checker().score(scaled, clips.scenes).all_right.double().mean()) < 1
    assert not torch.equal(upscaling.Clips.of(replace(case, seed=1)).sharp, clips.sharp)
    assert all(row["psnr"][1] < row["psnr"][0] < row["psnr"][2] for row in found.values())


def test_students_of_upscaling_are_opened_and_shown(upscaling: ModuleType, tmp_path: Path) -> None:
    """On a model that was not trained: it makes other clips with a prompt than without, and is worse than what it is given."""
    folder, rollout = tmp_path / "student", FromLow()
    world = VideoModel.from_pretrained("world")
    world.with_card(contract=rollout.contract(world.card.contract), role="student").save(folder)
    picture = tmp_path / "clips.gif"
    found = upscaling.measure(upscaling.Case(students=(str(folder),), clips=6, at_once=4, picture=picture))
    told, untold = (found[f"{folder}{name}"] for name in (", with prompt", ""))
    best, given = (found[name] for name in ("sharp, encoded", "bicubic, encoded"))
    assert told["psnr"] != untold["psnr"] and told["psnr"][0] < given["psnr"][0] < best["psnr"][0]
    assert picture.stat().st_size > 0
    with pytest.raises(ValueError, match="world makes clips from noise; give students that begin with a video"):
        upscaling.measure(upscaling.Case(students=("world",)))
    with pytest.raises(ValueError, match="clips must be at least 2"):
        upscaling.Case(clips=1)
