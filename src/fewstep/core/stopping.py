"""Stopping a program from outside: Ctrl-C, and the SIGTERM that schedulers send before they kill."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM. As with Ctrl-C, the text says what is kept of the work."""


@dataclass
class Request:
    """Whether SIGTERM has come."""

    made: bool = False


@contextmanager
def on_request() -> Iterator[Request]:
    """In this block SIGTERM only makes a note, so that work can be saved first; a second one stops at once.

    Only a program's main thread hears signals: in another nothing changes.
    """
    request, old = Request(), signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        if request.made:
            raise Terminated
        request.made = True

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
