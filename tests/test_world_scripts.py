"""Scripts: their text and their clips say the same, and what is not understood is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewstep.core import Rng
from fewstep.data.base import DataError
from fewstep.world.checker import Checker
from fewstep.world.grammar import ATTRIBUTES, describe, parse, sample_scenes
from fewstep.world.renderer import Variation, render
from fewstep.world.script_clips import WorldScripts
from fewstep.world.scripts import EXAMPLE, FPS, Script, describe_script, parse_script, render_script
from support_engine import tiny_model

RING = parse("a small red ring moves slowly left over a navy background")


def some_scripts(count: int) -> list[Script]:
    generator = torch.Generator().manual_seed(5)
    scenes = sample_scenes(3 * count, generator)
    return [Script(tuple(scenes[3 * i : 3 * i + 3]), (0, 4 + i, 20 + i)) for i in range(count)]


def test_text_and_script_are_the_same() -> None:
    for script in some_scripts(40):
        assert parse_script(describe_script(script)) == script
    assert parse_script(describe(RING)) == Script((RING,))


def test_each_clause_changes_what_it_names_and_nothing_else() -> None:
    script = parse_script(EXAMPLE)
    assert script.starts == (0, 3 * FPS, 44)
    assert script.scenes == (RING, replace(RING, direction="up"), replace(RING, direction="up", colour="blue"))
    fast = parse_script(f"{describe(RING)} then speeds up and turns to the upper left at 1 second")
    assert fast.scenes[1] == replace(RING, speed="quickly", direction="up-left")
    every = parse_script(f"{describe(RING)}, then a large blue star moves quickly up over a sand background at 2 s")
    assert every.scenes[1] == parse("a large blue star moves quickly up over a sand background")


@pytest.mark.parametrize(
    ("clause", "why"),
    [
        ("turns up", "must end with its time"),
        ("turns up at 3.1 s", "between two frames"),
        ("turns left at 3 s", "changes nothing"),
        ("slows down at 3 s", "already moves slowly"),
        ("turns up and turns down at 3 s", "direction is ambiguous"),
        ("speeds up and moves quickly at 3 s", "speed is ambiguous"),
        ("explodes at 3 s", "unknown words: explodes"),
        ("turns up at 0 s", "each after the one before"),
        ("at 3 s", "must end with its time"),
    ],
)
def test_what_is_not_understood_is_refused(clause: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_script(f"{describe(RING)}, then {clause}")


def test_scenes_hold_from_their_frame_on() -> None:
    script = parse_script(EXAMPLE)
    assert [script.at(f).direction for f in (0, 23, 24, 100)] == ["left", "left", "up", "up"]
    assert script.during(8, 24) == RING
    assert script.during(9, 25) is None
    assert script.during(24, 40) == script.scenes[1]


def test_one_scene_is_drawn_as_by_render_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    scenes, variation = sample_scenes(4, generator), Variation.sample(4, generator)
    clips = render_script([Script((scene,)) for scene in scenes], variation, 12)
    assert torch.equal(clips, render(scenes, variation, 12))


def test_a_longer_clip_begins_with_the_shorter_one() -> None:
    scripts, variation = some_scripts(3), Variation.sample(3, torch.Generator().manual_seed(0))
    assert torch.equal(render_script(scripts, variation, 40)[:, :, :18], render_script(scripts, variation, 18))


def test_the_object_goes_on_from_where_it_is() -> None:
    """Closed form: 10 frames to the left, then upwards from there, each by the speed of `slowly`."""
    variation = replace(Variation.sample(1, torch.Generator().manual_seed(0)), speed_scale=torch.ones(1))
    script = Script((RING, replace(RING, direction="up")), (0, 10))
    clips = render_script([script], variation, 16)
    there = replace(variation, position=variation.position + torch.tensor([[-7.0, -0.7 * 5]]))
    torch.testing.assert_close(clips[:, :, 15], render([RING], there, 1)[:, :, 0], atol=2e-5, rtol=0)


def test_the_checker_reads_the_scene_of_each_part() -> None:
    scripts = [Script(script.scenes[:2], (0, 16)) for script in some_scripts(30)]
    clips = render_script(scripts, Variation.sample(30, torch.Generator().manual_seed(0)), 32)
    for part, frames in enumerate((clips[:, :, :16], clips[:, :, 16:])):
        accuracy = Checker().score(frames, [script.scenes[part] for script in scripts]).accuracy()
        assert min(accuracy.values()) > 0.95, accuracy
    assert list(accuracy) == [*ATTRIBUTES, "all"]


def test_a_batch_of_scripts_is_of_its_two_prompts() -> None:
    data = WorldScripts(num_frames=40, every=8, changes=("direction", "colour"))
    source = data.open(tiny_model(), WorldScripts.provides)
    batch = source.batch(8, Rng(0))
    later = batch.require("later")
    frames, first, second = batch.require("frames"), batch.prompts, later.prompts
    assert frames.shape == (8, 3, 40, 32, 32) and later.frame in (8, 16, 24, 32)
    assert batch.latent_shape == (4, 40, 8, 8) and batch.require("x0").shape == (8, 4, 40, 8, 8)
    for prompts, part in ((first, frames[:, :, : later.frame]), (second, frames[:, :, later.frame :])):
        assert Checker().score(part, [parse(prompt) for prompt in prompts]).accuracy()["all"] > 0.8
    changed = {n for a, b in zip(first, second, strict=True) for n in ATTRIBUTES
               if getattr(parse(a), n) != getattr(parse(b), n)}  # fmt: skip
    assert changed == {"direction", "colour"}
    torch.testing.assert_close(later.cond.text[3], tiny_model().text.encode([second[3]]).text[0], rtol=1e-5, atol=1e-5)


def test_the_prompt_changes_at_any_chunk_and_at_one_frame_in_all_places() -> None:
    source = WorldScripts(num_frames=14, every=4).open(tiny_model(), frozenset({"prompts", "later"}))
    found = {source.batch(1, Rng(0, step)).require("later").frame for step in range(40)}
    assert found == {4, 8, 12}
    here, there = (source.batch(1, Rng(0, 3, place)) for place in (0, 1))
    assert here.require("later").frame == there.require("later").frame and here.prompts != there.prompts


def test_scripts_that_cannot_change_are_refused() -> None:
    with pytest.raises(ValueError, match="changes names hue"):
        WorldScripts(changes=("hue",))
    with pytest.raises(ValueError, match="at least one attribute"):
        WorldScripts(changes=())
    with pytest.raises(ValueError, match="smaller data.every"):
        WorldScripts(num_frames=4, every=4)
    with pytest.raises(DataError, match="32 x 32"):
        WorldScripts().check(tiny_model().with_card(height=64))
