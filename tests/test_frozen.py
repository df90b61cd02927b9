"""Frozen networks whose matrices are kept in bfloat16: the same numbers in half the memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep.engine import Parallel
from fewstep.engine.outline import Outline
from fewstep.engine.prepare import prepare, require_possible
from fewstep.methods import DMD2, KnowledgeDistillation, Method
from fewstep.models import Lora
from fewstep.models.bundle import read_card
from support_engine import Everything, small, tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["whole", "lora"])
@pytest.mark.parametrize("method", [DMD2(critic_updates=1), KnowledgeDistillation()], ids=["DMD2", "KD"])
def test_frozen_matrices_in_bfloat16_change_no_number(method: Method, lora: Lora | None, tmp_path: Path) -> None:
    """Autocast casts them in every call; the student that is kept is merged into the exact weights."""
    found = {}
    for frozen in ("float32", "bf16"):
        settings = small(3, autocast="bf16", frozen=frozen, lora=lora, ema=0.5)
        run = prepare(tiny_model(), method, Everything(), settings, tmp_path / frozen)
        teacher = run.nets.roles["teacher"]
        kinds = {
            p.dtype for name, p in teacher.named_parameters() if ".blocks." in name and name.endswith("qkv.weight")
        }
        assert kinds == {torch.bfloat16 if frozen == "bf16" else torch.float32}
        trained = [
            p for role in ("student", "critic") if role in run.nets.roles for p in run.nets.roles[role].parameters()
        ]
        assert trained and {p.dtype for p in trained} == {torch.float32}
        figures = []
        for _ in range(3):
            run.iterate()
            figures.append(dict(run.figures))
        run.keep(tmp_path / frozen / "kept")
        weights = load_file(tmp_path / frozen / "kept" / "denoiser.safetensors")
        found[frozen] = figures, weights, run.model.fingerprint("denoiser"), run.student().latents(["a red ball"])
    plain, narrow = found["float32"], found["bf16"]
    assert [row | {"time": 0} for row in plain[0]] == [row | {"time": 0} for row in narrow[0]]
    assert plain[1].keys() == narrow[1].keys() and all(
        torch.equal(plain[1][name], narrow[1][name]) for name in plain[1]
    )
    assert plain[2] == narrow[2] and torch.equal(plain[3], narrow[3])


def test_frozen_matrices_are_planned_as_they_are_kept() -> None:
    card, sizes = read_card("world"), {}
    for frozen in ("float32", "bf16"):
        settings = small(3, autocast="bf16", frozen=frozen, health=None, lora=Lora())
        sizes[frozen] = {held.role: held.weights for held in Outline.of(card, DMD2(), settings)._holdings()}
    assert sizes["bf16"]["student"] == sizes["float32"]["student"]
    assert 0.5 <= sizes["bf16"]["teacher"] / sizes["float32"]["teacher"] < 0.6


def test_frozen_in_bfloat16_needs_autocast_and_blocks_that_come_again() -> None:
    with pytest.raises(ValueError, match=r"settings\.frozen: bf16 keeps what autocast casts in every call"):
        require_possible(DMD2(), small(3, frozen="bf16"), read_card("world"), None)
    shared = small(3, frozen="bf16", autocast="bf16", parallel=Parallel(shard=2))
    with pytest.raises(ValueError, match="write checkpointing: true, so that each comes again"):
        require_possible(DMD2(), shared, read_card("world"), None)
