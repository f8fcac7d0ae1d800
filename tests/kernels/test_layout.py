"""The kernel layout: where each code goes, and that nothing is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowbit.packing import pack
from lowbit_kernels import from_layout, reference, to_layout, unsupported
from lowbit_kernels.layout import block_columns
from tests.kernels.weights import make_weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("group_size", "columns"),
    [
        (32, 96),
        (32, 256),
        (64, 320),
        (128, 384),
        (128, 512),
        (256, 768),
        (512, 1024),
        (-1, 77),
        (-1, 256),
        (77, 77),
    ],
)
@pytest.mark.parametrize("stack_and_rows", [(1,), (65,), (128,), (3, 5)])
def test_nothing_is_lost(
    bits: int, scale_dtype: torch.dtype, group_size: int, columns: int, stack_and_rows: tuple[int, ...]
) -> None:
    weight = make_weight(*stack_and_rows, columns, bits=bits, group_size=group_size, scale_dtype=scale_dtype)
    grid = {"bits": bits, "group_size": group_size, "in_features": columns}
    layout = to_layout(*weight, **grid)
    back = from_layout(*layout, **grid, out_features=stack_and_rows[-1], scale_dtype=scale_dtype)
    for before, after in zip(weight, back, strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


def test_where_a_code_goes() -> None:
    """The picture of the module's docstring, code by code, on the layout that lowbit's packer writes."""
    codes = torch.randint(0, 16, (130, 512), dtype=torch.uint8)
    scales, zeros = torch.randn(130, 4).bfloat16(), torch.randint(0, 16, (130, 4), dtype=torch.uint8)
    words, scale_zero = to_layout(pack(codes, 4), scales, zeros, bits=4, group_size=128, in_features=512)
    assert words.shape == (4, 2, 64, 64)  # 130 rows make four tiles, 512 columns two blocks
    for row, column in [(0, 0), (1, 63), (63, 64), (64, 200), (129, 256 + 3 * 64 + 5), (129, 511)]:
        word = words[row // 64, column // 256, row % 64, column % 64].item()
        assert word >> 4 * (column % 256 // 64) & 15 == codes[row, column]
    pair = scale_zero[2, 3, 1]  # tile, group, row of the tile
    assert pair.to(torch.int16).view(torch.bfloat16) == scales[129, 3]
    assert (pair >> 16).to(torch.int16).view(torch.float16) == 1024 + int(zeros[129, 3])


def test_padding_weighs_nothing() -> None:
    weight = make_weight(3, 384, bits=8, group_size=128)
    layout = to_layout(*weight, bits=8, group_size=128, in_features=384)
    assert (layout.scale_zero.mT.flatten(-3, -2)[3:] & 0xFFFF == 0).all()


@pytest.mark.parametrize(
    ("bits", "group_size", "columns", "block"),
    [
        (4, 128, 4096, 256),
        (4, 128, 896, 128),
        (4, 32, 4096, 128),
        (4, -1, 4096, 256),
        (4, -1, 100, 128),
        (8, 128, 4096, 256),
        (8, 32, 4096, 64),
        (4, 16, 4096, None),
        (4, 96, 960, None),
        (2, 128, 4096, None),
    ],
)
def test_blocks(bits: int, group_size: int, columns: int, block: int | None) -> None:
    assert block_columns(bits, group_size, columns) == block


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("packed", lambda t: t[:, :-1], r"packed must be int32 \[5, 16\], got torch.int32 \[5, 15\]"),
        ("packed", lambda t: t.long(), "packed must be int32"),
        ("scales", lambda t: t.float(), r"scales must be .* \[5, 1\], got torch.float32"),
        ("zeros", lambda t: t[:4], r"zeros must be torch.uint8 \[5, 1\], got torch.uint8 \[4, 1\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, change: object, message: str) -> None:
    weight = make_weight(5, 128, bits=4, group_size=128)
    weight = weight._replace(**{name: change(getattr(weight, name))})  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        to_layout(*weight, bits=4, group_size=128, in_features=128)


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype", "reason"),
    [
        (3, 128, torch.float16, "3 bits"),
        (4, 16, torch.float16, "groups of 16"),
        (4, 128, torch.float32, "torch.float32"),
        (4, 128, torch.float16, "device of type 'cpu'"),
    ],
)
def test_why_not(bits: int, group_size: int, dtype: torch.dtype, reason: str) -> None:
    assert reason in str(unsupported(bits, group_size, 512, dtype, torch.device("cpu")))


def test_reference_reads_the_stream_bit_by_bit() -> None:
    packed = torch.randint(-(2**31), 2**31, (2, 3), dtype=torch.int32)
    stream = [int(word) >> bit & 1 for word in packed[1] for bit in range(32)]
    codes = [sum(stream[4 * i + j] << j for j in range(4)) for i in range(21)]
    assert reference.unpack(packed, 4, 21)[1].tolist() == codes


def test_importing_asks_no_driver() -> None:
    code = (
        "import lowbit_kernels, torch, triton.runtime.driver as d;"
        "assert not torch.cuda.is_initialized(); assert d._active is None and d._default is None"
    )
    source = Path(__file__).parents[2] / "triton_kernels"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
