"""Derivatives in forward mode: of attention, block by block, and of what a prediction says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.attention import attend
from fewstep.attention.forward_mode import forward_mode
from fewstep.core import Cond
from fewstep.core.ledger import Ledger
from fewstep.diffusion import EDM, KINDS, VP, Betas, Kind, NoisePath, Prediction, RectifiedFlow, Trig
from fewstep.diffusion.prediction import Tangent
from support_engine import tiny_model

B, H, N, M, D = 2, 3, 5, 7, 8
MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "rows": lambda: torch.tensor([[True] * (M - 2 + i // 2) + [False] * (2 - i // 2) for i in range(N)]),
    "padding": lambda: torch.tensor([True] * 4 + [False] * 3).expand(B, 1, 1, M),
    "added": lambda: torch.linspace(-2, 2, N * M).reshape(N, M).double(),
}


def drawn(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, n, D, generator=generator, dtype=torch.float64) for n in lengths]


def dual(
    attention: Callable[..., Tensor], primals: list[Tensor], tangents: list[Tensor | None]
) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        duals = [x if d is None else forward_ad.make_dual(x, d) for x, d in zip(primals, tangents, strict=True)]
        found = forward_ad.unpack_dual(attention(*duals))
        assert found.tangent is not None
        return found.primal, found.tangent


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("moving", ["qkv", "q", "k", "v", "kv"])
@pytest.mark.parametrize("scores", [2**24, 2 * B * H * M, 1])
def test_attention_moves_as_the_math_kernel_says(mask: str, moving: str, scores: int) -> None:
    primals, seen = drawn(N, M, M), MASKS[mask]()
    tangents = [d if name in moving else None for name, d in zip("qkv", drawn(N, M, M, seed=1), strict=True)]
    with sdpa_kernel(SDPBackend.MATH):
        expected = dual(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, seen, scale=0.3), primals, tangents)
    with forward_mode(scores):
        found = dual(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, seen, scale=0.3), primals, tangents)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_attention_without_derivatives_is_left_alone() -> None:
    q, k, v = drawn(N, M, M)
    with forward_mode(), forward_ad.dual_level():
        out = attend(q, k, v)
        assert forward_ad.unpack_dual(out).tangent is None
    assert torch.equal(out, attend(q, k, v))


def test_what_forward_mode_cannot_do_is_refused() -> None:
    q, k, v = drawn(N, M, M)
    causal = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    with forward_mode(), pytest.raises(ValueError, match="'is_causal': True"):
        dual(causal, [q, k, v], [q, k, v])


def test_bfloat16_is_derived_in_float32() -> None:
    exact = drawn(N, M, M)
    moving = drawn(N, M, M, seed=1)
    with forward_mode(), torch.autocast("cpu", torch.bfloat16):
        found = dual(F.scaled_dot_product_attention, [x.bfloat16() for x in exact], [x.bfloat16() for x in moving])
    rounded = [[x.bfloat16().double() for x in xs] for xs in (exact, moving)]
    with forward_mode():
        expected = dual(F.scaled_dot_product_attention, *rounded)  # type: ignore[arg-type]
    assert found[1].dtype == torch.bfloat16
    assert (
        float((found[1].double() - expected[1]).abs().max() / expected[1].abs().max()) < 2**-8
    )  # one rounding, at the end


def peak(tokens: int) -> int:
    """Bytes alive at most while the derivative is made, inputs and outputs included."""
    primals, tangents = drawn(tokens, tokens, tokens), drawn(tokens, tokens, tokens, seed=1)
    with Ledger() as ledger, forward_mode(2**14):
        for x in (*primals, *tangents):
            ledger.note(x)
        dual(F.scaled_dot_product_attention, primals, tangents)  # type: ignore[arg-type]
    return ledger.peak


def test_memory_does_not_grow_with_the_square_of_the_tokens() -> None:
    short, long = peak(256), peak(1024)
    assert long < 4.1 * short
    assert long < 1024 * 1024 * B * H * 8 / 8  # an eighth of the scores alone


# --- what a prediction says ---------------------------------------------------------------------------------------------------

PATHS: tuple[NoisePath, ...] = (RectifiedFlow(), Trig(), VP(), EDM(sigma_min=0.02, sigma_max=5.0), Betas())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_frame", [False, True], ids=["clip", "frame"])
def test_every_view_moves_as_finite_differences_say(path: NoisePath, kind: Kind, per_frame: bool) -> None:
    x, dx, draw = (drawn(1, seed=seed)[0][:, :, :, :4, None] for seed in range(3))  # [B, C, F, h, w]
    x, dx, draw = (torch.cat([y, 2 * y], 2) for y in (x, dx, draw))
    t = torch.tensor([[0.3004, 0.6502], [0.4506, 0.8004]], dtype=torch.float64)
    dt = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=torch.float64)
    t, dt = (t, dt) if per_frame else (t[:, 0], dt[:, 0])
    raw = lambda x, t: (0.3 * x).sin() + draw * (t if per_frame else t[:, None])[:, None, :, None, None] ** 2  # noqa: E731
    moved = lambda e: Prediction(raw(x + e * dx, t + e * dt), kind, x + e * dx, t + e * dt, path)  # noqa: E731
    h = 1e-6
    difference: Callable[[Callable[[Prediction], Tensor]], Tensor] = lambda view: (  # noqa: E731
        (view(moved(h)) - view(moved(-h))) / (2 * h)
    )
    tangent = Tangent(difference(lambda at: at.raw), dx, dt, moved(0.0))
    views: dict[str, Any] = {"x0": lambda at: at.x0, "eps": lambda at: at.eps, "flow": lambda at: at.flow}
    for name, view in views.items():
        expected, found = difference(view), getattr(tangent, name)
        assert float((found - expected).norm() / expected.norm()) < 1e-7, name
    score = tangent.of(lambda at: at.score)
    assert float((score - difference(lambda at: at.score)).norm() / score.norm()) < 1e-7


def test_a_denoisers_derivative_is_constant_and_its_prediction_is_not() -> None:
    network = tiny_model().denoiser
    x, dx = torch.randn(2, 2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t, cond = torch.tensor([0.3, 0.8]), Cond(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool))
    prediction, tangent = network.jvp(x, t, cond, dx, torch.ones(2))
    assert torch.equal(prediction.raw, network(x, t, cond).raw) and prediction.raw.requires_grad
    assert not tangent.raw.requires_grad and not tangent.x0.requires_grad and tangent.at is prediction
    with torch.no_grad():
        once, same = network.jvp(x, t, cond, dx, torch.ones(2))
    assert torch.equal(same.raw, tangent.raw) and torch.equal(same.x0, tangent.x0)
    torch.testing.assert_close(once.raw, prediction.raw, atol=1e-5, rtol=0)
