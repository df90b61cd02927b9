"""Stop the run at a non-finite number and say where it first appeared. It is never masked."""

from __future__ import annotations

from torch import Tensor


class NonFiniteError(RuntimeError):
    """A loss, gradient or sample became NaN or infinite."""


def require_finite(value: Tensor, what: str) -> None:
    """Raise `NonFiniteError` naming `what` when `value` holds a NaN or an infinity."""
    finite = value.isfinite()
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise NonFiniteError(
            f"{what}: {bad} of {value.numel()} values are NaN or infinite. "
            "Nothing was masked; the last good checkpoint is untouched. "
            "Usual causes: a learning rate too high, low-precision weights, guidance too strong."
        )
