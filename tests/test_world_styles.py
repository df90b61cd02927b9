"""The style of a clip is told from its pixels, whatever else is right in it."""

from __future__ import annotations

import pytest
import torch

from fewstep.world.checker import ABSTAIN
from fewstep.world.grammar import sample_scenes
from fewstep.world.renderer import STYLES, Variation, render
from fewstep.world.styles import nearest_style


@pytest.mark.parametrize("style", list(STYLES))
def test_the_style_of_a_rendered_clip_is_recognised(style: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scenes = [
        one for one in sample_scenes(100, generator) if one.colour != "white"
    ]  # thin and white: alike in all styles
    scenes = [one for one in scenes if style != "neon" or one.background != "black"]
    clips = render(scenes, Variation.sample(len(scenes), generator), style=style)
    found = nearest_style(clips + 0.05 * torch.randn(clips.shape, generator=generator), scenes)
    assert float((found == list(STYLES).index(style)).float().mean()) > 0.95


def test_a_clip_without_an_object_has_no_style() -> None:
    scenes = sample_scenes(2, torch.Generator().manual_seed(0))
    assert nearest_style(torch.zeros(2, 3, 8, 32, 32), scenes).tolist() == [ABSTAIN, ABSTAIN]
    with pytest.raises(ValueError, match="give one of each per clip"):
        nearest_style(torch.zeros(1, 3, 8, 32, 32), scenes)
