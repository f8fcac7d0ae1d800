"""How work is cut: parts of K, and tiles of rows that go to the same expert."""

from __future__ import annotations

import pytest
import torch

from lowbit_kernels.grouped import tile_rows
from lowbit_kernels.matmul import split
from lowbit_kernels.tiles import Tiles

TILE = Tiles(16, 64, 0, 2, 3, programs=4)


@pytest.mark.parametrize("blocks", [1, 2, 3, 16, 17, 56])
@pytest.mark.parametrize("programs", [1, 7, 64, 448, 5000])
@pytest.mark.parametrize("most", [0, 1, 4, 64])
def test_parts_cover_k_and_none_is_empty(blocks: int, programs: int, most: int) -> None:
    parts, per_part = split(blocks, programs, TILE, 132, most)
    assert (parts - 1) * per_part < blocks <= parts * per_part


@pytest.mark.parametrize(
    ("blocks", "programs", "most", "parts"),
    [
        (16, 64, 64, 8),  # 4096 x 4096, one row: until the device is full, two blocks a part
        (16, 64, 4, 4),  # 16 rows: no more parts than are worth their traffic
        (16, 64, 1, 3),  # 64 rows: just what keeps every multiprocessor busy, in whole blocks
        (16, 528, 64, 1),  # enough features to fill the device
        (1, 1, 64, 1),
    ],
)
def test_how_many_parts(blocks: int, programs: int, most: int, parts: int) -> None:
    assert split(blocks, programs, TILE, 132, most)[0] == parts


@pytest.mark.parametrize(
    ("rows", "num_experts", "height"), [(1, 8, 8), (40, 3, 8), (64, 128, 16), (33, 1, 32)]
)
def test_every_row_is_in_one_tile_of_its_expert(rows: int, num_experts: int, height: int) -> None:
    experts = torch.randint(0, num_experts, (rows,))
    ranges, order = tile_rows(experts, num_experts, height)
    seen = []
    for expert, start, end in ranges.tolist():
        assert end - start <= height
        assert all(experts[row] == expert for row in order[start:end])
        seen += order[start:end].tolist()
    assert sorted(seen) == list(range(rows))
