"""A role says all of itself: how it is made, from what, whether it is trained and whose weights it starts with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.attention import KVCache
from fewstep.core import Batch, Call, Cond, KVView, Losses, Rng
from fewstep.core.call import Place, S
from fewstep.engine.nets import build_nets, origin, sources, trained_roles
from fewstep.engine.outline import Outline
from fewstep.engine.prepare import prepare
from fewstep.engine.views import View
from fewstep.methods import DMD2, ROLES, Copy, Decoder, Heads, Judge, Making, Method, Nets, Other, Role, Update, Weak
from fewstep.methods.targets import mse
from fewstep.models import Denoiser, Lora, fingerprint
from fewstep.models.lora import duplicate
from fewstep.models.spread import Spread
from support_engine import FRAMES, Everything, TinyImages, small, stored_card, tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")


@dataclass(frozen=True)
class Start(Role):
    """A role that stays what another was in the beginning: all that is needed to add one."""

    of: str = "student"

    @property
    def needs(self) -> str:
        return self.of

    @property
    def origin(self) -> str:
        return self.of

    @property
    def trainable(self) -> bool:
        return False

    def make(self, name: str, making: Making) -> nn.Module:
        return duplicate(making.roles[self.of])


@dataclass(frozen=True)
class Gain(Role):
    """A trained role that is no network of the model's: one number."""

    def make(self, name: str, making: Making) -> nn.Module:
        return nn.Linear(1, 1, bias=False, device=making.device)


@dataclass(frozen=True, kw_only=True)
class Anchored(Method):
    """Stays near its start, scaled by a learned number."""

    cite = "nobody"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"prompts", "x0"})

    def aux(self) -> dict[str, Role]:
        return {"start": Start(), "gain": Gain()}

    def updates(self, step: int) -> Iterator[Update]:
        yield Update(("student", "gain"), self.loss)

    def loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        x0 = batch.require("x0")
        t = rng.rand((len(x0),), "t")
        seen = [net(x0, t, batch.cond).raw for net in (nets.student, nets.start)]
        yield {"anchor": mse(nets.gain(seen[0][..., None])[..., 0], seen[1].detach())}


def test_a_new_role_is_one_class(tmp_path: Path) -> None:
    """Made, outlined, prepared, trained and kept without a word about it anywhere else."""
    method = Anchored()
    assert trained_roles(method, 3) == ("student", "gain") and sources(method) == {}
    assert (
        origin(method, "start", {"teacher"}) == "teacher"
        and origin(method, "start", {"teacher", "student"}) == "student"
    )
    model = tiny_model()
    card = stored_card(model)
    plan = Outline.of(card, method, small(2), FRAMES).plan()
    assert {h.role: h.trained for h in plan.holdings}.items() >= {"start": 0, "gain": 1}.items()
    run = prepare(model, method, Everything(), small(2), tmp_path)
    start = {name: p.clone() for name, p in run.nets.roles["start"].state_dict().items()}
    run.iterate()
    assert all(torch.equal(p, start[name]) for name, p in run.nets.roles["start"].state_dict().items())
    assert not torch.equal(next(run.nets.roles["student"].parameters()), next(run.nets.roles["start"].parameters()))
    assert {"student", "gain"} <= run.changing.keys()


MADE: dict[type[Role], Role] = {
    Copy: Copy(),
    Heads: Heads(),
    Weak: Weak("student", 0.5),
    Other: Other(TinyImages()),
    Decoder: Decoder(),
    Judge: Judge("world/features"),
}


@pytest.mark.parametrize("cls", ROLES, ids=lambda cls: cls.__name__)
def test_what_a_role_says_is_so(cls: type[Role]) -> None:
    role, model = MADE[cls], tiny_model()
    teacher = model.denoiser.requires_grad_(False)
    roles: dict[str, nn.Module] = {"teacher": teacher}
    roles["student"] = Copy().make("student", Making(roles=roles, lora=Lora(rank=2)))
    others = {} if role.source is None else {"new": role.source.load()}
    made = role.make("new", Making(roles=roles, others=others, codec=model.codec))
    assert role.needs is None or role.needs in roles
    assert (role.source is not None) == (cls is Other) and (not others or made is others["new"].denoiser)
    assert role.trainable == (cls in (Copy, Heads))
    if role.origin is not None:
        base = roles[role.origin]
        assert isinstance(made, Denoiser) and isinstance(base, Denoiser)
        held = base.state_dict()
        assert all(torch.equal(mine, held[name]) for name, mine in made.state_dict().items())


def test_what_a_role_cannot_be_made_from_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wanting(DMD2):
        role: Role = Copy("critc")

        def aux(self) -> dict[str, Role]:
            return {**super().aux(), "new": self.role}

    with pytest.raises(ValueError, match="role 'new' is made from 'critc', which this run does not have"):
        build_nets(tiny_model(), Wanting(), 0)
    with pytest.raises(ValueError, match=r"layers must be from -2 to 1, .*; got \[5\]"):
        build_nets(tiny_model(), Wanting(role=Heads(layers=(5,))), 0)
    with pytest.raises(ValueError, match="set settings.lora, or method.scorers.weak: 0"):
        prepare(tiny_model(), replace(Wanting(), role=Weak("critic", 0.5)), Everything(), small(2), Path())


def test_adapters_depend_on_the_seed() -> None:
    """The same for all roles of one source, and the same again for the same seed."""
    one, again, other = (build_nets(tiny_model(), DMD2(), seed, Lora(rank=2)) for seed in (0, 0, 1))
    assert fingerprint(one.student) == fingerprint(one.critic) == fingerprint(again.student)
    assert fingerprint(one.student) != fingerprint(other.student)


def nothing(block: object, state: S, place: Place) -> S:
    """Runs no block."""
    return state


def asked() -> tuple[Tensor, Tensor, Cond]:
    rng = Rng(0)
    cond = Cond(rng.randn((2, 3, 16), "text"), torch.ones(2, 3, dtype=torch.bool))
    return rng.randn((2, 4, FRAMES, 8, 8), "x"), torch.full((2,), 0.5), cond


def test_a_runs_calls_have_its_processes_and_their_own_facts() -> None:
    network, (x, t, cond) = tiny_model().denoiser, asked()
    processes: Any = object()
    call = Spread(shared=processes)(Call(step=2, steps=4))
    assert call == Call(step=2, steps=4, shared=processes)
    skipped = network(x, t, cond, Call(runner=nothing)).raw
    assert torch.equal(network(x, t, cond, Spread(checkpointing=True)(Call(runner=nothing))).raw, skipped)
    assert not torch.equal(network(x, t, cond, Spread(checkpointing=True)(Call())).raw, skipped)


def test_a_view_tells_of_every_call() -> None:
    """And makes each in the run's way, also those that nobody hears of."""
    network, (x, t, cond), heard, recalled = tiny_model().denoiser, asked(), [], []

    class Ear:
        def hear(self, role: str, x_t: Tensor, t: Tensor) -> None:
            heard.append(role)

    class Skipping(Spread):
        def __call__(self, call: Call) -> Call:
            return replace(call, runner=nothing)

    def recall(memory: KVCache, x_t: Tensor, call: Call = Call()) -> KVView:
        recalled.append(call)
        return Denoiser.recall(network, memory, x_t, call)

    network.recall = recall  # type: ignore[method-assign]
    view, skipped = View("critic", network, Skipping(), (Ear(),)), Call(runner=nothing)
    assert torch.equal(view(x, t, cond).raw, network(x, t, cond, skipped).raw)
    assert heard == ["critic"]
    slopes = [net.jvp(x, t, cond, x, t, call)[1].raw for net, call in ((view, Call()), (network, skipped))]
    assert torch.equal(*slopes) and heard == ["critic"] * 2
    taps = [net.features(x, t, cond, [-1], call)[0] for net, call in ((view, Call()), (network, skipped))]
    assert torch.equal(*taps)
    view.recall(KVCache.empty(), x)
    assert recalled == [skipped] and heard == ["critic"] * 2
