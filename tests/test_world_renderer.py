"""The renderer draws what the scene says, on a torus, the same for every clip length."""

import math
from itertools import pairwise

import pytest
import torch

from fewstep.world.grammar import ATTRIBUTES, BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Scene, sample_scenes
from fewstep.world.renderer import BACKGROUND_RGB, COLOUR_RGB, RADIUS, SPEED, Variation, coverage, render

PLAIN = {
    "shape": "circle",
    "colour": "white",
    "size": "small",
    "direction": "right",
    "speed": "quickly",
    "background": "black",
}


def still(n: int, x: float = 16.0, y: float = 16.0) -> Variation:
    one = torch.ones(n)
    return Variation(
        position=torch.tensor([[x, y]]).repeat(n, 1), tilt=0 * one, radius_scale=one, speed_scale=one, shade=one
    )


def test_shape_range_and_dtype():
    generator = torch.Generator().manual_seed(0)
    clips = render(sample_scenes(30, generator), Variation.sample(30, generator))
    assert clips.shape == (30, 3, 16, 32, 32) and clips.dtype == torch.float32
    assert clips.min() >= -1 and clips.max() <= 1 and clips.isfinite().all()
    assert render([], Variation.sample(0, generator)).shape == (0, 3, 16, 32, 32)


def test_a_longer_clip_starts_with_the_shorter_one_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    scenes, variation = sample_scenes(24, generator), Variation.sample(24, generator)
    long = render(scenes, variation, num_frames=64)
    for frames in (1, 5, 16):
        assert torch.equal(render(scenes, variation, num_frames=frames), long[:, :, :frames])


@pytest.mark.parametrize(("direction", "x", "y"), [("right", 1, 0), ("up", 0, -1), ("left", -1, 0), ("down", 0, 1)])
def test_directions_move_the_bright_pixels_along_the_right_axis(direction, x, y):
    clip = render([Scene(**PLAIN | {"direction": direction})], still(1), num_frames=4)[0].mean(0) + 1
    rows = torch.arange(32.0)
    weight = clip.square()  # [F, row, column]; the background is almost 0
    row = (weight.sum(2) @ rows) / weight.sum((1, 2))
    column = (weight.sum(1) @ rows) / weight.sum((1, 2))
    assert torch.allclose(column.diff(), torch.tensor(x * SPEED["quickly"]), atol=0.05)
    assert torch.allclose(row.diff(), torch.tensor(y * SPEED["quickly"]), atol=0.05)


def test_diagonal_speed_is_the_same_euclidean_speed():
    start, after = still(1, 16, 16), still(1, 16 + 1.8 * math.sqrt(0.5), 16 - 1.8 * math.sqrt(0.5))
    scene = Scene(**PLAIN | {"direction": "up-right"})
    moved = render([scene], start, num_frames=2)[0, :, 1]
    assert torch.allclose(moved, render([scene], after, num_frames=1)[0, :, 0], atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_seam_shows_the_same_object_rolled(shape):
    radius, tilt = torch.tensor([RADIUS["large"]]), torch.tensor([0.1])
    middle = coverage(shape, torch.tensor([[[16.0, 16.0]]]), radius, tilt)
    corner = coverage(shape, torch.tensor([[[0.0, 32.0]]]), radius, tilt)
    assert torch.allclose(corner, middle.roll((16, 16), (2, 3)), atol=1e-5)
    assert torch.allclose(coverage(shape, torch.tensor([[[336.0, -304.0]]]), radius, tilt), middle, atol=1e-4)


def test_shapes_differ_and_sizes_scale_the_area():
    middle, tilt = torch.full((1, 1, 2), 16.0), torch.zeros(1)
    masks = {(s, k): coverage(s, middle, torch.tensor([r]), tilt).flatten() for s in SHAPES for k, r in RADIUS.items()}
    for shape in SHAPES:
        assert float(masks[shape, "large"].sum() / masks[shape, "small"].sum()) == pytest.approx(1.7**2, rel=0.03)
        for other in SHAPES:
            if other != shape:
                for size in RADIUS:
                    cosine = torch.cosine_similarity(masks[shape, size], masks[other, size], dim=0)
                    assert cosine < 0.97, (shape, other, size)
    ring = masks["ring", "small"].view(32, 32)
    assert ring[15:17, 15:17].max() == 0  # the hole stays open at the small size


def test_star_has_five_points_the_first_upwards():
    radius = torch.tensor([8.5])
    mask = coverage("star", torch.full((1, 1, 2), 16.0), radius, torch.zeros(1), size=256)[0, 0]
    angle = torch.arange(0, 360.0, 2).deg2rad()  # clockwise from the top
    at = 0.95 * 8.5 * 8
    ring = mask[(128 - at * angle.cos()).long(), (128 + at * angle.sin()).long()] > 0.5
    assert int((ring & ~ring.roll(1)).sum()) == 5
    assert ring[0] and not ring[90]
    assert float(mask.sum() / 64) == pytest.approx(5 * (1.3 * 8.5) ** 2 * 0.45 * math.sin(math.pi / 5), rel=0.01)


def test_palettes_are_well_separated():
    objects = torch.tensor([COLOUR_RGB[c] for c in COLOURS]) / 255
    grounds = torch.tensor([BACKGROUND_RGB[b] for b in BACKGROUNDS]) / 255
    assert torch.pdist(objects.double()).min() > 0.35
    assert torch.pdist(grounds.double()).min() > 0.29
    assert torch.cdist(objects, grounds).min() > 0.42


def test_other_canvas_sizes_show_the_same_picture():
    generator = torch.Generator().manual_seed(0)
    scenes, variation = sample_scenes(6, generator), Variation.sample(6, generator)
    small, large = render(scenes, variation, num_frames=2), render(scenes, variation, num_frames=2, size=64)
    assert (torch.nn.functional.avg_pool3d(large, (1, 2, 2)) - small).abs().mean() < 0.01


def test_variation_stays_within_its_bounds():
    v = Variation.sample(500, torch.Generator().manual_seed(0))
    assert v.position.shape == (500, 2) and v.position.min() >= 0 and v.position.max() < 32
    assert v.tilt.abs().max() <= math.radians(10)
    for scale in (v.radius_scale, v.speed_scale, v.shade):
        assert (scale - 1).abs().max() <= 0.06 + 1e-6 and scale.std() > 0.02


def test_refuses_counts_that_do_not_match():
    with pytest.raises(ValueError, match="2 scenes but 1 variations"):
        render([Scene(**PLAIN)] * 2, still(1))
    with pytest.raises(ValueError, match="num_frames"):
        render([Scene(**PLAIN)], still(1), num_frames=0)


def test_directions_are_a_full_turn_in_equal_steps():
    shown = [render([Scene(**PLAIN | {"direction": d})], still(1), num_frames=6)[0, :, 5] for d in DIRECTIONS]
    turned = [torch.rot90(a, 2, (1, 2)) for a in shown]
    assert all(torch.allclose(shown[k], turned[(k + 4) % 8], atol=1e-4) for k in range(8))
    assert all(not torch.allclose(a, b, atol=0.1) for a, b in pairwise(shown))
    assert len(DIRECTIONS) == len(ATTRIBUTES["direction"]) == 8


def test_an_outline_is_the_rim_of_the_filled_shape():
    centre, radius, tilt = torch.full((1, 1, 2), 16.0), torch.tensor([8.5]), torch.zeros(1)
    for shape in SHAPES:
        filled, outline = (coverage(shape, centre, radius, tilt, line=line)[0, 0] for line in (0.0, 3.0))
        assert (outline <= filled + 1e-6).all() and outline.max() == 1
    circle = coverage("circle", centre, radius, tilt, line=3.0)[0, 0]
    assert circle[16, 16] == 0 and circle[16, 9] == 1
    assert float(circle.sum()) == pytest.approx(math.pi * (8.33**2 - 5.33**2), rel=0.02)


def test_neon_is_drawn_on_black_whatever_is_asked_for():
    scenes = [Scene(**{**PLAIN, "background": name}) for name in BACKGROUNDS]
    plain, neon = (render(scenes, still(len(scenes)), style=style) for style in ("plain", "neon"))
    assert torch.equal(neon, neon[:1].expand_as(neon)) and not torch.equal(plain[0], plain[1])


def test_chalk_is_an_outline_on_the_background_of_the_prompt():
    scenes = [Scene(**{**PLAIN, "size": "large", "background": name}) for name in BACKGROUNDS]
    plain, chalk = (render(scenes, still(len(scenes)), 1, style=style) for style in ("plain", "chalk"))
    ground = plain[:, :, :, :1, :1]
    assert torch.equal(chalk[:, :, :, 15:17, 15:17], ground.expand(-1, -1, -1, 2, 2)), "empty within"
    assert torch.equal(chalk[..., :4, :], plain[..., :4, :]), "and the same around"
    assert not torch.equal(chalk[..., 16, 9], plain[..., 16, 9]), "with a paler rim"
