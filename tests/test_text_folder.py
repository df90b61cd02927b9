"""Text states of known prompts: sampling reads them from a folder, and loads no text encoder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.cli import main
from fewstep.core import Cond
from fewstep.data import texts
from fewstep.data.base import DataError
from fewstep.data.text_folder import ENCODERS, TextFolder, filled
from fewstep.data.texts import Texts
from fewstep.diffusion import CFG, Contract
from fewstep.models import TextEncoder, VideoModel, needs
from fewstep.models.bundle import read_card
from fewstep.models.needs import DECODING, DENOISING, READING
from fewstep.models.runtime import Runtime
from support_engine import tiny_model
from tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("single_thread")
PROMPTS = ("a red ball", "a blue box moves left")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    contract = Contract(steps=2, guidance=CFG(scale=3.0))
    tiny_model().with_card(contract=contract, negative_prompt="a grey box").save("tiny")
    return "tiny"


def sampled(*words: Any) -> bytes:
    """The clip of a command."""
    assert main(["sample", *map(str, words), "--output", "clip.webp", "--quiet"]) == 0
    return Path("clip.webp").read_bytes()


def test_known_prompts_need_no_text_encoder(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder works before the other networks are there; later it is not built at all; and new prompts are added."""
    loaded: list[tuple[str, ...]] = []
    load = VideoModel.load.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        VideoModel, "load", classmethod(lambda *a, **o: (loaded.append(tuple(a[1].parts)), load(*a, **o))[1])
    )
    plain = sampled(folder, "--prompt", PROMPTS[0])
    assert sampled(folder, "--prompt", PROMPTS[0], "--texts", "texts") == plain
    assert loaded[1:] == [("text",), ("denoiser", "codec", "features")]
    loaded.clear()
    monkeypatch.setattr(TextEncoder, "encode", lambda *_: pytest.fail("encoded again"))
    assert sampled(folder, "--prompt", PROMPTS[0], "--texts", "texts") == plain
    assert loaded == [("denoiser", "codec", "features")]


def test_prompts_that_are_missing_are_added(folder: str) -> None:
    card, prompts = read_card(folder), (*PROMPTS, "a grey box")
    found = filled("texts", card, folder, ("a red ball", "a grey box"))
    assert found.missing(prompts) == (PROMPTS[1],)
    with pytest.raises(KeyError, match="a blue box"):
        found(PROMPTS)
    found = filled("texts", card, folder, prompts)
    assert found.missing(prompts) == () and len(found.readers) == 2
    model = VideoModel.from_pretrained(folder)
    alone = Cond.cat([model.text.encode([prompt]) for prompt in prompts])
    made = found(prompts)
    assert torch.equal(made.text, alone.text) and torch.equal(made.mask, alone.mask)
    expected = model.latents(list(PROMPTS), seed=3)
    silent = VideoModel(model.card, {name: part for name, part in model.parts.items() if name != "text"})
    torch.testing.assert_close(silent.latents(list(PROMPTS), seed=3, texts=found), expected, rtol=1e-4, atol=1e-4)
    cond, uncond = silent.conditions(PROMPTS, texts=found)
    assert torch.equal(cond.text, made.text[:2]) and torch.equal(uncond.text[1], made.text[2])


def test_a_folder_of_training_serves_sampling_and_the_other_way_round(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, card = VideoModel.from_pretrained(folder), read_card(folder)
    Texts(model, frozenset({"prompts"}), "cache", PROMPTS)
    filled("own", card, folder, PROMPTS)
    monkeypatch.setattr(texts, "_encode", lambda encoder, prompt: pytest.fail(f"encoded {prompt!r} again"))
    assert not filled("cache", card, folder, (*PROMPTS, "a grey box")).missing(PROMPTS)
    Texts(model, frozenset({"prompts"}), "own", PROMPTS)
    (store,) = Path("cache").iterdir()
    assert not filled(store, card, folder, PROMPTS).missing(PROMPTS), "one store alone"


def test_states_of_another_encoder_are_refused(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(seed=1).save("other")
    filled("texts", read_card("other"), "other", PROMPTS)
    own, its = (read_card(name).fingerprints["text"] for name in (folder, "other"))
    with pytest.raises(
        DataError, match=rf"another text encoder \({its}\), not of this model's \({own}\); give another"
    ):
        TextFolder("texts", own, 12)
    assert main(["sample", folder, "--prompt", "a red ball", "--texts", "texts", "--output", "x.gif"]) == 2
    assert "texts holds text states of another text encoder" in " ".join(capsys.readouterr().err.split())
    filled("texts/mine", read_card(folder), folder, PROMPTS)  # beside each other each reads its own
    assert TextFolder("texts/mine", own, 12).readers


def test_the_plan_leaves_out_an_encoder_that_is_not_loaded(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    card = read_card(folder)
    beside, alone, absent = (needs.needs(card, Runtime(), encoder=where) for where in ("beside", "alone", "absent"))
    text = beside.weights["text"]
    assert (beside.alone, alone.alone, absent.alone) == (0, text, 0)
    assert absent.weights == alone.weights == {name: size for name, size in beside.weights.items() if name != "text"}
    for phase in (DENOISING, DECODING):
        assert beside.total(phase, "none") - alone.total(phase, "none") == text
    assert alone.resident(READING, "none") == text and absent.resident(READING, "none") == 0
    assert alone.resident(READING, "block") == 0, "there it works on the CPU"
    words = ["sample", folder, "--prompt", PROMPTS[0], "--texts", "texts", "--dry-run"]
    assert main(words) == 0
    assert "loaded alone and left before the others are" in capsys.readouterr().out
    filled("texts", card, folder, (PROMPTS[0], "a grey box"))
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "text" not in [line.split()[0] for line in said.splitlines() if line.strip()] and "loaded alone" not in said


def test_the_encoder_of_a_layout_is_known_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is loaded to learn its fingerprint, once; and again when its files have changed."""
    pytest.importorskip("diffusers", reason="needs the extra diffusers")
    from fewstep.models.adapters.conditions.t5 import T5Text

    folder = save_tiny("wan", tmp_path / "wan")
    card, cache = read_card(folder), tmp_path / "texts"
    assert TextFolder.known(cache, card) is None
    filled(cache, card, str(folder), PROMPTS)
    with monkeypatch.context() as later:
        later.setattr(T5Text, "load", lambda *_: pytest.fail("loaded the text encoder"))
        assert not filled(cache, card, str(folder), PROMPTS).missing(PROMPTS)
        assert TextFolder.known(cache, replace(card, name="other")) is not None
        (weights,) = (folder / "text_encoder").glob("*.safetensors")
        os.utime(weights, ns=(0, 1))
        assert TextFolder.known(cache, card) is None
    assert not filled(cache, card, str(folder), PROMPTS).missing(PROMPTS)
    (cache / ENCODERS).write_text("{")
    with pytest.raises(DataError, match=r"encoders.json is damaged .*; delete it, and it is made again"):
        TextFolder.known(cache, card)
