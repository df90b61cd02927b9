"""Numbers: a run stops at the first that is not finite and says where; none is ever masked."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


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


def has_values(x: Tensor) -> bool:
    """Whether a tensor has numbers. In a run that is only planned (`engine.outline`) tensors have nothing but shapes."""
    return not (x.is_meta or isinstance(x, FakeTensor))
