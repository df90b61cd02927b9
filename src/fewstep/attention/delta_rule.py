"""The gated delta rule (2412.06464): keys and values in a matrix of fixed size, token by token or many at once.

    M_t = a_t M_(t-1) (I - b_t k_t k_t') + b_t v_t k_t'          a = exp(decay), b = strength, k of length 1

With `u_t = b_t (v_t - a_t M_(t-1) k_t)` this is `M_t = a_t M_(t-1) + u_t k_t'`, so the `u` of a run of tokens are the solution of
one triangular system: `folded` solves it for `BLOCK` tokens at a time. Legend: as in `pattern.py`; V channels of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
"""Tokens of one triangular system."""


def folded(state_BHVD: Tensor, k_BHND: Tensor, v_BHNV: Tensor, decay_BHN: Tensor, strength_BHN: Tensor) -> Tensor:
    """The state after N tokens, oldest first. `decay` is at most 0, `strength` from 0 to 1; keys of any length."""
    state, k_BHND = state_BHVD, F.normalize(k_BHND, dim=-1)
    runs = zip(*(x.split(BLOCK, 2) for x in (k_BHND, v_BHNV, decay_BHN, strength_BHN)), strict=True)
    for k, v, decay, strength in runs:
        since = decay.cumsum(-1)  # log of what is left of the state of before, after each token
        between = (since[..., :, None] - since[..., None, :]).tril().exp()
        system = (strength[..., None] * between * (k @ k.mT)).tril(-1)
        wanted = strength[..., None] * (v - since.exp()[..., None] * (k @ state.mT))
        one = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
        u = torch.linalg.solve_triangular(one + system, wanted, upper=False, unitriangular=True)
        left = since[..., -1:]
        state = left.exp()[..., None] * state + (u * (left - since).exp()[..., None]).mT @ k
    return state


def empty_state(k_BHND: Tensor, width: int) -> Tensor:
    """A state `[B, H, V, D]` that nothing was written to, for values of `width` channels."""
    wide = torch.promote_types(k_BHND.dtype, torch.float32)
    return k_BHND.new_zeros(*k_BHND.shape[:2], width, k_BHND.shape[3], dtype=wide)
