"""When a viewer needs the next chunk, and how many viewers a worker can serve."""

from __future__ import annotations

from dataclasses import dataclass

AHEAD = 3
"""Chunks that a stream may be ahead of its viewer."""
FULL = 0.85
"""Share of a worker's time that streams may take together."""


@dataclass
class Pace:
    """How far the viewer of a stream is. Times in seconds on one clock."""

    fps: float
    ahead: int
    """Frames that may be made beyond what was played."""
    opened: float
    acknowledged: bool = False
    """Whether the viewer says how far it has played; if not, it plays in real time."""
    sent: int = 0
    """Frames that it was sent."""
    played: int = 0
    """Frames that it said it has played."""
    began: float | None = None
    """When it began to play, later by every pause of its own."""

    def send(self, frames: int, now: float) -> None:
        """It is sent so many more."""
        if self.began is None and frames:
            self.began = now
        elif self.began is not None and self.began + self.sent / self.fps < now:  # it has stalled
            self.began = now - self.sent / self.fps
        self.sent += frames

    def play(self, frames: int, now: float) -> None:
        """It has played so many in all. A number that is impossible counts as the nearest possible one."""
        self.played = min(max(frames, self.played), self.sent)
        if self.began is not None:
            self.began = max(self.began, now - self.played / self.fps)

    def pause(self, seconds: float) -> None:
        """It stood still for so long."""
        if self.began is not None:
            self.began += seconds

    def at(self, now: float) -> int:
        """Number of frames that it has played."""
        if self.acknowledged or self.began is None:
            return self.played
        return min(self.sent, int((now - self.began) * self.fps))

    def waits(self, now: float) -> bool:
        """Whether it has enough frames for the moment."""
        return self.sent - self.at(now) >= self.ahead

    def due(self) -> float:
        """When it runs out of frames."""
        return self.opened if self.began is None else self.began + self.sent / self.fps


@dataclass
class Gate:
    """Admits streams up to a share of the worker's time. One is always admitted, on however slow a machine."""

    full: float = FULL
    load: float = 0.0
    """Share that is taken."""
    streams: int = 0

    def admits(self, load: float) -> bool:
        return self.streams == 0 or self.load + load <= self.full + 1e-9

    def enter(self, load: float) -> None:
        self.streams, self.load = self.streams + 1, self.load + load

    def leave(self, load: float) -> None:
        self.streams -= 1
        self.load = self.load - load if self.streams else 0.0
