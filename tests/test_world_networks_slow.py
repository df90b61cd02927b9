"""What everything measured on the built-in world rests on: the checker, and the autoencoder that clips go through."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from fewstep.models.bundle import BUILT_IN, VideoModel
from fewstep.world.grammar import ATTRIBUTES

TOOL = Path(__file__).parent.parent / "tools" / "measure_world.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_world", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_checker_reads_true_clips(tool: ModuleType) -> None:
    scenes, clips = tool.draw(2000, seed=1)
    shares = dict(zip(ATTRIBUTES, tool.right(clips, scenes).double().mean(0).tolist(), strict=True))
    assert min(shares.values()) >= 0.99, shares


@pytest.mark.skipif(not (BUILT_IN / "teacher" / "card.json").is_file(), reason="the weights are not in this checkout")
def test_the_autoencoder_keeps_every_attribute(tool: ModuleType) -> None:
    scenes, clips = tool.draw(512, seed=2)
    hits = tool.right(tool.reconstruct(VideoModel.from_pretrained("world"), clips), scenes)
    assert float(hits.all(1).double().mean()) >= 0.97, dict(
        zip(ATTRIBUTES, hits.double().mean(0).tolist(), strict=True)
    )
