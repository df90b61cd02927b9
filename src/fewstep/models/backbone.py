"""The three visible parts of a video network: `embed`, `blocks`, `head`. Nobody installs hooks.

Legend: B batch, F frames, N tokens of this call, M tokens read (cached + this call's), H heads, D head dimension,
E width, L text tokens, G time groups (1 when t is `[B]`, F when t is `[B, F]`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from fewstep.attention import Grid3, KVCache, Operation, Pattern, Site, Ulysses, attend, operate
from fewstep.attention.pattern import Part, parts_of
from fewstep.compress import Transform
from fewstep.compress.stepwise import knows_steps
from fewstep.core import KV, Call, Cond, KVView
from fewstep.core.call import Place
from fewstep.models.depot import Depot
from fewstep.models.rotary import Rotary


class Avoided(NamedTuple):
    """A negative prompt as blocks read it (`core.call.Negative`), for the first b samples of a call."""

    text_bLE: Tensor
    mask_b11L: Tensor | None
    push: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, call: Call, states: Callable[[Cond], Tensor], *, masked: bool) -> Avoided | None:
        """That of a call, if it has one; `states` makes of conditions what blocks read."""
        if call.negative is None:
            return None
        cond = call.negative.cond
        text = call.constant("negative words", lambda: states(cond))
        return cls(text, cond.mask[:, None, None] if masked else None, call.negative.push)


class Context(NamedTuple):
    """What every block reads and none changes."""

    modulation_BG6E: Tensor
    text_BLE: Tensor
    text_mask_B11L: Tensor | None
    """Mask of the text tokens; None: padding is read like words."""
    rotary: Rotary
    table: Tensor
    """Table of `rotary` for the positions of all N tokens."""
    site: Site
    shared: Ulysses | None = None
    """Processes that hold the other tokens of these clips; None if clips are not shared."""
    image_BKE: Tensor | None = None
    """K image tokens that are read next to the text; None without an image."""
    avoided: Avoided | None = None
    """Negative prompt that attention to the text is pushed away from; None: there is none."""


class Words(NamedTuple):
    """Keys and values of what a block reads besides the clip."""

    text: KV
    avoided: KV | None = None
    """Of the negative prompt, if there is one to be pushed away from."""
    image: KV | None = None


def words_of(context: Context, keys: Callable[[Tensor], KV]) -> Words:
    """Those of a context's texts; `keys` are the block's."""
    avoided = context.avoided
    return Words(keys(context.text_BLE), None if avoided is None else keys(avoided.text_bLE))


def read_text(q_BHND: Tensor, words: Words, context: Context) -> Tensor:
    """What queries read of the prompt: `[B, H, N, D]`, pushed away from what they read of the negative one, if there is one."""
    read, avoided = attend(q_BHND, *words.text, context.text_mask_B11L), context.avoided
    if avoided is None or words.avoided is None:
        return read
    own = len(avoided.text_bLE)  # guidance's negative samples come last, and are as they were
    pushed = avoided.push(read[:own], attend(q_BHND[:own], *words.avoided, avoided.mask_b11L))
    return pushed if own == len(read) else torch.cat([pushed, read[own:]])


class Read(NamedTuple):
    """What self-attention gives."""

    mixed_BHND: Tensor
    new: KV
    """This call's own keys (not rotated) and values, for the memory. Processes that share clips have their own heads each."""


def read(operation: Operation, qkv: tuple[Tensor, Tensor, Tensor], state: Tokens) -> Read:
    """Self-attention of this call's tokens, wherever they are, to each other and to the past. `qkv` are `[B, H, n, D]`."""
    (q, k, v), context, past = qkv, state.context, state.past
    if state.unmixed:
        own = (k, v) if context.shared is None else (context.shared.to_heads(k), context.shared.to_heads(v))
        return Read(v, own)
    shared, table = context.shared, context.table
    if shared is not None:
        (q, k, v), table = (shared.to_heads(x) for x in qkv), shared.own_heads(table)
    q_BHND, k_BHMD, v_BHMD = context.rotary.turn(q, table).to(v), context.rotary.turn(k, table).to(v), v
    if past is not None:
        k_BHMD, v_BHMD = torch.cat([past[0], k_BHMD], 2), torch.cat([past[1], v], 2)
    mixed = operate(operation, q_BHND, k_BHMD, v_BHMD, context.site)
    mixed, new = operation.finish(mixed, (q, k, v), context.site)
    return Read(mixed if shared is None else shared.to_tokens(mixed), new)


@dataclass(frozen=True)
class State(ABC):
    """What flows from block to block."""

    past: KV | None = field(default=None, kw_only=True)
    """Input: rotated keys, and values, that the next block may read in addition to its own."""
    place: Place = field(default=Place(0, 1, Call()), kw_only=True)
    """Input: where the next block is, and in which call."""
    text: Any = field(default=None, kw_only=True)
    """Input: `Words` that the next block reads, or of several networks in one those of each; None: the block computes them."""
    unmixed: bool = field(default=False, kw_only=True)
    """Input: whether the next block's self-attention gives each token its own values (`Call.unmixed`)."""
    new: KV | None = field(default=None, kw_only=True)
    """Output: keys (without rotary position) and values of the last block that ran."""

    @property
    @abstractmethod
    def volume(self) -> Tensor:
        """What the next block reads as `[B, width, F, h, w]`."""

    @property
    @abstractmethod
    def streams(self) -> tuple[Tensor, ...]:
        """What blocks change: the tensors that flow, and nothing that all blocks read alike."""

    @abstractmethod
    def with_streams(self, streams: Sequence[Tensor]) -> Self:
        """The same state with other tensors flowing, in the order of `streams`."""

    @property
    def route(self) -> Hashable:
        """Which of several networks in one the state goes through: what one has made says nothing of another."""
        return None

    @property
    def detached(self) -> Self:
        """The same state as the start of a graph."""
        return self.with_streams([x.detach().requires_grad_() for x in self.streams])

    def split(self, processes: Ulysses) -> Self:
        """This process' share of the tokens. ValueError unless its backbone `shares`."""
        raise ValueError(f"the tokens of a {type(self).__name__} cannot be shared; set parallel.sequence: 1")

    @property
    def joined(self) -> Self:
        """All tokens again, for the head; this state itself where they were never split."""
        return self


@dataclass(frozen=True)
class Tokens(State):
    """The state of a transformer over space-time patches."""

    x_BNE: Tensor
    time_BGE: Tensor
    grid: Grid3
    context: Context

    @property
    def volume(self) -> Tensor:
        return self.joined.x_BNE.unflatten(1, self.grid).permute(0, 4, 1, 2, 3)

    @property
    def streams(self) -> tuple[Tensor, ...]:
        return (self.x_BNE,)

    def with_streams(self, streams: Sequence[Tensor]) -> Self:
        return replace(self, x_BNE=streams[0])

    def split(self, processes: Ulysses) -> Self:
        """This process' share of the tokens, with what belongs to each of them."""
        context, tokens = self.context, self.x_BNE.shape[1]
        modulation = context.modulation_BG6E
        if modulation.shape[1] > 1:  # the groups of time are runs of tokens
            modulation = processes.split(modulation.repeat_interleave(tokens // modulation.shape[1], 1), 1)
        context = context._replace(modulation_BG6E=modulation, shared=processes)
        return replace(self, x_BNE=processes.split(self.x_BNE, 1), context=context)

    @property
    def joined(self) -> Self:
        shared = self.context.shared
        return self if shared is None else replace(self, x_BNE=shared.join(self.x_BNE, 1))


class Output(NamedTuple):
    """What a backbone returns. `kv` is one entry per block if a view was given and every block was run, else None."""

    raw: Tensor
    kv: tuple[KV, ...] | None


def _same(x: Tensor) -> Tensor:
    return x


def _slots_read(kv: KVView) -> Tensor | None:
    """Which slots of a past may be read, `[S]` or `[B, S]`; where they count less than the call, what is added to their
    logits."""
    if kv.weight == 1:
        return kv.readable
    there = torch.ones_like(kv.positions, dtype=torch.bool) if kv.readable is None else kv.readable
    oldest = kv.positions.masked_fill(~there, torch.iinfo(torch.long).max).amin(-1, keepdim=True)
    weight = torch.where(kv.positions == oldest, 1.0, kv.weight)
    return torch.where(there, weight, 0.0).log()


def _of_rows(table: Tensor, rows: Tensor, per_frame: int) -> Tensor:
    """The angles of single tokens, of a table of whole frames; of one that stands for several: half-way between the two in their
    middle."""
    first = rows[:, :2] @ torch.tensor([per_frame, 1])
    count = rows[:, 2] if rows.shape[1] == 3 else torch.ones_like(first)
    low, high = (table[..., index.to(table.device), :] for index in (first + (count - 1) // 2, first + count // 2))
    middle = low + high
    return torch.where((count > 1).to(table.device)[:, None], middle / middle.norm(dim=0, keepdim=True), low)


def _require_states(pattern: Pattern, kv: KVView, parts: Sequence[Part]) -> None:
    """ValueError where what has left the memory is folded and not read, or would be read and is not there."""
    name = type(pattern).__name__
    if kv.states is not None and not pattern.folds:
        raise ValueError(
            f"this stream folds what leaves its memory into a state, which {name} does not read; give the network the pattern "
            "StateCausal, or let the stream have a window"
        )
    if kv.compresses != pattern.compresses and (kv.layers or kv.compresses):
        raise ValueError(
            f"{name} leaves a learned token for each {pattern.compresses or 'no'} tokens of a frame, and this stream remembers "
            f"one for {kv.compresses or 'none'}: give the network the pattern CompressCausal, and the stream memory: {{type: "
            "CompressedMemory, ...}, with one ratio"
        )
    if pattern.folds and kv.layers and (kv.states is None or parts):
        raise ValueError(
            f"{name} reads a state of what has left the memory: let the stream have memory: {{type: StateMemory, ...}} and make "
            "one chunk after the other, or train on whole clips in one call (DiffusionForced)"
        )


class Original(NamedTuple):
    """What an adapter was read from: its own library's networks with the same weights, and how that library calls them."""

    networks: Mapping[str, nn.Module]
    """Networks by the folder they are saved in, in eval mode. They use the adapter's tensors; nothing is copied."""
    forward: Callable[[Tensor, Tensor, Cond], Tensor]
    """The networks' own forward, from `(x, t [B], cond)` to what `Output.raw` must be."""
    pack: Callable[[Tensor], Tensor] = _same
    """Conversion from latents `[B, C, F, H, W]` to the layout that the library's pipeline takes."""
    unpack: Callable[[Tensor, torch.Size], Tensor] = Tensor.reshape
    """Conversion of the pipeline's output back to latents of that shape."""
    names: Mapping[str, str] = MappingProxyType({})
    """The pipeline's name for a field of `Cond.extra` or an argument, if it is not the usual name."""
    told: Mapping[str, float] = MappingProxyType({})
    """Additional arguments for the pipeline, which are settings of the adapter."""


class Backbone(nn.Module, ABC):
    """A video network: latents `[B, C, F, H, W]`, time `[B]` or `[B, F]` and text in, a tensor like the latents out."""

    args: dict[str, object]
    """Constructor arguments as plain values; `Spec` builds the same network from them."""
    width: int
    """Channels of `State.volume`, if all blocks have the same number (see `widths`)."""
    patch_frames: int = 1
    """Latent frames per frame of `State.volume`."""
    any_size: bool = True
    """Whether clips may have another height and width than in training."""
    blocks: nn.ModuleList
    """Blocks; each maps State to State."""
    rotary: Rotary
    """Rotary positions, for networks that can have a past."""
    shares: ClassVar[bool] = False
    """Whether several processes may share the tokens of a clip: the blocks' self-attention is `read` (or a `joint.Seat`),
    and all other operations work token by token."""
    transforms: tuple[Transform, ...] = ()
    """Transforms of this network relative to its class and `args`, see `compress.transformed`."""
    text_first: bool = False
    """Whether blocks attend to the text apart from the clip, and have `reads(context)`: the `State.text` that one run of sampling
    computes once. Their attention to the text is `read_text`."""
    depot: Depot | None = None
    """Where the blocks' weights are, and from where they come while a block runs; None: in the blocks."""
    unmixes: ClassVar[bool] = False
    """Whether a call may leave the tokens of some blocks unmixed (`Call.unmixed`): their self-attention is `read`, which is
    given the block's state."""
    by_age: bool = False
    """Whether it looks up something by the number of a frame in its stream, such as the latents of an image; then all samples of
    a call must be of one age."""
    takes_scalars: ClassVar[bool] = False
    """Whether `embed` passes its time embedding through `with_scalars`."""
    takes_signals: ClassVar[bool] = False
    """Whether `embed` passes the modulation of its blocks through `with_signals`."""
    scalars: nn.ModuleDict
    """Embeddings added by `ScalarInput`, by name."""
    signals: nn.ModuleList
    """Embeddings added by `FrameInput`, in their order."""
    flow_head: nn.Module | None
    """What runs the last blocks several times (`FlowHead`); None: every block runs once in a call."""

    def __init__(self) -> None:
        super().__init__()
        self.flow_head = None
        self.scalars = nn.ModuleDict()
        self.signals = nn.ModuleList()

    @abstractmethod
    def embed(self, x: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> State:
        """What the first block reads."""

    @abstractmethod
    def head(self, state: Any) -> Tensor:
        """From the kind of state that `embed` makes."""

    def recall(self, memory: KVCache, x: Tensor, call: Call = Call()) -> KVView:
        """What calls like `call` on latents like `x`, which come next, may read of a memory. Make it once for all calls of a
        chunk.
        """
        grid, read = self.grid(x), memory.read()
        (positions, start), layers = read.stand(self.rotary.longest), read.layers
        if layers:
            table = self.rotary.table(positions.clamp_min(0), grid, x)
            if read.rows is not None:
                table = _of_rows(table, read.rows, grid.per_frame)
            table = table if call.shared is None else cast(Ulysses, call.shared).own_heads(table)
            layers = tuple((self.rotary.turn(k, table).to(v), v) for k, v in layers)
        if memory.weight != 1 and read.rows is not None:
            raise ValueError("this stream remembers parts of frames, which cannot count less; set its past_weight to 1")
        there = positions >= 0 if memory.keep.leaves_empty else None
        states = read.states if memory.keep.folds else None
        return KVView(layers, positions, start, there, read.start, memory.weight, states, memory.keep.compresses)

    def site(self, pattern: Pattern, grid: Grid3, call: Call, device: torch.device) -> Site:
        """Where this call's self-attention is. ValueError where `pattern` cannot be right."""
        kv, readable = call.kv, None
        if kv is not None and kv.layers and (slots := _slots_read(kv)) is not None:
            past = slots.repeat_interleave(grid.per_frame, -1)
            own = torch.ones(*past.shape[:-1], grid.tokens).to(past.dtype)
            readable = torch.cat([past, own if past.dtype == torch.bool else own.log()], -1).to(device)
            readable = (readable if readable.ndim == 2 else readable[None])[:, None, None]
        parts = () if call.causal is None else parts_of(call.causal, grid, kv)
        if kv is not None:
            _require_states(pattern, kv, parts)
        site = Site(grid, 0 if kv is None else kv.slots, 0, readable, call, parts)
        for alone in (site.of(part) for part in parts) if parts else (site,):
            pattern.check(alone)
        return site

    def grid(self, x: Tensor) -> Grid3:
        """The tokens of latents. ValueError for latents of another size than the network takes."""
        raise ValueError(
            f"{type(self).__name__} sees whole clips and has no past; take a causal model (VideoDiT, Wan, LTX)"
        )

    def turns(self, grid: Grid3, x: Tensor, call: Call) -> Tensor:
        """The table of `rotary` for the tokens of a call."""
        self._require_positions(call, grid.frames)
        make = partial(self.rotary.table, call.positions(grid.frames), grid, x)
        return make() if call.kv is not None else call.constant("turns", make)  # a stream moves on

    def _require_positions(self, call: Call, frames: int) -> None:
        """ValueError past the end of the table of positions."""
        if (longest := self.rotary.longest) is None:
            return
        end = frames if call.kv is None else int(call.kv.start.max()) + frames
        if end > longest:
            what = (
                "" if call.kv is None else '. Let the stream have a window, and positions "window", "sink" or "rebased"'
            )
            raise ValueError(f"{type(self).__name__} knows positions of {longest} latent frames, not {end}{what}")

    def with_scalars(self, time_BGE: Tensor, cond: Cond) -> Tensor:
        """The time embedding, to which every added scalar input adds what `cond` says of it."""
        for scalar in self.scalars.values():
            time_BGE = scalar(time_BGE, cond.extra)
        return time_BGE

    def with_signals(self, modulation_BG6E: Tensor, cond: Cond, frames: int) -> Tensor:
        """The modulation of the blocks in a call of so many latent frames, to which every input for frames adds what `cond` says
        of it."""
        for signal in self.signals:
            modulation_BG6E = signal(modulation_BG6E, cond.extra, frames)
        return modulation_BG6E

    @property
    def named(self) -> Backbone:
        """The network whose class and `args` are in its card: itself, or one of several in one."""
        return self

    def by_time(self, boundaries: Sequence[float]) -> Backbone:
        """Copies of this network that take turns in time, which become one network with this one as its first
        (`experts.Experts`). ValueError where its class has none."""
        raise ValueError(f"a {type(self).__name__} has no experts by time; take VideoDiT or Wan")

    def original(self) -> Original | None:
        """The networks this one was read from, to compare with or to save; None where the class is fewstep's own."""
        return None

    def require_plain(self) -> None:
        """ValueError for a transformed network: outside of fewstep nothing knows how to build it."""
        if self.transforms:
            names = ", ".join(type(transform).__name__ for transform in self.transforms)
            raise ValueError(
                f"this {type(self).__name__} is transformed ({names}), and only fewstep knows how to build it; keep it in "
                "fewstep's folder"
            )

    @property
    def dtype(self) -> torch.dtype | None:
        """Type of the weights at both ends, which latents must have; None if all weights are in the blocks."""
        return next((p.dtype for name, p in self.named_parameters() if not name.startswith("blocks.")), None)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of `State.volume` after each block."""
        return (self.width,) * len(self.blocks)

    def foreign(self, name: str) -> str:
        """What the parameter `name` is called in the files of the library that the network comes from."""
        return name

    def walk(self, state: State, call: Call = Call()) -> Iterator[State]:
        """The state after each block, in the order of `blocks`."""
        return self.run(range(len(self.blocks)), self.divided(state, call), call)

    def divided(self, state: State, call: Call) -> State:
        """The state that `embed` made, or this process' share of it. ValueError for a call that the blocks cannot make."""
        if call.unmixed:
            self.require_unmixing(call.unmixed)
        if call.shared is None:
            return state
        self.require_sharing()
        return state.split(cast(Ulysses, call.shared))

    def run(self, layers: Iterable[int], state: State, call: Call) -> Iterator[State]:
        """The state after each of these blocks; `call.runner` runs them."""
        kept = call.constants.during(state.route) if call.constants is not None and self.text_first else None
        for index in layers:
            block = self.blocks[index]
            place = Place(index, len(self.blocks), call)
            past, text = call.kv.layer(index) if call.kv else None, None
            if kept is not None:
                text = kept.get((call.branch, "text", index), partial(block.reads, cast(Any, state).context))  # type: ignore[operator, misc]
            state = replace(state, past=past, place=place, text=text, unmixed=index in call.unmixed, new=None)
            state = call.runner(block if self.depot is None else self.depot.around(block), state, place)
            yield state

    def forward(self, x: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Output:
        if self.flow_head is not None:
            return Output(self.flow_head(self, x, t, cond, call), None)
        start, made = self.embed(x, t, cond, call), []
        for state in self.walk(start, call):
            if call.kv is not None:
                made.append(state.new)
        whole = call.kv is not None and None not in made
        return Output(self.head(state.joined), tuple(made) if whole else None)

    def require_sharing(self) -> None:
        """ValueError if processes cannot share the tokens of this network's clips (`Call.shared`)."""
        if not self.shares:
            raise ValueError(f"processes cannot share the tokens of a {type(self).__name__}; set parallel.sequence: 1")

    def require_unmixing(self, blocks: Sequence[int]) -> None:
        """ValueError if the self-attention of these blocks cannot be left out (`Call.unmixed`)."""
        name = type(self).__name__
        if not self.unmixes:
            raise ValueError(
                f"spatiotemporal guidance (STG) replaces the self-attention of single blocks, which a {name} has not apart from "
                "other attention; VideoDiT, Wan, WanExperts and LTX have. Use guidance of type CFG"
            )
        if wrong := [block for block in blocks if not 0 <= block < len(self.blocks)]:
            raise ValueError(
                f"spatiotemporal guidance (STG): this {name} has the blocks 0 to {len(self.blocks) - 1}, and {wrong} were "
                "asked for; name others in the guidance's blocks"
            )

    def compile_blocks(self, *, hooked: bool = False) -> None:
        """Compile every block in place (one graph serves all). A copy of this network starts uncompiled.

        `hooked`: what others do around a block's forward (FSDP gathers its weights) stays outside. Copy no such network.
        ValueError for layers that depend on the step: the compiler does not follow a view of a block.
        """
        if knows_steps(self):
            raise ValueError("compile: blocks whose layers depend on the step cannot be compiled; leave compile out")
        for block in self.blocks:
            if hooked:
                block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
            else:
                block.compile(fullgraph=True, dynamic=False)
