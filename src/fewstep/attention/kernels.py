"""Attention kernels: one function, a table of the kernels of this machine, and the choice of one (`attending`).

Legend: B batch, H heads, N queries, M keys, D head dimension.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Tier = Literal["auto", "reference", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "sdpa-math"]
"""Who computes attention. auto: the fastest that takes the inputs. reference: plain products in float64, and every pattern by
its mask. The others: this kernel of torch and no other."""

_SDPA = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}

_SHORT = 1024
"""Up to so many keys, two matmuls and a softmax beat the CPU's flash kernel in bfloat16 (by 2-3x at 24 and 256 keys)."""


def attend(q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, `[B, H, N, D]`. `mask` broadcasts to `[B, H, N, M]`: bool, True = may look, or numbers that are added
    to the logits."""
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q_BHND.dtype)
    own = _has_matmul(q_BHND.device.type, q_BHND.dtype) and k_BHMD.shape[2] <= _SHORT
    if own and _chosen.tier == "auto":
        return _matmul(q_BHND, k_BHMD, v_BHMD, mask)
    return F.scaled_dot_product_attention(q_BHND, k_BHMD, v_BHMD, attn_mask=mask)


def _matmul(q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, mask: Tensor | None) -> Tensor:
    scores_BHNM = (q_BHND * q_BHND.shape[-1] ** -0.5) @ k_BHMD.transpose(-1, -2)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q_BHND.dtype).masked_fill(~mask, float("-inf"))
        scores_BHNM = scores_BHNM + mask
    return scores_BHNM.softmax(-1) @ v_BHMD


class _Choice:
    """The tier of this process, like the kernels that torch may use (`sdpa_kernel`)."""

    tier: Tier = "auto"


_chosen = _Choice()


@contextmanager
def attending(tier: Tier) -> Iterator[None]:
    """Inside, `tier` computes all attention. ValueError for inputs that its kernel does not take."""
    if tier == "auto":
        yield
        return
    before, _chosen.tier = _chosen.tier, tier
    try:
        with _Reference() if tier == "reference" else sdpa_kernel(_SDPA[tier]):
            yield
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise ValueError(
            f"attention {tier} does not take the inputs of this model (their masks, sizes or types); choose auto"
        ) from error
    finally:
        _chosen.tier = before


def by_reference() -> bool:
    """Whether attention is computed by its definition now."""
    return _chosen.tier == "reference"


def require_tier(tier: Tier, device: str, dtype: torch.dtype) -> None:
    """ValueError for a kernel that this machine does not have for masked inputs of `dtype` on `device`."""
    if tier not in _SDPA:
        return
    found = {backend.name: backend for backend in backends(device, dtype)}
    if not found[tier].available:
        have = [name for name in get_args(Tier) if name not in found or found[name].available]
        why = found[tier].why.rstrip(".")
        raise ValueError(f"attention {tier} does not run here ({why}); choose one of {', '.join(have)}")


class _Reference(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` is what its documentation says, in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = _exactly if func is F.scaled_dot_product_attention else func
        return run(*args, **(kwargs or {}))


def _exactly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    **others: Any,
) -> Tensor:
    if any(others.values()):
        raise ValueError("the reference knows attention with a mask and a scale only; choose attention auto")
    with torch.autocast(query.device.type, enabled=False):
        scores = query.double() @ key.double().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            bool_mask = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, float("-inf")) if bool_mask else scores + attn_mask
        return (scores.softmax(-1) @ value.double()).to(value.dtype)


@dataclass(frozen=True)
class Backend:
    """One way to compute attention on this machine."""

    name: str
    available: bool
    why: str


def backends(device: str | None = None, dtype: torch.dtype = torch.bfloat16) -> list[Backend]:
    """Every known backend, tried on a tiny masked problem of `dtype` on `device` (default: the fastest here)."""
    device = device or _best_device()
    return [_own(device, dtype), *(_try_sdpa(name, kernel, device, dtype) for name, kernel in _SDPA.items()), _flex()]


def pick(device: str | None = None, dtype: torch.dtype = torch.bfloat16) -> Backend:
    """The backend `attend` ends up in for short masked inputs of `dtype` on `device`, and why."""
    device = device or _best_device()
    own = _own(device, dtype)
    if own.available:
        return own
    q, mask = _tiny(device, dtype)
    chosen = SDPBackend(
        torch._fused_sdp_choice(q, q, q, attn_mask=mask)
    )  # what scaled_dot_product_attention itself asks
    name = next(name for name, kernel in _SDPA.items() if kernel.value == chosen.value)
    return Backend(name, True, "torch's own choice for this problem")


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _has_matmul(device: str, dtype: torch.dtype) -> bool:
    return device == "cpu" and dtype == torch.bfloat16


def _own(device: str, dtype: torch.dtype) -> Backend:
    if not _has_matmul(device, dtype):
        return Backend("matmul", False, f"for bfloat16 on the CPU only; this is {_short(dtype)} on {device}")
    return Backend("matmul", True, f"in bfloat16 up to {_SHORT} keys, where it beats the CPU's flash kernel")


def _try_sdpa(name: str, kernel: SDPBackend, device: str, dtype: torch.dtype) -> Backend:
    if device == "cpu" and kernel in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        return Backend(name, False, "a CUDA kernel; this device is cpu")
    q, mask = _tiny(device, dtype)
    try:
        with sdpa_kernel(kernel):
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    except RuntimeError as error:
        return Backend(name, False, str(error).strip().splitlines()[0])
    return Backend(name, True, f"ran a masked {_short(dtype)} problem on {device}")


def _tiny(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q = torch.zeros(1, 1, 8, 16, dtype=dtype, device=device)
    return q, torch.ones(8, 8, dtype=torch.bool, device=device)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _flex() -> Backend:
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        return Backend("flex", False, "this torch has no flex_attention")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return Backend("flex", False, "needs a C++ compiler for torch.compile; none found")
    return Backend("flex", False, "could be compiled here, but no pattern of this version uses it")
