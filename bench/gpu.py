"""Everything that waits for a GPU, in one command: `make gpu`, or `tools/gpu.sh` without an environment of its own.

Each part runs in a process of its own with a limit of time, and its result is kept in one JSON file at once. A part that has a
result of the same commit and device is not run again (`--again` runs it). A part that fails says why; the others go on.

    python bench/gpu.py                  all parts, under eleven minutes on a data-centre GPU
    python bench/gpu.py --only sample    one of them
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from fewstep.core import Cond, Rng
from fewstep.core.call import Constants
from fewstep.core.ledger import Ledger
from fewstep.diffusion import CFG, Euler
from fewstep.engine import Optim
from fewstep.engine.optim import RoleOptimizer
from fewstep.engine.shard import hollow, shard
from fewstep.evaluate.latency import peak_memory
from fewstep.evaluate.machine import describe_machine, versions
from fewstep.models import Denoiser
from fewstep.models.offload import Blockwise, bring, pin
from fewstep.models.runtime import Runtime, typed
from measuring import RESULTS, WAN, WAN_CLIP, Timer

ROOT = Path(__file__).parent.parent
TEXT = (512, 4096)
FRAMES = (81, 480, 832)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which parts to run."""

    only: tuple[str, ...] = ()
    """Names of parts (default: all)."""
    again: bool = False
    """Run parts that have a result of this commit already."""
    device: str = "cuda"
    small: bool = False
    """Tiny sizes, to try the script itself; `--device cpu` needs it."""
    part: str = ""
    """For the script's own use: run this part here and print its result."""


def wan(options: Options, dtype: str = "bfloat16", **changes: int) -> tuple[Denoiser, Tensor, Cond]:
    """The denoiser of Wan2.1-T2V-1.3B with random weights (and `changes` in its config), noise of its clips, and text states."""
    from fewstep.diffusion import RectifiedFlow
    from fewstep.models.adapters.dits.wan import Wan

    torch.manual_seed(0)
    size = {"num_layers": 2, "num_attention_heads": 2, "ffn_dim": 64} if options.small else changes
    denoiser = Denoiser(Wan(config=WAN | size), RectifiedFlow(), "flow").eval().requires_grad_(False)
    typed(denoiser, dtype)  # type: ignore[arg-type]
    shape = (16, 3, 8, 8) if options.small else WAN_CLIP
    x, text = (Rng(0).randn((1, *some), name).to(options.device) for name, some in (("x", shape), ("text", TEXT)))
    return denoiser, x, Cond(text, text.new_ones(1, TEXT[0], dtype=torch.bool))


def sampled(denoiser: Denoiser, x: Tensor, cond: Cond, *, steps: int, guidance: CFG, runner: Any = None) -> Tensor:
    """A clip, as `VideoModel` samples it."""
    extra: dict[str, Any] = {"constants": Constants()} if runner is None else {"runner": runner}
    times = tuple(1 - i / steps for i in range(steps + 1))
    with torch.no_grad(), Runtime(dtype="bfloat16", device=x.device.type).denoising():
        return Euler()(
            lambda x_t, t, call: guidance(denoiser, x_t, t, cond, cond, replace(call, **extra)), x, times, rng=Rng(0)
        )


def tests(options: Options) -> dict[str, Any]:
    """The tests marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"summary": lines[-1] if lines else done.stderr[-500:], "failed": failed, "ok": done.returncode == 0}


def sample(options: Options) -> dict[str, Any]:
    """Sampling of clips of 81 x 480 x 832: 4 steps without guidance, guided steps as of a teacher, eager and compiled."""
    denoiser, x, cond = wan(options)
    denoiser.to(options.device)
    timer, found = Timer(options.device), dict[str, Any]()
    peak_flops = matmul_rate(options)
    with torch.no_grad(), Ledger() as ledger, Runtime(dtype="bfloat16", device=options.device).denoising():
        denoiser(x, torch.ones(1, device=x.device), cond)
    found["TFLOP of a forward"] = ledger.flops / 1e12
    for name in ("eager", "compiled"):
        if name == "compiled":
            denoiser.backbone.compile_blocks()
        sampled(denoiser, x, cond, steps=1, guidance=CFG())
        sampled(denoiser, x, cond, steps=1, guidance=CFG(scale=5.0))
        four = timer.of(lambda: sampled(denoiser, x, cond, steps=4, guidance=CFG()))
        five = timer.of(lambda: sampled(denoiser, x, cond, steps=5, guidance=CFG(scale=5.0)))
        found[name] = {
            "4 steps, s": four, "50 guided steps, s (10 times 5)": 10 * five,
            "share of the matrix rate": 4 * ledger.flops / four / peak_flops,
        }  # fmt: skip
    return found | peak(lambda: sampled(denoiser, x, cond, steps=2, guidance=CFG(scale=5.0)), options)


def peak(fn: Callable[[], Any], options: Options) -> dict[str, float]:
    """Most memory of the GPU while `fn` runs; nothing elsewhere, where the whole program would be counted."""
    return {"peak memory, GiB": peak_memory(fn, "cuda")[0] / 2**30} if options.device == "cuda" else {}


def matmul_rate(options: Options) -> float:
    """Operations per second of a large product in bfloat16: what this device can do."""
    size = 64 if options.small else 8192
    a, b = (Rng(0).randn((size, size), name).to(options.device, torch.bfloat16) for name in "ab")
    timer = Timer(options.device)
    for _ in range(3):
        a @ b
    return 2 * size**3 / min(timer.of(lambda: a @ b) for _ in range(10))


def offload(options: Options) -> dict[str, Any]:
    """Block offload: the same clip, in how much memory and time."""
    denoiser, x, cond = wan(options)
    guidance, timer = CFG(scale=5.0), Timer(options.device)
    found: dict[str, Any] = {}
    clips = {}
    for name in ("block", "none"):
        runner = None
        if name == "block":
            if options.device == "cuda":
                pin(denoiser)
            bring({"denoiser": denoiser}, ("denoiser",), torch.device(options.device), whole=False)
            runner = Blockwise(
                denoiser.backbone.blocks, torch.device(options.device), lambda block, state, _: block(state)
            )
        else:
            denoiser.to(options.device)
        two = partial(sampled, denoiser, x, cond, steps=2, guidance=guidance, runner=runner)
        clips[name] = sampled(denoiser, x, cond, steps=1, guidance=guidance, runner=runner)
        found[name] = {"s per step": timer.of(two) / 2} | peak(two, options)
    return {**found, "same bits": bool(torch.equal(clips["block"], clips["none"]))}


def decode(options: Options) -> dict[str, Any]:
    """Decoding 21 latent frames of 60 x 104 with Wan's autoencoder, random weights."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    size = {"base_dim": 8} if options.small else {}
    vae = AutoencoderKLWan(**size).eval().requires_grad_(False).to(options.device, torch.bfloat16)
    x = Rng(0).randn((1, 16, *((3, 8, 8) if options.small else WAN_CLIP[1:])), "x").to(options.device, torch.bfloat16)
    timer = Timer(options.device)
    with torch.no_grad():
        vae.decode(x)
        seconds = timer.of(lambda: vae.decode(x))
        most = peak(lambda: vae.decode(x), options)
    return {"s": seconds, "frames per second": (4 * x.shape[2] - 3) / seconds} | most


def shards(options: Options) -> dict[str, Any]:
    """Training steps of a Wan of four blocks that FSDP2 divides over a mesh of one process, beside those of the whole one."""
    whole, x, cond = wan(options, "float32", num_layers=4)
    x = x[:, :, :6, :30, :52]
    whole.to(options.device)
    found, weights = dict[str, Any](), dict[str, dict[str, Tensor]]()
    with alone_in_a_group(options.device) as mesh:
        cut = hollow(whole)
        shard(cut, whole.state_dict(), mesh)  # type: ignore[arg-type]
        for name, network in (("whole", whole), ("shards", cut)):
            losses, seconds = trained(network, x, cond, options)
            found[name] = {"s per step": min(seconds[1:]), "losses": losses}
            weights[name] = {key: full(tensor) for key, tensor in network.state_dict().items()}
        most = peak(lambda: trained(cut, x, cond, options), options)
    pairs = [(weights["shards"][key], tensor) for key, tensor in weights["whole"].items()]
    apart = max(float((ours - own).abs().max() / own.abs().max().clamp_min(1e-12)) for ours, own in pairs)
    same = all(torch.equal(ours, own) for ours, own in pairs)
    return found | most | {"largest relative difference of a weight": apart, "same bits": same}


STEPS = 4
"""Training steps of `shards`; the first is not timed."""


def trained(network: Any, x: Tensor, cond: Cond, options: Options) -> tuple[list[float], list[float]]:
    """Losses and seconds of steps with the engine's AdamW, under autocast as in a run. They make a given clip of noise."""
    network.requires_grad_(True)
    optimizer, timer = RoleOptimizer(network, Optim(lr=1e-4), STEPS), Timer(options.device)
    losses, seconds = [], []
    for step in range(STEPS):
        noise, t = Rng(step).randn(tuple(x.shape), "noise").to(x.device), torch.full((len(x),), 0.5, device=x.device)

        def once(step: int = step, noise: Tensor = noise, t: Tensor = t) -> None:
            with torch.autocast(x.device.type, torch.bfloat16):
                made = network((x + noise) / 2, t, cond).raw
            loss = (made - (noise - x)).float().square().mean()
            loss.backward()
            optimizer.clip()
            optimizer.step(step)
            losses.append(float(loss.detach()))

        seconds.append(timer.of(once))
    return losses, seconds


@contextmanager
def alone_in_a_group(device: str) -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    kind = torch.device(device).type
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield init_device_mesh(kind, (1,), mesh_dim_names=("shard",))
        finally:
            dist.destroy_process_group()


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def plan(options: Options) -> dict[str, Any]:
    """What the plan says that denoising needs, to be compared with the peaks of `sample` and `offload`."""
    sys.path.append(str(ROOT / "tests"))
    import published
    from fewstep.models.bundle import read_card
    from fewstep.models.needs import DENOISING, needs

    with tempfile.TemporaryDirectory() as folder:
        card = read_card(published.wan(Path(folder), published.WAN_13B))
        card = replace(card, num_frames=9, height=64, width=64) if options.small else card
        found = needs(card, Runtime(dtype="bfloat16"))
    own = found.weights["denoiser"]
    return {
        "none, GiB": (own + found.working[DENOISING]) / 2**30,
        "block, GiB": (found.ends + 2 * found.block + found.working[DENOISING]) / 2**30,
    }


def train(options: Options) -> dict[str, Any]:
    """A DMD2 cycle of one clip beside its floor (`train_step.py`)."""
    case = (
        ["--model", "world", "--batch", "2"]
        if options.small
        else ["--model", "wan-1.3b", "--recipe", "wan21_1p3b/dmd2"]
    )
    facts = figures(["bench/train_step.py", *case, "--device", options.device, "--rounds", "2"])
    return facts if "failed" in facts else {name: facts[name] for name in ("medians", "phases", "memory", "cost")}


def stream(options: Options) -> dict[str, Any]:
    """A live stream of 480 x 832 in chunks of 3 latent frames (`stream.py`)."""
    size = ["--small", "--chunks", "2"] if options.small else ["--dtype", "bfloat16", "--compile"]
    case = ["--model", "wan-1.3b", "--chunk", "3", "--sink", "3", "--rounds", "3", *size]
    facts = figures(["bench/stream.py", *case, "--device", options.device])
    return {name: value for name, value in facts.items() if name not in ("case", "machine", "versions")}


def figures(words: list[str]) -> dict[str, Any]:
    """What another script of this folder has written; its last line names the file."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"failed": (done.stderr or done.stdout)[-800:]}
    found: dict[str, Any] = json.loads((ROOT / lines[-1]).read_text())
    return found


PARTS: dict[str, tuple[Callable[[Options], dict[str, Any]], int]] = {
    "tests": (tests, 120), "sample": (sample, 150), "offload": (offload, 60), "decode": (decode, 40), "plan": (plan, 60),
    "train": (train, 180), "shards": (shards, 60), "stream": (stream, 180),
}  # fmt: skip
"""Parts, and the seconds that each may take."""


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main(options: Options) -> int:
    if options.part:
        print(json.dumps(PARTS[options.part][0](options)))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: this machine has no CUDA device")
        return 0
    if unknown := [name for name in options.only if name not in PARTS]:
        raise SystemExit(f"unknown parts {', '.join(unknown)}; choose of {', '.join(PARTS)}")
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    path = RESULTS / f"gpu-{name.lower().replace(' ', '-')}{'-small' if options.small else ''}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    if kept.get("commit") != commit():
        kept = {}
    kept |= {"commit": commit(), "machine": asdict(describe_machine(options.device)), "versions": versions()}
    for part in options.only or PARTS:
        if part in kept and "failed" not in kept[part] and not options.again:
            continue
        start = time.monotonic()
        kept[part] = alone(part, options) | {"seconds in all": round(time.monotonic() - start, 1)}
        path.write_text(json.dumps(kept, indent=2) + "\n")
        print(part, json.dumps(kept[part], indent=2), flush=True)
    print(path)
    return 1 if any(kept.get(part, {}).get("failed") for part in PARTS) else 0


def alone(part: str, options: Options) -> dict[str, Any]:
    """The result of a part, from a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--part",
        part,
        "--device",
        options.device,
        *(["--small"] if options.small else []),
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PARTS[part][1], check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {PARTS[part][1]} s"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    except (IndexError, json.JSONDecodeError):
        return {"failed": (done.stderr or done.stdout)[-800:]}


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
