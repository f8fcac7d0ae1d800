"""The int8 kernels against their naive twins, at sizes that fit no tile, over poisoned memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit_kernels import int8, reference

ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
# rows, out, in: each height of a tile, columns beyond a block and short of one, whole blocks
SHAPES = [(1, 33, 40), (3, 70, 300), (16, 32, 512), (17, 65, 130), (64, 70, 128), (130, 140, 200)]


def padded_with_nan(x: Tensor) -> Tensor:
    """The same values, in a larger matrix that is NaN elsewhere."""
    larger = torch.full((x.shape[0] + 40, x.shape[1] + 264), torch.nan, dtype=x.dtype)
    larger[: x.shape[0], : x.shape[1]] = x
    return larger[: x.shape[0], : x.shape[1]]


def weight(out: int, columns: int) -> tuple[Tensor, Tensor]:
    scales = (torch.rand(out) * 0.02 + 0.005) * (torch.randint(0, 2, (out,)) * 2 - 1)
    return torch.randint(-128, 128, (out, columns), dtype=torch.int8), scales


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("columns", [40, 256, 5000])
def test_codes_are_equal(columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(6, columns).mul_(torch.logspace(-4, 2, 6).unsqueeze(-1)).to(dtype)
    x[2] = 0
    for found, expected in zip(
        int8.quantize_rows(padded_with_nan(x)), reference.quantize_rows(x), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize(("rows", "out", "columns"), SHAPES)
def test_product(rows: int, out: int, columns: int, dtype: torch.dtype) -> None:
    codes, scales = weight(out, columns)
    x, bias = torch.randn(rows, columns).to(dtype), torch.randn(out).to(dtype)
    for added in (None, bias):
        y = int8.int8_matmul(padded_with_nan(x), codes, scales, added)
        expected = reference.int8_matmul(x, codes, scales, added)
        terms = reference.int8_matmul(x, codes, scales).abs() + bias.double().abs()
        assert y.shape == expected.shape
        assert ((y.double() - expected).abs() <= ROUNDING[dtype] * expected.abs() + 2**-20 * terms).all()


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    codes, scales = weight(40, 64)
    x = torch.randn(4, 64).bfloat16()
    x[1, 5], x[2, 7] = torch.inf, torch.nan
    y = int8.int8_matmul(x, codes, scales)
    assert y[1:3].isnan().all()
    assert y[[0, 3]].isfinite().all()


def test_inputs() -> None:
    codes, scales = weight(40, 64)
    x = torch.randn(2, 3, 64).half()
    y = int8.int8_matmul(x, codes, scales)
    assert torch.equal(int8.int8_matmul(x.transpose(0, 1), codes, scales), y.transpose(0, 1))
    assert int8.int8_matmul(x[:0], codes, scales).shape == (0, 3, 40)
    for arguments, message in (
        ((x.float(), codes, scales), "float16 or bfloat16"),
        ((x[..., :32], codes, scales), "64"),
        ((x, codes.int(), scales), "int8"),
        ((x, codes, scales[:3]), "scales"),
    ):
        with pytest.raises(ValueError, match=message):
            int8.int8_matmul(*arguments)
