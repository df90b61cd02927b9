"""Stored trajectories: the right states, resumable, and refused for another teacher."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

import support_processes
from fewstep.core import Rng
from fewstep.data import DataError, PairPlan, Progress, StoredPairs, make_pairs, pairs_cost, require
from fewstep.data.pairs import grid_through
from fewstep.data.prompts import read_prompts
from fewstep.data.store import ShardReader
from fewstep.diffusion import (
    CFG,
    EDM,
    SAMPLERS,
    Contract,
    Euler,
    Heun,
    NoisePath,
    RectifiedFlow,
    Renoise,
    Sampler,
    Shifted,
    Staggered,
    Timesteps,
    uniform_grid,
)
from fewstep.methods import DMD2, Adversary
from fewstep.models import Card, Denoiser, FrameAutoencoder, TextEncoder, VideoDiT, VideoModel, fingerprint
from fewstep.models.bundle import read_card

TIMES = (1.0, 0.75, 0.5, 0.0)
PROMPTS = ("a red ball", "a blue box", "a green ring", "a white star", "nothing")

ODE = [sampler for sampler in (cls() for cls in SAMPLERS) if sampler.deterministic and sampler.one_time]


class Killed(Exception):
    """Stands for a signal."""


def tiny(seed: int = 0, *, sampler: Sampler = Euler(), path: NoisePath = RectifiedFlow()) -> VideoModel:
    torch.manual_seed(seed)
    backbone = VideoDiT(channels=4, width=24, depth=1, heads=2, text_width=16)
    for parameter in backbone.parameters():  # a fresh network is zero in places
        torch.nn.init.normal_(parameter, std=0.1)
    parts = {
        "denoiser": Denoiser(backbone, path, "flow"),
        "text": TextEncoder(width=16, length=8, buckets=64, depth=1),
        "codec": FrameAutoencoder(width=8, depth=1),
    }
    contract = Contract(sampler=sampler, steps=8, guidance=CFG(scale=3.0))
    return VideoModel(Card(name=f"tiny{seed}", num_frames=2, height=16, width=16, contract=contract), parts)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("sampler", ODE, ids=lambda s: type(s).__name__)
def test_endpoint_is_the_models_own_sample(tmp_path: Path, sampler: Sampler) -> None:
    model = tiny(sampler=sampler)
    make_pairs(model, PROMPTS[:2], tmp_path, PairPlan(times=TIMES, seed=5), batch=2)
    states = ShardReader(tmp_path, "pairs").read("states", [0, 1])
    torch.testing.assert_close(states[:, -1], model.latents(PROMPTS[:2], seed=5))


def test_sampling_starts_from_the_prior_of_the_path(tmp_path: Path) -> None:
    model = tiny(path=EDM())
    seen = [step.prediction.x_t for step in model.sampling(PROMPTS[:2], seed=5)]
    assert float(seen[0].std()) == pytest.approx(80, rel=0.2)  # EDM's largest sigma; the noise itself has 1
    make_pairs(model, PROMPTS[:2], tmp_path, PairPlan(times=TIMES, seed=5), batch=2)
    states = ShardReader(tmp_path, "pairs").read("states", [0, 1])
    torch.testing.assert_close(states[:, 0], seen[0])
    torch.testing.assert_close(states[:, -1], model.latents(PROMPTS[:2], seed=5))


def test_states_lie_on_the_trajectory(tmp_path: Path) -> None:
    model = tiny()
    make_pairs(model, PROMPTS[:2], tmp_path, PairPlan(times=TIMES), batch=2)
    states = ShardReader(tmp_path, "pairs").read("states", [0, 1])
    cond, uncond = model.encode_text(PROMPTS[:2])
    grid = uniform_grid(8)
    for i, (t, s) in enumerate(pairwise(TIMES)):
        x = states[:, i]
        for here, there in pairwise(g for g in grid if s <= g <= t):
            with torch.no_grad():
                flow = CFG(scale=3.0)(model.denoiser, x, torch.full((2,), here), cond, uncond).flow
            x = x + (there - here) * flow
        torch.testing.assert_close(x, states[:, i + 1])


def test_killed_run_continues_to_the_same_bytes(tmp_path: Path) -> None:
    model, plan = tiny(), PairPlan(times=TIMES, steps=4, per_prompt=2, shard_size=3, part_size=4)

    def progress(event: Progress) -> None:
        if event.done >= 5:
            raise Killed

    whole = make_pairs(model, PROMPTS, tmp_path / "whole", plan, batch=2)
    with pytest.raises(Killed):
        make_pairs(model, PROMPTS, tmp_path / "killed", plan, batch=2, progress=progress)
    seen: list[Progress] = []
    make_pairs(model, PROMPTS, tmp_path / "killed", plan, batch=2, progress=seen.append)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert [event.done for event in seen] == [6, 7, 8, 10]
    assert whole.pairs == 10
    with Image.open(whole.preview) as gif:
        assert gif.size == (64, 16)


def test_two_processes_go_on_where_one_was_killed(tmp_path: Path) -> None:
    tiny().save(tmp_path / "model")
    model, plan = VideoModel.from_pretrained(tmp_path / "model"), PairPlan(times=TIMES, steps=4, shard_size=2)
    (tmp_path / "prompts.txt").write_text("\n".join(f"{prompt} number {i}" for prompt in PROMPTS for i in range(20)))
    prompts = read_prompts(tmp_path / "prompts.txt")

    def progress(event: Progress) -> None:
        if event.done == 68:
            raise Killed

    make_pairs(model, prompts, tmp_path / "whole", plan, batch=4)
    with pytest.raises(Killed):
        make_pairs(model, prompts, tmp_path / "killed", plan, batch=4, progress=progress)
    words = [str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "killed"), "--model", str(tmp_path / "model")]
    words += ["--steps", "4", "--times", *map(str, TIMES), "--batch", "4", "--shard-size", "2", "--quiet"]
    support_processes.run(2, tmp_path, "pairs", *words)
    said = [(tmp_path / f"process{rank}.log").read_text() for rank in range(2)]
    assert "".join(said).count("100 pairs of ") == 1
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_autocast_is_part_of_what_was_asked_for(tmp_path: Path) -> None:
    model, rounded, plan = tiny(), tiny().to(torch.bfloat16), PairPlan(times=TIMES, steps=4)
    make_pairs(model, PROMPTS[:2], tmp_path / "off", plan)
    make_pairs(rounded, PROMPTS[:2], tmp_path / "bf16", plan)
    off, half = (ShardReader(tmp_path / name, "pairs").read("states", [0, 1]) for name in ("off", "bf16"))
    assert torch.equal(off[:, 0], half[:, 0])  # the noise
    assert 0 < float((off - half).abs().max()) < 0.1
    with pytest.raises(DataError, match="autocast: there off, here bf16"):
        make_pairs(rounded, PROMPTS[:2], tmp_path / "off", plan)


def test_manifest_tells_how_the_pairs_were_made(tmp_path: Path) -> None:
    plan = PairPlan(times=(1.0, 0.7, 0.0), steps=4, guidance=CFG(scale=2.0, high=0.9), seed=3)
    make_pairs(tiny(), PROMPTS[:1], tmp_path, plan)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    settings = manifest["settings"]
    assert settings["sampler"] == {"type": "Euler"}
    assert settings["grid"] == [1.0, 0.7, 0.5, 0.25, 0.0]
    assert settings["guidance"] == {"scale": 2.0, "low": 0.0, "high": 0.9, "outside": 1.0}
    assert set(settings["teacher"]) == {"denoiser", "text"}
    assert (manifest["rows"], manifest["nfe_per_pair"], manifest["complete"]) == (1, 8, True)


def test_cost_is_known_beforehand() -> None:
    cost = pairs_cost(tiny(), 10, PairPlan(times=TIMES, per_prompt=3, storage="float16"))
    assert (cost.pairs, cost.nfe_per_pair, cost.nfe) == (30, 16, 480)
    assert cost.bytes == 30 * 4 * (4 * 2 * 4 * 4) * 2
    assert pairs_cost(tiny(), 1, PairPlan(times=TIMES, sampler=Heun(), steps=4, guidance=CFG())).nfe == 7


def test_stored_pairs_as_data(tmp_path: Path) -> None:
    model = tiny()
    make_pairs(model, PROMPTS, tmp_path, PairPlan(times=TIMES, steps=4, shard_size=2))
    reader = ShardReader(tmp_path, "pairs")
    batch = StoredPairs(path=str(tmp_path)).open(model, frozenset({"prompts", "pairs"})).batch(3, Rng(0))
    assert batch.pairs.times == TIMES
    assert batch.pairs.states.shape == (3, 4, *batch.latent_shape)
    for prompt, states in zip(batch.prompts, batch.pairs.states):
        assert torch.equal(states, reader.read("states", [PROMPTS.index(prompt)])[0])


def test_endpoints_serve_as_clips(tmp_path: Path) -> None:
    model = tiny()
    make_pairs(model, PROMPTS, tmp_path, PairPlan(times=TIMES, steps=4))
    data = StoredPairs(path=str(tmp_path))
    require(data, DMD2(adversary=Adversary(), anchor=0.25))
    both = data.open(model, frozenset({"prompts", "pairs", "x0"})).batch(3, Rng(0))
    assert both.x0 is not None and torch.equal(both.x0, both.require("pairs").states[:, -1])
    one = data.open(model, frozenset({"prompts", "x0"})).batch(3, Rng(0))
    assert one.pairs is None and torch.equal(one.require("x0"), both.x0)


def test_pairs_of_another_size_are_refused(tmp_path: Path) -> None:
    model = tiny()
    make_pairs(model, PROMPTS[:2], tmp_path / "pairs", PairPlan(times=TIMES, steps=4, num_frames=3))
    model.save(tmp_path / "model")
    data = StoredPairs(path=str(tmp_path / "pairs"))
    for refuse in (lambda: data.check(model), lambda: data.check_card(read_card(tmp_path / "model"))):
        with pytest.raises(DataError, match=r"\[4, 3, 4, 4\], but model 'tiny0' makes \[4, 2, 4, 4\]"):
            refuse()


def test_pairs_of_another_teacher_are_refused(tmp_path: Path) -> None:
    model, other = tiny(), tiny(1)
    make_pairs(model, PROMPTS, tmp_path, PairPlan(times=TIMES, steps=4))
    data, needs = StoredPairs(path=str(tmp_path)), frozenset({"pairs"})
    with pytest.raises(DataError, match=r"denoiser [0-9a-f]{12}, but the denoiser of 'tiny1' is [0-9a-f]{12}"):
        data.open(other, needs)
    meant = replace(data, teacher=fingerprint(model.denoiser))
    with pytest.raises(DataError, match="text encoder"):
        meant.open(other, needs)
    meant.open(model.with_part("denoiser", other.denoiser), needs)
    with pytest.raises(DataError, match=r"teacher.denoiser: there"):
        make_pairs(other, PROMPTS, tmp_path, PairPlan(times=TIMES, steps=4))
    with pytest.raises(DataError, match=r"guidance.scale: there 3.0, here 1.0"):
        make_pairs(model, PROMPTS, tmp_path, PairPlan(times=TIMES, steps=4, guidance=CFG()))


def test_a_plan_is_followed_where_it_says_so() -> None:
    contract = Contract(sampler=Euler(), steps=8, grid=Shifted(shift=2.0), guidance=CFG(scale=3.0))
    own = PairPlan(times=(1.0, 0.0)).resolve(contract)
    assert (own.sampler, own.grid, own.guidance, own.nfe) == (Euler(), uniform_grid(8, 2.0), CFG(scale=3.0), 16)
    asked = PairPlan(times=(1.0, 0.0), sampler=Heun(), steps=4, grid=Shifted(shift=5.0), guidance=CFG())
    plan = asked.resolve(contract)
    assert (plan.sampler, plan.grid, plan.guidance, plan.nfe) == (Heun(), uniform_grid(4, 5.0), CFG(), 7)


def test_plans_that_cannot_be_run() -> None:
    with pytest.raises(ValueError, match=r"decreases strictly from 1.0 to 0.0"):
        PairPlan(times=(0.9, 0.0))
    for sampler, said in (
        (Renoise(), "Renoise adds new noise"),
        (Staggered(), "Staggered gives frames different times"),
    ):
        with pytest.raises(ValueError, match=said):
            PairPlan(times=TIMES, sampler=sampler)
        with pytest.raises(ValueError, match=said):
            PairPlan(times=TIMES).resolve(Contract(sampler=sampler))
    with pytest.raises(ValueError, match="2 steps cannot pass through 2 times"):
        PairPlan(times=TIMES, steps=2).resolve(Contract())
    leading = Contract(steps=25, grid=Timesteps(spacing="leading", steps_offset=1))
    with pytest.raises(ValueError, match=r"from t = 0\.962 to 0, .* name another grid"):
        PairPlan(times=TIMES).resolve(leading)
    assert PairPlan(times=TIMES, grid=Shifted()).resolve(leading).grid[0] == 1.0


def test_grid_passes_through_the_times() -> None:
    for steps, shift in ((4, 1.0), (7, 3.0), (50, 5.0)):
        for times in ((1.0, 0.0), TIMES, (1.0, 0.76, 0.75, 0.0), (1.0, 0.02, 0.01, 0.005, 0.0)):
            grid = grid_through(times, uniform_grid(steps, shift))
            assert len(grid) == steps + 1
            assert set(times) <= set(grid)
    assert grid_through(TIMES, uniform_grid(8)) == uniform_grid(8)
    assert grid_through((1.0, 0.7, 0.0), uniform_grid(4)) == (1.0, 0.7, 0.5, 0.25, 0.0)  # the nearest point moves
