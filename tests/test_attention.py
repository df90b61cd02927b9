"""What each query reads: patterns and their operations, kernels, memories."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.attention import (
    PATTERNS,
    BlockCausal,
    CompressCausal,
    Dense,
    Grid3,
    Site,
    StateCausal,
    TopK,
    attend,
    attending,
    backends,
    pick,
)
from fewstep.attention.pattern import Operation, Pattern
from fewstep.core import Call, KVView, build

EXAMPLES = [
    Dense(),
    BlockCausal(),
    BlockCausal(chunk=3),
    BlockCausal(chunk=2, window=4),
    BlockCausal(chunk=2, window=5, sink=1),
    StateCausal(chunk=2, window=5, sink=1),
    CompressCausal(chunk=7, ratio=3),
    TopK(block=4, keep=0.5),
    TopK(block=5, keep=0.4),
    TopK(block=3, keep=1.0),
]
GRID = Grid3(7, 1, 3)
every_example = pytest.mark.parametrize("pattern", EXAMPLES, ids=str)


def drawn(queries: int, keys: int, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries)
    return tuple(  # type: ignore[return-value]
        torch.randn(2, heads, n, 8, generator=generator, dtype=torch.float64) for n in (queries, keys, keys)
    )


def view(start: int, slots: int = 0) -> KVView:
    some = tuple((torch.zeros(1, 1, slots, 1), torch.zeros(1, 1, slots, 1)) for _ in range(min(slots, 1)))
    return KVView(some, torch.arange(start - slots, start), torch.tensor(start))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return (scores if mask is None else scores.where(mask, -torch.inf)).softmax(-1) @ v


# --- patterns -------------------------------------------------------------------------------------------------------------


def test_every_pattern_has_an_example() -> None:
    assert {type(pattern) for pattern in EXAMPLES} == set(PATTERNS)


@every_example
def test_pattern_survives_its_tree(pattern: Pattern) -> None:
    names = {cls.__name__: cls for cls in PATTERNS}
    assert build(Pattern, pattern.tree(), names) == pattern


@every_example
@pytest.mark.parametrize("beside", [0, 4])
@pytest.mark.parametrize("hidden", [False, True], ids=["all readable", "some hidden"])
def test_an_operation_is_softmax_attention_under_its_mask(pattern: Pattern, beside: int, hidden: bool) -> None:
    """Whatever way it computes: the dense truth is `allowed`."""
    count = GRID.tokens + beside
    readable = torch.ones(2, 1, 1, count, dtype=torch.bool)
    if hidden:
        readable[0, ..., beside - 1 if beside else 2] = readable[1, ..., -1] = False
    site = Site(GRID, beside=beside, readable_B11M=readable if hidden else None)
    try:
        pattern.check(site)
    except ValueError:
        assert beside and isinstance(pattern, BlockCausal | CompressCausal | StateCausal)
        return
    operation, (q, k, v) = pattern.operation(0, 2, 8), drawn(count, count)
    allowed = operation.allowed(q, k, site)
    assert not hidden or not ((torch.tensor(True) if allowed is None else allowed) & ~readable).any()
    made = operation(q, k, v, site)
    torch.testing.assert_close(made, softmax_attention(q, k, v, allowed), atol=1e-12, rtol=0)
    torch.testing.assert_close(Operation.forward(operation, q, k, v, site), made, atol=1e-12, rtol=0)


@every_example
def test_gradients_are_those_of_the_mask(pattern: Pattern) -> None:
    operation, site, qkv = pattern.operation(0, 2, 8), Site(GRID), drawn(GRID.tokens, GRID.tokens)
    ours, theirs = ([x.clone().requires_grad_() for x in qkv] for _ in range(2))
    operation(*ours, site).square().sum().backward()
    allowed = operation.allowed(qkv[0], qkv[1], site)
    softmax_attention(*theirs, allowed).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-11, rtol=0)


@pytest.mark.parametrize("pattern", [BlockCausal(chunk=2), TopK(block=8, keep=0.25)], ids=str)
def test_no_mask_of_all_queries_and_keys_is_made(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor beside inputs and outputs is a small multiple of them, whatever the length."""
    grid, largest = Grid3(32, 4, 4), 0
    q, k, v = (x.float() for x in drawn(grid.tokens, grid.tokens))
    for name in ("zeros", "ones"):
        make = getattr(torch, name)

        def noted(*shape: int, make=make, **options: object) -> Tensor:  # type: ignore[no-untyped-def]
            nonlocal largest
            made: Tensor = make(*shape, **options)
            largest = max(largest, made.numel())
            return made

        monkeypatch.setattr(torch, name, noted)
    monkeypatch.setattr(Operation, "allowed", lambda *_: pytest.fail("the mask of all queries and keys was made"))
    pattern.operation(0, 2, 8)(q, k, v, Site(grid))
    assert largest <= q.numel()


def test_empty_chunks_and_windows_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk >= 1"):
        BlockCausal(chunk=0)
    with pytest.raises(ValueError, match="a window holds its sink and a chunk"):
        BlockCausal(chunk=2, window=3, sink=2)
    with pytest.raises(ValueError, match="set window"):
        BlockCausal(chunk=2, sink=1)
    with pytest.raises(ValueError, match="keep in"):
        TopK(keep=0.0)


@pytest.mark.parametrize(("frames", "past", "chunk"), [(5, 4, 2), (5, 0, 2), (3, 0, 2), (2, 3, 1)])
def test_block_causal_mask_by_definition(frames: int, past: int, chunk: int) -> None:
    grid = Grid3(frames, 1, 2)
    q, k, _ = drawn(grid.tokens, (past + frames) * 2)
    mask = BlockCausal(chunk=chunk).operation(0, 2, 8).mask(q, k, Site(grid, past=past))
    assert mask is not None and mask.shape == (2 * frames, 2 * (past + frames))
    for query in range(2 * frames):
        for key in range(2 * (past + frames)):
            frame_of_query, frame_of_key = past + query // 2, key // 2
            assert bool(mask[query, key]) == (frame_of_key // chunk <= frame_of_query // chunk)


@pytest.mark.parametrize(("chunk", "window", "sink"), [(1, 3, 0), (2, 5, 1), (3, 6, 2), (2, 4, 0)])
def test_a_window_follows_the_chunk_of_the_query(chunk: int, window: int, sink: int) -> None:
    """Inside a chunk every query reads the same frames: `window` at most, the sink among them."""
    grid = Grid3(11, 1, 1)
    q, k, _ = drawn(11, 11)
    mask = BlockCausal(chunk=chunk, window=window, sink=sink).operation(0, 2, 8).mask(q, k, Site(grid))
    assert mask is not None
    for query in range(11):
        end = (query // chunk + 1) * chunk
        read = [key for key in range(11) if key < end and (key < sink or key >= end - (window - sink))]
        assert mask[query].nonzero().flatten().tolist() == read
        assert len(read) <= window


def test_one_chunk_reads_everything() -> None:
    q, k, _ = drawn(16, 48)
    assert BlockCausal(chunk=4).operation(0, 2, 8).mask(q, k, Site(Grid3(4, 2, 2), past=8)) is None
    assert Dense().operation(0, 2, 8).mask(q, k, Site(Grid3(4, 2, 2), past=8)) is None


def test_a_memory_must_end_where_a_chunk_ends() -> None:
    with pytest.raises(ValueError, match="whole chunks"):
        BlockCausal(chunk=2).check(Site(Grid3(2, 1, 1), past=3, call=Call(kv=view(3, 3))))
    BlockCausal(chunk=2).check(Site(Grid3(2, 1, 1), past=4, call=Call(kv=view(4, 4))))
    with pytest.raises(ValueError, match="one chunk of 2 frames, not 4"):
        BlockCausal(chunk=2, window=4).check(Site(Grid3(4, 1, 1), past=2, call=Call(kv=view(4, 2))))


def test_the_router_keeps_its_own_block_and_the_most_alike() -> None:
    operation = TopK(block=2, keep=0.5).operation(0, 1, 8)
    axis = torch.eye(8, dtype=torch.float64)
    k = axis[[0, 0, 1, 1, 2, 2, 3, 3]][None, None]
    q = axis[[3, 3, 0, 0, 1, 1, 2, 2]][None, None]  # block i is most like the block before it, cyclically
    chosen = operation.routes(q, k, None)[0, 0].sort(-1).values  # type: ignore[operator]
    assert chosen.tolist() == [[0, 3], [0, 1], [1, 2], [2, 3]]


def test_sparse_attention_reads_few_keys() -> None:
    operation, (q, k, _) = TopK(block=4, keep=0.25).operation(0, 2, 8), drawn(64, 64)
    mask = operation.mask(q, k, Site(Grid3(4, 4, 4)))
    assert mask is not None and mask.float().mean() == 0.25


def test_the_share_of_blocks_is_rounded_up() -> None:
    operation, (q, k, _) = TopK(block=4, keep=0.3).operation(0, 2, 8), drawn(64, 64)
    mask = operation.mask(q, k, Site(Grid3(4, 4, 4)))
    assert mask is not None and mask.float().mean() == 5 / 16  # of 4.8


def test_a_block_is_scored_by_the_mean_of_what_may_be_read() -> None:
    """Neither what fills up the last block nor what is hidden counts."""
    operation = TopK(block=2, keep=0.5).operation(0, 1, 1)
    k = torch.tensor([0, 0, 0.7, 0.7, 0.1, 10, 1.0], dtype=torch.float64)[None, None, :, None]
    readable = torch.tensor([True] * 5 + [False, True])[None, None, None]
    chosen = operation.routes(torch.ones_like(k), k, readable)[0, 0, 0]  # type: ignore[operator]
    assert sorted(chosen.tolist()) == [0, 3]


def test_behind_a_past_the_own_blocks_are_the_last() -> None:
    operation, k = TopK(block=2, keep=0.25).operation(0, 1, 1), torch.zeros(1, 1, 8, 1)
    assert operation.routes(k[:, :, :4], k, None)[0, 0].tolist() == [[2], [3]]  # type: ignore[operator]
    astride = operation.routes(k[:, :, :4], k[:, :, :7], None)[0, 0]  # type: ignore[operator] - each lies in two blocks
    assert astride.sort(-1).values.tolist() == [[1, 2], [2, 3]]


# --- kernels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_attend_is_softmax_attention_in_every_kernel(masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    mask = torch.rand(5, 7) > 0.4 if masked else None
    if mask is not None:
        mask[:, 0] = True
    expected = softmax_attention(q, k, v, mask)
    torch.testing.assert_close(attend(q, k, v, mask), expected, atol=1e-12, rtol=0)
    with attending("sdpa-math"):
        torch.testing.assert_close(attend(q, k, v, mask), expected, atol=1e-12, rtol=0)
    low = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), expected, atol=0.05, rtol=0)


def test_backends_are_reported_with_a_reason() -> None:
    table = backends("cpu")
    assert len({backend.name for backend in table}) == len(table)
    assert all(backend.why for backend in table)
    assert any(backend.name == "sdpa-math" and backend.available for backend in table)
    assert pick("cpu") == table[0]
    assert pick("cpu").name == "matmul"
    assert pick("cpu", torch.float32).name.startswith("sdpa-")
    assert not backends("cpu", torch.float32)[0].available


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attend_takes_the_backend_that_is_reported(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    kernels = "fewstep.attention.kernels"
    monkeypatch.setattr(f"{kernels}._matmul", lambda q, *_: ran.append("matmul") or q)
    monkeypatch.setattr(f"{kernels}.F.scaled_dot_product_attention", lambda q, *_, **__: ran.append("sdpa") or q)
    q = torch.zeros(1, 1, 8, 16, dtype=dtype)
    attend(q, q, q)
    assert pick("cpu", dtype).name.startswith(ran[0])


@pytest.mark.parametrize(
    ("dtype", "keys", "fused"),
    [(torch.bfloat16, 1024, False), (torch.bfloat16, 1025, True), (torch.float32, 8, True), (torch.float64, 8, True)],
)
def test_only_short_bfloat16_is_multiplied_by_hand(
    dtype: torch.dtype, keys: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = F.scaled_dot_product_attention

    def noted(*tensors: Tensor, **options: Tensor) -> Tensor:
        calls.append(tensors[1].shape[2])
        return plain(*tensors, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    q, k = torch.zeros(1, 1, 2, 8, dtype=dtype), torch.zeros(1, 1, keys, 8, dtype=dtype)
    attend(q, k, k)
    assert calls == ([keys] if fused else [])


def test_a_backend_is_tried_by_running_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[torch.dtype] = []

    def refuse(q: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        ran.append(q.dtype)
        raise RuntimeError("no such kernel here")

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", refuse)
    found = {backend.name: backend for backend in backends("cpu")}
    assert ran == [torch.bfloat16] * 2  # flash and math: the others are for CUDA
    assert not found["sdpa-flash"].available and found["sdpa-math"].why == "no such kernel here"
