"""The grammar reads back everything it writes, and refuses what it cannot read."""

import itertools
import math

import pytest
import torch

from fewstep.core import Rng
from fewstep.world.data import AT_ONCE
from fewstep.world.grammar import ATTRIBUTES, EXAMPLE, Scene, describe, paraphrase, parse, sample_scenes

GOOD = parse(EXAMPLE)


def every_scene() -> list[Scene]:
    return [Scene.from_indices(i) for i in itertools.product(*(range(len(v)) for v in ATTRIBUTES.values()))]


def test_every_scene_survives_its_description_and_a_paraphrase():
    generator = torch.Generator().manual_seed(0)
    for scene in every_scene():
        assert parse(describe(scene)) == scene
        sentence = paraphrase(scene, generator)
        assert parse(sentence) == scene, sentence


def test_canonical_sentence_and_indices():
    assert describe(GOOD) == EXAMPLE
    assert GOOD.to_indices() == (3, 0, 0, 3, 0, 1)
    assert Scene.from_indices(GOOD.to_indices()) == GOOD


def test_paraphrases_vary_in_words_and_order():
    generator = torch.Generator().manual_seed(0)
    sentences = {paraphrase(GOOD, generator) for _ in range(500)}
    assert len(sentences) > 400
    assert {s.split()[0] for s in sentences} >= {"a", "over", "on"}
    assert any("hoop" in s for s in sentences) and any("ring" in s for s in sentences)


@pytest.mark.parametrize(
    ("prompt", "canonical"),
    [
        (
            "A BIG green disc, drifting rapidly to the upper right on a dark green backdrop.",
            "a large green circle moves quickly up-right over a forest background",
        ),
        (
            "over a dark red field a tiny bright red plus sign glides straight down at a slow pace",
            "a small red cross moves slowly down over a maroon background",
        ),
        (
            "a slow little blue box heading left and down over navy blue",
            "a small blue square moves slowly down-left over a navy background",
        ),
        (
            "a huge white star travels up, over a grey background, fast",
            "a large white star moves quickly up over a gray background",
        ),
    ],
)
def test_reads_sentences_nobody_wrote_for_it(prompt, canonical):
    assert describe(parse(prompt)) == canonical


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("a small red ring moves slowly over a navy background", "direction is missing"),
        (
            "a red small ring moves slowly left and right over a navy background",
            r"direction is ambiguous \(left and right\)",
        ),
        ("a small red ring and a star moves slowly left over a navy background", "shape is ambiguous"),
        ("a small purple ring moves slowly left over a navy background", "colour is missing.*unknown words: purple"),
        ("a small red ring and 2 dogs move slowly left over a navy background", "unknown words: 2, dogs"),
        ("a small green ring moves slowly left over a green background", "background is missing"),
        ("", "shape is missing.*background is missing"),
    ],
)
def test_refusal_names_the_attribute_and_shows_a_good_prompt(prompt, fault):
    with pytest.raises(ValueError, match=fault) as error:
        parse(prompt)
    assert EXAMPLE in str(error.value)


def test_scene_refuses_unknown_values_and_indices():
    with pytest.raises(ValueError, match=r"Scene\.shape is 'blob'; accepted: circle"):
        Scene(shape="blob", colour="red", size="small", direction="up", speed="slowly", background="navy")
    with pytest.raises(ValueError, match="index 9 of colour"):
        Scene.from_indices((0, 9, 0, 0, 0, 0))
    with pytest.raises(ValueError, match="6 indices"):
        Scene.from_indices((0, 0))


def test_sampling_is_reproducible_and_covers_every_value():
    first, again = (sample_scenes(400, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == again
    for name, values in ATTRIBUTES.items():
        assert {getattr(scene, name) for scene in first} == set(values)


def test_the_world_has_as_many_scenes_as_the_docs_say():
    assert math.prod(map(len, ATTRIBUTES.values())) == 9216
    pools = [Rng(seed, step=start).local("pool") for seed in (0, 1) for start in range(0, 8192, AT_ONCE)]
    seen = {scene.to_indices() for generator in pools for scene in sample_scenes(AT_ONCE, generator)}
    assert round(len(seen) / 9216, 2) == 0.83  # the shipped teacher's two runs: teacher.yaml, teacher_motion.yaml
