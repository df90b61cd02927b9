"""LoRA files of other tools: every usual naming is the same update, and what is not understood is named."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from diffusers import StableDiffusionPipeline, WanPipeline
from safetensors.torch import save_file
from torch import Tensor

from fewstep.cli import main
from fewstep.compress import Int8
from fewstep.core import Rng
from fewstep.models import VideoModel
from fewstep.models.adapters import lora_hub
from fewstep.models.adapters.lora_reading import in_order, read_lora
from fewstep.models.source import Diffusers
from support_unets import stable_diffusion
from tiny_models import TINY, shared

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
RANK, ALPHA = 2, 6.0
LAYER = "blocks.1.attn1.to_out.0"
AUTHORS = "blocks.1.self_attn.o"


@pytest.fixture(scope="module")
def wan() -> VideoModel:
    return VideoModel.from_pretrained(shared("wan"))


@pytest.fixture(scope="module")
def experts() -> VideoModel:
    return VideoModel.from_pretrained(shared("wan_experts"))


def matrices(out: int, into: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    down = Rng(seed).randn((RANK, *into), "down")
    return down, Rng(seed).randn((out, RANK, *[1] * (len(into) - 1)), "up")


def write(path: Path, **tensors: Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def change(model: VideoModel, source: Path) -> dict[str, Tensor]:
    """What a LoRA adds to the weights that it changes."""
    before, after = model.denoiser.state_dict(), model.with_lora(source).denoiser.state_dict()
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


# --- namings ------------------------------------------------------------------------------------------------------------------

NAMINGS = {
    "diffusers": (f"transformer.{LAYER}", "lora_A.weight", "lora_B.weight"),
    "diffusers, no prefix": (LAYER, "lora_A.weight", "lora_B.weight"),
    "ComfyUI": (f"diffusion_model.{AUTHORS}", "lora_down.weight", "lora_up.weight"),
    "ComfyUI, whole model": (f"model.diffusion_model.{AUTHORS}", "lora_down.weight", "lora_up.weight"),
    "authors, no prefix": (AUTHORS, "lora_down.weight", "lora_up.weight"),
    "kohya": ("lora_unet_" + AUTHORS.replace(".", "_"), "lora_down.weight", "lora_up.weight"),
    "OneTrainer": ("lora_transformer_" + LAYER.replace(".", "_"), "lora_down.weight", "lora_up.weight"),
    "peft": (f"base_model.model.{LAYER}", "lora_A.default.weight", "lora_B.default.weight"),
    "old diffusers": (f"transformer.{LAYER}", "lora.down.weight", "lora.up.weight"),
    "ours": (f"base_model.model.backbone.{LAYER}", "lora_A.weight", "lora_B.weight"),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_is_the_same_update(wan: VideoModel, naming: str, tmp_path: Path) -> None:
    layer, a, b = NAMINGS[naming]
    down, up = matrices(24, (24,))
    tensors = {f"{layer}.{a}": down, f"{layer}.{b}": up, f"{layer}.alpha": torch.tensor(ALPHA)}
    changed = change(wan, write(tmp_path / "lora.safetensors", **tensors))
    assert changed.keys() == {f"backbone.{LAYER}.weight"}
    torch.testing.assert_close(changed[f"backbone.{LAYER}.weight"], ALPHA / RANK * up @ down, atol=1e-5, rtol=1e-5)


def test_names_of_attention_processors_are_read(tmp_path: Path) -> None:
    """As diffusers wrote LoRAs before it had peft."""
    stable_diffusion().save_pretrained(tmp_path / "sd")
    model = VideoModel.from_pretrained(tmp_path / "sd")
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    down, up = matrices(8, (8,))
    tensors = {
        f"unet.{layer}.processor.to_{x}_lora.{m}.weight": t
        for x in ("q", "out")
        for m, t in (("down", down), ("up", up))
    }
    changed = change(model, write(tmp_path / "lora.safetensors", **tensors))
    here = "backbone.blocks.0.inner.attentions.0.transformer_blocks.0.attn1"
    assert changed.keys() == {f"{here}.to_q.weight", f"{here}.to_out.0.weight"}
    for value in changed.values():
        torch.testing.assert_close(value, up @ down, atol=1e-5, rtol=1e-5)


def test_diffusers_makes_the_same_of_differences_and_alphas(wan: VideoModel, tmp_path: Path) -> None:
    """A file as LightX2V writes it: alphas, biases, and norms that diffusers leaves out where they are zero."""
    tensors: dict[str, Tensor] = {}
    for seed, (layer, out, into) in enumerate(
        (("self_attn.q", 24, 24), ("cross_attn.k", 24, 24), ("ffn.0", 32, 24), ("ffn.2", 24, 32))
    ):
        for block in (0, 1):
            name = f"diffusion_model.blocks.{block}.{layer}"
            down, up = matrices(out, (into,), seed + 10 * block)
            tensors |= {
                f"{name}.lora_down.weight": down,
                f"{name}.lora_up.weight": up,
                f"{name}.alpha": torch.tensor(ALPHA),
            }
            tensors[f"{name}.diff_b"] = Rng(seed).randn((out,), "bias")
    tensors["diffusion_model.blocks.0.norm3.diff"] = torch.zeros(24)
    file = write(tmp_path / "lora.safetensors", **tensors)
    pipe = WanPipeline.from_pretrained(shared("wan"))
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    ours = wan.with_lora(file).denoiser.backbone.state_dict()
    theirs = pipe.transformer.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)
    assert len(change(wan, file)) == 16


def test_differences_are_added_as_they_are(wan: VideoModel, tmp_path: Path) -> None:
    """Of a bias, a norm, a whole weight, a patch embedding and a modulation: no alpha counts for them."""
    shapes = {
        "blocks.0.self_attn.q.diff_b": ("blocks.0.attn1.to_q.bias", (24,)),
        "blocks.0.norm3.diff": ("blocks.0.norm2.weight", (24,)),
        "head.head.diff": ("proj_out.weight", (16, 24)),
        "patch_embedding.diff": ("patch_embedding.weight", (24, 4, 1, 2, 2)),
        "blocks.1.diff_m": ("blocks.1.scale_shift_table", (1, 6, 24)),
        "head.modulation.diff": ("scale_shift_table", (1, 2, 24)),
    }
    tensors = {f"diffusion_model.{name}": Rng(0).randn(shape, name) for name, (_, shape) in shapes.items()}
    changed = change(wan, write(tmp_path / "lora.safetensors", **tensors))
    assert changed.keys() == {f"backbone.{own}" for own, _ in shapes.values()}
    for name, (own, _) in shapes.items():
        torch.testing.assert_close(changed[f"backbone.{own}"], tensors[f"diffusion_model.{name}"], atol=1e-5, rtol=1e-5)


def test_the_bias_of_peft_is_as_strong_as_its_matrices(wan: VideoModel, tmp_path: Path) -> None:
    down, up = matrices(24, (24,))
    bias = Rng(3).randn((24,), "bias")
    tensors = {
        f"{LAYER}.lora_A.weight": down,
        f"{LAYER}.lora_B.weight": up,
        f"{LAYER}.lora_B.bias": bias,
        f"{LAYER}.alpha": torch.tensor(ALPHA),
    }
    changed = change(wan, write(tmp_path / "lora.safetensors", **tensors))
    torch.testing.assert_close(changed[f"backbone.{LAYER}.bias"], ALPHA / RANK * bias, atol=1e-5, rtol=1e-5)


def test_convolutions_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    """kohya's names over a U-Net: kernels of 3 x 3 and of 1 x 1, and linear layers."""
    stable_diffusion().save_pretrained(tmp_path / "sd")
    model = VideoModel.from_pretrained(tmp_path / "sd")
    layers = {
        "down_blocks_0_resnets_0_conv1": (8, (8, 3, 3)), "down_blocks_0_attentions_0_proj_in": (8, (8, 1, 1)),
        "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (8, (8,)), "mid_block_resnets_0_time_emb_proj": (16, (32,)),
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for seed, (layer, (out, into)) in enumerate(layers.items()):
        down, up = matrices(out, into, seed)
        name = f"lora_unet_{layer}"
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(ALPHA),
        }
    file = write(tmp_path / "lora.safetensors", **tensors)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    backbone = model.with_lora(file).denoiser.backbone
    theirs, changed = pipe.unet.state_dict(), change(model, file)
    assert len(changed) == len(layers)
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(value, theirs[backbone.foreign(name)], atol=1e-5, rtol=1e-5)


# --- two experts --------------------------------------------------------------------------------------------------------------


def pair(folder: Path, high: str, low: str) -> tuple[Path, dict[str, Tensor]]:
    """A LoRA for each expert, under one name, and the update of each."""
    updates = {}
    for seed, (file, expert) in enumerate(((high, "0"), (low, "1"))):
        down, up = matrices(24, (24,), seed)
        write(
            folder / file,
            **{f"diffusion_model.{AUTHORS}.lora_down.weight": down, f"diffusion_model.{AUTHORS}.lora_up.weight": up},
        )
        updates[expert] = up @ down
    return folder, updates


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("high_noise_model.safetensors", "low_noise_model.safetensors"),
        ("Wan2.2-Lightning_lora_HIGH_fp16.safetensors", "Wan2.2-Lightning_lora_LOW_fp16.safetensors"),
        ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors"),
    ],
)  # fmt: skip
def test_each_expert_gets_its_own_file(experts: VideoModel, high: str, low: str, tmp_path: Path) -> None:
    folder, updates = pair(tmp_path / "lora", high, low)
    changed = change(experts, folder)
    assert len(changed) == 2
    for expert, update in updates.items():
        name = f"backbone.blocks.1.experts.{expert}.{LAYER.removeprefix('blocks.1.')}.weight"
        torch.testing.assert_close(changed[name], update, atol=1e-5, rtol=1e-5)


def test_one_file_may_name_both_experts(experts: VideoModel, tmp_path: Path) -> None:
    """As diffusers saves the LoRAs of two transformers."""
    tensors = {}
    for seed, folder in enumerate(("transformer", "transformer_2")):
        down, up = matrices(24, (24,), seed)
        tensors |= {f"{folder}.{LAYER}.lora_A.weight": down, f"{folder}.{LAYER}.lora_B.weight": up}
    changed = change(experts, write(tmp_path / "lora.safetensors", **tensors))
    assert sorted(name.split(".")[4] for name in changed) == ["0", "1"]


def test_half_a_lora_is_refused(experts: VideoModel, tmp_path: Path) -> None:
    """A file for one expert says what to do, whoever's names it has; so do two files that do not say whose they are."""
    folder, _ = pair(tmp_path / "lora", "high_noise_model.safetensors", "low_noise_model.safetensors")
    with pytest.raises(ValueError, match="file for each.*high and low"):
        experts.with_lora(folder / "high_noise_model.safetensors")
    down, up = matrices(24, (24,))
    half = write(
        tmp_path / "half.safetensors",
        **{f"transformer.{LAYER}.lora_A.weight": down, f"transformer.{LAYER}.lora_B.weight": up},
    )
    with pytest.raises(ValueError, match="changes nothing in transformer_2"):
        experts.with_lora(half)
    (folder / "low_noise_model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(ValueError, match="do not say whose they are"):
        experts.with_lora(folder)
    (folder / "third.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="there are 3 .*file for each"):
        experts.with_lora(folder)


def test_low_is_not_read_in_other_words() -> None:
    """A name with both words, or with one of them inside another word, does not say whose it is."""
    for one, two in (("x_high", "slow_other"), ("high_low", "low"), ("high", "high2")):
        with pytest.raises(ValueError, match="whose they are"):
            in_order([Path(f"{one}.safetensors"), Path(f"{two}.safetensors")])
    files = [Path("b_low.safetensors"), Path("z_HIGH.safetensors")]
    assert in_order(files) == (files[1], files[0])


# --- refusals -----------------------------------------------------------------------------------------------------------------


def refused(model: VideoModel, tmp_path: Path, match: str, **tensors: Tensor) -> None:
    with pytest.raises(ValueError, match=match):
        model.with_lora(write(tmp_path / "lora.safetensors", **tensors))


def test_the_first_name_that_is_not_understood_is_told(wan: VideoModel, tmp_path: Path) -> None:
    down, up = matrices(24, (24,))
    good = {f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}
    accepted = r"first zz\.hada_w1_a; .*transformer\.blocks\.0.*diffusion_model\..*lora_unet_.*without prefix.*diff_b"
    refused(wan, tmp_path, accepted, **good, **{"zz.hada_w1_a": down})
    refused(wan, tmp_path, "belong to no layer", **{"lora_unet_blocks_9_self_attn_q.lora_down.weight": down})
    refused(wan, tmp_path, "belong to no layer", **{f"{LAYER}.dora_scale": down})


def test_what_does_not_fit_is_refused(wan: VideoModel, tmp_path: Path) -> None:
    down, up = matrices(24, (24,))
    refused(
        wan, tmp_path, "made for another model", **{f"{LAYER}.lora_A.weight": down[:, :8], f"{LAYER}.lora_B.weight": up}
    )
    refused(
        wan, tmp_path, "made for another model", **{f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up[:, :1]}
    )
    twice = {f"{LAYER}.alpha": torch.tensor(1.0), f"transformer.{LAYER}.alpha": torch.tensor(2.0)}
    refused(wan, tmp_path, "says again what another tensor says", **twice)
    refused(wan, tmp_path, "has no lora_B", **{f"{LAYER}.lora_A.weight": down})
    refused(wan, tmp_path, "has no lora_A", **{f"{LAYER}.alpha": torch.tensor(1.0)})
    refused(wan, tmp_path, "difference of .*bias is", **{f"{LAYER}.diff_b": torch.ones(3)})
    refused(wan.transformed(Int8()), tmp_path, "quantised here", **{f"{LAYER}.diff": torch.ones(24, 24)})


def test_reading_leaves_the_base_as_it_was(wan: VideoModel, tmp_path: Path) -> None:
    before = copy.deepcopy(wan.denoiser.state_dict())
    down, up = matrices(24, (24,))
    file = write(
        tmp_path / "lora.safetensors",
        **{f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up, f"{LAYER}.diff_b": torch.ones(24)},
    )
    wan.with_lora(file)
    assert all(torch.equal(value, before[name]) for name, value in wan.denoiser.state_dict().items())
    updates = read_lora(wan.denoiser, file)
    assert updates.layers.keys() == {f"backbone.{LAYER}"} and updates.whole.keys() == {f"backbone.{LAYER}.bias"}


# --- by a name on the hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A hub with three repositories; what is downloaded from it is noted."""
    down, up = (x.contiguous() for x in matrices(24, (24,)))
    tensors = {f"transformer.{LAYER}.lora_A.weight": down, f"transformer.{LAYER}.lora_B.weight": up}
    for name in ("one/style.safetensors", "many/a.safetensors", "many/deep/b.safetensors"):
        write(tmp_path / "me" / name, **tensors)
    asked: list[list[str]] = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.append([repo, *allow_patterns])
        return str(tmp_path / repo)

    def listed(repo: str) -> list[str]:
        if not (tmp_path / repo).is_dir():
            raise OSError(f"no repository {repo}")
        return sorted(str(path.relative_to(tmp_path / repo)) for path in (tmp_path / repo).rglob("*.safetensors"))

    monkeypatch.setattr(lora_hub, "snapshot_download", download)
    monkeypatch.setattr(lora_hub, "list_repo_files", listed)
    monkeypatch.chdir(tmp_path.parent)
    return asked


def test_a_lora_is_downloaded_by_its_name(hub: list[list[str]], wan: VideoModel, tmp_path: Path) -> None:
    """The same update as of the file, and no other file of the repository."""
    expected = change(wan, tmp_path / "me/one/style.safetensors")
    assert expected and hub == []
    for source in ("me/one", "me/many/a.safetensors", "me/many/deep/b.safetensors"):
        found = change(wan, source)  # type: ignore[arg-type]
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert hub == [["me/one", "style.safetensors"], ["me/many", "a.safetensors"], ["me/many", "deep/b.safetensors"]]


REFUSED_NAMES = {
    "me/many": "has 2 .safetensors files (a.safetensors, deep/b.safetensors), and a LoRA of this model is one; give one by",
    "me/none": "me/none: there is no such file or folder, and the hub did not give it: no repository me/none",
    "me/one/other.safetensors": "the repository me/one has no other.safetensors",
    "loras/style.safetensors": "no such file or folder",
}


@pytest.mark.parametrize("source", REFUSED_NAMES)
def test_names_without_a_lora_are_refused(source: str, hub: list[list[str]], wan: VideoModel) -> None:
    with pytest.raises(FileNotFoundError) as error:
        wan.with_lora(source)
    assert REFUSED_NAMES[source] in str(error.value)


def test_two_experts_take_two_files_of_a_repository(hub: list[list[str]], experts: VideoModel, tmp_path: Path) -> None:
    down, up = matrices(24, (24,))
    for name in ("high_noise.safetensors", "low_noise.safetensors"):
        write(tmp_path / "me/both" / name, **{f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up})
    expected = change(experts, tmp_path / "me/both")
    assert len(expected) == 2 and change(experts, "me/both").keys() == expected.keys()  # type: ignore[arg-type]
    assert hub == [["me/both", "high_noise.safetensors", "low_noise.safetensors"]]


def test_a_recipe_takes_a_name_and_loads_nothing_for_its_card(hub: list[list[str]]) -> None:
    source = Diffusers(source=str(shared("wan")), lora="me/one", **TINY["wan"].size)
    assert source.card().provenance["lora"] == "me/one" and hub == []
    with pytest.raises(FileNotFoundError, match="is not there; give a LoRA file or folder, or a hub name"):
        Diffusers(source=str(shared("wan")), lora="loras/style.safetensors", **TINY["wan"].size).card()


def test_sample_merges_loras_and_makes_the_clip_again(hub: list[list[str]]) -> None:
    words = [
        "sample",
        str(shared("wan")),
        "--prompt",
        "a cat",
        "--quiet",
        "--num-frames",
        "5",
        "--height",
        "32",
        "--width",
        "48",
    ]
    words += ["--num-inference-steps", "2", "--force"]
    assert main([*words, "--output", "plain.gif"]) == 0
    assert main([*words, "--lora", "me/one", "--output", "styled.gif"]) == 0
    assert main(["sample", "--like", "styled.gif", "--output", "again.gif", "--quiet"]) == 0
    plain, styled, again = (Path(f"{name}.gif").read_bytes() for name in ("plain", "styled", "again"))
    assert plain != styled == again and hub == [["me/one", "style.safetensors"]] * 2
