"""Muon: the update is orthogonal, as large as AdamW's, and that of torch's own Muon up to rounding."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from fewstep.engine import muon
from fewstep.engine.muon import Muon, orthogonalised

SHAPES = [(24, 24), (16, 64), (64, 16)]


def gradients(shape: tuple[int, int], count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int], narrow: bool) -> None:
    (matrix,) = gradients(shape, 1)
    with mock.patch.object(muon, "has_bfloat16", return_value=narrow):
        result = orthogonalised(100 * matrix)
    assert result.dtype == torch.float32 and result.shape == shape
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = (left.mT @ result @ right.mT).diagonal()  # its singular values, in the order of those of the matrix
    usual = values > 0.1 * values[0]
    assert bool((found[usual] > 0.6).all()) and bool((found < 1.3).all())
    off = left.mT @ result @ right.mT - found.diag()
    assert float(off.norm() / found.norm()) < (0.02 if narrow else 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_updates_are_those_of_torchs_muon(shape: tuple[int, int]) -> None:
    """Decay, Nesterov's momentum and size; torch multiplies in bfloat16."""
    start = torch.ones(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = Muon([ours], lr=0.1, weight_decay=0.3)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients(shape, 4):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
        moved = (theirs.detach() - start).norm()
        assert float((ours.detach() - theirs.detach()).norm() / moved) < 0.03
    assert set(optimizer.state[ours]) == set(reference.state[theirs]) == {"momentum_buffer"}
    torch.testing.assert_close(optimizer.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"])


def test_without_bfloat16_arithmetic_it_multiplies_in_float32() -> None:
    (matrix,) = gradients((16, 32), 1)
    with mock.patch.object(muon, "has_bfloat16", return_value=False):
        wide = orthogonalised(matrix)
    with mock.patch.object(muon, "has_bfloat16", return_value=True):
        narrow = orthogonalised(matrix)
    assert torch.equal(narrow, narrow.bfloat16().float()) and not torch.equal(wide, wide.bfloat16().float())


def test_weights_without_a_gradient_stay() -> None:
    used, unused = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))
    used.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    Muon([used, unused], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(unused, torch.ones(4, 4)) and not torch.equal(used, torch.ones(4, 4))


def test_a_gradient_of_zeros_moves_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.zeros(4, 4)
    Muon([parameter], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(parameter, torch.ones(4, 4))
