"""A live stream: frames as soon as each chunk is made, prompts at times, pause and cancel between two network calls.

`Session` makes latents; `LiveSession` decodes them, in a thread of its own beside the next chunk's network calls, and keeps
time. What it makes depends on nothing but model, prompts and seed: not on who asks when, nor on what else runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from threading import RLock
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor

from fewstep.diffusion import Step
from fewstep.streaming.control import Control, fed, inputs_of, lasting, numbers_for, require_moment, told
from fewstep.streaming.decoder import Decoder, Pixels
from fewstep.streaming.session import Session, Snapshot, Streams
from fewstep.streaming.switch import Switch
from fewstep.streaming.video import Video

AHEAD = 2
"""Most chunks that are being decoded, or wait for it."""


@dataclass(frozen=True, kw_only=True)
class Took:
    """Milliseconds that a chunk took."""

    denoise: float
    """Its sampling steps."""
    commit: float
    """Remembering the chunk before it, 0 for the first: a chunk is shown before it is remembered itself."""
    decode: float
    """Its frames, mostly while other chunks were denoised."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LiveChunk:
    """The frames of a chunk, and what there is to know of them."""

    frames: Tensor
    """uint8 `[B, K, H, W, 3]`, on the CPU. K may be 0 where the decoder waits for more latents."""
    index: int
    """Number of the chunk in the stream, from 0."""
    first: int
    """Number of its first frame in the stream."""
    seconds: float
    """Time of that frame, at the card's frames per second."""
    prompts: tuple[str, ...]
    """What it was made of, one for each clip."""
    version: int
    """How often the prompts had changed by then."""
    took: Took
    told: Mapping[str, Tensor] = field(default_factory=dict)
    """What it was told of its latent frames, by name, `[B, f, K]` each."""


@dataclass(frozen=True)
class LiveSnapshot:
    """Where a live stream is after a chunk that was shown: everything that later latents and frames depend on, besides the
    model and the options of its `Session`. Nothing in it is ever changed."""

    session: Snapshot
    """Of the latents: prompts, seeds, and the memory of the denoiser."""
    past: Any = None
    """Memory of the decoder."""
    frames: int = 0
    """Frames shown so far."""
    version: int = 0
    """How often the prompts have changed."""
    switches: tuple[tuple[int, tuple[str, ...], Switch], ...] = ()
    """Chunks from which other prompts apply, these prompts, and how they are changed."""
    controls: tuple[Control, ...] = ()
    """What is told of later frames."""
    given: tuple[tuple[int, Tensor], ...] = ()
    """Chunks from which latents are given, and these latents."""


@dataclass(eq=False)
class _Making:
    """A chunk on its way: its steps are made, then it is decoded and remembered, then it is shown."""

    index: int
    before: Snapshot
    """The session before it, and before the prompts that apply from it on."""
    steps: Iterator[Step]
    prompts: tuple[str, ...]
    version: int
    told: Mapping[str, Tensor]
    commit: float
    """Milliseconds of the commit of the chunk before it."""
    denoise: float = 0.0
    made: bool = False
    """Whether its latents are finished."""
    after: Snapshot | None = None
    """The session when it has been remembered."""
    past: Any = None
    """Memory of the decoder after it, when it was shown."""
    end: int = 0
    """Number of the frame after it, when it was shown."""


class LiveSession:
    """A stream as people watch it.

    >>> live = LiveSession(Session(student, ["a red ball rolls left"]))     # doctest: +SKIP
    >>> live.prompt("a blue star", at=10.0)                                 # doctest: +SKIP
    >>> for chunk in live.frames(chunks=20): show(chunk.frames)             # doctest: +SKIP

    While one thread iterates, others may call `prompt`, `control`, `pause`, `resume`, `cancel` and `snapshot`.
    """

    def __init__(
        self,
        session: Session,
        start: LiveSnapshot | None = None,
        *,
        video: Video | None = None,
        beside: bool = True,
    ) -> None:
        """`session` is where `start` says; `restore` makes both fit. None: its first frame is the stream's. With a `video` the
        stream changes that.

        Chunks are decoded `beside` the denoiser, in a thread of their own, or between two chunks, in the caller's. The frames are
        the same.
        """
        self._session, self._model, self._video = session, session.model, video
        self._start = start or LiveSnapshot(session.snapshot)
        self._switches = {chunk: (prompts, how) for chunk, prompts, how in self._start.switches}
        self._given = dict(self._start.given)
        self._controls = self._start.controls
        self._decoder = Decoder(self._model.decode_next, self._start.past, self._model.device, beside=beside)
        self._making: _Making | None = None  # the chunk that was begun last
        self._undecoded = deque[tuple[_Making, Future[Pixels]]]()
        self._last: _Making | None = None  # the chunk that was shown last
        self._commit = 0.0
        self._running, self._dropping, self._ended = True, False, False
        self._lock = RLock()

    @classmethod
    def restore(
        cls, model: Streams, snapshot: LiveSnapshot, *, video: Video | None = None, beside: bool = True, **options: Any
    ) -> LiveSession:
        """A session that goes on after `snapshot`, bit for bit. `video` and `options` are those of the session before, and of its
        `Session`."""
        return cls(Session(model, snapshot.session, **options), snapshot, video=video, beside=beside)

    # --- control, from any thread -------------------------------------------------------------------------------------

    def prompt(
        self, text: str | Sequence[str], *, at: float | None = None, chunk: int | None = None, how: Switch = "keep"
    ) -> int:
        """Other prompts, one for all clips or one each, from a chunk on, whose number is returned; `how` as in `Session.steer`.

        That is the first chunk that starts `at` this second or later, or this `chunk`; by default, and where it was begun
        already, the next one to begin. Of several prompts for one chunk the last counts.
        """
        require_moment("a prompt applies", at, chunk)
        self._session.require(how)
        clips = len(self._start.session.prompts)
        prompts = (text,) * clips if isinstance(text, str) else tuple(text)
        if len(prompts) != clips:
            raise ValueError(f"this session has {clips} clips, and was given {len(prompts)} prompts")
        with self._lock:
            first = self._first(at, chunk)
            self._switches[first] = prompts, how
            return first

    def begin_with(self, latents: Tensor, *, at: float | None = None, chunk: int | None = None) -> int:
        """Let the stream go on with these latents, as in `Session.begin_with`, from a chunk on, whose number is returned: the
        first that is not begun, or later, as in `prompt`."""
        require_moment("latents are given", at, chunk)
        with self._lock:
            first = self._first(at, chunk)
            self._session.require_given(latents, first)
            self._given[first] = latents.to(self._model.device)
            return first

    def control(self, name: str, numbers: Any, *, at: float | None = None, chunk: int | None = None) -> int:
        """Tell the model something of every frame (`FrameInput`) from a chunk on, whose number is returned: the first that is not
        begun, or later, as in `prompt`.

        `numbers` are of one frame `[K]`, and stay; or of one frame after the other `[N, K]`, from the chunk's first frame on,
        and the last row stays; or such rows for each clip, `[B, N, K]`. ValueError for what the model does not read.
        """
        require_moment(f"{name} applies", at, chunk)
        rows = numbers_for(self._model.card, name, numbers, len(self._start.session.prompts)).to(self._model.device)
        with self._lock:
            first = self._first(at, chunk)
            kept = [c for c in self._lasting() if (c.name, c.chunk) != (name, first)]
            new = Control(name, rows, first, self._ends(first)[0])
            self._controls = tuple(sorted([*kept, new], key=lambda control: control.chunk))
            return first

    def feed(self, name: str, numbers: Any, *, last: bool = False) -> int:
        """Tell the model of frames as they come: rows `[N, K]` or `[B, N, K]` that follow those fed before, the first ones from
        the first chunk on that is not begun. Number of the frame after them. Unlike with `control` no row stays before the `last`
        ones: a chunk begins when all that it reads is there (`FrameInput.ahead`), and `frames` ends until then."""
        rows = numbers_for(self._model.card, name, numbers, len(self._start.session.prompts)).to(self._model.device)
        with self._lock:
            first = self._first(None, None)
            new = Control(name, rows, first, self._ends(first)[0], not last)
            self._controls = fed(self._lasting(), new)
            return max(c.frame + c.numbers_BNK.shape[1] for c in self._controls if c.name == name)

    @property
    def waiting(self) -> bool:
        """Whether the next chunk needs rows that have not been fed."""
        chunk, inputs = self._session.snapshot.chunks, inputs_of(self._model.card)
        busy = self._making is not None and self._making.after is None
        return not busy and any(c.lacks(self._ends(chunk)[-1] + inputs[c.name].ahead) for c in self._controls)

    def _lasting(self) -> tuple[Control, ...]:
        """Controls that the chunk after the one that was shown last, or a later one, is told of."""
        back = max((each.back for each in inputs_of(self._model.card).values()), default=0)
        return lasting(self._controls, self._ends(self.chunks)[0] - back)

    def _first(self, at: float | None, chunk: int | None) -> int:
        """The first chunk that is not begun, or later."""
        self._drop()
        begun = self._session.snapshot.chunks if self._making is None else self._making.index + 1
        return max(begun, (chunk or 0) if at is None else self.chunk_at(at))

    def _ends(self, chunk: int) -> tuple[int, ...]:
        """Number of frames in the stream before a chunk, and after each of its latent frames."""
        stream = self._session.stream
        latents = range(stream.begin(chunk), stream.begin(chunk + 1) + 1)
        return tuple(map(self._model.clip_frames, latents))

    def chunk_at(self, seconds: float) -> int:
        """Number of the first chunk that starts at this second or later."""
        index = latents = 0
        while self._model.clip_frames(latents) < seconds * self._model.card.fps - 1e-6:
            latents += self._session.stream.length(index)
            index += 1
        return index

    def pause(self) -> None:
        """Make no further network call. `frames` ends with what is finished; a chunk that is half-made waits."""
        self._running = False

    def cancel(self) -> None:
        """Pause, and give up the chunk that is half-made: the stream is where it was before that chunk."""
        self._running, self._dropping = False, True

    def resume(self) -> None:
        """Go on after `pause` or `cancel`, when `frames` or `work` is called again."""
        with self._lock:
            self._drop()
            self._running = True

    def snapshot(self) -> LiveSnapshot:
        """Where the stream is after the chunk that was shown last. If that has yet to be remembered, this takes a network call.

        Chunks beyond it are not in the snapshot; a restored session makes them again, the same.
        """
        with self._lock:
            shown = self._last
            waiting = tuple(
                (chunk, *switch) for chunk, switch in sorted(self._switches.items()) if chunk >= self.chunks
            )
            given = tuple(each for each in sorted(self._given.items()) if each[0] >= self.chunks)
            start = self._start
            if shown is not None:
                if shown.after is None and shown is self._making:
                    self._call(shown)
                if shown.after is None:
                    raise ValueError(
                        f"chunk {shown.index} was shown, but remembering it failed; restore an earlier snapshot"
                    )
                start = LiveSnapshot(shown.after, shown.past, shown.end, shown.version)
            return replace(start, switches=waiting, controls=self._lasting(), given=given)

    def close(self) -> None:
        """End the stream and free its thread."""
        with self._lock:
            self.cancel()
            self._drop()
            self._ended = True
            self._decoder.close()

    def __enter__(self) -> LiveSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- work, from one thread ----------------------------------------------------------------------------------------

    @property
    def chunks(self) -> int:
        """Number of chunks of the stream that were shown."""
        return self._start.session.chunks if self._last is None else self._last.index + 1

    def frames(self, chunks: int | None = None, *, last: bool = False) -> Iterator[LiveChunk]:
        """The next `chunks` (None: without end), each as soon as it has its frames. Ends early at `pause` and `cancel`.

        `last`: nothing follows, so the last chunk also has the frames that some decoders hold back, and a window of several
        chunks shrinks (`Session.steps(left=...)`). Whoever stops asking may go on later with another `frames`.
        """
        if last and chunks is None:
            raise ValueError("a stream without end has no last chunk; say how many chunks it has")
        until = None if chunks is None else self.chunks + chunks
        if last and self._making is not None and self._making.made and self._making.index + 1 == until:
            raise ValueError(
                f"chunk {self._making.index} was made as if others followed; ask for another chunk at least"
            )
        while until is None or self.chunks < until:
            made = self.work(until, last=last)
            if made is not None:
                yield made
            elif not self._undecoded and (self.waiting or not self._running):
                return

    def work(self, until: int | None = None, *, last: bool = False) -> LiveChunk | None:
        """Make at most one network call, for a chunk before number `until`. Gives the oldest chunk that can be shown, if any.

        Whoever runs many sessions calls this in turns. An error of the decoder is raised at its chunk, and again from then on; go
        on from a snapshot. ValueError for a stream that has ended.
        """
        with self._lock:
            if self._ended and not self._undecoded:
                raise ValueError("this stream has ended; begin another one, or restore a snapshot")
            self._drop()
            making = self._next(until, last) if self._running and not self._ended else None
            if making is not None:
                self._call(making, last=last and until == making.index + 1)
            return self._shown(patient=making is None or self._last is None)

    def _next(self, until: int | None, last: bool) -> _Making | None:
        """The chunk that needs a network call; None if no chunk before `until` does."""
        making = self._making
        if making is None or making.after is not None:
            index = self._session.snapshot.chunks
            if self.waiting or (until is not None and index >= until):
                return None
            making = self._making = self._begun(index, until - index if last and until is not None else None)
        elif until is not None and making.index + making.made >= until:
            return None  # it is remembered when the stream goes on
        return making

    def _begun(self, index: int, left: int | None) -> _Making:
        session, before = self._session, self._session.snapshot
        if index in self._switches:
            session.steer(*self._switches[index])
        if index in self._given:
            session.begin_with(self._given[index])
        version = self._start.version + sum(chunk <= index for chunk in self._switches)
        extra = told(self._controls, self._ends(index), inputs_of(self._model.card))
        steps = session.steps(self._video, extra=extra, left=left)
        return _Making(index, before, steps, session.snapshot.prompts, version, extra, self._commit)

    def _call(self, making: _Making, *, last: bool = False) -> None:
        """One network call: a step of the chunk, or what remembers it."""
        start = perf_counter()
        try:
            step = next(making.steps, None)
            if self._model.device.type != "cpu":  # decoding has a stream of its own, and goes on
                torch.accelerator.current_stream(self._model.device).synchronize()
        except BaseException:  # its steps have ended
            self._ended = making.made
            self._session.snapshot, self._making = making.before, None
            raise
        milliseconds = 1000 * (perf_counter() - start)
        if step is None:
            making.after, self._commit = self._session.snapshot, milliseconds
            return
        making.denoise += milliseconds
        if step.index == step.steps - 1:
            making.made, self._ended = True, last
            if len(self._undecoded) >= AHEAD:
                self._undecoded[-AHEAD][1].exception()  # waits; an error is raised when its chunk is to be shown
            self._undecoded.append((making, self._decoder.submit(step.x, last=last)))

    def _shown(self, *, patient: bool) -> LiveChunk | None:
        """The oldest chunk that is not shown yet, if it has its frames or the caller is `patient`."""
        if not self._undecoded or not (patient or self._undecoded[0][1].done()):
            return None
        making, decoding = self._undecoded[0]
        pixels, first = decoding.result(), self._start.frames if self._last is None else self._last.end
        self._undecoded.popleft()
        making.past, making.end, self._last = pixels.past, first + pixels.frames.shape[1], making
        took = Took(denoise=making.denoise, commit=making.commit, decode=pixels.milliseconds)
        return LiveChunk(
            frames=pixels.frames, index=making.index, first=first, seconds=first / self._model.card.fps,
            prompts=making.prompts, version=making.version, took=took, told=making.told,
        )  # fmt: skip

    def _drop(self) -> None:
        """Give up the chunk that is half-made, if that was asked for."""
        if self._dropping and self._making is not None and not self._making.made:
            cast(Generator[Step, None, None], self._making.steps).close()
            self._session.snapshot, self._making = self._making.before, None
        self._dropping = False
