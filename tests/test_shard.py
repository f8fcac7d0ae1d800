"""Files written tensor by tensor, read back by the safetensors library itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.shard import DTYPES, Shard


def write(path: Path, tensors: dict[str, Tensor]) -> Shard:
    shard = Shard(path)
    for name, tensor in tensors.items():
        shard.add(name, tensor)
    shard.close()
    return shard


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_reads_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(-3, 12).view(3, 5).to(dtype)
    write(tmp_path / "a.safetensors", {"x": tensor})
    read = load_file(tmp_path / "a.safetensors")["x"]
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_mixed_widths_in_any_order_are_aligned_and_whole(tmp_path: Path) -> None:
    tensors = {
        "odd bytes": torch.arange(7, dtype=torch.uint8),
        "shape": torch.tensor([3, 5]),
        "odd halves": torch.randn(3).bfloat16(),
        "wide": torch.randn(5, 3),
        "bytes again": torch.arange(5, dtype=torch.int8),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "ünïcode": torch.ones(1, dtype=torch.float64),
    }
    shard = write(tmp_path / "a.safetensors", tensors)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert shard.size == sum(t.nbytes for t in tensors.values())
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    views = {"transposed": whole.T, "rows": whole[1:3], "strided": whole[:, ::2]}
    write(tmp_path / "a.safetensors", views)
    read = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], views[name]) for name in views)


def test_nothing_stays_in_memory(tmp_path: Path) -> None:
    shard = Shard(tmp_path / "a.safetensors")
    shard.add("x", torch.zeros(1000, dtype=torch.uint8))
    shard._data.flush()
    assert (tmp_path / "a.safetensors.data").stat().st_size == 1000
    shard.close()


def test_the_library_writes_the_same_bytes(tmp_path: Path) -> None:
    tensors = {
        f"{name}.{i}": torch.arange(i + 3).to(dtype) for i, dtype in enumerate(DTYPES) for name in "ba"
    }
    write(tmp_path / "a.safetensors", tensors)
    save_file(tensors, tmp_path / "b.safetensors", {"format": "pt"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
