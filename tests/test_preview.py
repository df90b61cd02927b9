"""Pictures of a run, other than those of a distillation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fewstep.core import Rng
from fewstep.engine import train
from fewstep.engine.preview import CLIPS, HEAD, Reconstructions, sheet
from fewstep.methods import FlowMatching, Reconstruction
from fewstep.recipe import Recipe
from support_engine import Everything, small, tiny_model


def test_a_codec_is_drawn_next_to_the_clips_that_it_encodes(tmp_path: Path) -> None:
    model = tiny_model()
    source = Everything().open(model, frozenset({"frames"}))
    drawn = Reconstructions.of(source, Rng(0))
    again = Reconstructions.of(source, Rng(0, step=5))
    assert len(drawn.frames) == CLIPS and torch.equal(drawn.frames, source.batch(CLIPS, Rng(0).fold("preview")).frames)
    assert drawn.frames.shape == again.frames.shape
    picture = np.asarray(drawn.draw(model))[HEAD:]
    clips, made = np.split(picture, 2, axis=1)
    with torch.no_grad():
        reconstruction = model.codec.decode(model.codec.encode(drawn.frames))
    assert np.array_equal(clips, sheet([drawn.frames])) and np.array_equal(made, sheet([reconstruction]))
    assert not np.array_equal(clips, made)


def test_runs_of_a_codec_and_of_a_teacher_write_pictures(tmp_path: Path) -> None:
    for method in (Reconstruction(), FlowMatching()):
        output = tmp_path / method.part
        train(tiny_model(), method, Everything(), small(2, preview_every=1), output, quiet=True)
        assert sorted(path.name for path in (output / "previews").iterdir()) == ["000001.png", "000002.png"]
        with Image.open(output / "previews" / "000002.png") as picture:
            assert (np.asarray(picture.convert("L"))[:HEAD] < 128).any()  # the names of the columns


def test_the_recipes_for_own_videos_write_pictures() -> None:
    for name in ("autoencoder", "teacher", "dmd2"):
        assert 0 < Recipe.load(f"videos/{name}").settings.preview_every <= Recipe.load(f"videos/{name}").settings.steps
