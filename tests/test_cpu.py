"""The CPU's own layout, and memory that is given back."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import lowbit
from lowbit import QuantScheme, cpu, pages
from lowbit.quantizer import quant_layers
from tests.formats.samples import random_weight
from tests.packed import logits


def test_the_block_of_this_machine_is_known() -> None:
    assert cpu.block() is not None, (
        "a layout that cpu.Block does not describe: packed weights run slowly here"
    )


def test_kernel_and_tiles_agree_at_the_threshold() -> None:
    for scheme in (QuantScheme(4, 32), QuantScheme(4, 32, False), QuantScheme(8, 64, False)):
        weight = random_weight(scheme, (96, 192), torch.bfloat16)
        tiled = cpu.tile(weight)
        x = torch.randn(cpu.MOST_ROWS + 1, 192).bfloat16()
        many = cpu.matmul(x, *tiled, 96)
        few = torch.cat([cpu.matmul(part, *tiled, 96) for part in x.split(8)])
        mass = x.double().abs() @ weight.dequantize(torch.float64).abs().T
        assert ((many.double() - few.double()).abs() / mass).max() < 2**-7


@pytest.mark.parametrize("bits", [4, 8])
def test_without_bfloat16_products_tiles_are_float32(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact but for the rounding of the result; in bfloat16 the weights are rounded, too."""
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: False)
    weight = random_weight(QuantScheme(bits, 64), (96, 192), torch.bfloat16)
    x, bias = torch.randn(cpu.MOST_ROWS + 1, 192).bfloat16(), torch.randn(96).bfloat16()
    exact = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    found = cpu.matmul(x, *cpu.tile(weight), 96, bias)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-3).all()


def test_what_is_kept_between_calls_is_not_handed_out() -> None:
    """A later call must not overwrite an earlier result."""
    weight = random_weight(QuantScheme(4, 32), (96, 192), torch.bfloat16)
    tiled = cpu.tile(weight)
    x = torch.randn(80, 192).bfloat16()
    first = cpu.matmul(x, *tiled, 96)
    copy = first.clone()
    cpu.matmul(-x, *tiled, 96)
    assert torch.equal(first, copy)
    dense = cpu.dense(*tiled, 4, torch.float32)
    copy = dense.clone()
    cpu.dense(tiled[0].flip(0), tiled[1], 4, torch.float32)
    assert torch.equal(dense, copy)


def resident(needle: str) -> int:
    """Kilobytes in memory of the mapped file whose path holds `needle`."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.partition(" ")[0].endswith(":"):
            inside = needle in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_pages_are_given_back_and_read_again(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "weights.safetensors"
    values = torch.arange(2**20, dtype=torch.int32)
    save_file({"a": values}, file)
    with safe_open(file, framework="pt") as opened:
        mapped = opened.get_slice("a")[...]
    assert int(mapped.sum()) == int(values.sum())
    if not resident(file.name):
        pytest.skip("this safetensors does not map files")
    assert pages.release([mapped]) >= 4 * 2**20 - 2 * 4096
    assert resident(file.name) < 64
    assert torch.equal(mapped, values)
    mapped[5], mapped[2**19] = -1, -2  # now it differs from the file, and must stay
    assert pages.release([mapped, values]) == 0
    assert (mapped[5], mapped[2**19]) == (-1, -2)


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux")
def test_a_tensor_beside_one_that_was_written_to_may_go(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "weights.safetensors"
    values = torch.arange(2**20, dtype=torch.int32)
    save_file({"a": values, "b": values.clone()}, file)
    with safe_open(file, framework="pt") as opened:
        written, read = (opened.get_slice(name)[...] for name in "ab")
    written[2**19] = -1
    assert int(read.sum()) == int(values.sum())
    if not resident(file.name):
        pytest.skip("this safetensors does not map files")
    assert pages.release([written, read]) >= 4 * 2**20 - 2 * 4096
    assert written[2**19] == -1
    assert torch.equal(read, values)


FILE, COPY, SWAPPED, ABSENT = 0xA000_0000_0000_0000, 0x8000_0000_0000_0000, 0x4000_0000_0000_0000, 0


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([FILE, FILE], True),
        ([FILE, ABSENT], True),
        ([FILE, COPY], False),
        ([FILE, SWAPPED], False),
        ([ABSENT, ABSENT], False),  # nobody's account
        ([FILE], False),
        (None, False),
    ],
)
def test_pages_that_may_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: list[int] | None, expected: bool
) -> None:
    """Bits of Linux's account of a page: present 63, swapped 62, of a file 61."""
    monkeypatch.setattr(pages, "_PROCESS", tmp_path)
    if entries is not None:
        (tmp_path / "pagemap").write_bytes(np.array([0, *entries], np.uint64).tobytes())
    assert pages._as_on_disk(mmap.PAGESIZE, 3 * mmap.PAGESIZE) is expected


def test_mapped_files_are_found_below_odd_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_PROCESS", tmp_path)
    lines = ["10-20 rw-p 0 fe:00 5  /a\rb\u2028/w.safetensors", "30-40 r--p 0 fe:00 6  /lib/x.so", ""]
    (tmp_path / "maps").write_bytes("\n".join(lines).encode())
    assert pages._mapped_files() == [(0x10, 0x20)]


def test_released_weights_are_saved_whole(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llama", QuantScheme(4, 32))
    model = lowbit.load(folder)
    logits(model)
    pages.release(tensor for layer in quant_layers(model) for tensor in layer.tensors().values())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
