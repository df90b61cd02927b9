"""One DMD2 cycle of ours beside one of NVlabs/FastGen's: the same network, weights and batch, in turns.

    git clone https://github.com/NVlabs/FastGen CHECKOUT
    python bench/against_fastgen.py --fastgen CHECKOUT

FastGen's side is its own code, imported from the checkout: `Trainer.train_step` with gradient clipping, `DMD2Model`, its
optimisers, its noise schedule. Ours is `Run.iterate`. Each lives in a process of its own, as its users run it, and they
take turns, so a slow minute of the machine hits both. Equal in both: four turns of the critic and one of the student per
cycle (its `student_update_freq: 5`), one student call in each turn on noised latents at one of four times, a guided
teacher, no discriminator, no average, AdamW, clipping, float32 master weights, nothing logged.

It needs what FastGen's core imports: hydra-core, omegaconf, attrs, loguru, boto3, wandb, pandas, imageio, ftfy, einops,
scipy, diffusers. Packages that only its other networks and its data loaders use (`UNUSED`) may be missing.
"""

from __future__ import annotations

import copy
import importlib.abc
import importlib.machinery
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from fewstep.core import Batch, Cond, Rng
from fewstep.diffusion import CFG
from fewstep.engine import Optim, Settings
from fewstep.engine.prepare import prepare
from fewstep.methods import DMD2
from fewstep.methods.rollouts import FromData
from fewstep.models import VideoModel
from measuring import Clock, Fixed, Timer, keep, load, middle, rounded

TIMES = (0.999, 0.75, 0.5, 0.25)
"""Where FastGen's student is trained: its rectified flow ends at 0.999. Ours begins at 1."""
CRITIC_UPDATES = 4
GUIDANCE = 3.0
METHOD = DMD2(rollout=FromData(grids=((1.0, *TIMES[1:]),)), guidance=CFG(scale=GUIDANCE), critic_updates=CRITIC_UPDATES)
OPTIM = Optim(lr=1e-5, weight_decay=0.01)
UNUSED = ("torchvision", "timm", "cv2")
"""Packages that FastGen imports, and that nothing measured here calls."""
WARM_UP = 2

Cycle = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison."""

    fastgen: Path = Path("FastGen")
    """A checkout."""
    model: str = "world"
    batch: int = 16
    autocast: Literal["off", "bf16"] = "off"
    compile: bool = False
    """Compile fewstep's networks; FastGen has no such setting."""
    device: str = "cpu"
    rounds: int = 7
    clock: Clock = "wall"


def same(case: Case) -> tuple[VideoModel, Fixed, Batch]:
    """What both sides start from: equal in every process."""
    model, _ = load(case.model)
    data = Fixed(latents=model.latent_shape(), text=(model.text.length, model.text.width))
    return model, data, data.open(model, METHOD.needs).batch(case.batch, Rng(0, device=case.device))


def ours(case: Case) -> Cycle:
    """One iteration of a run."""
    model, data, _ = same(case)
    settings = Settings(
        steps=10000, batch=case.batch, autocast=case.autocast, compile=case.compile, device=case.device,
        optim={"student": OPTIM},
    )  # fmt: skip
    return prepare(model, METHOD, data, settings, Path(tempfile.mkdtemp())).iterate


def theirs(case: Case) -> Cycle:
    """Five iterations of `Trainer.run` without its logging: preprocess, train_step, callbacks."""
    import_fastgen(case.fastgen)
    from fastgen.configs.callbacks import GradClip_CALLBACK
    from fastgen.methods import DMD2Model
    from fastgen.trainer import Trainer
    from fastgen.utils.logging_utils import logger
    from omegaconf import DictConfig

    logger.remove()
    batch, config = same(case)[2], configured(case)
    config.trainer.callbacks = DictConfig({**GradClip_CALLBACK})
    config.trainer.checkpointer.save_dir = tempfile.mkdtemp()
    trainer, model, step = Trainer(config), DMD2Model(config.model), [0]
    model.on_train_begin()
    model.init_optimizers()

    def cycle() -> None:
        for _ in range(CRITIC_UPDATES + 1):
            step[0] += 1
            data = {"real": batch.x0, "condition": batch.cond.text, "neg_condition": batch.uncond.text}
            data = trainer.preprocess_data(model, data)
            trainer.callbacks.on_training_step_begin(model, iteration=step[0])
            losses, outputs = trainer.train_step(model, model, data, step[0], 0)
            trainer.callbacks.on_training_step_end(
                model=model, data_batch=data, output_batch=outputs, loss_dict=losses, iteration=step[0]
            )

    return cycle


def configured(case: Case) -> Any:
    """FastGen's own DMD2 configuration, with our network in place of its and with what is equal in both."""
    from fastgen.configs.methods.config_dmd2 import create_config
    from fastgen.networks.network import FastGenNetwork

    start, _, batch = same(case)

    class Same(FastGenNetwork):
        """Our denoiser behind FastGen's interface."""

        def __init__(self) -> None:
            super().__init__(net_pred_type="flow", schedule_type="rf")
            self.inner = copy.deepcopy(start.denoiser)

        def forward(self, x_t: Tensor, t: Tensor, condition: Any = None, fwd_pred_type: str = "", **_: Any) -> Any:
            mask = condition.new_ones(condition.shape[:2], dtype=torch.bool)
            raw = self.inner(x_t, t, Cond(condition, mask)).raw
            wanted = fwd_pred_type or self.net_pred_type
            return self.noise_scheduler.convert_model_output(x_t, raw, t, self.net_pred_type, wanted)

    config = create_config()
    model = config.model
    model.net, model.device, model.input_shape = {"_target_": Same}, case.device, list(batch.latent_shape)
    model.precision_amp = "bfloat16" if case.autocast == "bf16" else None
    model.gan_loss_weight_gen, model.guidance_scale, model.student_update_freq = 0.0, GUIDANCE, CRITIC_UPDATES + 1
    model.student_sample_steps, model.sample_t_cfg.t_list = len(TIMES), [*TIMES, 0.0]
    model.sample_t_cfg.time_dist_type, model.sample_t_cfg.min_t, model.sample_t_cfg.max_t = "uniform", 0.02, 0.98
    for optimizer in (model.net_optimizer, model.fake_score_optimizer):
        optimizer.lr, optimizer.weight_decay = OPTIM.lr, OPTIM.weight_decay
    return config


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in place of packages that are imported and not used."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        unused = name.partition(".")[0] in UNUSED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if unused else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def import_fastgen(checkout: Path) -> None:
    """Make `fastgen` importable."""
    import diffusers  # noqa: F401 - asks for torchvision, so before anything pretends to be it
    import transformers  # noqa: F401

    os.environ.setdefault("FASTGEN_OUTPUT_ROOT", tempfile.mkdtemp())
    sys.path.insert(0, str(checkout))
    sys.meta_path.append(Absent())


def serve(side: Callable[[Case], Cycle], case: Case, pipe: Connection) -> None:
    """One side in its own process: the time of a cycle for every request."""
    torch.manual_seed(0)
    cycle, timer = side(case), Timer(case.device, case.clock)
    while pipe.recv():
        pipe.send(timer.of(cycle))


def compare(case: Case) -> dict[str, Any]:
    """Seconds of both by round, and our share of theirs; medians."""
    context, pipes = get_context("spawn"), {}
    for side in (ours, theirs):
        pipes[side.__name__], far = context.Pipe()
        context.Process(target=serve, args=(side, case, far), daemon=True).start()
        far.close()  # so that a side that ends is noticed

    def ask(side: str) -> float:
        pipes[side].send(True)
        return pipes[side].recv()  # type: ignore[no-any-return]

    for side in ("ours", "theirs") * WARM_UP:
        ask(side)
    rounds: list[dict[str, float]] = []
    for number in range(case.rounds):
        order = ("ours", "theirs") if number % 2 else ("theirs", "ours")
        spent = {side: ask(side) for side in order}
        rounds.append(
            {"ours": spent["ours"], "theirs": spent["theirs"], "ours over theirs": spent["ours"] / spent["theirs"]}
        )
    for pipe in pipes.values():
        pipe.send(False)
    medians = {name: middle([r[name] for r in rounds]) for name in rounds[0]}
    return {
        "cost": sum(work.forwards for work in METHOD.cost()),
        "medians": medians,
        "rounds": [rounded(r) for r in rounds],
    }


def main(case: Case) -> int:
    if not (case.fastgen / "fastgen").is_dir():
        print(f"{case.fastgen}: no checkout of https://github.com/NVlabs/FastGen there; pass --fastgen")
        return 1
    found = compare(case)
    git = ["git", "-C", str(case.fastgen), "rev-parse", "HEAD"]
    found["fastgen"] = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    path = keep("against_fastgen", case, found, case.device)
    for name, value in found["medians"].items():
        print(f"{name:40} {value:9.4f}")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Case, description=__doc__)))
