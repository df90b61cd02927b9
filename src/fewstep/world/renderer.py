"""Draws scenes: one soft-edged shape moving at constant velocity over a flat background, on a torus.

Coordinates are pixels of the 32 x 32 reference canvas: x grows to the right, y grows downwards (row 0 is the top), and the
centre of pixel (row i, column j) is (j + 0.5, i + 0.5).  Another canvas `size` shows the same picture at another resolution.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fewstep.world.grammar import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, Scene

CANVAS = 32
"""Side of the torus in reference pixels."""

COLOUR_RGB: Mapping[str, tuple[int, int, int]] = {
    "red": (255, 40, 40),
    "orange": (255, 140, 10),
    "yellow": (255, 235, 40),
    "green": (40, 220, 60),
    "cyan": (40, 230, 240),
    "blue": (50, 90, 255),
    "magenta": (240, 50, 230),
    "white": (250, 250, 250),
}
BACKGROUND_RGB: Mapping[str, tuple[int, int, int]] = {
    "black": (8, 8, 8),
    "navy": (16, 24, 96),
    "forest": (12, 80, 40),
    "maroon": (96, 16, 32),
    "gray": (96, 96, 96),
    "sand": (170, 145, 100),
}


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a world is drawn: the RGB values of its colours, and whether shapes are filled."""

    colours: Mapping[str, tuple[int, int, int]]
    backgrounds: Mapping[str, tuple[int, int, int]]
    line: float = 0.0
    """Width of the outline in reference pixels, inside the edge; 0 fills the shape."""


PALE_RGB = {name: (76 + 7 * r // 10, 76 + 7 * g // 10, 76 + 7 * b // 10) for name, (r, g, b) in COLOUR_RGB.items()}
STYLES: Mapping[str, Style] = {
    "plain": Style(colours=COLOUR_RGB, backgrounds=BACKGROUND_RGB),
    "chalk": Style(colours=PALE_RGB, backgrounds=BACKGROUND_RGB, line=3.0),
    "neon": Style(colours=PALE_RGB, backgrounds=dict.fromkeys(BACKGROUND_RGB, BACKGROUND_RGB["black"]), line=3.0),
}
"""`chalk` draws light outlines on the asked background, `neon` on black, whatever is asked for; the shipped autoencoder can show
both."""
RADIUS: Mapping[str, float] = {"small": 5.0, "large": 8.5}
"""Nominal radius in pixels. The extent of each shape is a fixed multiple of it, chosen so that all shapes look equally big."""
SPEED: Mapping[str, float] = {"slowly": 0.7, "quickly": 1.8}
"""Euclidean speed in pixels per frame, the same for straight and diagonal directions."""

# DIRECTIONS go counter-clockwise from "right" in steps of 45 degrees; y is negated because row 0 is the top.
HEADING = [(math.cos(k * math.pi / 4), -math.sin(k * math.pi / 4)) for k in range(len(DIRECTIONS))]


@dataclass(frozen=True, kw_only=True)
class Variation:
    """Random properties of clips of the same scene; every field is float32, with one row per clip."""

    position: Tensor
    """`[B, 2]`, (x, y) of the object's centre in frame 0, pixels on the torus."""
    tilt: Tensor
    """`[B]`, rotation of the shape in radians."""
    radius_scale: Tensor
    """`[B]`, multiplies the radius."""
    speed_scale: Tensor
    """`[B]`, multiplies the speed."""
    shade: Tensor
    """`[B]`, multiplies the object's RGB value, which is then limited to 1."""

    @classmethod
    def sample(cls, n: int, generator: torch.Generator) -> "Variation":
        """Draw `n` rows: start uniform on the torus, tilt within 10 degrees, scales and shade within 6 %."""

        def spread(half: float, centre: float) -> Tensor:
            return centre + half * (2 * torch.rand(n, generator=generator, device=generator.device) - 1)

        return cls(
            position=CANVAS * torch.rand(n, 2, generator=generator, device=generator.device),
            tilt=spread(math.radians(10), 0.0),
            radius_scale=spread(0.06, 1.0),
            speed_scale=spread(0.06, 1.0),
            shade=spread(0.06, 1.0),
        )

    def row(self, i: int) -> "Variation":
        """The variation of clip `i` alone."""
        return Variation(**{field.name: getattr(self, field.name)[i : i + 1] for field in fields(self)})


def render(
    scenes: Sequence[Scene], variation: Variation, num_frames: int = 16, size: int = CANVAS, style: str = "plain"
) -> Tensor:
    """Draw one clip per scene: float32 `[B, 3, num_frames, size, size]` in [-1, 1], on the device of `variation`.

    Frame f does not depend on `num_frames`: a longer clip starts with the shorter one, bit for bit.  `ValueError` when the
    number of scenes and of variations differ, or when a count is not positive.  `style` is one of `STYLES`.
    """
    if len(scenes) != len(variation.tilt):
        raise ValueError(f"{len(scenes)} scenes but {len(variation.tilt)} variations; give one variation per scene")
    if num_frames < 1 or size < 1:
        raise ValueError(f"num_frames and size must be at least 1, got {num_frames} and {size}")
    frame = torch.arange(num_frames, device=variation.tilt.device, dtype=torch.float32)
    centre = variation.position[:, None] + frame[:, None] * velocity(scenes, variation)[:, None]  # [B, F, 2]
    return render_track(scenes, variation, centre, size, style)


def render_track(
    scenes: Sequence[Scene], variation: Variation, centre: Tensor, size: int = CANVAS, style: str = "plain"
) -> Tensor:
    """Draw scenes whose objects are at `centre` `[B, F, 2]` (x, y), wherever that is: as `render`, but for the motion.

    `ValueError` when the number of scenes, of variations and of tracks differ."""
    if not len(scenes) == len(variation.tilt) == len(centre):
        raise ValueError(
            f"{len(scenes)} scenes, {len(variation.tilt)} variations and {len(centre)} tracks; give one of each per clip"
        )
    device, look, num_frames = variation.tilt.device, STYLES[style], centre.shape[1]
    shape, colour, extent, _, _, background = _indices(scenes, device).unbind(1)
    radius = _table(RADIUS, SIZES, device)[extent] * variation.radius_scale

    alpha = torch.empty(len(scenes), num_frames, size, size, device=device)
    for k, name in enumerate(SHAPES):
        rows = (shape == k).nonzero()[:, 0]
        if len(rows):
            alpha[rows] = coverage(name, centre[rows], radius[rows], variation.tilt[rows], size, look.line)
    paint = (_table(look.colours, COLOURS, device)[colour] / 255 * variation.shade[:, None]).clamp(max=1)
    ground = _table(look.backgrounds, BACKGROUNDS, device)[background] / 255
    change = (2 * (paint - ground))[:, :, None, None, None]
    return alpha[:, None].mul(change).add_((2 * ground - 1)[:, :, None, None, None]).clamp_(-1, 1)


def velocity(scenes: Sequence[Scene], variation: Variation) -> Tensor:
    """Pixels per frame of each scene's object, `[B, 2]` (x, y)."""
    direction, speed = _indices(scenes, variation.tilt.device)[:, 3:5].unbind(1)
    pace = _table(SPEED, SPEEDS, variation.tilt.device)[speed] * variation.speed_scale
    return pace[:, None] * torch.tensor(HEADING, device=variation.tilt.device)[direction]


def coverage(shape: str, centre: Tensor, radius: Tensor, tilt: Tensor, size: int = CANVAS, line: float = 0.0) -> Tensor:
    """Share of each pixel that the shape covers: `[B, F, size, size]` in [0, 1], with an edge one canvas pixel wide.

    `centre` is `[B, F, 2]` (x, y) and may lie anywhere (it is wrapped); `radius` is `[B]` in reference pixels; `tilt` is `[B]`
    in radians.  With a `line`, only the outline of that width, inside the edge, is covered.
    """
    grid = (torch.arange(size, device=centre.device, dtype=torch.float32) + 0.5) * (CANVAS / size)
    # Wrapping the offset to the centre (not the centre) draws the part that left on one side at the other side.
    dx = torch.remainder(grid - centre[..., :1] + CANVAS / 2, CANVAS) - CANVAS / 2  # [B, F, W]
    dy = torch.remainder(grid - centre[..., 1:] + CANVAS / 2, CANVAS) - CANVAS / 2  # [B, F, H]
    dx, dy = dx[:, :, None, :], dy[:, :, :, None]
    cos, sin, r = (v[:, None, None, None] for v in (tilt.cos(), tilt.sin(), radius))
    distance = _DISTANCE[shape](cos * dx + sin * dy, cos * dy - sin * dx, r)
    if line > 0:
        distance = distance.add_(line / 2).abs_().sub_(line / 2)
    return distance.mul_(-size / CANVAS).add_(0.5).clamp_(0, 1)


# Signed distances in pixels (negative inside) to a shape of nominal radius r at the origin; y points down.  The multiples of r
# equalise the visual extent, and keep ring hole, cross arm and star point above 3 px at the small size: a 4x-downsampling
# autoencoder still sees them.


def _length(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt()


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return _length(x, y) - 0.98 * r


def _ring(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (_length(x, y) - 0.80 * r).abs() - 0.27 * r


def _box(x: Tensor, y: Tensor, half_width: Tensor, half_height: Tensor) -> Tensor:
    outside_x, outside_y = x.abs() - half_width, y.abs() - half_height
    return _length(outside_x.clamp(min=0), outside_y.clamp(min=0)) + torch.maximum(outside_x, outside_y).clamp(max=0)


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return _box(x, y, 0.90 * r, 0.90 * r)


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 1.12 * r, 0.34 * r), _box(x, y, 0.34 * r, 1.12 * r))


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    # Corner radius 1.3 r, so each side lies 0.65 r from the centroid; the largest of the three half-plane distances is exact
    # inside and rounds nothing outside, which keeps the corners sharp.
    half, root = 0.5, math.sqrt(3) / 2
    return torch.maximum(y, root * x.abs() - half * y) - 0.65 * r


def _star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    # Five points, the first upwards, corner radius 1.3 r; fold the plane twice onto one half point, then measure the distance
    # to that point's edge (the exact distance of a five-pointed star, inner radius 0.45 of the outer).
    outer, inner = 1.30 * r, 0.45
    c36, s36 = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x, y = x.abs(), -y
    fold = 2 * (c36 * x - s36 * y).clamp(
        min=0
    )  # reflect across the ray of the inner corner, 36 degrees from the top point
    x, y = (x - fold * c36).abs(), y + fold * s36
    fold = 2 * (c36 * x - s36 * y).clamp(min=0)
    x, y = (x - fold * c36).abs(), y + fold * s36
    # Edge from the tip (0, 1) to the inner corner inner * (s36, c36), both times `outer`.
    ex, ey = inner * s36, inner * c36 - 1
    y = y - outer
    along = ((x * ex + y * ey) / (ex * ex + ey * ey)).clamp(min=0)
    along = torch.minimum(along, outer)
    side = torch.sign(x * -ey + y * ex)
    return _length(x - along * ex, y - along * ey) * side


_DISTANCE = {"circle": _circle, "square": _square, "triangle": _triangle, "ring": _ring, "cross": _cross, "star": _star}


def _indices(scenes: Sequence[Scene], device: torch.device) -> Tensor:
    return torch.tensor([scene.to_indices() for scene in scenes], dtype=torch.long).reshape(-1, 6).to(device)


def _table(mapping: Mapping, order: Sequence[str], device: torch.device) -> Tensor:
    return torch.tensor([mapping[name] for name in order], dtype=torch.float32, device=device)
