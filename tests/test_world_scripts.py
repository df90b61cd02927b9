"""Scripts: their text and their clips say the same, and what is not understood is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewstep.world.checker import Checker
from fewstep.world.grammar import ATTRIBUTES, describe, parse, sample_scenes
from fewstep.world.renderer import Variation, render
from fewstep.world.scripts import EXAMPLE, FPS, Script, describe_script, parse_script, render_script

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
