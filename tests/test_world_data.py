"""Clips of the built-in world as training data: everything in a batch is of one scene, and a pool is a set of such."""

from __future__ import annotations

import pytest
import torch

from fewstep.core import Rng
from fewstep.models import VideoModel
from fewstep.world.checker import Checker
from fewstep.world.data import AT_ONCE, WorldClips
from fewstep.world.grammar import parse
from support_engine import FRAMES, tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")
X0 = frozenset({"prompts", "x0"})


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return tiny_model()


def test_prompts_labels_frames_and_latents_are_of_one_scene(model: VideoModel) -> None:
    source = WorldClips(num_frames=16).open(model, WorldClips.provides)
    batch = source.batch(12, Rng(0))
    scenes = [parse(prompt) for prompt in batch.prompts]
    assert batch.require("labels").tolist() == [list(scene.to_indices()) for scene in scenes]
    assert Checker().score(batch.require("frames"), scenes).accuracy()["all"] > 0.9
    torch.testing.assert_close(batch.x0, model.codec.encode(batch.require("frames")))
    for row, prompt in enumerate(batch.prompts):
        alone = model.text.encode([prompt]).text[0]
        torch.testing.assert_close(batch.cond.text[row], alone, rtol=1e-5, atol=1e-5)


def test_clips_differ_between_places_iterations_and_seeds(model: VideoModel) -> None:
    source = WorldClips(num_frames=FRAMES).open(model, X0)
    here, *others = (source.batch(4, rng) for rng in (Rng(0), Rng(0, 0, 1), Rng(0, 1), Rng(1)))
    assert all(not torch.equal(here.require("x0"), other.require("x0")) for other in others)
    assert torch.equal(here.require("x0"), source.batch(4, Rng(0)).require("x0"))


def test_a_pool_is_drawn_from_with_its_own_prompts_and_rolled_in_space(model: VideoModel) -> None:
    source = WorldClips(num_frames=16, pool=12).open(model, X0)
    batch = source.batch(40, Rng(0))
    scenes = [parse(prompt) for prompt in batch.prompts]
    assert set(scenes) <= set(source.scenes)  # type: ignore[attr-defined]
    stored, rolled = source.latents.float(), 0  # type: ignore[attr-defined]
    for x0, scene in zip(batch.require("x0"), scenes):
        own = [i for i, other in enumerate(source.scenes) if other == scene]  # type: ignore[attr-defined]
        shifts = [
            (i, rows, columns)
            for i in own
            for rows in range(8)
            for columns in range(8)
            if torch.equal(stored[i].roll((rows, columns), (-2, -1)), x0)
        ]
        assert shifts, "a stored clip of that very scene, moved by whole cells"
        rolled += shifts[0][1:] != (0, 0)
    assert rolled > 30
    other = WorldClips(num_frames=16, pool=2, pool_seed=1).open(model, X0)
    assert not torch.equal(other.latents, WorldClips(num_frames=16, pool=2).open(model, X0).latents)  # type: ignore[attr-defined]


def test_no_part_of_a_large_pool_repeats_another(model: VideoModel) -> None:
    source = WorldClips(num_frames=FRAMES, pool=2 * AT_ONCE).open(model, X0)
    assert len(source.scenes) == 128 and len(set(source.scenes)) > 120  # type: ignore[attr-defined]
