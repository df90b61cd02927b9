"""What each query reads: masks, kernels, caches."""

from __future__ import annotations

import pytest
import torch

from fewstep.attention import PATTERNS, BlockCausal, Dense, Grid3, KVCache, attend, backends, math_only, pick
from fewstep.attention.pattern import Pattern
from fewstep.core import build


@pytest.mark.parametrize("pattern", [Dense(), BlockCausal(), BlockCausal(chunk=3)])
def test_pattern_survives_its_tree(pattern: Pattern) -> None:
    names = {cls.__name__: cls for cls in PATTERNS}
    assert build(Pattern, pattern.tree(), names) == pattern


def test_empty_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk >= 1"):
        BlockCausal(chunk=0)


@pytest.mark.parametrize(("frames", "cached", "chunk"), [(5, 4, 2), (3, 0, 2), (2, 3, 1)])
def test_block_causal_mask_by_definition(frames: int, cached: int, chunk: int) -> None:
    mask = BlockCausal(chunk=chunk).mask(Grid3(frames, 1, 2), cached)
    assert mask is not None
    assert mask.shape == (2 * frames, 2 * (cached + frames))
    for query in range(2 * frames):
        for key in range(2 * (cached + frames)):
            frame_of_query, frame_of_key = cached + query // 2, key // 2
            assert bool(mask[query, key]) == (frame_of_key // chunk <= frame_of_query // chunk)


def test_one_chunk_needs_no_mask() -> None:
    assert BlockCausal(chunk=4).mask(Grid3(4, 2, 2), cached=8) is None
    assert Dense().mask(Grid3(4, 2, 2)) is None


def test_cache_must_end_where_a_chunk_ends() -> None:
    with pytest.raises(ValueError, match="whole chunks"):
        BlockCausal(chunk=2).mask(Grid3(2, 1, 1), cached=3)


@pytest.mark.parametrize("masked", [False, True])
def test_attend_is_softmax_attention_in_every_kernel(masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    mask = torch.rand(5, 7) > 0.4 if masked else None
    if mask is not None:
        mask[:, 0] = True
    scores = q @ k.mT / 8**0.5
    expected = (scores if mask is None else scores.where(mask, -torch.inf)).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, mask), expected, atol=1e-12, rtol=0)
    with math_only():
        torch.testing.assert_close(attend(q, k, v, mask), expected, atol=1e-12, rtol=0)
    low = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), expected, atol=0.05, rtol=0)


def test_cache_is_immutable_and_grows_at_the_end() -> None:
    first = tuple((torch.full((1, 1, 2, 4), i + 0.1), torch.full((1, 1, 2, 4), i + 0.2)) for i in range(3))
    second = tuple((k + 10, v + 10) for k, v in first)
    empty = KVCache.empty()
    one = empty.commit(first, frames=1)
    two = one.commit(second, frames=1)
    assert (empty.frames, one.frames, two.frames) == (0, 1, 2)
    assert empty.view().layer(0) is None
    assert one.view().layers[0][0].shape[2] == 2
    k, v = two.view().layers[1]
    assert k[0, 0, :, 0].tolist() == pytest.approx([1.1, 1.1, 11.1, 11.1])
    assert v[0, 0, :, 0].tolist() == pytest.approx([1.2, 1.2, 11.2, 11.2])
    with pytest.raises(ValueError, match="3 layers"):
        two.commit(first[:2], frames=1)


def test_backends_are_reported_with_a_reason() -> None:
    table = backends("cpu")
    assert len({backend.name for backend in table}) == len(table)
    assert all(backend.why for backend in table)
    assert any(backend.name == "sdpa-math" and backend.available for backend in table)
    assert pick("cpu") == table[0]
    assert pick("cpu").name == "matmul"
    assert pick("cpu", torch.float32).name.startswith("sdpa-")
    assert not backends("cpu", torch.float32)[0].available


def test_a_backend_is_tried_by_running_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[torch.dtype] = []

    def refuse(q: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        ran.append(q.dtype)
        raise RuntimeError("no such kernel here")

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", refuse)
    found = {backend.name: backend for backend in backends("cpu")}
    assert ran == [torch.bfloat16] * 2  # flash and math: the others are for CUDA
    assert not found["sdpa-flash"].available and found["sdpa-math"].why == "no such kernel here"
