"""What the server tells its worker (orders), and what it hears from it (news). Frozen, so that they can go through a pipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewstep.serve.pace import AHEAD
from fewstep.streaming import Switch

Pixels = NDArray[np.uint8]
"""Frames `[F, H, W, 3]`."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """Concerns one task: a stream or a clip."""

    id: str
    """Name of the task."""


@dataclass(frozen=True, kw_only=True)
class Open(Order):
    """Begin a stream."""

    model: str
    prompt: str
    seed: int = 0
    steps: int | None = None
    """Sampling steps per chunk; None: the student's own number."""
    chunks: int | None = None
    """Length; None: until it is closed."""
    snapshot: str | None = None
    """Where another stream of this model was: its file, in the folder of `Served`. Its prompt and seed are gone on with."""
    acknowledged: bool = False
    """Whether the viewer says how far it has played. If not, it is taken to play in real time."""
    ahead: int = AHEAD
    """Chunks that it may be ahead of its viewer."""


@dataclass(frozen=True, kw_only=True)
class Steer(Order):
    """Another prompt, from the next chunk on, or from a later one."""

    prompt: str
    how: Switch = "keep"
    chunk: int | None = None
    """None: the next one to begin."""
    token: str = ""
    """Comes back in `Applies` or `Declined`."""


@dataclass(frozen=True, kw_only=True)
class Press(Order):
    """These keys are held from the next chunk on, or from a later one, and no others."""

    keys: tuple[str, ...]
    chunk: int | None = None
    """None: the next one to begin."""
    token: str = ""
    """Comes back in `Applies` or `Declined`."""


@dataclass(frozen=True, kw_only=True)
class Play(Order):
    """Go on, or pause after the network call that is under way."""

    on: bool


@dataclass(frozen=True, kw_only=True)
class Played(Order):
    """The viewer has played so many frames of the stream."""

    frames: int


@dataclass(frozen=True, kw_only=True)
class Save(Order):
    """Write a snapshot of the stream to a file."""


@dataclass(frozen=True, kw_only=True)
class Close(Order):
    """Give up a stream or a clip. Nothing is heard of it any more."""


@dataclass(frozen=True, kw_only=True)
class Make(Order):
    """Make a clip."""

    model: str
    prompt: str
    frames: int
    seed: int = 0
    steps: int | None = None
    """None: the model's own number."""
    guidance: float | None = None
    """Scale; None: the model's own."""
    negative_prompt: str | None = None
    """None: the model's own."""
    image: Path | None = None
    """File of the first frame. Its pixels are more than a pipe holds, and the server would wait until the worker reads them."""
    schedule: tuple[tuple[float, str], ...] = ()
    """Seconds from which other prompts hold, of a student that streams."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A model that is served."""

    name: str
    role: str
    fps: float
    height: int
    width: int
    frames: int
    """Frames of a clip."""
    steps: tuple[int, ...]
    """Step counts that it was trained for; the first one is its own. Empty: any."""
    guided: bool
    """Whether guidance can be chosen: not in a student, which has learnt it."""
    takes_image: bool
    chunk_frames: tuple[int, ...] = ()
    """Frames of the first and of later chunks of a student that streams; empty: it makes whole clips."""
    chunk_seconds: float = 0.0
    """Time that a chunk takes, as measured at the start."""
    joined_seconds: tuple[float, ...] = ()
    """Time in which 2, 3, ... streams make a chunk each, if their network calls are made as one; empty: they are not."""
    guidance: float = 1.0
    """Scale of its own guidance; 1: none."""
    licence: str = ""
    keys: tuple[str, ...] = ()
    """Names of the keys that a student that streams reads; none: it is not steered by keys."""
    switches: tuple[Switch, ...] = ()
    """Ways to change the prompt of its stream."""

    @property
    def streams(self) -> bool:
        return bool(self.chunk_frames)

    @property
    def load(self) -> float:
        """Share of the worker's time that one viewer of a stream takes."""
        return self.taken(1)

    def taken(self, viewers: int) -> float:
        """Share of the worker's time that so many viewers of streams take."""
        times = 0.0, self.chunk_seconds, *self.joined_seconds
        full, rest = divmod(viewers, len(times) - 1)
        return (full * times[-1] + times[rest]) * self.fps / self.chunk_frames[-1] if self.streams else 0.0


@dataclass(frozen=True, kw_only=True)
class News:
    """What a worker says of a task."""

    id: str


@dataclass(frozen=True, kw_only=True)
class Up:
    """The worker is ready."""

    models: tuple[Facts, ...]


@dataclass(frozen=True, kw_only=True)
class Down:
    """The worker could not begin."""

    message: str


@dataclass(frozen=True)
class Beat:
    """The worker is alive."""

    memory: int = 0
    """Bytes that it holds: of the GPU where it uses one, else of the machine; 0 where that is not known."""


@dataclass(frozen=True, kw_only=True)
class Declined(News):
    """An order that could not be followed; the task goes on as if it had not been given."""

    message: str
    token: str = ""
    """Of the order."""


@dataclass(frozen=True, kw_only=True)
class Applies(News):
    """From which chunk on a prompt or keys hold."""

    token: str
    chunk: int
    prompt: str | None = None
    keys: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown(News):
    """A chunk of a stream."""

    index: int
    first: int
    """Number of its first frame in the stream."""
    seconds: float
    """Time of that frame in the stream."""
    prompt: str
    version: int
    """How often the prompt had changed."""
    frames: Pixels
    took: tuple[float, float, float]
    """Milliseconds of its steps, of remembering the chunk before it, and of decoding."""
    keys: tuple[str, ...] = ()
    """Keys that were held at its end."""


@dataclass(frozen=True, kw_only=True)
class Saved(News):
    """A snapshot, as a safetensors file in the folder of `Served`."""

    chunk: int
    """Chunks before it."""
    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Progress(News):
    """Of a clip: network calls or chunks that are done."""

    done: int
    of: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Made(News):
    """The frames of a clip."""

    frames: Pixels
    fps: float


@dataclass(frozen=True, kw_only=True)
class Finished(News):
    """A stream that has all its chunks."""


@dataclass(frozen=True, kw_only=True)
class Failed(News):
    """A task that ended with an error."""

    code: str
    message: str
    retryable: bool = False
