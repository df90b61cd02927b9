"""The order in which samples are drawn, and long files that are read in place."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import torch

from fewstep.core import Rng
from fewstep.data import DataError, draw_indices
from fewstep.data.lines import Lines
from fewstep.data.order import shuffled
from fewstep.data.store import ShardReader
from support_data import synthetic_index


@pytest.mark.parametrize("size", [1, 3, 4, 10, 25])
def test_every_epoch_has_every_sample_once(size: int) -> None:
    n = 10
    stream = [i for step in range(40) for i in draw_indices(n, size, Rng(3, step=step, place=1))]
    epochs = [stream[k : k + n] for k in range(0, len(stream) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # shuffled anew each time
    assert draw_indices(n, size, Rng(3, step=17, place=1)) == stream[17 * size : 18 * size]


def test_places_and_seeds_draw_differently() -> None:
    assert draw_indices(1000, 8, Rng(0)) != draw_indices(1000, 8, Rng(0, place=1))
    assert draw_indices(1000, 8, Rng(0)) != draw_indices(1000, 8, Rng(1))


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 255, 256, 257, 1000])
def test_an_order_is_a_permutation(n: int) -> None:
    assert sorted(shuffled(i, n, b"key") for i in range(n)) == list(range(n))


@pytest.mark.parametrize("n", [5, 16, 33])
def test_orders_are_as_likely_as_they_should_be(n: int) -> None:
    """Every sample is about as often at every position, and after every other: chi-square per degree of freedom."""
    orders = [[shuffled(i, n, b"%d" % key) for i in range(n)] for key in range(1500)]
    positions = Counter((i, v) for order in orders for i, v in enumerate(order))
    follows = Counter(pair for order in orders for pair in zip(order, order[1:]))
    for counts, cells, freedom in ((positions, n * n, (n - 1) ** 2), (follows, n * (n - 1), n * (n - 1))):
        expected = sum(counts.values()) / cells
        assert len(counts) == cells
        assert sum((c - expected) ** 2 / expected for c in counts.values()) / freedom < 2


def test_a_late_step_of_a_huge_dataset_costs_nothing() -> None:
    tracemalloc.start()
    chosen = draw_indices(10**9, 64, Rng(0, step=10**8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({*chosen}) == 64 and max(chosen) < 10**9
    assert peak < 100_000


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeff a red ball\r\n\n  \t\nein grüner Kreis\nno newline".encode())
    lines = Lines(path)
    assert list(lines) == ["a red ball", "ein grüner Kreis", "no newline"]
    assert (len(lines), lines[-1], lines[1:]) == (3, "no newline", ["ein grüner Kreis", "no newline"])
    with pytest.raises(IndexError):
        lines[3]
    path.write_bytes(b"")
    assert list(Lines(path)) == []
    path.write_bytes(b"good\nb\xe4d\n")
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 6\)"):
        Lines(path)


def test_an_index_is_not_loaded(tmp_path: Path) -> None:
    folder = synthetic_index(tmp_path, 20_000)
    ShardReader(folder, "latents")
    tracemalloc.start()
    reader = ShardReader(folder, "latents")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 20 * len(reader) < (folder / "index.jsonl").stat().st_size / 4
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert [reader.row(i) for i in (0, 777, 19_999)] == [rows[i] for i in (0, 777, 19_999)]
    assert torch.equal(reader.read("latents", [777, 19_999])[:, 0, 0, 0, 0], torch.tensor([777.0, 19_999.0]))
