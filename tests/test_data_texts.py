"""Text states that are encoded once, stored, and read from there."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fewstep.core import Rng
from fewstep.data import Progress, Prompts, StoredPairs, remembered, store, texts
from fewstep.data.base import Data
from fewstep.data.pairs import PairPlan, make_pairs
from fewstep.data.texts import Texts
from fewstep.engine.loop import prepare
from fewstep.methods import DMD2, KnowledgeDistillation
from fewstep.models import TextEncoder, VideoModel, fingerprint
from fewstep.world.data import WorldClips
from support_engine import FRAMES, small, tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")
PROMPTS = ("a red ball", "a blue box moves left", "a red ball")
NEEDS = frozenset({"prompts"})


class Deaf(torch.nn.Module):
    """Stands for an encoder that must not be asked."""

    def encode(self, prompts):
        raise AssertionError(f"encoded {prompts} again")


class Halved(TextEncoder):
    """An encoder with bfloat16 weights, whose states come as float32."""

    def __init__(self, **args) -> None:
        super().__init__(**args)
        self.to(torch.bfloat16)

    def encode(self, prompts):
        cond = super().encode(prompts)
        return replace(cond, text=cond.text.float())


def test_stored_states_are_the_encoder_s_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_model()
    fresh, stored = Texts(model, NEEDS), Texts(model, NEEDS, tmp_path, PROMPTS)
    stored.encoder = Deaf()  # type: ignore[assignment]
    for a, b in zip(fresh(PROMPTS, "cpu"), stored(PROMPTS, "cpu"), strict=True):
        assert torch.equal(a.text, b.text) and torch.equal(a.mask, b.mask)


def test_conditions_are_those_of_the_prompts_in_their_order(tmp_path: Path) -> None:
    tiny = tiny_model()
    model = VideoModel(replace(tiny.card, negative_prompt="a grey box"), tiny.parts)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(sorted({*PROMPTS, "a green star", "nothing"})))
    batch = Prompts(path=str(file)).open(model, NEEDS).batch(4, Rng(0))
    assert len(set(batch.prompts)) == 4
    for row, prompt in enumerate(batch.prompts):
        alone = model.text.encode([prompt])
        torch.testing.assert_close(batch.cond.text[row], alone.text[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(batch.cond.mask[row], alone.mask[0])
    negative = model.text.encode(["a grey box"]).text.expand(4, -1, -1)
    torch.testing.assert_close(batch.uncond.text, negative, rtol=1e-5, atol=1e-5)


def test_they_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Texts(tiny_model(), NEEDS, tmp_path, PROMPTS)
    monkeypatch.setattr(texts, "_encode", lambda encoder, prompt: pytest.fail(f"encoded {prompt!r} again"))
    again = Texts(tiny_model(), NEEDS, tmp_path, PROMPTS)
    assert again.stored is not None
    assert list(again.stored.captions) == ["", "a blue box moves left", "a red ball"]
    with pytest.raises(KeyError, match="a green cow"):
        again(["a green cow"], "cpu")


def test_states_are_stored_as_long_and_as_narrow_as_they_are(tmp_path: Path) -> None:
    model = tiny_model()
    model.parts["text"] = Halved(**model.text.args)  # type: ignore[arg-type]
    fresh, stored = Texts(model, NEEDS), Texts(model, NEEDS, tmp_path, PROMPTS)
    (file,) = tmp_path.rglob("shard-00000.safetensors")
    with safe_open(file, "pt") as shard:
        states = [shard.get_tensor(f"text.{row}") for row in range(3)]
    assert {x.dtype for x in states} == {torch.bfloat16}
    assert [len(x) for x in states] == [1, 6, 4]  # "", "a blue box moves left", "a red ball", each with its begin
    for a, b in zip(fresh(PROMPTS, "cpu"), stored(PROMPTS, "cpu"), strict=True):
        assert torch.equal(a.text, b.text) and torch.equal(a.mask, b.mask)


def test_padded_states_of_earlier_versions_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with monkeypatch.context() as earlier:
        earlier.setattr(store, "RAGGED", frozenset())
        earlier.setattr(texts, "_encode", lambda encoder, prompt: encoder.encode([prompt]))  # with its padding
        with torch.no_grad():
            before = Texts(model, NEEDS, tmp_path, PROMPTS)
    monkeypatch.setattr(texts, "_encode", lambda encoder, prompt: pytest.fail(f"encoded {prompt!r} again"))
    (file,) = tmp_path.rglob("shard-00000.safetensors")
    with safe_open(file, "pt") as shard:
        assert shard.get_tensor("text").shape == (3, model.text.length, model.text.width)
    assert torch.equal(Texts(model, NEEDS, tmp_path, PROMPTS)(PROMPTS, "cpu")[0].text, before(PROMPTS, "cpu")[0].text)


def test_progress_counts_prompts_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PART", 4)
    monkeypatch.setattr(texts, "SHARD", 2)
    model, prompts = tiny_model(), [f"prompt {number}" for number in range(8)]  # and the negative one
    seen: list[int] = []

    def killing(event: Progress) -> None:
        seen.append(event.done)
        if event.done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        texts.store_texts(model, prompts, tmp_path, progress=killing)
    texts.store_texts(model, prompts, tmp_path, progress=lambda event: seen.append(event.done))
    assert seen == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9]


def test_what_is_kept_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Texts(tiny_model(), NEEDS)
    monkeypatch.setattr(remembered, "ROOM", 3000)
    for number in range(40):
        held([f"prompt number {number}"], "cpu")
        assert held.states.bytes == sum(x.nbytes for cond in held.states.known.values() for x in cond.tensors) <= 3000
    assert 1 < len(held.states.known) < 40


def test_another_encoder_or_other_prompts_have_a_folder_of_their_own(tmp_path: Path) -> None:
    for seed, prompts in ((0, PROMPTS), (1, PROMPTS), (0, PROMPTS[:1])):
        Texts(tiny_model(seed), NEEDS, tmp_path, prompts)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_run_on_stored_texts_is_the_same_run(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    figures = []
    for cache in ("", str(tmp_path / "texts")):
        model = tiny_model()
        run = prepare(model, DMD2(critic_updates=1), Prompts(path=str(file), text_cache=cache), small(2), tmp_path)
        if cache:
            model.parts["text"] = Deaf()
        run.iterate()
        figures.append(run.figures)
    assert figures[0] == figures[1]


def test_pairs_too(tmp_path: Path) -> None:
    model = tiny_model()
    make_pairs(model, PROMPTS[:2], tmp_path / "pairs", PairPlan(times=(1.0, 0.5, 0.0), steps=2))
    data = StoredPairs(path=str(tmp_path / "pairs"), text_cache=str(tmp_path / "texts"))
    source = data.open(model, KnowledgeDistillation().needs)
    source.texts.encoder = Deaf()  # type: ignore[attr-defined]
    assert len(source.batch(2, Rng(0)).cond) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_encoder_is_not_where_the_training_is(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    model: VideoModel = tiny_model()
    data = Prompts(path=str(file), text_cache=str(tmp_path / "texts"))
    before = fingerprint(model.text)
    run = prepare(model, DMD2(critic_updates=1), data, small(1, device="cuda", preview_every=1), tmp_path)
    run.iterate()
    assert next(model.text.parameters()).device.type == "cpu" and model.device.type == "cuda"
    assert run.student()(["a red ball"], num_inference_steps=4).shape[2] == FRAMES and fingerprint(model.text) == before


def test_every_kind_of_data_says_whether_texts_are_stored_and_how_long_clips_are() -> None:
    """Fields where there is something to say; a plan and a run ask all data alike."""
    assert (Prompts(path="p").text_cache, Prompts(path="p", text_cache="t").text_cache) == ("", "t")
    assert Prompts(path="p").num_frames is None and WorldClips(num_frames=8).num_frames == 8
    assert not {"text_cache", "num_frames"} & {field.name for field in fields(Data)}  # nobody accepts and ignores one
    assert WorldClips().text_cache == "" and "text_cache" not in {field.name for field in fields(WorldClips)}
