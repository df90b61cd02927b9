"""What a command is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

Overrides = list[tuple[str, str]]


class UsageError(ValueError):
    """A command line that means nothing."""


@dataclass(frozen=True)
class Command(ABC):
    """One sub-command: its fields are its options."""

    takes_overrides: ClassVar[bool] = False
    """Whether `--method.critic-updates 3` and the like change its recipe."""

    @abstractmethod
    def run(self, overrides: Overrides) -> int:
        """Do it; the exit code."""


@dataclass(frozen=True, kw_only=True)
class Loads(Command):
    """A command that loads a model."""

    trust: bool = False
    """Load weights without comparing their files with what their card says of them: faster, and damage is not noticed."""
