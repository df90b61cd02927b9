"""Mobile adversarial distillation (2507.13343): a pruned student, and a transformer block that judges it by features of the whole
teacher's first blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.compress import Pruned
from fewstep.core import Batch, Rng
from fewstep.diffusion import Uniform
from fewstep.engine import Settings, train
from fewstep.engine.checkpoint import Checkpoint
from fewstep.engine.nets import build_for
from fewstep.engine.prepare import prepare
from fewstep.engine.student import with_student
from fewstep.methods import (
    AdversarialDistillation,
    Adversary,
    BackwardSimulation,
    FromData,
    Method,
    Nets,
    Progressive,
    SelfAdversarial,
)
from fewstep.methods.adversary import Shown
from fewstep.methods.roles import Heads, Making
from fewstep.models import BlockHead, VideoModel, fingerprint
from support_engine import Everything, shaken, small, tiny_model
from support_gaussian import terms

pytestmark = pytest.mark.usefixtures("single_thread")
DEPTH = 4
METHOD = AdversarialDistillation(
    rollout=FromData(grids=((1.0, 0.5),)),
    adversary=Adversary(weight=0.5, loss="hinge", head="block", layers=(0, 1), density=Uniform(), r1=0.1),
    distillation=1.0,
)


def nets_of(model: VideoModel, *removed: int) -> Nets:
    settings = Settings(steps=2, transforms=(Pruned(blocks=removed),) if removed else ())
    return build_for(settings, model, METHOD, with_student(model, settings, {}))


def batch_of(model: VideoModel) -> Batch:
    with torch.no_grad():
        cond, none = (model.text.encode([text] * 2) for text in ("a red circle", ""))
    shape = model.latent_shape()
    return Batch(cond, none, shape, x0=Rng(0).randn((2, *shape), "x0"))


def judged(nets: Nets, batch: Batch) -> Tensor:
    head = shaken(nets.discriminator)
    clip = Shown(batch.require("x0"), torch.tensor([0.3, 0.7]), batch.cond)
    return METHOD.adversary.logits(Nets({**nets.roles, "discriminator": head}), clip.x_t, clip.t, clip.cond)


def test_what_judges_a_pruned_student_is_the_same_whatever_was_pruned() -> None:
    """The features are those of the whole teacher, so the same blocks stand under the same numbers."""
    model = tiny_model(depth=DEPTH)
    batch, whole = batch_of(model), nets_of(model)
    expected = judged(whole, batch)
    for removed in ((0,), (1, 2), (0, 1, 3)):
        nets = nets_of(model, *removed)
        assert len(nets.student.backbone.blocks) == DEPTH - len(removed)
        assert len(nets.teacher.backbone.blocks) == DEPTH
        assert torch.equal(judged(nets, batch), expected)


def test_a_fresh_head_does_not_push_the_student_and_soon_learns_to() -> None:
    """Logits are 0 at first: the hinge is 2 for D and 0 for the student, whose gradient comes from the teacher alone."""
    model = tiny_model(depth=DEPTH)
    nets, batch = nets_of(model, 1), batch_of(model)
    own, student = METHOD.updates(0)
    nets.discriminator.requires_grad_(True)
    losses = terms(own.losses(nets, batch, Rng(0)))
    assert {name: loss.item() for name, loss in losses.items()} == {"discriminator": 2, "r1": 0}
    optimizer = torch.optim.AdamW(nets.discriminator.parameters(), lr=1e-2)
    adversarial = []
    for step in range(3):
        nets.student.requires_grad_(True).zero_grad(set_to_none=True)
        terms(student.losses(nets, batch, Rng(0)))["adversarial"].backward()
        adversarial.append(sum(float(p.grad.abs().sum()) for p in nets.student.parameters() if p.grad is not None))
        optimizer.zero_grad()
        terms(own.losses(nets, batch, Rng(0, step)))["discriminator"].backward()
        optimizer.step()
    assert adversarial[0] == 0 and min(adversarial[1:]) > 0
    assert all(p.grad is not None and p.grad.any() for p in nets.discriminator.parameters() if p.ndim > 1)


def test_every_kind_of_head_is_made_for_the_features_that_it_reads() -> None:
    making, made = Making(roles={"teacher": tiny_model(depth=DEPTH).denoiser}), {}
    for head in ("separate", "joint", "block", "query"):
        network = Heads("teacher", (0, -1), head, views=2).make("discriminator", making)  # type: ignore[arg-type]
        made[type(network).__name__] = network.args["widths"]
    assert made == {"FeatureHeads": [48, 48], "JointHead": [48, 48], "BlockHead": [48, 48], "QueryHead": [48, 48]}
    framewise = [Heads("teacher", (0,), head).make("discriminator", making).framewise for head in ("query", "frames")]
    assert framewise == [False, True]


def test_a_run_is_saved_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """The folder holds a student of two blocks for two steps; a run from a checkpoint has its student, average and head."""
    settings = small(2, save_every=1, transforms=(Pruned(blocks=(1, 2)),), ema=0.5, health=None)
    made = train(tiny_model(depth=DEPTH), METHOD, Everything(), settings, tmp_path / "run", quiet=True)
    assert made.card.transforms == settings.transforms and made.card.contract.counts == (2,)
    loaded = VideoModel.from_pretrained(tmp_path / "run" / "student")
    assert len(loaded.denoiser.backbone.blocks) == 2 and fingerprint(loaded.denoiser) == fingerprint(made.denoiser)

    whole, rest = (prepare(tiny_model(depth=DEPTH), METHOD, Everything(), settings, tmp_path) for _ in range(2))
    whole.iterate()
    rest.restore(Checkpoint.open(whole.state().save(tmp_path / "checkpoints")))
    for going in (whole, rest):
        going.iterate()
    ends = [[*map(fingerprint, (*run.nets.roles.values(), run.average))] for run in (whole, rest)]
    assert ends[0] == ends[1] and ends[0][-1] == fingerprint(made.denoiser)


def test_the_head_has_the_size_of_one_block() -> None:
    """A projector for each width, 12 hidden^2 in the block with its biases and scales, and one logit."""
    head, block = BlockHead([32, 8], hidden=48, heads=2), 12 * 48**2 + (3 + 1 + 4 + 1) * 48 + 2 * 24
    assert sum(p.numel() for p in head.parameters()) == (32 + 8 + 2) * 48 + block + 49
    with pytest.raises(ValueError, match=r"hidden / heads must be an even number >= 6, got 48 / 5"):
        BlockHead([32], hidden=48, heads=5)


def test_method_is_the_one_of_its_parts() -> None:
    assert METHOD.adversary.eyes == "teacher" and METHOD.aux() == {"discriminator": Heads("teacher", (0, 1), "block")}
    assert METHOD.adversary.work(1) == replace(METHOD.adversary, head="joint").work(1)


@pytest.mark.parametrize(
    ("method", "role"),
    [
        (AdversarialDistillation(adversary=Adversary(trained=True, density=Uniform())), "eyes"),
        (SelfAdversarial(rollout=BackwardSimulation(grids=((1.0,), (1.0, 0.5)))), "critic"),
        (Progressive(stages=((2, 1),)), "stage"),
    ],
)
def test_what_begins_as_the_teacher_is_whole_beside_a_pruned_student(method: Method, role: str) -> None:
    model, settings = tiny_model(depth=4), Settings(steps=2, transforms=(Pruned(blocks=(1, 2)),))
    nets = build_for(settings, model, method, with_student(model, settings, {}))
    assert len(nets.student.backbone.blocks) == 2
    mine, its = (nets[name].state_dict() for name in (role, "teacher"))
    assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in its)
