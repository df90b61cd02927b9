"""Available devices, and the error for a missing one."""

from __future__ import annotations

import torch


def require_device(name: str, option: str) -> None:
    """ValueError, naming the `option`, for a device that this machine does not have."""
    require_device_name(name, option)
    device, have = torch.device(name), torch.accelerator.current_accelerator()
    if device.type == "cpu":
        return
    if have is None or have.type != device.type:
        raise ValueError(f"{option} {name}: this machine has {have.type if have else 'only cpu'}")
    count = torch.accelerator.device_count()
    if (device.index or 0) >= count:
        raise ValueError(f"{option} {name}: this machine has {count} of them, from {have.type}:0 on")


def require_device_name(name: str, option: str) -> None:
    """ValueError for what is no device on any machine."""
    try:
        kind = torch.device(name).type
    except (RuntimeError, ValueError):
        kind = ""
    if kind in ("", "meta"):
        raise ValueError(f"{option} {name!r} is no device; write cpu, cuda or cuda:1")


def has_bfloat16() -> bool:
    """Whether the processor has bfloat16 arithmetic. Without it `autocast: bf16` is slower on it than float32, not faster."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def emulated(arithmetic: str, device: str) -> str:
    """What to add where this arithmetic is named, if the device has none of it: bfloat16 takes several times as long then."""
    if arithmetic != "bfloat16" or torch.device(device).type != "cpu" or has_bfloat16():
        return ""
    return " (this processor has no bfloat16 arithmetic, so float32 is faster)"
