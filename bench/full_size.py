"""A published network at its full size, with random weights in its published layout: the memory of loading it and of one step.

    python bench/full_size.py                        Wan2.1-T2V-1.3B, bfloat16 shards of 1 GB: 2.7 GB on the disk
    python bench/full_size.py --dtype float32

The step is guided and of a small clip, so that a CPU can make it. Each figure is the peak of a process of its own, minus what the
program takes before it loads anything. It needs the folder `tests` of a checkout, where the published configurations are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import save_file

from fewstep.core import Cond, Rng
from fewstep.diffusion import CFG
from fewstep.models import Card, VideoModel
from fewstep.models.bundle import read_card
from fewstep.models.card import allocate
from fewstep.models.needs import DENOISING, needs
from fewstep.models.runtime import Runtime
from measuring import write

sys.path.append(str(Path(__file__).parent.parent / "tests"))
FRAMES, HEIGHT, WIDTH = 9, 64, 64
SHARD = 10**9
"""Bytes of a file, about."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """How the network is run; it is stored in bfloat16."""
    folder: str = ""
    """For the script's own use: measure this folder here."""


def saved(folder: Path) -> Path:
    """The layout, with the denoiser's weights in shards and an index."""
    import published

    published.wan(folder, published.WAN_13B)
    card = read_card(folder)
    with torch.device("meta"):
        shapes = allocate("denoiser", card).backbone.state_dict()  # type: ignore[union-attr, operator]
    place, shard, size, number = {}, dict[str, torch.Tensor](), 0, 1
    for name, tensor in shapes.items():
        weight = 0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(place)))
        shard[name], place[name] = weight.bfloat16(), f"diffusion_pytorch_model-{number:05d}.safetensors"
        size += shard[name].nbytes
        if size > SHARD:
            save_file(shard, folder / "transformer" / place[name])
            shard, size, number = {}, 0, number + 1
    save_file(shard, folder / "transformer" / f"diffusion_pytorch_model-{number:05d}.safetensors")
    index = {"metadata": {}, "weight_map": place}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def small(folder: Path) -> Card:
    """Its card for a small clip, with the denoiser alone."""
    card = replace(read_card(folder), num_frames=FRAMES, height=HEIGHT, width=WIDTH)
    return replace(card, parts={"denoiser": card.parts["denoiser"]})


def measured(case: Case, folder: Path) -> dict[str, Any]:
    """In this process: bytes and seconds of loading, then of a guided step."""
    watch, start = Resident(), time.monotonic()
    before = watch.now()
    model = VideoModel.load(small(folder), folder, runtime=Runtime(dtype=case.dtype))
    weights = sum(tensor.nbytes for tensor in model.denoiser.state_dict().values())
    found: dict[str, Any] = {
        "weights": weights,
        "loading": watch.peak() - before,
        "loading, s": time.monotonic() - start,
    }
    text = Rng(0).randn((1, 512, 4096), "text")
    cond, start = Cond(text, torch.ones(1, 512, dtype=torch.bool)), time.monotonic()
    x = Rng(0).randn((1, 16, (FRAMES + 3) // 4, HEIGHT // 8, WIDTH // 8), "x")
    with torch.no_grad(), model.runtime.denoising():
        made = CFG(scale=5.0)(model.denoiser, x, torch.ones(1), cond, cond)
    return {
        **found,
        "step": watch.peak() - before,
        "step, s": time.monotonic() - start,
        "finite": bool(made.raw.isfinite().all()),
    }


class Resident(threading.Thread):
    """Looks at this process' resident memory every few milliseconds; some systems' own count of the peak lags behind."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.start()

    def run(self) -> None:
        while True:
            self.most = max(self.most, self.now())
            time.sleep(0.005)

    @staticmethod
    def now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def peak(self) -> int:
        """Most bytes so far."""
        return max(self.most, self.now())


def main(case: Case) -> None:
    if case.folder:
        print(json.dumps(measured(case, Path(case.folder))))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = saved(Path(place))
        card = replace(read_card(folder), num_frames=FRAMES, height=HEIGHT, width=WIDTH)
        plan = needs(card, Runtime(dtype=case.dtype))
        command = [sys.executable, __file__, "--dtype", case.dtype, "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    planned = plan.weights["denoiser"] + plan.working[DENOISING]
    found |= {"planned": planned, "loading over weights": found["loading"] / found["weights"]}
    found["step over plan"] = found["step"] / planned
    print(json.dumps(found, indent=2))
    print(write(f"full_size-{case.dtype}", case, found))


if __name__ == "__main__":
    main(tyro.cli(Case, description=__doc__))
