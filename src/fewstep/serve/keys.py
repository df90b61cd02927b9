"""Who may use a server: keys, stored as digests, and tickets for browsers, which send no headers with a WebSocket."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fewstep.core.atomic import write_text

TICKET_SECONDS = 30.0
ANYBODY = "anybody"
"""Name of all clients of a server without keys, which listens to this machine alone."""


@dataclass(frozen=True)
class Keys:
    """Digests of keys by name of their holder. Keys have 256 random bits, so that a plain SHA-256 is enough."""

    digests: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Keys:
        """A file with a name and a digest in each line. ValueError for another one."""
        found: dict[str, str] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2 or len(words[1]) != 64 or words[0] in found:
                raise ValueError(
                    f"{path}, line {number}: a line has a name, which no other has, and a digest; add keys by "
                    f"fewstep serve --keys {path} --new-key NAME"
                )
            found[words[0]] = words[1].lower()
        if not found:
            raise ValueError(f"{path} has no keys; add one by fewstep serve --keys {path} --new-key NAME")
        return Keys(found)

    @staticmethod
    def add(path: Path, name: str) -> str:
        """A new key, whose digest is added to the file. The key itself is nowhere else. ValueError for a name that is taken."""
        before = (
            path.read_text(encoding="utf-8") if path.exists() else "# Keys of fewstep serve: name, SHA-256 of the key\n"
        )
        if not name.isidentifier() or (path.exists() and "\n" + name + " " in "\n" + before):
            raise ValueError(f"a key needs a name of its own, of letters and digits; {name!r} is none or is taken")
        secret = f"fs-{secrets.token_urlsafe(32)}"
        write_text(path, f"{before}{name} {_digest(secret)}\n")
        path.chmod(0o600)
        return secret

    def holder(self, secret: str) -> str | None:
        """Whose key this is; None: nobody's. Takes equally long for all keys."""
        digest, found = _digest(secret), None
        for name, known in self.digests.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found


@dataclass
class Door:
    """Decides who a request is from."""

    keys: Keys | None = None
    """None: everybody who reaches this server."""
    tickets: dict[str, tuple[str, float]] = field(default_factory=dict)

    def enter(self, authorization: str | None) -> str | None:
        """The holder of the key in a header `Bearer KEY`; None: nobody."""
        if self.keys is None:
            return ANYBODY
        scheme, _, secret = (authorization or "").partition(" ")
        return self.keys.holder(secret.strip()) if scheme.lower() == "bearer" else None

    def ticket(self, name: str) -> str:
        """A word that opens one WebSocket within half a minute."""
        now = time.monotonic()
        self.tickets = {word: held for word, held in self.tickets.items() if held[1] > now}
        word = secrets.token_urlsafe(24)
        self.tickets[word] = name, now + TICKET_SECONDS
        return word

    def punch(self, word: str) -> str | None:
        """Who got this ticket, if it is still good. It is used up."""
        name, until = self.tickets.pop(word, ("", 0.0))
        return name if until > time.monotonic() else None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
