"""The checker agrees with the ground truth, and abstains instead of guessing."""

import dataclasses

import pytest
import torch
from torch.nn import functional

from fewstep.world.checker import ABSTAIN, Checker, Score, temporal_groups
from fewstep.world.grammar import ATTRIBUTES, DIRECTIONS, SPEEDS, Scene, parse, sample_scenes
from fewstep.world.renderer import SPEED, Variation, render

CHECKER = Checker()
NAMES = list(ATTRIBUTES)
MOVING = [NAMES.index("direction"), NAMES.index("speed")]
STILL = [k for k in range(6) if k not in MOVING]
SCENE = parse("a large red star moves slowly right over a navy background")


def variation(n: int, position: tuple[float, float] = (16.0, 16.0)) -> Variation:
    one = torch.ones(n)
    return Variation(
        position=torch.tensor([position]).repeat(n, 1), tilt=0 * one, radius_scale=one, speed_scale=one, shade=one
    )


def clip(scene: Scene, position: tuple[float, float] = (16.0, 16.0), num_frames: int = 16) -> torch.Tensor:
    return render([scene], variation(1, position), num_frames)


@pytest.fixture(scope="module")
def truth():
    generator = torch.Generator().manual_seed(0)
    scenes = sample_scenes(300, generator)
    return scenes, render(scenes, Variation.sample(300, generator))


def box_blur(clips: torch.Tensor) -> torch.Tensor:
    frames = functional.pad(clips.transpose(1, 2).flatten(0, 1), (1, 1, 1, 1), mode="replicate")
    return functional.avg_pool2d(frames, 3, 1).unflatten(0, (len(clips), -1)).transpose(1, 2)


@pytest.mark.parametrize("damage", ["none", "noise", "blur"])
def test_reads_the_ground_truth(truth, damage):
    scenes, clips = truth
    if damage == "noise":
        clips = clips + 0.05 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(1))
    elif damage == "blur":
        clips = box_blur(clips)
    accuracy = CHECKER.score(clips, scenes).accuracy()
    assert list(accuracy) == [*NAMES, "all"]
    assert min(accuracy.values()) >= 0.99, accuracy


def test_wrong_scenes_are_not_right(truth):
    scenes, clips = truth
    accuracy = CHECKER.score(clips, scenes[1:] + scenes[:1]).accuracy()
    assert accuracy["all"] == 0
    for name, values in ATTRIBUTES.items():
        assert abs(accuracy[name] - 1 / len(values)) < 0.12, name


def test_all_right_is_every_attribute_right():
    right, abstained = torch.ones(3, 6, dtype=torch.bool), torch.zeros(3, 6, dtype=torch.bool)
    right[1, 2], right[2, 4], abstained[2, 4] = False, False, True
    score = Score(right=right, abstained=abstained)
    assert score.all_right.tolist() == [True, False, False]
    assert score.accuracy()["all"] == pytest.approx(1 / 3)


def test_readings_give_scenes_back(truth):
    scenes, clips = truth
    readings = CHECKER.read(clips[:40])
    assert [readings.scene(i) for i in range(40)] == scenes[:40]
    assert CHECKER.read(clips[:0]).values.shape == (0, 6)


def test_every_direction_across_the_seam():
    scenes = [
        dataclasses.replace(SCENE, direction=d, speed=s, size="small")
        for d in DIRECTIONS
        for s in ("slowly", "quickly")
    ]
    for corner in ((0.0, 0.0), (31.5, 16.0), (16.0, 0.5)):
        score = CHECKER.score(render(scenes, variation(len(scenes), corner)), scenes)
        assert score.all_right.all(), corner


def test_up_is_towards_row_0_and_x_is_the_last_axis():
    bar = torch.full((1, 3, 8, 32, 32), -1.0)
    for f in range(8):
        bar[:, 0, f, 22 - 2 * f : 30 - 2 * f, 12:20] = 1.0  # a red square whose rows go down in number
    readings = CHECKER.read(bar).scene(0)
    assert (readings.shape, readings.colour, readings.direction, readings.background) == (
        "square",
        "red",
        "up",
        "black",
    )
    turned = CHECKER.read(bar.transpose(3, 4)).scene(0)
    assert turned.direction == "left"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reversed_frames_flip_the_direction(direction):
    scene = dataclasses.replace(SCENE, direction=direction)
    opposite = DIRECTIONS[(DIRECTIONS.index(direction) + 4) % 8]
    assert CHECKER.read(clip(scene).flip(2)).scene(0) == dataclasses.replace(scene, direction=opposite)


def test_flipping_the_picture_flips_only_its_axis():
    scene = dataclasses.replace(SCENE, shape="ring", direction="up-right")
    assert CHECKER.read(clip(scene).flip(4)).scene(0).direction == "up-left"
    assert CHECKER.read(clip(scene).flip(3)).scene(0).direction == "down-right"


@pytest.mark.parametrize(
    "change",
    [
        {"shape": "circle"},
        {"colour": "orange"},
        {"size": "small"},
        {"background": "maroon"},
        {"direction": "up"},
        {"direction": "up-right"},
        {"speed": "quickly"},
    ],
    ids=str,
)
@pytest.mark.parametrize("at", [4, 8, 12])
def test_an_attribute_that_changes_on_the_way_is_right_for_neither(change, at):
    other = dataclasses.replace(SCENE, **change)
    first = clip(SCENE, num_frames=at)
    # The second half starts where the first one stopped, so nothing but the attribute changes.
    second = clip(other, (16.0 + 0.7 * at, 16.0), num_frames=16 - at)
    name = NAMES.index(next(iter(change)))
    clips = torch.cat([first, second], 2).repeat(2, 1, 1, 1, 1)
    assert not CHECKER.score(clips, [SCENE, other]).all_right.any()
    assert int(CHECKER.read(clips).values[0, name]) == ABSTAIN


def test_a_jump_and_a_standstill_abstain_on_motion_only():
    jump = torch.cat([clip(SCENE)[:, :, :8], clip(SCENE, (4.0, 28.0))[:, :, 8:]], 2)
    frozen = clip(SCENE)[:, :, :1].repeat(1, 1, 16, 1, 1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = clip(dataclasses.replace(SCENE, speed="quickly"))[:, :, order]
    values = CHECKER.read(torch.cat([jump, frozen, shuffled])).values
    assert (values[:, MOVING] == ABSTAIN).all()
    assert (values[:, STILL] == torch.tensor(SCENE.to_indices())[STILL]).all()


@pytest.mark.parametrize(("share", "speed"), [(0.97, 0), (1.03, 1)])
def test_speeds_are_parted_at_their_geometric_mean(share: float, speed: int):
    slow, quick = (SPEED[name] for name in SPEEDS)
    between = share * (slow * quick) ** 0.5
    track = torch.stack([16 + between * torch.arange(16.0), torch.full((16,), 16.0)], 1)[None]
    direction, read = CHECKER._motion(track % 32, torch.tensor([True]))
    assert direction.item() == DIRECTIONS.index("right") and read.item() == speed


def test_values_beyond_the_range_are_cut():
    """A few pixels of a background that a codec has overdrawn are white, not brighter than white."""
    overdrawn, white = clip(SCENE), clip(SCENE)
    overdrawn[..., 0, :3], white[..., 0, :3] = 9.0, 1.0
    values = CHECKER.read(torch.cat([overdrawn, white])).values
    assert torch.equal(values[0], values[1])
    assert values[0].tolist() == list(SCENE.to_indices())


def test_a_colour_between_two_is_none():
    red, orange = (clip(dataclasses.replace(SCENE, colour=colour)) for colour in ("red", "orange"))
    values, colour = CHECKER.read((red + orange) / 2).values[0].tolist(), NAMES.index("colour")
    wanted = list(SCENE.to_indices())
    assert values == [*wanted[:colour], ABSTAIN, *wanted[colour + 1 :]]


def test_garbage_abstains():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(8, 3, 16, 32, 32, generator=generator) * 2 - 1
    normal = torch.randn(8, 3, 16, 32, 32, generator=generator)
    smooth = functional.interpolate(
        torch.randn(8, 3, 4, 4, 4, generator=generator), size=(16, 32, 32), mode="trilinear"
    )
    constant = torch.tensor([-0.2, 0.0, 0.5, 0.9])[:, None, None, None, None].expand(4, 3, 16, 32, 32)
    values = CHECKER.read(torch.cat([noise, normal, smooth, constant[1:]])).values
    assert (values == ABSTAIN).all()


def test_an_empty_background_reads_as_nothing_but_a_background():
    empty = clip(SCENE)[:, :, :, :1, :1].expand(1, 3, 16, 32, 32)  # one navy pixel everywhere
    values = CHECKER.read(empty).values[0]
    assert values[-1] == ATTRIBUTES["background"].index("navy") and (values[:-1] == ABSTAIN).all()


def test_two_objects_are_no_shape():
    small = dataclasses.replace(SCENE, size="small")
    two = torch.maximum(clip(small, (8.0, 8.0)), clip(small, (24.0, 22.0)))
    assert (CHECKER.read(two).values[0, [0, 2]] == ABSTAIN).all()


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 40])
def test_other_lengths(frames):
    generator = torch.Generator().manual_seed(frames)
    scenes = sample_scenes(24, generator)
    score = CHECKER.score(render(scenes, Variation.sample(24, generator), frames), scenes)
    assert score.right[:, STILL].all()
    assert score.abstained[:, MOVING].all() if frames == 1 else score.right[:, MOVING].all()


def test_groups_are_contiguous_and_cover_the_clip():
    assert temporal_groups(1).tolist() == [0]
    assert temporal_groups(8).tolist() == [0] * 4 + [1] * 4
    assert temporal_groups(100).unique().tolist() == list(range(8))


def test_reading_a_clip_does_not_depend_on_its_batch(truth):
    _, clips = truth
    alone = CHECKER.read(clips[64:70]).values
    assert torch.equal(CHECKER.read(clips[:70]).values[64:], alone)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(CHECKER.read(clips[64:70]).values, alone)


def test_refuses_what_it_cannot_read(truth):
    scenes, clips = truth
    broken = clips[:2].clone()
    broken[1, 0, 3, 4, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        CHECKER.read(broken)
    with pytest.raises(ValueError, match="clips must be"):
        CHECKER.read(clips[:, :, 0])
    with pytest.raises(ValueError, match="2 clips but 3 scenes"):
        CHECKER.score(clips[:2], scenes[:3])


def test_reads_outlines_on_every_background():
    generator = torch.Generator().manual_seed(0)
    scenes = sample_scenes(200, generator)
    clips = render(scenes, Variation.sample(200, generator), style="chalk")
    assert Checker(style="chalk").score(clips, scenes).accuracy()["all"] > 0.95
    assert CHECKER.score(clips, scenes).accuracy()["all"] < 0.5


def test_reads_another_style_but_its_background():
    generator = torch.Generator().manual_seed(0)
    scenes = sample_scenes(200, generator)
    clips = render(scenes, Variation.sample(200, generator), style="neon")
    score = Checker(style="neon").score(clips, scenes)
    assert score.right[:, :5].all(1).float().mean() > 0.95
    assert CHECKER.score(clips, scenes).accuracy()["all"] < 0.1
