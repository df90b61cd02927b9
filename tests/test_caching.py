"""Cache policies: the identity where they promise it, the counts they state, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fewstep.attention import KVCache
from fewstep.caching import CACHES, CachePolicy, SkipMiddle
from fewstep.core import Call, Cond
from fewstep.core.call import Place, Runner
from fewstep.diffusion import RectifiedFlow
from fewstep.models import Denoiser, VideoDiT

LAYERS, STEPS = 5, 6
EXAMPLES: list[CachePolicy] = [
    SkipMiddle(every=1), SkipMiddle(), SkipMiddle(every=3, first=2, last=0), SkipMiddle(first=0, last=LAYERS)
]  # fmt: skip
every_example = pytest.mark.parametrize("policy", EXAMPLES, ids=str)


@pytest.fixture(scope="module")
def network() -> Denoiser:
    torch.manual_seed(0)
    backbone = VideoDiT(channels=2, width=24, depth=LAYERS, heads=2, text_width=8)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return Denoiser(backbone, RectifiedFlow(), "flow").double().requires_grad_(False)


def cond_of(seed: int) -> Cond:
    states = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Cond(states, torch.ones(2, 3, dtype=torch.bool))


def noise(seed: int) -> Tensor:
    return torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def euler(network: Denoiser, x: Tensor, cond: Cond, call: Call) -> Iterator[Tensor]:
    """Step by step, so that two runs can take turns."""
    for step in range(STEPS):
        t = torch.full((len(x),), 1 - step / STEPS, dtype=x.dtype)
        x = x - network(x, t, cond, replace(call, step=step, steps=STEPS)).flow / STEPS
        yield x


def last(steps: Iterator[Tensor]) -> Tensor:
    *_, x = steps
    return x


def counting(runner: Runner, run: list[tuple[int, int]]) -> Runner:
    def counted(block: Callable[[object], object], state: object, place: Place) -> object:
        def noted(s: object) -> object:
            run.append((place.call.step, place.layer))
            return block(s)

        return runner(noted, state, place)

    return counted  # type: ignore[return-value]


def test_every_policy_has_an_example_that_changes_nothing() -> None:
    assert {type(policy) for policy in EXAMPLES} == set(CACHES) == {type(p) for p in EXAMPLES if p.exact}


@every_example
def test_the_identity_where_it_is_promised(policy: CachePolicy, network: Denoiser) -> None:
    plain = last(euler(network, noise(1), cond_of(1), Call()))
    cached = last(euler(network, noise(1), cond_of(1), Call(runner=policy.begin())))
    saves = policy.share(STEPS, LAYERS) < 1
    assert torch.equal(plain, cached) is not saves
    assert not (policy.exact and saves)


@every_example
def test_the_blocks_that_it_says_are_run(policy: CachePolicy, network: Denoiser) -> None:
    run: list[tuple[int, int]] = []
    last(euler(network, noise(1), cond_of(1), Call(runner=counting(policy.begin(), run))))
    assert run == [(step, layer) for step in range(STEPS) for layer in policy.runs(step, STEPS, LAYERS)]
    assert len(run) == pytest.approx(policy.share(STEPS, LAYERS) * STEPS * LAYERS)


@every_example
def test_two_runs_that_take_turns_are_two_runs(policy: CachePolicy, network: Denoiser) -> None:
    alone = [last(euler(network, noise(i), cond_of(i), Call(runner=policy.begin()))) for i in (1, 2)]
    one, two = (euler(network, noise(i), cond_of(i), Call(runner=policy.begin())) for i in (1, 2))
    *_, together = zip(one, two, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@every_example
def test_branches_are_remembered_apart(policy: CachePolicy, network: Denoiser) -> None:
    runner = policy.begin()
    alone = last(euler(network, noise(1), cond_of(1), Call(runner=policy.begin())))
    one = euler(network, noise(1), cond_of(1), Call(runner=runner, branch="cond"))
    two = euler(network, noise(1), cond_of(2), Call(runner=runner, branch="uncond"))
    *_, (together, _) = zip(one, two, strict=True)
    assert torch.equal(alone, together)


@every_example
def test_a_run_that_is_given_up_leaves_nothing_behind(policy: CachePolicy, network: Denoiser) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in network.named_modules()}
    given_up = euler(network, noise(1), cond_of(1), Call(runner=policy.begin()))
    next(given_up)
    given_up.close()
    assert {name: set(vars(module)) for name, module in network.named_modules()} == attributes
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_a_call_that_fails_half_way_does_not_count(network: Denoiser) -> None:
    """What is remembered is of the last step that was finished."""
    policy, stopped = SkipMiddle(), SkipMiddle().begin()
    x, cond, t = noise(1), cond_of(1), torch.full((2,), 0.5, dtype=torch.float64)
    network(x, t, cond, Call(step=0, steps=STEPS, runner=stopped))

    def failing(block: Callable[[object], object], state: object, place: Place) -> object:
        if place.layer == 2:
            raise KeyboardInterrupt
        return stopped(block, state, place)  # type: ignore[type-var]

    with pytest.raises(KeyboardInterrupt):
        network(noise(2), t, cond_of(2), Call(step=2, steps=STEPS, runner=failing))  # type: ignore[arg-type]
    other = policy.begin()
    network(x, t, cond, Call(step=0, steps=STEPS, runner=other))
    kept, expected = (network(x, t, cond, Call(step=1, steps=STEPS, runner=r)).raw for r in (stopped, other))
    assert torch.equal(kept, expected)


def test_skipped_blocks_add_what_they_added_before(network: Denoiser) -> None:
    """By the formula, block by block."""
    runner, cond, backbone = SkipMiddle(first=1, last=1).begin(), cond_of(1), network.backbone
    t = torch.full((2,), 0.9, dtype=torch.float64)
    network(noise(1), t, cond, Call(step=0, steps=2, runner=runner))
    states = list(backbone.walk(backbone.embed(noise(1), t, cond)))
    added = states[LAYERS - 2].x_BNE - states[0].x_BNE
    now = backbone.blocks[0](backbone.embed(noise(2), t - 0.5, cond))
    now = backbone.blocks[-1](replace(now, x_BNE=now.x_BNE + added))
    made = network(noise(2), t - 0.5, cond, Call(step=1, steps=2, runner=runner)).raw
    torch.testing.assert_close(made, backbone.head(now), atol=1e-12, rtol=0)


def test_skipped_blocks_leave_nothing_to_commit(network: Denoiser) -> None:
    x, cond, t = noise(1), cond_of(1), torch.full((2,), 0.5, dtype=torch.float64)
    view, runner = network.recall(KVCache.empty(), x), SkipMiddle().begin()
    assert network(x, t, cond, Call(step=0, steps=2, kv=view, runner=runner)).kv is not None
    assert network(x, t, cond, Call(step=1, steps=2, kv=view, runner=runner)).kv is None


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="every must be at least 1"):
        SkipMiddle(every=0)


@dataclass(frozen=True)
class Number:
    """The least that flows from block to block."""

    x: Tensor
    route: Hashable = None

    @property
    def streams(self) -> tuple[Tensor, ...]:
        return (self.x,)

    def with_streams(self, streams: Sequence[Tensor]) -> Number:
        return replace(self, x=streams[0])


def middle(runner: Runner, start: Number, step: int, by: float = 1.0) -> Tensor:
    """After the one block between the first and the last, which multiplies."""
    made: Number = runner(
        lambda state: replace(state, x=(1 + by) * state.x), start, Place(1, 3, Call(step=step, steps=2))
    )
    return made.x


def test_routes_are_remembered_apart() -> None:
    """What one expert added says nothing of another."""
    runner, one = SkipMiddle().begin(), torch.ones(2)
    for route, by in (("noisy", 3.0), ("clean", 5.0)):
        middle(runner, Number(one, route), 0, by)
    assert middle(runner, Number(10 * one, "noisy"), 1).tolist() == [13, 13]
    assert middle(runner, Number(10 * one, "clean"), 1).tolist() == [15, 15]


def test_what_is_remembered_keeps_no_graph() -> None:
    runner, before, now = SkipMiddle().begin(), torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    middle(runner, Number(before), 0)
    middle(runner, Number(now), 1).sum().backward()
    assert before.grad is None and now.grad is not None and now.grad.tolist() == [1, 1]
