"""How a model is run: in what numbers, where, and by which kernels; and that it says so or refuses."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from fewstep.attention import BlockCausal, Operation, TopK, attend, attending
from fewstep.caching import SkipMiddle
from fewstep.cli import main
from fewstep.cli.arguments import CheckLora, CheckModel, Evaluate, Pairs, Sample
from fewstep.cli.command import Runs
from fewstep.core import Rng, devices
from fewstep.diffusion import CFG
from fewstep.engine.effective import Kernels
from fewstep.models import Card, VideoModel, offload
from fewstep.models import runtime as running
from fewstep.models.card import allocate
from fewstep.models.fitting import Memory, fitting
from fewstep.models.offload import Blockwise, bring
from fewstep.models.repattern import repattern
from fewstep.models.runtime import Runtime, effective, told
from fewstep.models.spec import Spec
from support_engine import tiny_model
from tiny_models import load_tiny

pytestmark = pytest.mark.usefixtures("single_thread")
PROMPTS = ("a small red ring", "a large blue disc")
HALF = Runtime(dtype="bfloat16")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model().save(tmp_path / "tiny")


def test_bfloat16_is_autocast_with_half_the_matrices(folder: Path) -> None:
    """The same bits as float32 weights that are cast in every call; the ends, norms and latents are float32."""
    plain, half = VideoModel.from_pretrained(folder), VideoModel.from_pretrained(folder, runtime=HALF)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(PROMPTS)
    made = half(PROMPTS)
    assert torch.equal(made, expected) and not torch.equal(made, plain(PROMPTS))
    types = {name: weight.dtype for name, weight in half.denoiser.named_parameters()}
    assert {name for name, kind in types.items() if kind == torch.bfloat16} == {
        name for name in types if ".blocks." in name and name.endswith((".weight", ".bias"))
    }
    prediction = half.denoiser(*inputs(half))
    assert prediction.raw.dtype == prediction.x0.dtype == torch.float32


def inputs(model: VideoModel) -> tuple[Any, ...]:
    cond = model.text.encode(PROMPTS)
    return Rng(0).randn((2, *model.latent_shape()), "x"), torch.full((2,), 0.5), cond


def test_a_model_in_bfloat16_is_still_the_same_model(folder: Path) -> None:
    """Its fingerprint is that of the weights in its folder, and rounded weights are not written."""
    plain, half = VideoModel.from_pretrained(folder), VideoModel.from_pretrained(folder, runtime=HALF)
    later = VideoModel.from_pretrained(folder).to(torch.bfloat16)
    known = plain.fingerprint("denoiser")
    again = (half, later, later.with_card(name="other"), half.with_part("codec", half.codec))
    assert [model.fingerprint("denoiser") for model in again] == [known] * 4
    assert torch.equal(half(PROMPTS), later(PROMPTS))
    for model in (half, later):
        with pytest.raises(ValueError, match="runs in bfloat16, so its weights are rounded; load it without a runtime"):
            model.save(folder / "copy")
        with pytest.raises(ValueError, match="the weights are bfloat16 already; load the model again"):
            model.prepared(Runtime())


def test_networks_of_other_types_take_float32_latents(folder: Path) -> None:
    """A denoiser that somebody casts as a whole: its time keeps more than 8 bits, and its prediction is float32."""
    plain = VideoModel.from_pretrained(folder)
    truth = plain.denoiser(*inputs(plain)).raw
    for dtype, near in ((torch.bfloat16, 0.1), (torch.float64, 1e-5)):
        cast = VideoModel.from_pretrained(folder).denoiser.to(dtype)
        made = cast(*inputs(plain)).raw
        assert made.dtype == torch.float32 and not torch.equal(made, truth)
        assert (made - truth).norm() < near * truth.norm()


PEAKS = """
import sys
from fewstep.evaluate.latency import peak_memory
from fewstep.models.bundle import VideoModel
from fewstep.models.card import allocate
from fewstep.models.runtime import Runtime
kept = [VideoModel.from_pretrained(sys.argv[1])]  # what is imported late, and the allocator's own reserves
before, how = peak_memory(lambda: None)
for folder in sys.argv[1:]:
    for dtype in ("float32", "bfloat16"):
        load = lambda: kept.append(VideoModel.from_pretrained(folder, runtime=Runtime(dtype=dtype)))
        after, _ = peak_memory(load)
        before, _ = peak_memory(lambda: print(how, ":", after - before))
"""


def test_loading_takes_no_more_than_what_is_loaded(tmp_path: Path) -> None:
    """A process holds the weights once, in the type in which they are run, and little else; files may have either type."""
    card = Card(name="large", parts={"denoiser": Spec("VideoDiT", {"width": 256, "depth": 12, "heads": 4})})
    network = VideoModel(card, {"denoiser": allocate("denoiser", card)})
    folders = [network.save(tmp_path / str(kind), dtype=kind) for kind in (torch.float32, torch.bfloat16)]
    weights = sum(p.numel() for p in network.denoiser.parameters())
    made = subprocess.run(
        [sys.executable, "-c", PEAKS, *map(str, folders)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    if "since its start" in made.stdout:
        pytest.skip("this system tells the peak of a process' whole life only")
    peaks = [int(line.rpartition(":")[2]) / weights for line in made.stdout.splitlines()]
    assert all(peak < 1.35 * size for peak, size in zip(peaks, (4, 2, 4, 2), strict=True)), peaks


def test_a_loaded_model_does_not_need_its_file(folder: Path) -> None:
    model = VideoModel.from_pretrained(folder)
    before = model.latents(PROMPTS)
    with (folder / "denoiser.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(bytes(size // 4))
    assert torch.equal(model.latents(PROMPTS), before)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "said"), [
    ({"dtype": "bf16"}, "dtype 'bf16' is unknown; choose one of float32, bfloat16, float64"),
    ({"tiling": "on"}, "tiling 'on' is unknown; choose one of auto, whole, tiles, chunks"),
    ({"attention": "flash"}, "attention 'flash' is unknown; choose one of auto, reference, sdpa-cudnn, sdpa-flash"),
    ({"device": "gpu"}, "device 'gpu' is no device; write cpu, cuda or cuda:1"),
    ({"offload": "model"}, "offload keeps idle networks on the CPU, and device is cpu already"),
    ({"compile": True, "attention": "reference"}, "compiled blocks cannot compute the reference"),
])  # fmt: skip
def test_what_no_machine_can_do_is_refused_at_once(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Runtime(**asked)


@pytest.mark.parametrize(("asked", "said"), [
    ({"attention": "sdpa-cudnn"}, "does not run here .a CUDA kernel; this device is cpu.; choose one of auto, reference, sdpa-f"),
    ({"tiling": "tiles"}, "tiling: FrameAutoencoder decodes frame by frame and has no tiles; choose chunks"),
    ({"compile": True}, "compile: no compiler here. Leave compile out"),
])  # fmt: skip
def test_what_this_machine_or_model_cannot_do_is_refused(
    asked: dict[str, Any], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a weight is read, unless a network must say so; and a model that is refused stays as it was."""
    monkeypatch.setattr(running, "compile_problem", lambda device: "no compiler here")
    model = VideoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=said):
        model.prepared(Runtime(**asked))
    assert model.runtime == Runtime()
    with pytest.raises(ValueError, match=said):
        VideoModel.from_pretrained(folder, runtime=Runtime(**asked))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="device cuda: this machine has"):
        VideoModel.from_pretrained(folder, runtime=Runtime(device="cuda", offload="model"))


def test_bfloat16_that_is_slow_is_announced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = VideoModel.from_pretrained(folder, runtime=HALF)
    for there in (True, False):
        monkeypatch.setattr(devices, "has_bfloat16", lambda there=there: there)
        assert ("no bfloat16 arithmetic, so float32 is faster" in told(effective(model))) is not there


# --- attention --------------------------------------------------------------------------------------------------------


def test_the_reference_is_softmax_in_float64() -> None:
    q, k, v = (Rng(0).randn((2, 2, 5, 8), name) for name in "qkv")
    mask = Rng(0).rand((5, 5), "mask") < 0.7
    mask[:, 0] = True
    scores = (q.double() @ k.double().mT / 8**0.5).masked_fill(~mask, float("-inf"))
    expected = (scores.softmax(-1) @ v.double()).float()
    with attending("reference"):
        assert torch.equal(attend(q, k, v, mask), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).float(), exact16(q, k, v))
    assert not torch.equal(attend(q, k, v, mask), expected)


def exact16(*qkv: Tensor) -> Tensor:
    """The reference of what bfloat16 has left of the inputs."""
    q, k, v = (x.bfloat16().double() for x in qkv)
    return ((q @ k.mT / 8**0.5).softmax(-1) @ v).bfloat16().float()


class _Wrong(Operation):
    """A faster computation that is wrong, beside the mask that is right."""

    def mask(self, q_BHND: Tensor, k_BHMD: Tensor, site: Any) -> Tensor:
        return torch.ones(q_BHND.shape[2], k_BHMD.shape[2]).tril().bool()

    def forward(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, site: Any) -> Tensor:
        return torch.zeros_like(q_BHND)


def test_the_reference_of_a_pattern_is_its_mask() -> None:
    """For every pattern it is near what is computed otherwise; and no faster computation is asked."""
    for pattern in (BlockCausal(chunk=1), TopK(block=8, keep=0.5)):
        model = tiny_model()
        model = model.with_part("denoiser", repattern(model.denoiser, pattern))
        fast, exact = model.latents(PROMPTS), model.prepared(Runtime(attention="reference")).latents(PROMPTS)
        torch.testing.assert_close(fast, exact, rtol=1e-3, atol=1e-4)
        assert effective(model)["attention"] == "reference"
    for block in model.denoiser.backbone.blocks:
        block.attention.operation = _Wrong()
    by_mask = model.latents(PROMPTS)
    assert not torch.allclose(by_mask, model.prepared(Runtime()).latents(PROMPTS), atol=1e-2)


def test_the_kernel_that_was_asked_for_runs() -> None:
    model, found = tiny_model(), {}
    cond, _ = model.conditions(PROMPTS, guided=False)
    for tier in ("auto", "sdpa-flash", "sdpa-math"):
        model.prepared(Runtime(attention=tier))
        with Kernels() as kernels:
            model.latents(cond, guidance_scale=1.0)
        found[tier] = set(kernels.names)
    assert found == {"auto": {"sdpa-flash"}, "sdpa-flash": {"sdpa-flash"}, "sdpa-math": {"matmul"}}


# --- compilation, offload, tiles --------------------------------------------------------------------------------------


def test_blocks_are_compiled_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by itself, whichever denoiser the model has later."""
    monkeypatch.setattr(running, "compile_problem", lambda device: "")
    model = tiny_model().prepared(Runtime(compile=True))
    other = model.with_part("denoiser", tiny_model(seed=1).denoiser)
    for compiled in (model, other):
        assert all(block._compiled_call_impl is not None for block in compiled.denoiser.backbone.blocks)
        assert effective(compiled)["blocks"] == "compiled"
    assert effective(tiny_model())["blocks"] == "not compiled"


@dataclass
class Moves:
    """Notes where networks are put."""

    seen: list[tuple[str, str]]

    def network(self, name: str) -> nn.Module:
        noted, network = self.seen, nn.Linear(1, 1)
        network.to = lambda device: noted.append((name, str(device)))  # type: ignore[method-assign, assignment]
        return network


def test_others_leave_before_a_network_comes() -> None:
    """The device of the tensors says where a network is: these are on the CPU, and the device is another."""
    moves = Moves([])
    parts = {name: moves.network(name) for name in ("denoiser", "text", "codec")}
    bring(parts, ("text",), torch.device("cuda"))
    assert moves.seen == [("text", "cuda")]  # the others wait already
    moves.seen.clear()
    parts["denoiser"] = nn.Linear(1, 1, device="meta")
    parts["denoiser"].to = lambda device: moves.seen.append(("denoiser", str(device)))  # type: ignore[method-assign, assignment]
    bring(parts, ("text",), torch.device("cuda"))
    assert moves.seen == [("denoiser", "cpu"), ("text", "cuda")]


def test_a_sample_brings_each_network_when_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time, in the order of their work; each is called only after it was brought."""
    model, seen = tiny_model(), list[str]()
    monkeypatch.setattr(VideoModel, "bring", lambda self, *names: seen.append("bring " + " ".join(names)))
    for name in ("text", "denoiser", "codec"):
        part = model.part(name)
        for call in ("encode", "decode", "forward"):
            if hasattr(part, call):
                monkeypatch.setattr(part, call, noted(getattr(part, call), name, seen))
    model(PROMPTS)
    assert [key for key, before in zip(seen, ["", *seen], strict=False) if key != before] == [
        "bring image codec", "bring text", "text", *["bring denoiser", "denoiser"] * 3, "bring codec", "codec",
    ]  # fmt: skip


def noted(call: Callable[..., Any], name: str, seen: list[str]) -> Callable[..., Any]:
    def run(*words: Any, **options: Any) -> Any:
        seen.append(name)
        return call(*words, **options)

    return run


@pytest.mark.parametrize("family", ["world", "wan", "wan_experts"])
def test_blocks_that_come_one_by_one_make_the_same_clip(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are there at most, the network is left as it was, and another runner runs inside."""
    model = tiny_model(depth=4) if family == "world" else load_tiny(family)
    plain, skipping = model.latents(PROMPTS), model.latents(PROMPTS, runner=SkipMiddle(every=2).begin())
    copied, alive, most, layers = Blockwise._copied, [], [0], list[int]()

    def noted(self: Blockwise, layer: int) -> Any:
        weights = copied(self, layer)
        alive[:] = [tensor for tensor in alive if tensor() is not None] + [weakref.ref(next(iter(weights.values())))]
        most[0] = max(most[0], len(alive))
        layers.append(layer)
        return weights

    monkeypatch.setattr(Blockwise, "_copied", noted)
    monkeypatch.setattr(
        VideoModel, "runner",
        lambda self, inner: Blockwise(self.denoiser.backbone.blocks, torch.device("cpu"), inner),
    )  # fmt: skip
    before = {name: p.data_ptr() for name, p in model.denoiser.named_parameters()}
    assert torch.equal(model.latents(PROMPTS), plain) and most == [2]
    calls, blocks = model.card.contract.steps, len(model.denoiser.backbone.blocks)
    assert layers == [*range(blocks)] * calls + [0], "each comes once in a call"
    assert {name: p.data_ptr() for name, p in model.denoiser.named_parameters()} == before
    assert torch.equal(model.latents(PROMPTS, runner=SkipMiddle(every=2).begin()), skipping)
    assert not torch.equal(plain, skipping) or family != "world"


def test_without_its_blocks_a_denoiser_comes_whole_otherwise() -> None:
    network = tiny_model().denoiser
    names = {id(tensor): name for name, tensor in network.named_parameters()}
    ends = {names[id(tensor)] for tensor in offload._ends(network) if id(tensor) in names}
    blocks = {name for name in names.values() if name.startswith("backbone.blocks.")}
    assert ends | blocks == set(names.values()) and not ends & blocks and "backbone.patches.weight" in ends


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_blocks_come_to_the_gpu_one_by_one(folder: Path) -> None:
    plain = VideoModel.from_pretrained(folder, runtime=Runtime(device="cuda"))
    model = VideoModel.from_pretrained(folder, runtime=Runtime(device="cuda", offload="block"))
    assert torch.equal(model(PROMPTS), plain(PROMPTS))
    assert {p.device.type for p in model.denoiser.backbone.blocks.parameters()} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_network_at_a_time_is_on_the_gpu(folder: Path) -> None:
    plain = VideoModel.from_pretrained(folder, runtime=Runtime(device="cuda"))
    model = VideoModel.from_pretrained(folder, runtime=Runtime(device="cuda", offload="model"))
    torch.testing.assert_close(model(PROMPTS), plain(PROMPTS))
    where = {name: next(part.parameters()).device.type for name, part in model.parts.items()}
    assert where == {"denoiser": "cpu", "text": "cpu", "codec": "cuda", "features": "cpu"}
    assert effective(model)["networks"] == "one at a time on the device"


def test_frames_in_chunks_are_those_of_the_whole() -> None:
    model, seen = tiny_model(), list[int]()
    latents, whole = model.latents(PROMPTS), model(PROMPTS)
    decode = model.codec.decode
    model.codec.decode = lambda x: (seen.append(x.shape[2]), decode(x))[1]  # type: ignore[method-assign]
    made = model.prepared(Runtime(tiling="chunks")).decode(latents)
    torch.testing.assert_close(made, whole, rtol=1e-5, atol=1e-5)
    assert seen == [1] * latents.shape[2] and effective(model)["decoding"] == "chunks"


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_negative_prompt_is_read_only_where_there_is_guidance() -> None:
    model, seen = tiny_model(), list[tuple[str, ...]]()
    encode = model.text.encode
    model.text.encode = lambda prompts: (seen.append(tuple(prompts)), encode(prompts))[1]  # type: ignore[method-assign]
    plain = model.latents(PROMPTS, guidance_scale=1.0)
    assert seen == [PROMPTS]
    model.latents(PROMPTS)
    assert seen == [PROMPTS, PROMPTS, ("",)]
    free = model.with_card(contract=replace(model.card.contract, guidance=CFG()))
    assert torch.equal(free.latents(PROMPTS), plain) and len(seen) == 4


def test_conditions_that_are_ready_are_taken() -> None:
    model = tiny_model()
    expected, (cond, uncond) = model.latents(PROMPTS, seed=4), model.conditions(PROMPTS)
    silent = VideoModel(model.card, {name: part for name, part in model.parts.items() if name != "text"})
    assert torch.equal(silent.latents(cond, negative=uncond, seed=4), expected)
    assert torch.equal(silent(cond, guidance_scale=1.0), model(PROMPTS, guidance_scale=1.0))
    assert not torch.allclose(model.latents(PROMPTS, negative=cond, seed=4), expected)
    with pytest.raises(ValueError, match="guidance reads a negative prompt too; give negative"):
        silent.latents(cond)
    with pytest.raises(ValueError, match="have their images and scalars already; leave out image"):
        silent.latents(cond, negative=uncond, image=torch.zeros(3, 32, 32))


class _Counted(Memory):
    """A device with `room` bytes, of which a clip takes `each`."""

    def __init__(self, room: int, each: int) -> None:
        self.__dict__.update(room=room, each=each)

    def begin(self) -> int:
        return 100

    def peak(self) -> int:
        return 100 + self.__dict__["each"]

    def free(self) -> int:
        return self.__dict__["room"]


def test_as_many_clips_as_fit_are_made_at_once() -> None:
    """The first one tells; what was asked for is done; without a count, as many as always."""
    assert list(fitting(7, None, 4, None)) == [(0, 4), (4, 7)]
    assert list(fitting(7, 3, 4, _Counted(1, 1))) == [(0, 3), (3, 6), (6, 7)]
    assert list(fitting(6, None, 8, _Counted(1000, 300))) == [(0, 1), (1, 4), (4, 6)]  # 3 in 90 % of 1000
    assert list(fitting(3, None, 8, _Counted(10, 300))) == [(0, 1), (1, 2), (2, 3)]
    assert list(fitting(20, None, 8, _Counted(10**6, 1))) == [(0, 1), (1, 9), (9, 17), (17, 20)]


# --- the command line -------------------------------------------------------------------------------------------------


def test_every_command_that_runs_a_model_has_the_same_options() -> None:
    """They are the fields of `Runtime`, with the same values and defaults, and `auto` where the machine decides."""
    assert all(issubclass(command, Runs) for command in (Sample, Evaluate, Pairs, CheckModel, CheckLora))
    options, mine = get_type_hints(Runs), get_type_hints(Runtime)
    given = Sample(student="x")
    for field in fields(Runtime):
        auto = field.name in ("dtype", "offload", "guidance_calls")
        assert get_args(options[field.name]) == ("auto",) * auto + get_args(mine[field.name]), field.name
        assert getattr(given, field.name) == ("auto" if auto else field.default), field.name


def test_sample_says_how_it_ran(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = [f"{folder}/{name}.gif" for name in ("one", "batches", "half")]
    words = ("sample", str(folder), "--prompt", *PROMPTS, "--output")
    assert main([*words, clips[0]]) == 0
    out, err = capsys.readouterr()
    assert (
        out.split() == [clips[0]] and "arithmetic: float32, blocks: not compiled, attention: auto (sdpa-flash)" in err
    )
    assert main([*words, clips[1], "--batch", "1"]) == 0
    assert Path(clips[0]).read_bytes() == Path(clips[1]).read_bytes()
    assert main([*words, clips[2], "--dtype", "bfloat16", "--tiling", "chunks", "--attention", "sdpa-math"]) == 0
    err = capsys.readouterr().err
    assert "denoiser bfloat16, float32" in err and "attention: sdpa-math" in err and "decoding: chunks" in err
    assert Path(clips[0]).read_bytes() != Path(clips[2]).read_bytes()
    for option, value in (("--offload", "model"), ("--batch", "0"), ("--attention", "sdpa-cudnn")):
        assert main([*words, clips[2], option, *([value] if value else [])]) == 2
        assert option.removeprefix("--") in capsys.readouterr().err
