"""Public causal students: files with the names of their authors become streams that equal their authors' loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from fewstep.cli import main
from fewstep.core import Rng, Seeds
from fewstep.diffusion import CFG, Stream
from fewstep.models import VideoModel
from fewstep.models.known import KNOWN
from fewstep.models.known.importing import Import
from fewstep.models.known.recognise import recognise
from fewstep.models.known.weights import open_weights
from fewstep.streaming import Session
from tiny_models import shared

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PROMPTS = ["a red ball", "a cat walks"]
SIZE = {"num_frames": 93, "height": 32, "width": 48}
"""24 latent frames: more than any window."""
BY_NAME = {known.name: known for known in KNOWN}
FOUR, TWO, ONE = (1.0, 0.9375, 5 / 6, 0.625), (1.0, 5 / 6), (1.0,)


@dataclass(frozen=True)
class Theirs:
    """How a system's authors sample it, by hand."""

    file: str
    network: str
    """The network of the checkpoint that they sample."""
    chunk: int
    times: tuple[float, ...]
    first: tuple[float, ...] = ()
    """Times of the first chunk, where they are others."""
    window: int = 21
    sink: int = 0


STREAMS = {
    "causvid": Theirs("autoregressive_checkpoint/model.pt", "generator", 3, (1.0, 0.757, 0.522)),
    "self-forcing": Theirs("checkpoints/self_forcing_dmd.pt", "generator_ema", 3, FOUR),
    "causal-forcing": Theirs("chunkwise/causal_forcing.pt", "generator", 3, FOUR),
    "causal-forcing-framewise": Theirs("framewise/causal_forcing.pt", "generator_ema", 1, FOUR),
    "causal-forcing-2step": Theirs("causal-forcing++/framewise-2step.pt", "generator_ema", 1, TWO, FOUR),
    "causal-forcing-1step": Theirs("causal-forcing++/framewise-1step.pt", "generator_ema", 1, ONE, FOUR),
    "longlive": Theirs("LongLive-1.3B/longlive_base.pt", "generator", 3, FOUR, window=12, sink=3),
}


def theirs_names() -> dict[str, str]:
    """Diffusers' names of the parameters of a Wan of 2 blocks, by those of its authors, by hand."""
    ends, found = ("weight", "bias"), dict[str, str]()
    outside = {
        "patch_embedding": "patch_embedding", "head.head": "proj_out",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
    }  # fmt: skip
    inside = {"norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    for one, other in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        inside |= {f"{one}.{part}": f"{other}.to_{part}" for part in "qkv"} | {f"{one}.o": f"{other}.to_out.0"}
    for block in range(2):
        outside |= {f"blocks.{block}.{one}": f"blocks.{block}.{other}" for one, other in inside.items()}
        found[f"blocks.{block}.modulation"] = f"blocks.{block}.scale_shift_table"
        for one, other in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for norm in ("norm_q", "norm_k"):
                found[f"blocks.{block}.{one}.{norm}.weight"] = f"blocks.{block}.{other}.{norm}.weight"
    found |= {f"{one}.{end}": f"{other}.{end}" for one, other in outside.items() for end in ends}
    return found | {"head.modulation": "scale_shift_table"}


def original(seed: int = 1) -> Any:
    """Diffusers' own network, whose weights are in the files."""
    return WanTransformer3DModel.from_pretrained(shared("wan", seed=seed) / "transformer").requires_grad_(False)


def sharded(name: str) -> str:
    """What a parameter is called in an average that was taken over FSDP's modules."""
    name = name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.")
    return f"model._fsdp_wrapped_module.{name}"


Change = Callable[[dict[str, Any]], object]


def checkpoint(folder: Path, system: str, change: Change = lambda stored: None) -> Path:
    """A training checkpoint as the system's authors publish it: what they sample is another tiny Wan, the rest are zeros."""
    state, theirs = original().state_dict(), STREAMS[system]
    plain = {f"model.{one}": state[other].clone() for one, other in theirs_names().items()}
    averaged = {sharded(one): state[other].clone() for one, other in theirs_names().items()}
    chosen = averaged if theirs.network == "generator_ema" else plain
    stored: dict[str, Any] = {"critic": {"model.x": torch.zeros(1)}, theirs.network: chosen, "step": 600}
    if theirs.network == "generator_ema" or system in ("causal-forcing", "longlive"):
        other = plain if chosen is averaged else averaged
        name = "generator" if chosen is averaged else "generator_ema"
        stored[name] = {key: torch.zeros_like(value) for key, value in other.items()}
    change(stored)
    file = folder / theirs.file
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(stored, file)
    return file


def with_lora(file: Path, scale: float = 0.3) -> dict[str, Tensor]:
    """A LoRA with peft's names beside the file, over all linear layers of the blocks; what it adds, by the authors' names."""
    state, tensors, added = original().state_dict(), dict[str, Tensor](), dict[str, Tensor]()
    for name, other in theirs_names().items():
        if name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name:
            out, into = state[other].shape
            down, up = Rng(1).randn((2, into), f"{name}/down"), scale * Rng(1).randn((out, 2), f"{name}/up")
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
            added[other] = up @ down
    torch.save({"generator_lora": tensors, "critic_lora": {"x": torch.zeros(1)}}, file.parent / "lora.pt")
    return added


def imported(source: Path, **more: Any) -> VideoModel:
    return Import(**{"source": str(source), "base": str(shared("wan")), **SIZE, **more}).student()


# --- the table ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_what_its_authors_wrote(name: str) -> None:
    known, theirs = BY_NAME[name], STREAMS[name]
    steps = (len(theirs.first), len(theirs.times)) if theirs.first else ()
    assert known.contract.stream == Stream(
        chunks=(theirs.chunk,),
        steps=steps,
        window=theirs.window,
        sink=theirs.sink,
        commit="clean",
        positions="absolute",
    )
    assert known.inside == theirs.network and known.contract.guidance == CFG(scale=1.0) and not known.missing
    with pytest.raises(ValueError, match="is sampled in"):
        known.for_file("x.pt", 4 if theirs.first else 5)


NAMES = {
    **{theirs.file: name for name, theirs in STREAMS.items()},
    "CausVid/autoregressive_checkpoint/model.pt": "causvid",
    "checkpoints/self_forcing_sid.pt": "self-forcing",
    "TencentARC/rolling_forcing_dmd.pt": "rolling-forcing",
    "krea/krea-realtime-video-14b.safetensors": "krea-realtime",
}


@pytest.mark.parametrize("name", NAMES)
def test_files_of_streams_are_recognised(name: str, tmp_path: Path) -> None:
    assert recognise(name, list).name == NAMES[name]
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.touch()
    assert recognise(str(file), list).name == NAMES[name]


@pytest.mark.parametrize(
    "name",
    ["chunkwise/causal_ode.pt", "CausVid/bidirectional_checkpoint1/model.pt", "causal_forcing.pt", "longlive2/x.pt"],
)
def test_files_of_other_stages_are_asked_for(name: str, tmp_path: Path) -> None:
    """The folder around them holds a student, which they are not."""
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    with pytest.raises(ValueError, match="give --as NAME"):
        recognise(str(file), list)


# --- what the files become ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "longlive"])
def test_the_weights_are_those_that_the_authors_sample(name: str, tmp_path: Path) -> None:
    """Every tensor, and no other one: the file holds zeros for the network that is not meant."""
    file = checkpoint(tmp_path, name)
    student, state = imported(file), original().state_dict()
    own = {key.removeprefix("backbone."): value for key, value in student.denoiser.state_dict().items()}
    assert {student.denoiser.backbone.foreign(key).rpartition("/")[2] for key in own} == state.keys()
    for key, value in own.items():
        assert torch.equal(value, state[student.denoiser.backbone.foreign(key).rpartition("/")[2]]), key
    card = student.card
    assert card.contract == BY_NAME[name].contract and (card.name, card.role) == (name, "student")
    assert file.name in card.provenance["weights"] and card.provenance["licence"] == BY_NAME[name].licence


def test_longlive_is_a_network_and_its_lora(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, "longlive")
    for source in (file, file.parent):
        with pytest.raises(ValueError, match="give one file of weights, and one LoRA beside it, in a folder"):
            imported(source)
    added, state = with_lora(file), original().state_dict()
    assert len(added) == 20
    student = imported(file.parent)
    for key, value in student.denoiser.state_dict().items():
        name = student.denoiser.backbone.foreign(key.removeprefix("backbone.")).rpartition("/")[2]
        torch.testing.assert_close(value, state[name] + added.get(name, 0.0), atol=1e-6, rtol=1e-6)
    assert all(part in student.card.provenance["weights"] for part in ("longlive_base.pt", "lora.pt"))


class Masked(WanAttnProcessor):
    """Diffusers' attention, told what each token may read."""

    def __init__(self, allowed: Tensor) -> None:
        super().__init__()
        self.allowed = allowed

    def __call__(self, attn: Any, hidden: Tensor, encoder: Any = None, mask: Any = None, rotary: Any = None) -> Any:
        return super().__call__(attn, hidden, encoder, self.allowed, rotary)


def allowed(theirs: Theirs, frames: int, per_frame: int) -> Tensor:
    """Whether a token may read another: its chunk, the sink, and as much before the end of its chunk as the window has."""
    frame = torch.arange(frames * per_frame) // per_frame
    end = (frame // theirs.chunk + 1) * theirs.chunk
    q, k = end[:, None], frame[None]
    return (k < q) & ((k < theirs.sink) | (k >= q - (theirs.window - theirs.sink)))


@torch.no_grad()
def by_hand(network: Any, theirs: Theirs, text: Tensor, shape: tuple[int, ...], seeds: tuple[int, ...]) -> Tensor:
    """The authors' loop over diffusers' own network, without a cache: finished chunks stand before the one that is made, clean
    and at time 0, and masks hide what a chunk may not read. The first chunk needs no mask: it is plain Wan on its frames."""
    batch, channels, frames, height, width = shape
    per_frame, chunk = height * width // 4, theirs.chunk
    done = torch.zeros(batch, channels, 0, height, width)
    for index in range(frames // chunk):
        rng, times = Seeds(seeds).fold(f"chunk/{index}"), (theirs.times if index or not theirs.first else theirs.first)
        x = rng.randn((batch, channels, chunk, height, width), "start")
        reach = allowed(theirs, done.shape[2] + chunk, per_frame)
        for block in network.blocks:
            block.attn1.set_processor(Masked(reach) if index else WanAttnProcessor())
        for step, t in enumerate(times):
            frame_times = torch.tensor([0.0] * done.shape[2] + [1000 * t] * chunk).repeat(batch, 1)
            tokens = frame_times.repeat_interleave(per_frame, 1) if index else torch.full((batch,), 1000 * t)
            flow = network(torch.cat([done, x], 2), tokens, text, return_dict=False)[0][:, :, -chunk:]
            x = x - t * flow
            if step + 1 < len(times):
                s = times[step + 1]
                x = (1 - s) * x + s * rng.randn(tuple(x.shape), f"renoise/{step}")
        done = torch.cat([done, x], 2)
    return done


@torch.no_grad()
@pytest.mark.parametrize("name", ["causvid", "self-forcing", "causal-forcing-2step", "longlive"])
def test_a_student_streams_as_its_authors_do(name: str, tmp_path: Path) -> None:
    """24 latent frames, more than the window: what has left it is not read, the sink is."""
    file, theirs, network = checkpoint(tmp_path, name), STREAMS[name], original()
    if name == "longlive":
        for layer, added in with_lora(file).items():
            network.get_parameter(layer).add_(added)
        file = file.parent
    student = imported(file)
    text = student.encode_text(PROMPTS, guided=False)[0].text
    shape = (2, *student.latent_shape())
    assert shape[2] == 24
    made = by_hand(network, theirs, text, shape, (5, 6))
    ours = torch.cat(list(Session(student, PROMPTS, seed=(5, 6)).take(24 // theirs.chunk)), 2)
    torch.testing.assert_close(ours, made, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(student.latents(PROMPTS, seed=(5, 6)), made, atol=2e-4, rtol=2e-4)


def test_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`import`, then `stream`: the folder is all that it needs."""
    file, student = checkpoint(tmp_path, "self-forcing"), tmp_path / "student"
    size = [
        word for key, value in (SIZE | {"num_frames": 9}).items() for word in (f"--{key.replace('_', '-')}", str(value))
    ]
    assert main(["import", str(file), "--base", str(shared("wan")), *size, "--output", str(student)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 steps at times 1, 0.9375, 0.8333, 0.625, 0" in said and "a stream in chunks of 3 latent frames" in said
    assert json.loads((student / "card.json").read_text())["contract"]["stream"]["window"] == 21
    video = tmp_path / "out.mp4"
    assert main(["stream", str(student), "--prompt", "a red ball", "--seconds", "2", "--output", str(video)]) == 0
    assert video.is_file() and VideoModel.from_pretrained(student).latents(["a red ball"]).shape[2] == 3


# --- what is refused ----------------------------------------------------------------------------------------------------------


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("sprung"),))


def test_a_checkpoint_with_more_than_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = checkpoint(tmp_path, "self-forcing", lambda stored: stored.update(config=Trap()))
    with pytest.raises(ValueError, match="holds more than tensors, and loading that would run its code"):
        imported(file)
    assert not (tmp_path / "sprung").exists()


def test_every_tensor_finds_its_place(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, "causvid", lambda stored: stored["generator"].pop("model.blocks.1.self_attn.k.weight"))
    with pytest.raises(
        ValueError, match=r"has no model\.blocks\.1\.self_attn\.k\.weight \(1 tensors are missing, 0 are too"
    ):
        imported(file)
    file = checkpoint(tmp_path, "causvid", lambda stored: stored["generator"].update({"model.cls": torch.ones(1)}))
    with pytest.raises(
        ValueError, match=r"model\.cls belongs to no part of the network \(0 tensors are missing, 1 are"
    ):
        imported(file)


def test_another_base_is_refused(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, "self-forcing")
    with pytest.raises(ValueError, match="is a LTX, and self-forcing belongs to a Wan"):
        imported(file, base=str(shared("ltx")), num_frames=5, height=64, width=96)

    def wider(stored: dict[str, Any]) -> None:
        stored["generator_ema"][sharded("blocks.1.ffn.0.weight")] = torch.ones(48, 24)

    with pytest.raises(ValueError, match=r"model\.blocks\.1\.ffn\.0\.weight is \(48, 24\), and the base's \(32, 24\)"):
        imported(checkpoint(tmp_path, "self-forcing", wider))


def test_a_clip_has_whole_chunks(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"chunks have 3 latent frames, and 5 frames are 2 .* ask for 9 frames \(3 latent"
    ):
        imported(checkpoint(tmp_path, "self-forcing"), num_frames=5)


def test_another_network_of_the_checkpoint_is_not_taken(tmp_path: Path) -> None:
    """An earlier stage (`ode_init.pt`) has no average, and is no student."""
    file = checkpoint(tmp_path, "self-forcing", lambda stored: stored.pop("generator_ema"))
    with pytest.raises(ValueError, match="has critic, generator, and its authors sample generator_ema"):
        imported(file)
    both = {"a": torch.zeros(1), "_fsdp_wrapped_module.a": torch.ones(1)}
    torch.save({"generator_ema": both}, file)
    with pytest.raises(ValueError, match="a is in it twice, once wrapped"):
        open_weights(file, "generator_ema")
    torch.save({"model": {"a": torch.ones(1)}, "generator_ema": {"a": torch.zeros(1)}}, file)
    assert open_weights(file, "generator").read("a") == 1
    torch.save({"_orig_mod.a": torch.ones(1), "a_fsdp_wrapped_module.b": torch.zeros(1)}, file)
    assert set(open_weights(file, "generator_ema").names) == {"a", "a_fsdp_wrapped_module.b"}
