"""The messages of `WS /v1/stream`, as JSON objects with a `type`. Media are binary messages, which follow their `chunk`.

Client:  init, then prompt, control, ack, pause, resume, snapshot, stop
Server:  queue (while others are served), started, then applied, chunk, saved, stats; at the end done or error
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from fewstep.core.bounds import Bounds, Natural, require_bounds
from fewstep.core.build import At, RecipeError, build
from fewstep.serve.pace import AHEAD
from fewstep.streaming import Switch

LONGEST_PROMPT = 2000
"""Characters."""
LARGEST = 1 << 16
"""Bytes of a client's message."""
Seed = Annotated[int, Bounds(least=0, most=2**63 - 1)]


def require_prompt(prompt: str) -> None:
    """ValueError for a prompt that is empty, or too long."""
    if not 0 < len(prompt.strip()) <= len(prompt) <= LONGEST_PROMPT:
        raise ValueError(f"a prompt has 1 to {LONGEST_PROMPT} characters, and this one {len(prompt)}")


class Message:
    """What a client says. `type` is the name of the class in lower case."""

    def __post_init__(self) -> None:
        require_bounds(self)
        prompt = getattr(self, "prompt", None)
        if prompt is not None:
            require_prompt(prompt)


@dataclass(frozen=True, kw_only=True)
class Init(Message):
    """Begin a stream, or go on with one whose connection was lost."""

    prompt: str = "a red circle moves left"
    model: str | None = None
    """Default: the first model that streams."""
    seed: Seed = 0
    steps: Annotated[int, Bounds(least=1)] | None = None
    """Sampling steps per chunk (default: the student's own)."""
    seconds: Annotated[float, Bounds(above=0)] | None = None
    """Length; null: until it is stopped, or the server's limit."""
    media: Literal["webp", "mp4"] = "webp"
    """Frames as pictures, one binary message each; or a fragment of an MP4 (H.264) per chunk, for Media Source Extensions."""
    ack: bool = False
    """Whether the client says what it has played. If not, it is taken to play in real time."""
    ahead: Annotated[int, Bounds(least=1, most=AHEAD)] = AHEAD
    """Chunks that the server may be ahead. With fewer it obeys sooner, and a slow machine stalls sooner."""
    snapshot: str | None = None
    """Name of a snapshot on this server: go on with its prompt and seed."""
    session: str | None = None
    """A stream that is there already: its id, as `started` said it. Then the fields above are those of the stream."""
    after: Annotated[int, Bounds(least=-1)] = -1
    """Of such a stream: the last chunk that the client has."""


@dataclass(frozen=True, kw_only=True)
class Prompt(Message):
    """Another prompt, from the next chunk on."""

    prompt: str
    how: Switch = "keep"
    chunk: Natural | None = None
    """From this chunk on, if it is not begun: so a stream can be made again, whatever the time that messages take."""
    id: str = ""
    """Comes back in `applied`, or in `error`."""


@dataclass(frozen=True, kw_only=True)
class Control(Message):
    """From the next chunk on these keys are held, and no others."""

    keys: tuple[str, ...]
    """Some of those that `/v1/models` and `started` name; none: no key is held."""
    chunk: Natural | None = None
    """As in `prompt`."""
    id: str = ""
    """Likewise."""


@dataclass(frozen=True, kw_only=True)
class Ack(Message):
    """So many frames of the stream have been played."""

    frames: Natural


@dataclass(frozen=True, kw_only=True)
class Pause(Message):
    """Make nothing more for now."""


@dataclass(frozen=True, kw_only=True)
class Resume(Message):
    """Go on."""


@dataclass(frozen=True, kw_only=True)
class Snapshot(Message):
    """Write where the stream is to a file, which `saved` names."""


@dataclass(frozen=True, kw_only=True)
class Stop(Message):
    """End the stream."""


CLIENT: dict[str, type[Message]] = {
    kind.__name__.lower(): kind for kind in (Init, Prompt, Control, Ack, Pause, Resume, Snapshot, Stop)
}


def heard(text: str) -> Message:
    """A client's message. ValueError says what is wrong with it."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError('a message is a JSON object, such as {"type": "stop"}') from None
    kind = CLIENT.get(str(tree.pop("type", None))) if isinstance(tree, dict) else None
    if kind is None:
        raise ValueError(f"a message is a JSON object whose type is one of {', '.join(CLIENT)}")
    try:
        message: Message = build(kind, tree, {}, At("message"))
    except RecipeError as error:
        raise ValueError(str(error)) from None
    return message


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the server says."""

    def text(self) -> str:
        kind = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        return json.dumps({"type": kind, **asdict(self)})


@dataclass(frozen=True, kw_only=True)
class Queue(Said):
    """The server has no room yet."""

    position: int
    """1: next."""


@dataclass(frozen=True, kw_only=True)
class Started(Said):
    """The stream begins, or goes on."""

    session: str
    """Its id. Whoever has it can go on with the stream."""
    model: str
    prompt: str
    seed: int
    steps: int
    fps: float
    width: int
    height: int
    chunk_frames: tuple[int, ...]
    """Frames of the first chunk, and of later ones."""
    media: str
    realtime: bool
    """Whether the machine makes frames at least as fast as they are played."""
    licence: str
    keys: tuple[str, ...] = ()
    """Keys that `control` may name; none: this model reads no keys."""
    switches: tuple[str, ...] = ()
    """Values of `how` that this model knows."""


@dataclass(frozen=True, kw_only=True)
class Applied(Said):
    """From which chunk on a prompt holds, or keys are held."""

    id: str
    chunk: int
    prompt: str | None = None
    keys: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Chunk(Said):
    """Frames follow, as so many binary messages."""

    index: int
    first: int
    """Number of its first frame in the stream."""
    pts: float
    """Time of that frame, in seconds."""
    frames: int
    messages: int
    prompt: str
    version: int
    """How often the prompt had changed."""
    keys: tuple[str, ...]
    """Keys that were held at its end."""
    denoise_ms: float
    commit_ms: float
    """What it took to remember the chunk before."""
    decode_ms: float
    encode_ms: float


@dataclass(frozen=True, kw_only=True)
class Saved(Said):
    """There is a snapshot: a file for `fewstep stream --restore`, at `/v1/stream/snapshots/NAME`, and for `init`."""

    name: str
    chunk: int
    """Chunks before it."""
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Stats(Said):
    """How the server is, every second."""

    streams: int
    """Streams that are served."""
    waiting: int
    load: float
    """Share of the worker's time that streams take."""
    memory: int
    """Bytes of the worker."""
    lead: float
    """Seconds that this stream is ahead of its viewer."""


@dataclass(frozen=True, kw_only=True)
class Error(Said):
    """The stream has ended, or a message was refused."""

    code: str
    message: str
    retryable: bool = False
    fatal: bool = True
    """Whether the connection is closed."""
    id: str = ""
    """Of the prompt or control that was refused."""


@dataclass(frozen=True, kw_only=True)
class Done(Said):
    """The stream has all its frames, or was stopped."""

    chunks: int
    frames: int
