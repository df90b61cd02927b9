"""Reads the six attributes of a scene from pixels by analysis: no network, no training, no model.

For each group of neighbouring frames, the checker finds the background by a vote of the pixels, the colour as the palette
entry that explains the other pixels best, and shape and size as the template that matches the centred object best.  Over the
whole clip, it finds direction and speed from the object's track on the torus.  If an attribute is not clearly visible, or
changes from group to group, the checker abstains (-1), which never counts as right: a poor generator cannot score by chance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.world.grammar import ATTRIBUTES, BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, Scene, parse
from fewstep.world.renderer import CANVAS, RADIUS, SPEED, STYLES, coverage

ABSTAIN = -1


@dataclass(frozen=True)
class Readings:
    """The checker's findings: `values` is int64 `[B, 6]`, the index within each of `ATTRIBUTES`, or -1 if it abstained."""

    values: Tensor
    track: Tensor
    """`[B, F, 2]`: the object's centre (x, y) in each frame, pixels on the torus; NaN where no object is visible."""

    def scene(self, i: int) -> Scene | None:
        """The scene of clip `i`, or None if the checker abstained from any attribute."""
        row = self.values[i].tolist()
        return None if ABSTAIN in row else Scene.from_indices(row)


@dataclass(frozen=True)
class Score:
    """Readings compared with the requested scenes: two boolean tensors `[B, 6]` in the order of `ATTRIBUTES`."""

    right: Tensor
    abstained: Tensor

    @property
    def all_right(self) -> Tensor:
        """`[B]`: every attribute of the clip is right."""
        return self.right.all(1)

    def accuracy(self) -> dict[str, float]:
        """Share of right clips, for each attribute and for "all" six together. Abstaining counts as wrong. NaN without clips."""
        shares = dict(zip(ATTRIBUTES, self.right.double().mean(0).tolist(), strict=True))
        return shares | {"all": float(self.all_right.double().mean())}


@dataclass(frozen=True, kw_only=True)
class Checker:
    """Thresholds of the analysis. Colours are RGB in [0, 1], lengths are in pixels; the defaults are for decoded clips."""

    style: str = "plain"
    """Drawing style of the world, one of `STYLES`. Backgrounds that a style draws alike cannot be checked."""
    background_tolerance: float = 0.15
    """Largest RGB distance of a pixel to the background it votes for."""
    background_share: float = 0.5
    """Share of a group's pixels that must vote for the background (the largest object covers 27 %)."""
    foreground_contrast: float = 0.12
    """RGB distance to the background above which a pixel belongs to the object."""
    colour_residual: float = 0.15
    """Largest share of the object's contrast energy that its colour may leave unexplained."""
    colour_margin: float = 1.5
    """Factor by which the second-best colour must fit worse."""
    object_area: tuple[float, float] = (18.0, 340.0)
    """Accepted area of the object in every frame, square pixels."""
    shape_similarity: float = 0.95
    """Smallest cosine between the centred object and its template."""
    shape_margin: float = 0.004
    """Margin of that cosine over the best other shape, and over the other size."""
    track_jitter: float = 0.8
    """Largest distance of the object from its straight track, 90 % of frames."""
    velocity_change: tuple[float, float] = (0.1, 0.25)
    """Accepted change of velocity within the clip: pixels per frame, plus a share of the speed."""
    speed_range: tuple[float, float] = (0.35, 2.7)
    """Accepted speed, pixels per frame; the boundary between the two SPEEDS is their geometric mean."""
    heading_error: float = math.radians(18)
    """Largest angle between the motion and the nearest of DIRECTIONS (half a sector is 22.5 degrees)."""

    @torch.no_grad()
    def read(self, clips: Tensor) -> Readings:
        """Read float clips `[B, 3, F, 32, 32]` in [-1, 1] (values outside are clipped). With F = 1, direction and speed abstain.

        `ValueError` for another shape or for numbers that are not finite.
        """
        if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[2] < 1 or clips.shape[3:] != (CANVAS, CANVAS):
            raise ValueError(f"clips must be [B, 3, F >= 1, {CANVAS}, {CANVAS}], got {list(clips.shape)}")
        if not torch.isfinite(clips).all():
            raise ValueError("clips have NaN or infinite values; find the step of the sampler that made them")
        per_pass = max(1, 512 // clips.shape[2])  # half a million pixels fit into the processor's cache
        with torch.autocast(clips.device.type, enabled=False):  # the result must not depend on the caller's precision
            passes = [self._read(part) for part in clips.split(per_pass)] if len(clips) else []
        if not passes:
            none = torch.empty(0, 6, dtype=torch.long, device=clips.device)
            return Readings(none, torch.empty(0, clips.shape[2], 2, device=clips.device))
        values, track = (torch.cat(parts) for parts in zip(*passes, strict=True))
        return Readings(values, track)

    def score(self, clips: Tensor, scenes: Sequence[Scene]) -> Score:
        """Compare clips with the scenes they should show; `ValueError` if the counts differ."""
        if len(clips) != len(scenes):
            raise ValueError(f"{len(clips)} clips but {len(scenes)} scenes; give one scene per clip")
        values = self.read(clips).values
        return Score(right=values == indices(scenes).to(values.device), abstained=values == ABSTAIN)

    def _read(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        rgb = (clips.float().clamp(-1, 1) + 1).div(2).permute(0, 2, 3, 4, 1).flatten(2, 3)  # [B, F, P, 3]
        group = temporal_groups(rgb.shape[1]).to(rgb.device)
        background, ground = self._background(rgb, group)
        contrast = rgb - ground[:, group, None]  # [B, F, P, 3]
        colour, alpha = self._colour(contrast, ground, group)
        area = alpha.sum(2)
        visible = ((area >= self.object_area[0]) & (area <= self.object_area[1])) & (background != ABSTAIN)[:, group]
        seen = torch.stack([visible[:, group == g].all(1) for g in range(int(group[-1]) + 1)], 1)  # [B, G]
        centre = _centre(alpha)
        shape, size = self._shape(alpha, centre, group)
        direction, speed = self._motion(centre, visible.all(1))
        shape, colour, size = (_agreed(v.where(seen, ABSTAIN)) for v in (shape, colour, size))
        values = torch.stack([shape, colour, size, direction, speed, _agreed(background)], 1)
        return values, centre.where(visible[..., None], torch.nan)

    def _background(self, rgb: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the background `[B, G]` (or -1) and its mean colour as seen `[B, G, 3]`."""
        palette = _palette(STYLES[self.style].backgrounds, BACKGROUNDS, rgb.device)
        distance = rgb.square().sum(3, keepdim=True) - 2 * rgb @ palette.T + palette.square().sum(1)
        nearest, vote = distance.min(3)
        votes = functional.one_hot(vote, len(palette)) * (nearest < self.background_tolerance**2)[..., None]
        share = _group_mean(votes.float().mean(2), group)  # [B, G, 6]
        best, index = share.max(2)
        chosen = (vote == index[:, group, None]) & (nearest < self.background_tolerance**2)  # [B, F, P]
        total = _group_mean((rgb * chosen[..., None]).mean(2), group)
        mean = total / best.clamp(min=1e-6)[..., None]
        return index.where(best >= self.background_share, ABSTAIN), mean

    def _colour(self, contrast: Tensor, ground: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Object colour `[B, G]` (or -1), and every pixel's share of the best colour `[B, F, P]` in [0, 1.15]."""
        palette = _palette(STYLES[self.style].colours, COLOURS, contrast.device)
        line = palette - ground[:, :, None]  # [B, G, 8, 3]: from the background to each colour
        length = line.square().sum(3)
        energy = contrast.square().sum(3)
        energy = energy * (energy > self.foreground_contrast**2)  # noise of the background explains nothing
        dot = contrast @ line[:, group].transpose(2, 3)  # [B, F, P, 8]
        share = (dot / length[:, group, None]).clamp(0, 1.15)  # beyond 1 only for a brighter shade
        left = share.square().mul_(length[:, group, None]).sub_(2 * share * dot)
        left = left.mul_((energy > 0)[..., None]).sum(2) + energy.sum(2)[..., None]  # squared residual, [B, F, 8]
        left, whole = _group_mean(left, group), _group_mean(energy.sum(2), group)
        two, index = left.topk(2, dim=2, largest=False)
        clear = (two[..., 0] <= self.colour_residual * whole) & (two[..., 1] >= self.colour_margin * two[..., 0])
        best = index[..., 0]
        at = best[:, group, None, None].expand(*share.shape[:3], 1)
        alpha = share.gather(3, at)[..., 0] * (energy > 0)
        return best.where(clear, ABSTAIN), alpha

    def _shape(self, alpha: Tensor, centre: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Shape and size of the centred mean object of each group, `[B, G]` each (or -1)."""
        seen = functional.normalize(_centred(alpha, centre, group), dim=2)  # [B, G, P]
        bank = _templates(STYLES[self.style].line).to(alpha.device)  # [shapes, sizes, variants, P]
        match = torch.einsum("bgp,smvp->bgsmv", seen, bank).amax(4)
        by_shape, by_size = match.amax(3), match.amax(2)
        similar = by_shape.amax(2) >= self.shape_similarity
        outcome = []
        for each in (by_shape, by_size):
            two, index = each.topk(2, dim=2)
            outcome.append(index[..., 0].where(similar & (two[..., 0] - two[..., 1] >= self.shape_margin), ABSTAIN))
        return outcome[0], outcome[1]

    def _motion(self, centre: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Direction and speed `[B]` each (or -1) of the track `[B, F, 2]` on the torus, if its velocity is constant."""
        clips, frames = centre.shape[:2]
        if frames == 1:
            nothing = torch.full((clips,), ABSTAIN, device=centre.device)
            return nothing, nothing
        track = torch.cat([torch.zeros_like(centre[:, :1]), wrap(centre.diff(dim=1)).cumsum(1)], 1)
        velocity = _robust_slope(track)
        speed = velocity.norm(dim=1)
        time = torch.arange(frames, device=centre.device, dtype=track.dtype)[:, None]
        off = track - time * velocity[:, None]
        off = (off - off.median(1, keepdim=True).values).norm(dim=2)
        steady = off.quantile(0.9, dim=1) <= self.track_jitter
        windows = min(8, max(1, (frames - 1) // 5))
        edges = [k * (frames - 1) // windows for k in range(windows + 1)]
        for first, last in pairwise(edges):
            change = (_least_squares_slope(track[:, first : last + 1]) - velocity).norm(dim=1)
            steady &= change <= self.velocity_change[0] + self.velocity_change[1] * speed
        steady &= (speed >= self.speed_range[0]) & (speed <= self.speed_range[1]) & visible
        sector = 2 * math.pi / len(DIRECTIONS)
        heading = torch.atan2(-velocity[:, 1], velocity[:, 0]) / sector  # rows grow downwards, so up is negative y
        direction = heading.round()
        straight = (heading - direction).abs() * sector <= self.heading_error
        slow, quick = (SPEED[name] for name in SPEEDS)
        pace = (speed > math.sqrt(slow * quick)).long()
        return direction.long().remainder(len(DIRECTIONS)).where(steady & straight, ABSTAIN), pace.where(
            steady, ABSTAIN
        )


def read_scenes(prompts: Sequence[str], height: int, width: int) -> tuple[Scene, ...] | None:
    """The scenes of prompts in the world's language; None if one prompt is not, or if the clips have another size."""
    if (height, width) != (CANVAS, CANVAS):
        return None
    try:
        return tuple(parse(prompt) for prompt in prompts)
    except ValueError:
        return None


def indices(scenes: Sequence[Scene]) -> Tensor:
    """Attribute indices `[B, 6]` of scenes, int64."""
    return torch.tensor([scene.to_indices() for scene in scenes], dtype=torch.long).reshape(-1, 6)


def temporal_groups(num_frames: int) -> Tensor:
    """The group of each frame, `[F]`: groups of about four frames, at most eight; a value must hold in all of them."""
    count = min(8, max(1, num_frames // 4))
    return torch.arange(num_frames) * count // num_frames


def _agreed(values: Tensor) -> Tensor:
    """`[B, G]` -> `[B]`: the value if all groups gave the same one, else -1."""
    return values[:, 0].where((values == values[:, :1]).all(1), ABSTAIN)


def _group_mean(values: Tensor, group: Tensor) -> Tensor:
    """Mean over the frames of each group: `[B, F, ...]` -> `[B, G, ...]`."""
    weight = functional.one_hot(group).to(values.dtype)
    return torch.einsum("bf...,fg->bg...", values, weight / weight.sum(0))


def _palette(table: Mapping[str, tuple[int, int, int]], names: Sequence[str], device: torch.device) -> Tensor:
    return torch.tensor([table[name] for name in names], device=device, dtype=torch.float32) / 255


def wrap(offset: Tensor) -> Tensor:
    """The shortest offset on the torus, in [-16, 16) pixels."""
    return torch.remainder(offset + CANVAS / 2, CANVAS) - CANVAS / 2


def _centre(alpha: Tensor) -> Tensor:
    """Centroid (x, y) of each frame on the torus, `[B, F, 2]`, from masks `[B, F, P]`; undefined for an empty mask."""
    mask = alpha.unflatten(2, (CANVAS, CANVAS))
    grid = torch.arange(CANVAS, device=alpha.device, dtype=alpha.dtype) + 0.5
    turn = 2 * math.pi / CANVAS
    axes = []
    for profile in (mask.sum(2), mask.sum(3)):  # along x, along y: [B, F, 32]
        angle = torch.atan2(profile @ (grid * turn).sin(), profile @ (grid * turn).cos())
        centre = angle / turn
        for _ in range(2):  # the circular mean is biased for an asymmetric shape; the mean offset around it is not
            offset = wrap(grid - centre[..., None])
            centre = centre + (profile * offset).sum(2) / profile.sum(2).clamp(min=1e-6)
        axes.append(centre)
    return torch.stack(axes, 2)


def _centred(alpha: Tensor, centre: Tensor, group: Tensor) -> Tensor:
    """Mean mask of each group with the object moved to the centre, `[B, G, P]`, by a Fourier shift, exact on the torus."""
    spectrum = torch.fft.rfft2(alpha.unflatten(2, (CANVAS, CANVAS)))
    shift = CANVAS / 2 - centre
    fy, fx = torch.fft.fftfreq(CANVAS, device=alpha.device), torch.fft.rfftfreq(CANVAS, device=alpha.device)
    phase = shift[..., 1, None, None] * fy[:, None] + shift[..., 0, None, None] * fx  # [B, F, 32, 17]
    spectrum = spectrum * torch.polar(torch.ones_like(phase), -2 * math.pi * phase)
    weight = functional.one_hot(group).to(alpha.dtype)
    spectrum = torch.einsum("bfhw,fg->bghw", spectrum, (weight / weight.sum(0)).to(spectrum.dtype))
    return torch.fft.irfft2(spectrum, s=(CANVAS, CANVAS)).flatten(2)


@lru_cache(maxsize=len(STYLES))
def _templates(line: float) -> Tensor:
    """Unit templates `[shapes, sizes, variants, P]`: radius -8..8 %, tilt -12..12 degrees, sharp and blurred."""
    scales, tilts = torch.linspace(0.92, 1.08, 5), torch.linspace(-12, 12, 7).deg2rad()
    scale, tilt = scales.repeat_interleave(7), tilts.repeat(5)
    middle = torch.full((len(scale), 1, 2), CANVAS / 2)

    def drawn(shape: str, size: str) -> Tensor:
        return coverage(shape, middle, scale * RADIUS[size], tilt, line=line)[:, 0]

    bank = torch.stack([torch.stack([drawn(shape, size) for size in SIZES]) for shape in SHAPES])
    flat = bank.reshape(-1, 1, CANVAS, CANVAS)
    blurred = functional.avg_pool2d(flat, 3, stride=1, padding=1).view_as(bank)
    return functional.normalize(torch.cat([bank, (bank + blurred) / 2, blurred], 2).flatten(3), dim=3)


def _robust_slope(track: Tensor) -> Tensor:
    """Velocity `[B, 2]`: the median of displacements over half the clip, which is robust to a few bad frames."""
    lag = max(1, track.shape[1] // 2)
    return (track[:, lag:] - track[:, :-lag]).median(1).values / lag


def _least_squares_slope(track: Tensor) -> Tensor:
    time = torch.arange(track.shape[1], device=track.device, dtype=track.dtype)
    time = time - time.mean()
    return torch.einsum("bfc,f->bc", track, time / time.square().sum())
