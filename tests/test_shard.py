"""Files written tensor by tensor, read back by the safetensors library itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.shard import DTYPES, Shard, dtype_of


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


NAMES = [
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "I16", "U16", "F16",
    "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64",
]  # fmt: skip
"""All dtypes of the format whose values are whole bytes."""


@pytest.mark.parametrize("name", NAMES)
def test_names_mean_what_they_mean_to_the_library(tmp_path: Path, name: str) -> None:
    size = dtype_of(name, "x").itemsize
    header = json.dumps({"x": {"dtype": name, "shape": [3], "data_offsets": [0, 3 * size]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3 * size))
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        assert opened.get_tensor("x").dtype == dtype_of(name, "x")
    assert set(DTYPES.values()) == set(NAMES)


@pytest.mark.parametrize("name", ["F4", "F6_E2M3", "Q4_K"])
def test_a_dtype_without_a_name_in_torch_is_refused(name: str) -> None:
    with pytest.raises(LowbitError, match=f"a.safetensors: x is stored as {name}: convert it to one of U64"):
        dtype_of(name, "a.safetensors: x")


def test_a_tensor_that_the_format_does_not_hold_is_refused(tmp_path: Path) -> None:
    shard = Shard(tmp_path / "a.safetensors")
    with pytest.raises(LowbitError, match=r"x is torch\.float4_e2m1fn_x2: convert it to one of U64"):
        shard.add("x", torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
    shard.close()


def test_a_mark_keeps_dtypes_by_name(tmp_path: Path) -> None:
    """Their order may change from one version to the next: one that kept numbers is not taken up."""
    shard = Shard(tmp_path / "a.safetensors")
    shard.add("x", torch.arange(3))
    mark = shard.mark()
    assert mark["entries"] == [["I64", "x", [3], 0, 24]]
    Shard(tmp_path / "a.safetensors", mark).close()
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.arange(3))
    mark["entries"] = [[0, "x", [3], 0, 24]]
    with pytest.raises(LowbitError, match="was begun by another version: add --restart to start over"):
        Shard(tmp_path / "a.safetensors", mark)
