"""Measures of finished videos on clips whose answer is plain: frozen, black, cut, looped, blurred, drifting, moving."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import avg_pool2d

from fewstep.data.video import to_pixels
from fewstep.metrics import (
    black,
    brightness,
    clipped,
    contrast,
    cuts,
    drift,
    frozen,
    luma,
    psnr,
    repetition,
    saturation,
    sharpness,
)
from fewstep.metrics.flow import block_flow, scaled_down
from fewstep.metrics.repetition import coarse
from fewstep.metrics.vlite import consistency, dynamic_degree, motion_smoothness, temporal_flickering

pytestmark = pytest.mark.usefixtures("single_thread")


def texture(seed: int = 0, frames: int = 1, size: int = 48) -> torch.Tensor:
    """A still clip `[1, 3, F, size, size]` of a grey random texture in [-0.5, 0.5]."""
    noise = torch.rand(1, 1, 1, size, size, generator=torch.Generator().manual_seed(seed)) - 0.5
    return noise.expand(1, 3, frames, size, size).clone()


def moving(step: int, frames: int = 9, size: int = 64) -> torch.Tensor:
    """A texture of blocks of 4 pixels that moves `step` pixels to the right per frame."""
    blocks = torch.rand(size // 4, 128, generator=torch.Generator().manual_seed(3)) * 2 - 1
    wide = blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)
    rows = [wide[:, 256 - f * step : 256 - f * step + size] for f in range(frames)]
    return torch.stack(rows)[None, None].expand(1, 3, frames, size, size)


# --- frames -------------------------------------------------------------------------------------------------------------


def test_brightness_runs_from_black_to_white_and_green_weighs_most():
    grey = torch.stack([torch.full((3, 2, 4, 4), value) for value in (-1.0, 0.0, 1.0)])
    assert brightness(grey).tolist() == pytest.approx([0, 0.5, 1], abs=1e-6)
    colours = torch.full((3, 3, 1, 2, 2), -1.0)
    colours[range(3), range(3)] = 1.0
    assert brightness(colours).tolist() == pytest.approx([0.299, 0.587, 0.114], abs=1e-6)
    with pytest.raises(ValueError, match=r"clips \[B, 3, F, H, W\]"):
        luma(torch.zeros(3, 2, 4, 4))


def test_clipped_pixels_are_those_at_either_end():
    clip = torch.zeros(1, 3, 1, 2, 5)
    clip[..., 0, 0], clip[..., 0, 1] = 1.0, -1.0
    clip[..., 1, 0], clip[..., 1, 1] = 1 - 3 / 255, -1 + 3 / 255  # 1.5 of 255 levels from the ends
    clip[..., 1, 2] = 1 - 6 / 255
    assert clipped(clip).tolist() == pytest.approx([0.4])


def test_black_frames_are_counted_one_by_one():
    clip = texture(frames=8)
    clip[:, :, 2:4] = -0.95
    assert black(clip).tolist() == [0.25]
    clip[:, :, 2, :24] = 0.0  # half of it is grey
    assert black(clip).tolist() == [0.125]
    clip[:, :, 3] = -0.75  # 0.125 of the range: dark, but not black
    assert black(clip).tolist() == [0.0]


def test_a_frame_with_a_bright_spot_is_not_black():
    clip = torch.full((1, 3, 1, 10, 10), -1.0)
    clip[..., :3, 0] = 0.5  # 3 % of the pixels
    assert black(clip).tolist() == [0.0] and float(brightness(clip)) < 0.1
    clip[..., 1:3, 0] = -1.0
    assert black(clip).tolist() == [1.0]


def test_sharpness_falls_with_blur_and_not_with_contrast_or_brightness():
    clip = texture()
    blurred = avg_pool2d(clip[:, :, 0], 3, 1, 1, count_include_pad=False)[:, :, None]
    base = float(sharpness(clip))
    assert float(sharpness(blurred)) < 0.5 * base
    assert float(sharpness(0.3 * clip + 0.2)) == pytest.approx(base, rel=1e-5)
    assert sharpness(torch.full((2, 3, 2, 5, 5), 0.3)).tolist() == [0, 0]
    with pytest.raises(ValueError, match="H >= 3"):
        sharpness(torch.zeros(1, 3, 1, 2, 9))


def test_sharpness_of_white_noise_is_the_root_of_twenty():
    """The Laplacian has the weights 4, -1, -1, -1, -1, and the sum of their squares is 20."""
    noise = 0.3 * torch.randn(1, 1, 2, 200, 200, generator=torch.Generator().manual_seed(1)).expand(1, 3, 2, 200, 200)
    assert float(sharpness(noise)) == pytest.approx(math.sqrt(20), rel=0.01)


def test_psnr_of_an_error_of_a_tenth_of_the_range_is_20_dB_in_each_clip():
    clip = texture(frames=2)
    two = torch.cat([clip + 0.2, clip - 0.02])
    assert psnr(two, torch.cat([clip, clip])).tolist() == pytest.approx([20, 40], abs=1e-3)
    assert psnr(clip, clip).tolist() == [math.inf]
    with pytest.raises(ValueError, match=r"one shape, got \[1, 3, 2, 48, 48\] and \[1, 3, 1, 48, 48\]"):
        psnr(clip, clip[:, :, :1])


def test_a_colour_of_twice_the_chroma_has_twice_the_saturation():
    clip = 0.4 * (torch.rand(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(2)) - 0.5)
    grey = clip.mean(1, keepdim=True)
    vivid = grey + 2 * (clip - grey)
    assert float(saturation(vivid) / saturation(clip)) == pytest.approx(2, rel=1e-5)
    assert float(contrast(3 * clip) / contrast(clip)) == pytest.approx(3, rel=1e-5)


# --- time ---------------------------------------------------------------------------------------------------------------


def test_drift_is_the_last_quarter_minus_the_first_relative_to_the_mean():
    series = torch.tensor([[1.0, 1, 2, 2, 2, 2, 3, 3], [5, 5, 5, 5, 5, 5, 5, 5]])
    assert drift(series, 0.1).tolist() == pytest.approx([1.0, 0.0])
    assert drift(series[:, [7, 6, 5, 4, 3, 2, 1, 0]], 0.1).tolist() == pytest.approx([-1.0, 0.0])
    assert drift(torch.tensor([[0.0, 0, 0, 0.004]]), 0.1).tolist() == pytest.approx([0.04])  # next to nothing
    with pytest.raises(ValueError, match="F >= 4"):
        drift(series[:, :3], 0.1)


def test_frozen_frames_are_those_that_repeat_the_one_before():
    clip = moving(2, frames=9)
    assert frozen(clip).tolist() == [0.0]
    stopped = clip.clone()
    stopped[:, :, 5:] = clip[:, :, 5:6]
    assert frozen(stopped).tolist() == pytest.approx([3 / 8])
    hardly = torch.zeros(2, 3, 2, 4, 4)
    hardly[0, :, 1], hardly[1, :, 1] = 0.0019, 0.0021  # of a range of 2
    assert frozen(hardly).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="F >= 2"):
        frozen(clip[:, :, :1])


def test_a_cut_is_found_at_its_frame():
    clip = torch.cat([texture(1, 6), (texture(2, 5) + 0.5).clamp(-1, 1)], 2)
    assert cuts(to_pixels(clip)[0]) == [6]
    assert cuts(to_pixels(clip[:, :, :6])[0]) == []
    with pytest.raises(ValueError, match="uint8"):
        cuts(clip[0].movedim(0, -1))


def test_a_loop_repeats_and_a_walk_does_not():
    generator = torch.Generator().manual_seed(4)
    once = torch.randn(1, 8, 20, generator=generator)
    assert repetition(torch.cat([once] * 3, 1)).tolist() == pytest.approx([1.0])
    assert repetition(torch.cat([once, once], 1)).tolist() == pytest.approx([1.0])
    straight = torch.arange(24.0)[None, :, None].expand(1, 24, 5)
    assert repetition(torch.cat([straight, torch.zeros(1, 24, 5)])).tolist() == [0.0, 0.0]
    assert float(repetition(torch.randn(1, 40, 200, generator=generator))) < 0.2
    between = torch.randn(1, 8, 20, generator=generator)
    assert float(repetition(torch.cat([once[:, :6], between, once[:, :6]], 1))) < 0.5  # it comes back, but too late
    with pytest.raises(ValueError, match="F >= 8"):
        repetition(once[:, :7])


def test_what_stays_the_same_is_no_repetition():
    """A bright picture in which one cell does what it likes does not resemble itself half a video later."""
    x = torch.zeros(1, 32, 20)
    x[..., 1:] = torch.linspace(-9, 9, 19)
    x[0, :, 0] = torch.randn(32, generator=torch.Generator().manual_seed(9))
    x[0, 1, 0], x[0, 0, 0] = -3.0, 3.0
    alone = repetition(x[..., :1])
    assert repetition(x).tolist() == pytest.approx(alone.tolist()) and float(alone) > 0


def test_coarse_features_are_means_of_cells():
    clip = torch.zeros(1, 3, 2, 32, 64)
    clip[:, :, 1, :2, :4] = 1.0  # one cell of 2 x 4 pixels
    features = coarse(clip)
    assert features.shape == (1, 2, 256) and features[0, 0].abs().sum() == 0
    assert features[0, 1].tolist() == pytest.approx([1.0] + [0.0] * 255, abs=1e-6)


# --- blocks and the light forms of VBench's measures ------------------------------------------------------------------------


@pytest.mark.parametrize(("down", "right"), [(0, 3), (-2, 0), (4, -3)])
def test_block_flow_finds_the_shift(down: int, right: int):
    y = torch.rand(1, 48, 48, generator=torch.Generator().manual_seed(5)) * 2 - 1
    lengths = block_flow(y, y.roll((down, right), (1, 2)))
    assert lengths.shape == (1, 6, 6)
    assert lengths[:, 1:-1, 1:-1].flatten().tolist() == pytest.approx([math.hypot(down, right)] * 16)


def test_flat_areas_and_noise_of_compression_do_not_move():
    flat = torch.zeros(1, 32, 32)
    noise = 0.01 * torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(6))
    assert block_flow(flat, flat + noise).abs().sum() == 0
    with pytest.raises(ValueError, match="H >= 8"):
        block_flow(flat[:, :7], flat[:, :7])


def test_frames_are_scaled_down_to_the_shorter_side():
    assert scaled_down(torch.zeros(2, 300, 200)).shape == (2, 192, 128)
    assert scaled_down(torch.zeros(2, 100, 300)).shape == (2, 100, 300)


def test_dynamic_degree_asks_for_fast_blocks_in_a_quarter_of_the_frames():
    lengths = torch.zeros(15, 10, 10)  # 16 frames of a shorter side of 128: above 3 pixels, in 4 pairs
    lengths[:3, 0, :5] = 3.1
    assert not dynamic_degree(lengths, 128)
    lengths[3, 0, :5] = 3.1
    assert dynamic_degree(lengths, 128)
    assert not dynamic_degree(lengths, 256)  # the same shifts are half as fast in a video of twice the side
    lengths[3, 0, 4] = 2.0  # the mean of the fastest 5 % is below 3
    assert not dynamic_degree(lengths, 128)


def test_a_still_picture_has_the_best_flickering_smoothness_and_consistency():
    still, fast = texture(frames=9), moving(6)
    assert temporal_flickering(still).tolist() == [1.0] and motion_smoothness(still).tolist() == [1.0]
    assert float(temporal_flickering(fast)) < 0.9 and float(motion_smoothness(fast)) < 0.9
    assert consistency(torch.ones(1, 4, 7)).tolist() == pytest.approx([1.0])


def test_flickering_and_smoothness_are_means_over_the_range():
    clip = torch.zeros(1, 3, 5, 2, 2)
    clip[:, :, 1] = 0.4  # a flash of one fifth of the range
    assert temporal_flickering(clip).tolist() == pytest.approx([1 - 0.2 * 2 / 4])
    assert motion_smoothness(clip).tolist() == pytest.approx([1 - 0.2 / 2])  # of frames 1 and 3
    clip[:, :, 2], clip[:, :, 1] = 0.4, 0.0
    assert motion_smoothness(clip).tolist() == pytest.approx([1 - 0.2 / 2])  # either is half of the flash away
    steady = torch.arange(5.0)[None, None, :, None, None].expand(1, 3, 5, 2, 2) / 5
    assert motion_smoothness(steady).tolist() == pytest.approx([1.0])
    for function, few in ((temporal_flickering, 1), (motion_smoothness, 2)):
        with pytest.raises(ValueError, match="F >= "):
            function(clip[:, :, :few])


def test_consistency_looks_at_the_first_and_at_the_frame_before():
    """Features turn by 60 degrees per frame: cosines to the first 1/2, -1/2, to the one before 1/2, 1/2."""
    angles = torch.tensor([0.0, 60.0, 120.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], 1)[None] * torch.tensor([1.0, 5.0, 2.0])[None, :, None]
    assert consistency(features).tolist() == pytest.approx([(0.5 + (0.0 + 0.5) / 2) / 2])
    with pytest.raises(ValueError, match="F >= 2"):
        consistency(features[:, :1])
