"""What the benchmarks share: a model by name, data that cost nothing, a stopwatch inside the real loop, results as JSON."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from fewstep.core import Batch, Cond, Rng
from fewstep.data.base import Data, Source
from fewstep.engine import run as loop
from fewstep.engine.precision import autocast
from fewstep.engine.run import Run
from fewstep.evaluate.latency import synchronize
from fewstep.evaluate.machine import describe_machine, versions
from fewstep.models import Card, Denoiser, VideoModel
from fewstep.world.data import WorldClips

RESULTS = Path(__file__).parent / "results"
WAN = {
    "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "ffn_dim": 8960, "num_layers": 30,
}  # fmt: skip
"""Wan2.1-T2V-1.3B, as its `transformer/config.json` says."""
WAN_CLIP = (16, 21, 60, 104)
"""Latents of its clips, 81 frames of 480 x 832."""


@dataclass(frozen=True, kw_only=True)
class Fixed(Data):
    """Random latents and text states of the given shapes, made once: a step's time is the engine's and the networks'."""

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "x0"})

    latents: tuple[int, int, int, int]
    """`(C, F, h, w)`."""
    text: tuple[int, int]
    """Words and width."""

    def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
        return _Fixed(self, {})


@dataclass(frozen=True)
class _Fixed:
    data: Fixed
    made: dict[int, Batch]

    def batch(self, size: int, rng: Rng) -> Batch:
        if size not in self.made:
            length, width = self.data.text
            conditions = [Rng(0, device=rng.device).randn((size, length, width), name) for name in ("cond", "uncond")]
            cond, uncond = (Cond(text, text.new_ones(size, length, dtype=torch.bool)) for text in conditions)
            x0 = Rng(0, device=rng.device).randn((size, *self.data.latents), "x0")
            self.made[size] = Batch(cond, uncond, self.data.latents, x0=x0)
        return self.made[size]


def load(name: str) -> tuple[VideoModel, Data]:
    """`world`, a folder that fewstep wrote, or `wan-1.3b`: its denoiser with random weights, and random inputs."""
    if name == "wan-1.3b":
        from fewstep.models.adapters.dits.wan import Wan

        torch.manual_seed(0)
        card = Card(name=name, num_frames=81, height=480, width=832)
        model = VideoModel(card, {"denoiser": Denoiser(Wan(config=WAN), card.path, card.kind)})
        return model, Fixed(latents=WAN_CLIP, text=(512, WAN["text_dim"]))
    model = VideoModel.from_pretrained(name)
    if name == "world":
        return model, WorldClips(num_frames=model.card.num_frames)
    return model, Fixed(latents=model.latent_shape(), text=(model.text.length, model.text.width))


Clock = Literal["wall", "processor"]
"""`processor`: what this process computed, for a CPU that others use meanwhile."""
CLOCKS: Mapping[Clock, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True)
class Timer:
    """A clock that waits for the device."""

    device: str = "cpu"
    clock: Clock = "wall"

    def __call__(self) -> float:
        synchronize(torch.device(self.device))
        return CLOCKS[self.clock]()

    def of(self, fn: Callable[[], Any]) -> float:
        """Seconds of one call."""
        start = self()
        fn()
        return self() - start


class Forward:
    """One call of a run's network on a batch of the run's, as the run makes it; and its backward pass."""

    def __init__(self, run: Run, timer: Timer) -> None:
        self.run, self.network, self.timer, device = run, run.nets.roles["critic"], timer, run.settings.device
        self.batch = run.source.batch(run.settings.batch, Rng(run.settings.seed, device=device))
        self.x_t = Rng(1, device=device).randn(self.batch.noise_shape, "x_t")
        self.t = Rng(1, device=device).rand((len(self.batch),), "t")

    def __call__(self) -> Tensor:
        with autocast(self.run.settings):
            return self.network(self.x_t, self.t, self.batch.cond).raw

    def plain(self) -> float:
        """Seconds of a call without gradient."""
        with torch.no_grad():
            return self.timer.of(self)

    def trained(self) -> tuple[float, float]:
        """Seconds of a call with gradient, and of the backward pass to all weights."""
        kept: list[Tensor] = []
        self.network.requires_grad_(True)
        ahead = self.timer.of(lambda: kept.append(self()))
        back = self.timer.of(kept[0].square().mean().backward)
        self.network.zero_grad(set_to_none=True)
        return ahead, back


class Stopwatch:
    """Seconds and calls by phase; what a phase spends in another one counts there alone."""

    def __init__(self, timer: Timer) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._timer, self._open, self._since = timer, ["rest"], 0.0

    def enter(self, phase: str, weight: float = 1) -> None:
        self._lap()
        self._open.append(phase)
        self.calls[phase] += weight

    def leave(self) -> None:
        self._lap()
        self._open.pop()

    def timed(self, phase: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(fn)
        def inside(*args: Any, **options: Any) -> Any:
            self.enter(phase)
            try:
                return fn(*args, **options)
            finally:
                self.leave()

        return inside

    @contextmanager
    def inside(self, run: Run) -> Iterator[None]:
        """Measure what `run` does meanwhile, in its own loop."""
        size, listening = run.settings.batch, []
        for role, network in run.nets.roles.items():

            def begin(_: Any, inputs: tuple[Tensor, ...], role: str = role) -> None:
                phase = f"{role}, with gradient" if torch.is_grad_enabled() and _trains(run, role) else role
                self.enter(phase, len(inputs[0]) / size)

            listening.append(network.register_forward_pre_hook(begin))
            listening.append(network.register_forward_hook(lambda *_: self.leave()))
        with ExitStack() as patched:
            for owner, name, phase in (
                (run, "backward", "backward"),
                (loop, "blend", "average"),
                *((optimizer, name, "optimizer") for optimizer in run.optimizers.values() for name in ("clip", "step")),
            ):
                patched.enter_context(patch.object(owner, name, self.timed(phase, getattr(owner, name))))
            patched.enter_context(patch.object(run, "source", _Timed(run.source, self)))
            self._lap(start=True)
            yield
            self._lap()
        for hook in listening:
            hook.remove()

    def _lap(self, start: bool = False) -> None:
        now = self._timer()
        if not start:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


@dataclass(frozen=True)
class _Timed:
    source: Source
    watch: Stopwatch

    def batch(self, size: int, rng: Rng) -> Batch:
        return self.watch.timed("data", self.source.batch)(size, rng)  # type: ignore[no-any-return]


def _trains(run: Run, role: str) -> bool:
    return next(run.nets.roles[role].parameters()).requires_grad


def rounded(figures: Mapping[str, float], digits: int = 4) -> dict[str, float]:
    return {name: round(value, digits) for name, value in figures.items()}


def middle(values: list[float]) -> float:
    return round(median(values), 4)


def show(name: str, case: Any, found: Mapping[str, Any]) -> None:
    """Print figures, and where they are kept."""
    for key, value in found.items():
        print(key, value)
    print(keep(name, case, found))


def keep(name: str, case: Any, found: Mapping[str, Any], device: str = "cpu") -> Path:
    """Keep figures in a file that is named by what the case changes."""
    return write("-".join([name, *changes(case)]), case, found, device)


def write(name: str, case: Any, found: Mapping[str, Any], device: str = "cpu") -> Path:
    """Keep figures with where they come from."""
    facts = {"case": {key: value for key, value in asdict(case).items() if not isinstance(value, Path)}, **found}
    facts |= {"machine": asdict(describe_machine(device)), "versions": versions()}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(facts, indent=2) + "\n")
    return path


def changes(case: Any) -> list[str]:
    """What a case changes, as words of a file's name."""
    default = type(case)()
    return [
        f"{key}-{value}".lower().replace("true", "on").replace("/", "_")
        for key, value in vars(case).items()
        if value != getattr(default, key) and key not in ("rounds", "fastgen", "clock")
    ]
