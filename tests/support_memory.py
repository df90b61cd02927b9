"""How much memory a run really takes: `python tests/support_memory.py '{"batch": 16}'` prints one line of JSON.

The program itself (code loaded at its first use included) is taken off: a tiny run goes before the one that is measured.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fewstep.engine import Settings
from fewstep.engine.prepare import prepare
from fewstep.engine.run import Run
from fewstep.methods import DMD2
from fewstep.models import Lora, VideoModel
from fewstep.world.data import WorldClips
from support_engine import tiny_model

METHOD = DMD2(critic_updates=1)
ITERATIONS = 2


def settings_of(given: dict[str, Any]) -> Settings:
    lora = {"lora": Lora(rank=given["lora"])} if "lora" in given else {}
    return Settings(**({"steps": 100, "batch": 16, "health": None} | given | lora))


def begin(model: VideoModel, settings: Settings) -> Run:
    return prepare(model, METHOD, WorldClips(num_frames=model.card.num_frames), settings, Path(tempfile.mkdtemp()))


def process(key: str) -> int:
    """A figure of this process in bytes: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(given: dict[str, Any]) -> dict[str, int]:
    settings = settings_of(given)
    begin(tiny_model(), settings_of(given | {"batch": 1})).iterate()
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = process("VmRSS")
    run = begin(VideoModel.from_pretrained("world"), settings)
    for _ in range(ITERATIONS):
        run.iterate()
    peak = torch.cuda.max_memory_allocated() if settings.device == "cuda" else process("VmHWM")
    return {"before": before, "peak": peak - before}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(json.loads(sys.argv[1]))))
