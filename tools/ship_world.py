"""Copy the built-in world's trained networks into the package: half-precision weights, and a card with their origin.

`python tools/ship_world.py` after the runs of the recipes world/* (autoencoder, text_encoder, features, teacher, teacher_motion,
self_forcing); `--runs DIR` where they lie elsewhere, `--only NAME` for one of them. The teacher's contract, measured best, is
given by `--guidance` and `--shift`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from fewstep.diffusion import CFG, Shifted
from fewstep.evaluate import describe_machine, versions
from fewstep.models.bundle import BUILT_IN, VideoModel
from fewstep.models.results import result_in

SHIPPED = {"teacher": "teacher_motion", "features": "features", "stream": "self_forcing"}
"""Folder in the package: the run it comes from."""
LICENCE = "Apache-2.0; trained on clips rendered by fewstep.world only, from random weights"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/world"))
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--shift", type=float, default=1.0)
    parser.add_argument("--only", choices=SHIPPED)
    options, machine = parser.parse_args(), describe_machine()
    for name in [options.only] if options.only else SHIPPED:
        run = SHIPPED[name]
        model = VideoModel.from_pretrained(result_in(options.runs / run) or options.runs / run)
        contract = model.card.contract
        if name == "teacher":
            contract = replace(contract, guidance=CFG(scale=options.guidance), grid=Shifted(shift=options.shift))
        made = {
            "recipe file": f"world/{run}",
            "trained on": f"{machine.cores} CPU cores ({machine.cpu}), no GPU",
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
            "licence": LICENCE,
        }
        card = replace(model.card, name=f"world-{name}", contract=contract, provenance=model.card.provenance | made)
        folder = VideoModel(card, model.parts).save(BUILT_IN / name, dtype=torch.float16)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{folder}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
