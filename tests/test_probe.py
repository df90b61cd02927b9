"""The rule by which a run's best student is chosen."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fewstep.engine import WorldProbe
from support_engine import tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")


def test_the_rule_is_the_mean_of_accuracy_less_the_logarithm_of_the_distance(tmp_path: Path) -> None:
    model = tiny_model()
    model.save(tmp_path)
    scores = WorldProbe(features=str(tmp_path), prompts=2, steps=(1, 2), frechet_weight=0.3)(model)
    each = [scores[f"accuracy@{n}"] - 0.3 * math.log(scores[f"frechet@{n}"]) for n in (1, 2)]
    assert scores["rule"] == pytest.approx(sum(each) / 2)
    assert scores["frechet@1"] != scores["frechet@2"] and scores["diversity@1"] > 0


def test_better_is_strictly_more() -> None:
    probe = WorldProbe()
    assert probe.better({"rule": 0.1}, {}) and probe.better({"rule": 0.2}, {"rule": 0.1})
    assert not probe.better({"rule": 0.1}, {"rule": 0.1}) and not probe.better({"rule": 0.0}, {"rule": 0.1})
