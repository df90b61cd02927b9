"""One DMD2 cycle of ours beside one of NVlabs/FastGen's, on the same network, weights and batch, in one process, in turns.

    git clone https://github.com/NVlabs/FastGen CHECKOUT
    python bench/against_fastgen.py --fastgen CHECKOUT

FastGen's side is its own code, imported from the checkout: `Trainer.train_step` with gradient clipping, `DMD2Model`,
its optimisers and its noise schedule. Ours is `Run.iterate` with default settings. Equal in both: four turns of the
critic and one of the student per cycle (its `student_update_freq: 5`), one student call in each turn on noised latents at
one of four times, teacher guided, no discriminator, no average, AdamW, clipping, float32 master weights. It needs what
FastGen's core imports (hydra-core, omegaconf, attrs, loguru, boto3, wandb, pandas, imageio, ftfy, einops, scipy,
diffusers); packages that only its other networks and its data loaders use may be missing.
"""

from __future__ import annotations

import copy
import importlib.abc
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from measuring import Fixed, Forward, load, middle, rounded, seconds, without_defaults, write
from torch import Tensor

from fewstep.core import Batch, Cond
from fewstep.diffusion import CFG
from fewstep.engine import Optim, Settings
from fewstep.engine.prepare import prepare
from fewstep.methods import DMD2
from fewstep.methods.rollouts import FromData
from fewstep.models import Denoiser

TIMES = (0.999, 0.75, 0.5, 0.25)
"""FastGen's rectified flow ends at 0.999."""
CRITIC_UPDATES = 4
GUIDANCE = 3.0
METHOD = DMD2(rollout=FromData(grids=((1.0, *TIMES[1:]),)), guidance=CFG(scale=GUIDANCE), critic_updates=CRITIC_UPDATES)
OPTIM = Optim(lr=1e-5, weight_decay=0.01)
UNUSED = ("torchvision", "timm", "cv2")
"""Of FastGen's dependencies, those that nothing measured here calls."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison."""

    fastgen: Path = Path("FastGen")
    """A checkout."""
    model: str = "world"
    batch: int = 16
    autocast: Literal["off", "bf16"] = "off"
    compile: bool = False
    """Of ours: FastGen does not compile networks."""
    device: str = "cpu"
    rounds: int = 7


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in place of packages that are imported and not used."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        known = name.partition(".")[0] in UNUSED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: _no_dunder(name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _no_dunder(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return object


def ours(case: Case) -> tuple[Callable[[], None], Batch, Denoiser, Forward]:
    """Our cycle; its batch and the network before training; one forward."""
    model, _ = load(case.model)
    data = Fixed(latents=model.latent_shape(), text=(model.text.length, model.text.width))
    start = copy.deepcopy(model.denoiser)
    settings = Settings(
        steps=10000, batch=case.batch, autocast=case.autocast, compile=case.compile, device=case.device,
        optim={"student": OPTIM},
    )  # fmt: skip
    run = prepare(model, METHOD, data, settings, Path(tempfile.mkdtemp()))
    forward = Forward(run)
    return run.iterate, forward.batch, start, forward


def theirs(case: Case, batch: Batch, start: Denoiser) -> Callable[[], None]:
    """Their cycle, as `Trainer.run` makes it: preprocess, train_step, callbacks."""
    import diffusers  # noqa: F401, PLC0415 - asks for torchvision before anything pretends to be it
    import transformers  # noqa: F401, PLC0415

    sys.path.insert(0, str(case.fastgen))
    os.environ.setdefault("FASTGEN_OUTPUT_ROOT", tempfile.mkdtemp())
    sys.meta_path.append(Absent())
    from fastgen.configs.callbacks import GradClip_CALLBACK  # noqa: PLC0415
    from fastgen.configs.methods.config_dmd2 import create_config  # noqa: PLC0415
    from fastgen.methods import DMD2Model  # noqa: PLC0415
    from fastgen.networks.network import FastGenNetwork  # noqa: PLC0415
    from fastgen.trainer import Trainer  # noqa: PLC0415
    from fastgen.utils.logging_utils import logger  # noqa: PLC0415
    from omegaconf import DictConfig  # noqa: PLC0415

    logger.remove()

    class Same(FastGenNetwork):
        """Our denoiser behind their interface."""

        def __init__(self) -> None:
            super().__init__(net_pred_type="flow", schedule_type="rf")
            self.inner = copy.deepcopy(start)

        def forward(self, x_t: Tensor, t: Tensor, condition: Any = None, fwd_pred_type: str | None = None, **_: Any) -> Any:
            mask = condition.new_ones(condition.shape[:2], dtype=torch.bool)
            raw = self.inner(x_t, t, Cond(condition, mask)).raw
            wanted = fwd_pred_type or self.net_pred_type
            return self.noise_scheduler.convert_model_output(
                x_t, raw, t, src_pred_type=self.net_pred_type, target_pred_type=wanted
            )

    config = create_config()
    model = config.model
    model.net, model.device, model.input_shape = {"_target_": Same}, case.device, list(batch.latent_shape)
    model.precision_amp = "bfloat16" if case.autocast == "bf16" else None
    model.gan_loss_weight_gen, model.guidance_scale, model.student_update_freq = 0.0, GUIDANCE, CRITIC_UPDATES + 1
    model.student_sample_steps, model.sample_t_cfg.t_list = len(TIMES), [*TIMES, 0.0]
    model.sample_t_cfg.time_dist_type, model.sample_t_cfg.min_t, model.sample_t_cfg.max_t = "uniform", 0.02, 0.98
    for optimizer in (model.net_optimizer, model.fake_score_optimizer):
        optimizer.lr = OPTIM.lr
    config.trainer.callbacks = DictConfig({**GradClip_CALLBACK})
    config.trainer.checkpointer.save_dir = tempfile.mkdtemp()

    trainer, distilled = Trainer(config), DMD2Model(model)
    distilled.on_train_begin()
    distilled.init_optimizers()
    step = [0]

    def cycle() -> None:
        for _ in range(CRITIC_UPDATES + 1):
            step[0] += 1
            data = {"real": batch.x0, "condition": batch.cond.text, "neg_condition": batch.uncond.text}
            data = trainer.preprocess_data(distilled, data)
            trainer.callbacks.on_training_step_begin(distilled, iteration=step[0])
            losses, outputs = trainer.train_step(distilled, distilled, data, step[0], 0)
            trainer.callbacks.on_training_step_end(
                model=distilled, data_batch=data, output_batch=outputs, loss_dict=losses, iteration=step[0]
            )

    return cycle


def compare(case: Case) -> dict[str, Any]:
    """Seconds of both by round, and our share of theirs; medians."""
    torch.manual_seed(0)
    mine, batch, start, forward = ours(case)
    other = theirs(case, batch, start)
    for _ in range(2):
        mine(), other(), forward.plain()
    rounds: list[dict[str, float]] = []
    for number in range(case.rounds):
        first, second = (mine, other) if number % 2 else (other, mine)
        spent = {fn: seconds(case.device, fn) for fn in (first, second)}
        rounds.append({
            "ours": spent[mine], "theirs": spent[other], "ours over theirs": spent[mine] / spent[other],
            "forward": forward.plain(),
        })  # fmt: skip
    medians = {name: middle([r[name] for r in rounds]) for name in rounds[0]}
    return {"cost": METHOD.cost(), "medians": medians, "rounds": [rounded(r) for r in rounds]}


def main(case: Case) -> int:
    if not (case.fastgen / "fastgen").is_dir():
        print(f"{case.fastgen}: no checkout of FastGen there; clone https://github.com/NVlabs/FastGen, pass --fastgen")
        return 1
    found = compare(case)
    git = ["git", "-C", str(case.fastgen), "rev-parse", "HEAD"]
    found["fastgen"] = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    path = write("-".join(["against_fastgen", *without_defaults(case)]), case, found, case.device)
    for name, value in found["medians"].items():
        print(f"{name:40} {value:9.4f}")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Case, description=__doc__)))
