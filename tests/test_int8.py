"""The int8 product against float64, its rounding of activations against compressed-tensors' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as library_quantize
from torch import Tensor

from lowbit import int8
from lowbit.activations import LARGEST, quantize_rows, round_rows
from lowbit.errors import LowbitError
from lowbit.formats.int_quantized import ACTIVATIONS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}
SHAPES = [(1, 64, 32), (5, 33, 7), (3, 200, 65), (300, 96, 40)]  # rows, in, out


def weight(out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8)
    scales = (torch.rand(out_features, 1) * 0.01 + 0.001) * (torch.randint(0, 2, (out_features, 1)) * 2 - 1)
    return codes, scales.bfloat16()


def operands(codes: Tensor, scales: Tensor) -> list[int8.Operand]:
    plain = int8.Operand(codes, scales.float().flatten(), codes.shape[1], codes.shape[0], int8.PLAIN)
    return [plain, int8.prepare(codes, scales, torch.bfloat16)]


def exact(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The product in float64, without and with the bias."""
    rows, row_scales = quantize_rows(x)
    product = (rows.double() @ codes.double().T) * scales.double().T * row_scales.double()
    return product, product if bias is None else product + bias.double()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_onednn_is_used_where_it_is_good() -> None:
    assert operands(*weight(8, 32))[1].layout == (int8.ONEDNN if int8.onednn_is_good() else int8.PLAIN)


@pytest.mark.parametrize("spoil", ["slow", "wrong", "absent"])
def test_onednn_is_not_used_where_it_is_not(spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = int8._onednn

    def spoiled(*args: Any) -> Tensor:
        if spoil == "absent":
            raise NotImplementedError
        for _ in range(2000 if spoil == "slow" else 0):
            real(*args)
        return real(*args) + (1 if spoil == "wrong" else 0)

    monkeypatch.setattr(int8, "_onednn", spoiled)
    assert not int8.onednn_is_good.__wrapped__()


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape: tuple[int, int, int], dtype: torch.dtype, with_bias: bool) -> None:
    rows, in_features, out_features = shape
    codes, scales = weight(out_features, in_features)
    x = torch.randn(rows, in_features).mul_(torch.rand(rows, 1) * 30).to(dtype)
    bias = torch.randn(out_features).to(dtype) if with_bias else None
    product, expected = exact(x, codes, scales, bias)
    for operand in operands(codes, scales):
        for grad in (False, True):  # past the dispatcher, and through it
            with torch.set_grad_enabled(grad):
                y = int8.matmul(x, operand, bias)
            assert y.dtype == dtype
            allowed = UNIT[dtype] * (product.abs() + expected.abs())  # two roundings
            assert ((y.double() - expected).abs() <= allowed + 1e-7).all()


def test_many_columns_stay_exact() -> None:
    """Sums beyond 16 bits, where CPUs without VNNI overflow, and beyond the 24 of float32."""
    codes, scales = torch.full((16, 8192), -128, dtype=torch.int8), torch.ones(16, 1).bfloat16()
    x = torch.full((2, 8192), float(LARGEST))
    for operand in operands(codes, scales):
        assert (int8.matmul(x, operand) == -128.0 * LARGEST * 8192).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (3, 4864), (700, 256)], ids=str)
def test_the_fast_rounding_is_the_specification(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).mul_(torch.logspace(-6, 4, shape[0]).unsqueeze(-1)).to(dtype)
    x[0] = 0
    found, scales = int8._quantize(x, int8._Last())
    expected = quantize_rows(x)
    assert torch.equal(found.int() - 128, expected[0].int())
    assert torch.equal(scales, expected[1])
    assert (round_rows(x)[0] == 0).all()


def test_codes_never_clip_and_are_the_library_s() -> None:
    x = torch.randn(2000, 64) * torch.logspace(-20, 20, 2000).unsqueeze(-1)
    codes, scales = quantize_rows(x)
    assert codes.abs().amax(-1).eq(LARGEST).all()
    args = QuantizationArgs.model_validate(ACTIVATIONS)
    theirs = library_quantize(x, scales.float(), torch.zeros_like(scales, dtype=torch.int8), args)
    differ = theirs != codes  # they divide, we multiply by the reciprocal: half a step may go either way
    distance = (x / scales.float()).frac().abs() - 0.5
    assert (distance[differ].abs() < 1e-4).all()
    assert differ.float().mean() < 1e-4


def test_a_bad_row_spoils_no_other() -> None:
    codes, scales = weight(16, 64)
    x = torch.randn(4, 64).bfloat16()
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    for operand in operands(codes, scales):
        y = int8.matmul(x, operand)
        assert y[[1, 2]].isnan().all()
        assert y[[0, 3]].isfinite().all()


@torch.no_grad()
def test_a_tensor_changed_in_place_is_rounded_anew() -> None:
    operand = operands(*weight(32, 64))[1]
    x = torch.randn(3, 64).bfloat16()
    before = int8.matmul(x, operand)
    assert torch.equal(int8.matmul(x, operand), before)
    x.mul_(2)
    assert torch.equal(int8.matmul(x, operand), 2 * before)
    other = torch.randn(3, 64).bfloat16()
    int8.matmul(other, operand)
    assert torch.equal(int8.matmul(x, operand), 2 * before)
    with torch.inference_mode():
        y = torch.ones(3, 64).bfloat16()
        one = int8.matmul(y, operand)
        y.mul_(2)
        assert torch.equal(int8.matmul(y, operand), 2 * one)


def test_shapes_and_strides() -> None:
    operand = operands(*weight(32, 64))[1]
    x = torch.randn(2, 3, 64).bfloat16()
    y = int8.matmul(x, operand)
    assert y.shape == (2, 3, 32)
    assert torch.equal(int8.matmul(x.transpose(0, 1), operand), y.transpose(0, 1))
    assert int8.matmul(x[:0], operand).shape == (0, 3, 32)
    assert copy.deepcopy(operand).nbytes == 32 * 64 + 4 * 32


@pytest.mark.parametrize("x", [torch.zeros(2, 32), torch.zeros(2, 64, dtype=torch.int32)], ids=str)
def test_refused(x: Tensor) -> None:
    for operand in operands(*weight(32, 64)):
        with pytest.raises(LowbitError, match=r"in_features=64|must be bfloat16"):
            int8.matmul(x, operand)


def test_gradient_is_that_of_the_dense_weight() -> None:
    codes, scales = weight(32, 64)
    dense = codes.float() * scales.float()
    for operand in operands(codes, scales):
        assert torch.equal(int8.dequantize(operand, torch.float32), dense)
        x, bias = torch.randn(3, 64, requires_grad=True), torch.zeros(32, requires_grad=True)
        int8.matmul(x, operand, bias).sum().backward()
        torch.testing.assert_close(x.grad, torch.ones(3, 32) @ dense)
        assert torch.equal(bias.grad, torch.full((32,), 3.0))


@pytest.mark.parametrize("with_gradient", [False, True])
def test_opcheck(with_gradient: bool) -> None:
    """On the plain layout: the tool reads the addresses of its inputs, and opaque tensors have none."""
    operand = operands(*weight(32, 64))[0]
    x = torch.randn(3, 64, requires_grad=with_gradient)
    for bias in (None, torch.randn(32)):
        arguments = (x, bias, operand.packed, operand.scales)
        rest = {"out_features": 32, "layout": operand.layout}
        torch.library.opcheck(torch.ops.lowbit.int8_matmul.default, arguments, rest)


def test_compiles_into_one_graph() -> None:
    for operand in operands(*weight(32, 64)):

        def forward(x: Tensor, operand: int8.Operand = operand) -> Tensor:
            return torch.relu(int8.matmul(x * 2, operand)).sum(-1)

        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (2, 5):
            x = torch.randn(rows, 64).bfloat16()
            assert torch.equal(compiled(x), forward(x))
