"""Activations in files are the activations, and leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.carried import Carried
from lowbit.hardware import used_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_memory", [None, 0, 5000])
def test_what_is_set_is_what_is_found(dtype: torch.dtype, in_memory: int | None, tmp_path: Path) -> None:
    carried = Carried(3, in_memory, tmp_path)
    assert list(carried) == [None, None, None]
    for turn in range(2):
        generator = torch.Generator().manual_seed(turn)
        tensors = [torch.randn(2, rows, 40, generator=generator).to(dtype) for rows in (17, 5, 30)]
        for index, tensor in enumerate(tensors):
            carried[index] = tensor
        for index in (2, 0, 1, 1):
            found = carried[index]
            assert found is not None
            assert torch.equal(found, tensors[index])
        everything = [tensor for tensor in carried if tensor is not None]  # earlier ones stay readable
        assert all(map(torch.equal, everything, tensors))
    assert in_memory is None or carried.in_memory() <= in_memory
    assert list(tmp_path.iterdir()) == []
    carried.clear()
    assert list(carried) == [None, None, None]


def test_beyond_the_limit_nothing_stays_resident(tmp_path: Path) -> None:
    carried = Carried(12, 0, tmp_path)
    tensor = torch.zeros(4, 2**20)  # 16 MiB
    before = used_memory()
    for index in range(12):
        carried[index] = tensor.fill_(index)
    for index in range(12):
        found = carried[index]
        assert found is not None
        assert found[3, -1] == index
    assert used_memory() - before < 2 * 2**24


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system can't ask for room on a disk")
def test_the_disk_has_room_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of a mapping that finds the disk full ends the process without a word."""
    map_file, room = torch.from_file, []

    def noted(name: str, **options: Any) -> torch.Tensor:
        room.append(512 * os.stat(name).st_blocks)
        return map_file(name, **options)

    monkeypatch.setattr(torch, "from_file", noted)
    carried = Carried(1, 0, tmp_path)
    carried[0] = torch.zeros(2**18)
    assert room[0] >= 2**20

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        carried[0] = torch.zeros(2**19)
    assert list(tmp_path.iterdir()) == []
