"""Named randomness, the finite check, and conditions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewstep.core import Call, Cond, KVView, Rng, Seeds
from fewstep.core.call import Constants, Negative, Place
from fewstep.core.finite import NonFiniteError, require_finite
from fewstep.diffusion import CFG, Prediction, RectifiedFlow


def test_same_name_same_numbers() -> None:
    assert torch.equal(Rng(3, 5, 1).randn((4,), "eps"), Rng(3, 5, 1).randn((4,), "eps"))


@pytest.mark.parametrize("other", [Rng(4, 5, 1), Rng(3, 6, 1), Rng(3, 5, 0), Rng(3, 5, 1).fold("child")])
def test_any_other_coordinate_gives_other_numbers(other: Rng) -> None:
    assert not torch.equal(Rng(3, 5, 1).randn((4,), "eps"), other.randn((4,), "eps"))


def test_another_name_gives_other_numbers() -> None:
    assert not torch.equal(Rng(3).randn((4,), "eps"), Rng(3).randn((4,), "noise"))


def test_shared_numbers_agree_across_places() -> None:
    exits = [[Rng(0, step, place).integer("exit", 1000) for step in range(20)] for place in range(3)]
    assert exits[0] == exits[1] == exits[2]
    assert len(set(exits[0])) > 10


def test_integers_of_clips_differ_across_places_and_reach_every_value() -> None:
    drawn = [Rng(0, 0, place).integers((40,), "index", 4).tolist() for place in range(2)]
    assert drawn[0] != drawn[1] and set(drawn[0]) == {0, 1, 2, 3}


def test_a_clips_seed_gives_its_noise_in_any_batch() -> None:
    both = Seeds((3, 7)).randn((2, 4), "eps")
    assert torch.equal(both[1], Seeds((7,)).randn((1, 4), "eps")[0]) and not torch.equal(both[0], both[1])
    assert not torch.equal(both, Seeds((3, 7)).randn((2, 4), "noise"))
    with pytest.raises(ValueError, match="2 seeds were given for 3 clips"):
        Seeds((3, 7)).randn((3, 4), "eps")


def test_drawing_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Rng(1).randn((8,), "eps")
    assert torch.equal(before, torch.get_rng_state())


def test_at_and_fold_keep_the_rest() -> None:
    rng = Rng(1, 2, 3).at(step=9)
    assert (rng.seed, rng.step, rng.place) == (1, 9, 3)
    assert Rng(1, 2, 3).at(place=0) == Rng(1, 2, 0) and Rng(1, 2, 3).at(step=0) == Rng(1, 0, 3)
    assert Rng(1).fold("a").seed != Rng(2).fold("a").seed
    assert rng.fold("a") == rng.fold("a") != rng.fold("b")


def test_moments() -> None:
    x = Rng(0).randn((50_000,), "eps")
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02
    counts = Rng(0).integers((50_000,), "index", 4).bincount()
    assert counts.min() > 12_000


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_is_named(bad: float) -> None:
    with pytest.raises(NonFiniteError, match=r"loss of critic: 1 of 3 values"):
        require_finite(torch.tensor([0.0, bad, 1.0]), "loss of critic")


def test_finite_numbers_pass() -> None:
    require_finite(torch.ones(3), "x")


def test_everything_in_a_condition_travels_together() -> None:
    def cond(value: float, batch: int = 2) -> Cond:
        full = {"pooled": torch.full((batch, 5), value), "image": torch.full((batch, 2, 3, 4, 4), value)}
        return Cond(torch.full((batch, 3, 4), value), torch.ones(batch, 3, dtype=torch.bool), full)

    both = Cond.cat([cond(1.0), cond(2.0)])
    assert [len(x) for x in both.tensors] == [4] * 4 and both.extra["pooled"][:, 0].tolist() == [1, 1, 2, 2]
    assert both[1:3].extra["image"][:, 0, 0, 0, 0].tolist() == [1, 2]
    assert both[torch.tensor([3, 0])].extra["pooled"][:, 0].tolist() == [2, 1]
    assert cond(1.0, 1).expand(3).extra["image"].shape == (3, 2, 3, 4, 4)
    mixed = cond(1.0).where(torch.tensor([True, False]), cond(2.0))
    assert [x.flatten(1)[:, 0].tolist() for x in (mixed.text, *mixed.extra.values())] == [[1, 2]] * 3
    assert {x.device.type for x in both.to("meta").tensors} == {"meta"}
    with pytest.raises(ValueError, match="different extras cannot be one batch: image, pooled; none"):
        Cond.cat([cond(1.0), Cond(cond(1.0).text, cond(1.0).mask)])


def test_guidance_reads_both_conditions_whole() -> None:
    def net(x_t: torch.Tensor, t: torch.Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        return Prediction(x_t * 0 + cond.extra["pooled"][:, :, None, None, None], "flow", x_t, t, RectifiedFlow())

    def cond(value: float) -> Cond:
        return Cond(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool), {"pooled": torch.full((2, 1), value)})

    guided = CFG(scale=3.0)(net, torch.zeros(2, 1, 1, 1, 1), torch.ones(2), cond(1.0), cond(0.5))
    assert torch.equal(guided.raw, torch.full_like(guided.raw, 0.5 + 3 * 0.5))


def test_a_plain_call_is_the_only_one_of_its_clip() -> None:
    assert Call() == Call(step=0, steps=1, branch="cond", kv=None, shared=None)
    state = object()
    assert Call().runner(lambda seen: [seen], state, Place(0, 1, Call())) == [state]  # type: ignore[arg-type, type-var, comparison-overlap]
    assert Call().positions(3).tolist() == [0, 1, 2]


def test_guidance_hands_the_call_on() -> None:
    """With everything that it says; and where it makes one call of both conditions, it says so."""
    seen: list[Call] = []

    def net(x_t: torch.Tensor, t: torch.Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        seen.append(call)
        return Prediction(x_t, "flow", x_t, t, RectifiedFlow())

    one, call = Cond(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool)), Call(step=2, steps=5)
    for guidance in (CFG(), CFG(scale=3.0)):
        guidance(net, torch.zeros(2, 1, 1, 1, 1), torch.ones(2), one, one, call)
    assert seen == [call, replace(call, branch="both")]


def test_guidance_in_two_calls_asks_for_the_prompt_first() -> None:
    """Each call is of the clips alone; the negative prompt itself is pushed away from nothing."""
    seen: list[tuple[Call, float]] = []

    def net(x_t: torch.Tensor, t: torch.Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        seen.append((call, float(cond.text.sum())))
        return Prediction(x_t + cond.text[0, 0, 0], "flow", x_t, t, RectifiedFlow())

    one, other = (Cond(torch.full((2, 1, 1), v), torch.ones(2, 1, dtype=torch.bool)) for v in (1.0, 3.0))
    call = Call(step=2, steps=5, constants=Constants(), negative=Negative(other, torch.add))
    made = CFG(scale=3.0)(net, torch.zeros(2, 1, 1, 1, 1), torch.ones(2), one, other, call, calls="two")
    assert made.raw.flatten().tolist() == [3 + 3 * (1 - 3)] * 2
    assert seen == [(call, 2.0), (replace(call, branch="uncond", negative=None), 6.0)]
    stream = replace(call, kv=KVView((), torch.zeros(0), torch.tensor(0)))
    with pytest.raises(ValueError, match="a stream's past is read by both prompts in one call"):
        CFG(scale=3.0)(net, torch.zeros(2, 1, 1, 1, 1), torch.ones(2), one, other, stream, calls="two")


def test_branches_have_constants_of_their_own() -> None:
    call = Call(constants=Constants())
    assert call.constant("words", lambda: 1) == call.constant("words", lambda: 2) == 1
    assert replace(call, branch="both").constant("words", lambda: 3) == 3
    assert replace(call, step=1).constant("words", lambda: 4) == 1
    assert Call().constant("words", lambda: 5) == 5 and Call().constant("words", lambda: 6) == 6
