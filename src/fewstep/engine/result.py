"""What a run makes: a student, a teacher, or another part of a model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from fewstep.core import Rng
from fewstep.core.atomic import recover, replacing_folder
from fewstep.core.env import place
from fewstep.engine.checkpoint import CheckpointError
from fewstep.engine.shard import filled
from fewstep.methods.base import Method
from fewstep.models import VideoModel
from fewstep.models.card import Card
from fewstep.models.lora import Merged, adapters, add, merge, mergeable

if TYPE_CHECKING:
    from fewstep.engine.run import Run


def role_of(method: Method, card: Card) -> Literal["teacher", "student"]:
    """The role of a trained denoiser: a student, unless it is sampled exactly like the model that the run started from."""
    return card.role if method.contract(card.contract) == card.contract else "student"


def result_of(method: Method, card: Card) -> str:
    """The name of a run's result (one of `RESULTS`): the role of a denoiser, or the part that is trained."""
    return role_of(method, card) if method.part == "denoiser" else method.part


def with_result(run: Run, network: nn.Module) -> VideoModel:
    """The run's model with `network` as its trained part."""
    card = run.model.card
    if run.method.part != "denoiser":
        return run.model.with_part(run.method.part, network, provenance=run.provenance)
    return run.model.with_part(
        "denoiser",
        network,
        contract=run.method.contract(card.contract),
        role=role_of(run.method, card),
        provenance=run.provenance,
        scores=dict(run.best),
    )


def saved(run: Run, network: nn.Module) -> VideoModel:
    """The model to be saved. Weights with adapters in them are computed one by one, when they are read."""
    base = run.base if run.exact is None else run.shell
    weights = run.base.state_dict() if run.exact is None else run.exact
    if run.settings.lora is not None and mergeable(base, network):
        made = with_result(run, base)
        made.stored["denoiser"] = Merged(weights, network)
        return made
    if run.exact is None:
        return with_result(run, merge(run.base, network))
    whole = filled(run.shell, {name: weights[name].to("cpu", copy=True) for name in weights})
    add(whole, adapters(network))
    return with_result(run, whole)


def finish(run: Run) -> Path:
    """Write the result (`result_of`) to its folder: the best student by the probe's rule, or the last one, or the best so far
    if the last one fails its health check."""
    if run.method.part == "codec":
        calibrate(run)
    folder = run.output / result_of(run.method, run.model.card)
    if not run.best and not (run.monitor is not None and run.monitor.returns_best):
        run.keep(folder)
    elif run.processes.leads:
        with replacing_folder(folder) as draft:
            shutil.copytree(run.output / "best", draft, dirs_exist_ok=True)
    run.processes.barrier()
    return folder


def recover_best(run: Run) -> None:
    """Restore the best student if the run was killed while replacing it. CheckpointError if it is gone."""
    folder = run.output / "best"
    if run.processes.leads:
        recover(folder)
    run.processes.barrier()
    if run.has_best and not (folder / "card.json").is_file():
        raise CheckpointError(
            f"{folder}, the best student so far, is gone. Put it back, or start anew in another output folder."
        )


def result_from(folder: Path, device: str) -> VideoModel:
    """The result of a run, on its device, or with several processes in the leader's main memory."""
    here = place()
    if here.rank != 0:
        return VideoModel.from_pretrained(folder, leave=("denoiser",))
    student = VideoModel.from_pretrained(folder)
    return student if here.world_size > 1 else student.to(device)


@torch.no_grad()
def calibrate(run: Run, batches: int = 8) -> None:
    """Store the mean and deviation of its latents in a trained codec, so that denoisers get normalised latents."""
    codec, rng = run.student().codec, Rng(run.settings.seed, device=run.settings.device)
    fresh = [run.source.batch(run.settings.batch, rng.fold(f"calibrate/{i}")).frames for i in range(batches)]
    latents = torch.cat([codec.encode_raw(frames) for frames in fresh if frames is not None])
    codec.set_statistics(latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)))
