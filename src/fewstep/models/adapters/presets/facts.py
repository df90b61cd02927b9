"""What a preset changes in a card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fewstep.diffusion import Contract
from fewstep.models.card import Card


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How somebody else samples a model."""

    contract: Callable[[Contract], Contract]
    """The contract, made of the card's own at the clip's size."""
    source: str
    """Where the facts are public: repository and file."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the card besides the contract: sizes, frame rate, negative prompt."""
    missing: str = ""
    """What the source does that is not done here."""

    def sampled(self, card: Card, name: str) -> Card:
        """The card with the contract, and in its provenance what it follows."""
        told = f"{name}: {self.source}" + (f"; without {self.missing}" if self.missing else "")
        return replace(card, contract=self.contract(card.contract), provenance=card.provenance | {"preset": told})
