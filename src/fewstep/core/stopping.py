"""Stopping a program from outside: Ctrl-C, and the SIGTERM that schedulers send before they kill."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

TOGETHER = 1.0
"""Seconds in which signals count as one: a scheduler tells torchrun and its processes, and torchrun tells them again."""


class Terminated(KeyboardInterrupt):
    """SIGTERM. As with Ctrl-C, the text says what is kept of the work."""


@dataclass
class Request:
    """Whether SIGTERM has come, and when."""

    made: bool = False
    at: float = 0.0


@contextmanager
def on_request() -> Iterator[Request]:
    """In this block SIGTERM only makes a note, so that work can be saved first; a later second one stops at once.

    Only a program's main thread hears signals: in another nothing changes.
    """
    request, old = Request(), signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        if not request.made:
            request.made, request.at = True, time.monotonic()
        elif time.monotonic() > request.at + TOGETHER:
            raise Terminated

    signal.signal(signal.SIGTERM, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, old)


@contextmanager
def saying(kept: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C or SIGTERM in this block say what is `kept` of the work, unless something within has said it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise stop if stop.args else type(stop)(kept()) from None
