"""The base class of all commands."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from tyro.conf import arg

Overrides = list[tuple[str, str]]


class UsageError(ValueError):
    """An invalid command line."""


def _said(default: str) -> str:
    return "" if default in ("", "''", "None", "False") else f"(default: {default})"


@dataclass(frozen=True)
class Command(ABC):
    """One sub-command: its fields are its options."""

    takes_overrides: ClassVar[bool] = False
    """Whether options such as `--method.critic-updates 3` change its recipe."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Print each default once: if it is None or empty, the option's own text explains it."""
        super().__init_subclass__(**options)
        own = inspect.get_annotations(cls)
        hint = arg(help_behavior_hint=_said)
        cls.__annotations__ = {k: v if str(v).startswith("ClassVar") else Annotated[v, hint] for k, v in own.items()}

    @abstractmethod
    def run(self, overrides: Overrides) -> int:
        """Run the command and return the exit code."""


@dataclass(frozen=True, kw_only=True)
class Loads(Command):
    """A command that loads a model."""

    trust: bool = False
    """Skip the check of weight files against the digests in their card. Faster, but damaged files go unnoticed."""
