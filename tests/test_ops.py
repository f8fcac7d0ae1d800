"""`lowbit::dequant_matmul` against float64, as an op, compiled, and at the edges."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch import Tensor

from lowbit import ops
from lowbit.errors import LowbitError
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme
from tests.formats.samples import random_weight

# (out, in): whole tiles; rows that are no whole block; a single row; an odd count
SHAPES = [(128, 256), (80, 128), (1, 64), (33, 192)]
SCHEMES = [
    QuantScheme(bits, group, symmetric)
    for bits, group, symmetric in itertools.product((2, 3, 4, 8), (16, 32, 64, -1), (True, False))
]


def exact(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The product in float64, from the equation, and the sum of the absolute values of its terms."""
    width = weight.shape[1] // weight.scales.shape[1]
    zeros = weight.zeros.double().repeat_interleave(width, 1)
    dense = (weight.codes.double() - zeros) * weight.scales.double().repeat_interleave(width, 1)
    bias = torch.zeros(1) if bias is None else bias
    return x.double() @ dense.T + bias.double(), x.double().abs() @ dense.abs().T + bias.double().abs()


def operands(weight: QuantizedWeight) -> list[ops.Operand]:
    return [ops.stream(weight), ops.prepare(weight, torch.bfloat16)]


def worst_error(found: Tensor, exact_and_mass: tuple[Tensor, Tensor]) -> float:
    """Largest error of an entry, relative to the absolute values that were summed up for it."""
    expected, mass = exact_and_mass
    return ((found.double() - expected).abs() / mass).max().item()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_matches_float64(scheme: QuantScheme, rows: int) -> None:
    """Weights and the result are rounded to bfloat16, by 2**-8 at most each."""
    for seed, shape in enumerate(SHAPES):
        weight = random_weight(scheme, shape, torch.bfloat16, seed)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, shape[1], generator=generator)
        bias = torch.randn(shape[0], generator=generator).bfloat16()
        for operand in operands(weight):
            found = ops.matmul(x.bfloat16(), operand, bias)
            assert found.dtype == torch.bfloat16
            assert worst_error(found, exact(x.bfloat16(), weight, bias)) < 2**-7, operand.layout
            # float32 activations see the same weights; only an asymmetric tile's zero is rounded
            tolerance = 1e-6 if operand.layout == ops.STREAM or scheme.symmetric else 2**-8
            assert worst_error(ops.matmul(x, operand), exact(x, weight)) < tolerance, operand.layout


def test_layout_of_every_scheme() -> None:
    weight = random_weight(QuantScheme(4, 16), (32, 64), torch.bfloat16)
    assert ops.prepare(weight, torch.bfloat16).layout == ops.STREAM, "the kernel knows no groups of 16"
    for bits in (2, 3, 4, 8):
        weight = random_weight(QuantScheme(bits, 64), (96, 128), torch.bfloat16)
        assert ops.prepare(weight, torch.bfloat16).layout == ops.TILES


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_symmetric_tiles_are_exact(bits: int, shape: tuple[int, int]) -> None:
    """bfloat16 scales survive the kernel's layout to the bit, negative ones included."""
    weight = random_weight(QuantScheme(bits, 32), shape, torch.bfloat16)
    assert (weight.scales < 0).any()
    expected = weight.dequantize(torch.float32)
    assert torch.equal(ops.dequantize(ops.prepare(weight, torch.bfloat16), torch.float32), expected)
    assert torch.equal(ops.dequantize(ops.stream(weight), torch.float32), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_tiles_are_exact(bits: int) -> None:
    """The layout rounds `zero * scale` to bfloat16; zeros are whole numbers, and found again."""
    weight = random_weight(QuantScheme(bits, 32, symmetric=False), (96, 128), torch.bfloat16)
    weight.scales[3, 1] = 0
    found = ops.dequantize(ops.prepare(weight, torch.bfloat16), torch.float32)
    assert torch.equal(found, weight.dequantize())


@pytest.mark.parametrize("rows", [1, 70])
def test_many_and_few_rows_multiply_the_same_weight(rows: int) -> None:
    """Both roads of the tiles, asked for one column each, give the dequantized weight."""
    for bits in (4, 8):
        weight = random_weight(QuantScheme(bits, 64), (64, 128), torch.bfloat16)
        operand = ops.prepare(weight, torch.bfloat16)
        for column in (0, 63, 64, 127):
            x = torch.zeros(rows, 128, dtype=torch.bfloat16)
            x[:, column] = 1
            expected = weight.dequantize(torch.bfloat16)[:, column].expand(rows, -1)
            assert torch.equal(ops.matmul(x, operand), expected)


def test_any_strides_any_rank_no_rows() -> None:
    weight = random_weight(QuantScheme(4, 32), (96, 128), torch.bfloat16)
    x = torch.randn(128, 5, 2).bfloat16()
    for operand in operands(weight):
        assert ops.matmul(x.permute(2, 1, 0), operand).shape == (2, 5, 96)
        strided = ops.matmul(x.permute(2, 1, 0), operand)
        assert torch.equal(strided, ops.matmul(x.permute(2, 1, 0).contiguous(), operand))
        sliced = torch.randn(3, 300).bfloat16()[:, ::2][:, :128]
        assert torch.equal(ops.matmul(sliced, operand), ops.matmul(sliced.clone(), operand))
        assert ops.matmul(x.new_empty(0, 128), operand).shape == (0, 96)
        assert ops.matmul(x.new_empty(2, 0, 128), operand).shape == (2, 0, 96)
        assert ops.matmul(x.new_zeros(128), operand).shape == (96,)


def test_wrong_inputs_are_named() -> None:
    weight = random_weight(QuantScheme(4, 32), (96, 128), torch.bfloat16)
    for operand in operands(weight):
        with pytest.raises(LowbitError, match="x has 64 columns, the weight has in_features=128"):
            ops.matmul(torch.zeros(1, 64), operand)
        with pytest.raises(LowbitError, match="floating-point"):
            ops.matmul(torch.zeros(1, 128, dtype=torch.int32), operand)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_opcheck(bits: int, layout: int, with_gradient: bool) -> None:
    weight = random_weight(QuantScheme(bits, 32, symmetric=bool(layout)), (96, 128), torch.bfloat16)
    tensors, rest = operands(weight)[layout].fields()
    x = torch.randn(3, 128, dtype=torch.bfloat16, requires_grad=with_gradient)
    for bias in (None, torch.randn(96, dtype=torch.bfloat16)):
        torch.library.opcheck(torch.ops.lowbit.dequant_matmul.default, (x, bias, *tensors), rest)
    torch.library.opcheck(torch.ops.lowbit.dequantize.default, tensors, {**rest, "dtype": torch.float32})


def test_gradient_is_that_of_the_dense_product() -> None:
    weight = random_weight(QuantScheme(4, 32), (96, 128), torch.bfloat16)
    dense = weight.dequantize()
    for operand in operands(weight):
        x = torch.randn(3, 128, requires_grad=True)
        bias = torch.randn(96, requires_grad=True)
        ops.matmul(x, operand, bias).square().sum().backward()
        expected = torch.autograd.grad(torch.nn.functional.linear(x, dense, bias).square().sum(), (x, bias))
        torch.testing.assert_close(x.grad, expected[0], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(bias.grad, expected[1], rtol=1e-4, atol=1e-3)


def test_compiles_as_one_graph() -> None:
    weight = random_weight(QuantScheme(4, 32), (96, 128), torch.bfloat16)
    for operand in operands(weight):

        def forward(x: Tensor, operand: ops.Operand = operand) -> Tensor:
            return torch.relu(ops.matmul(x * 2, operand)).sum(-1)

        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (2, 5):
            x = torch.randn(rows, 128).bfloat16()
            assert torch.equal(compiled(x), forward(x))


@pytest.mark.parametrize("scheme", [QuantScheme(4, 64), QuantScheme(8, 128, False)], ids=str)
def test_gpu_layout_and_calls_fit_the_kernels(scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed to see that the layout holds the weight and that the calls fit the signatures."""
    kernels = pytest.importorskip("lowbit_kernels")
    weight = random_weight(scheme, (96, 256), torch.bfloat16)
    operand = ops._to_triton(weight)
    sizes = {"bits": scheme.bits, "group_size": scheme.group_size, "in_features": 256}
    packed, scales, zeros = kernels.from_layout(
        operand.packed, operand.scales, **sizes, out_features=96, scale_dtype=torch.bfloat16
    )
    assert torch.equal(packed, ops.stream(weight).packed)
    assert torch.equal(scales, weight.scales)
    assert torch.equal(zeros, weight.zeros)
    dense = weight.dequantize()

    def dequant_matmul(*args: object, **kwargs: object) -> Tensor:
        call = signatures["dequant_matmul"].bind(*args, **kwargs).arguments
        assert call["out_features"] == 96
        return torch.nn.functional.linear(call["x"].float(), dense, call["bias"])

    def dequantize(*args: object, **kwargs: object) -> Tensor:
        return dense.to(signatures["dequantize"].bind(*args, **kwargs).arguments["dtype"])

    signatures = {
        name: inspect.signature(getattr(kernels, name)) for name in ("dequant_matmul", "dequantize")
    }
    monkeypatch.setattr(kernels, "dequant_matmul", dequant_matmul)
    monkeypatch.setattr(kernels, "dequantize", dequantize)
    tensors, rest = operand.fields()
    x = torch.randn(3, 256)
    assert torch.equal(ops._matmul_on_cuda(x, None, *tensors, **rest), torch.nn.functional.linear(x, dense))
    assert torch.equal(ops.dequantize(operand, torch.float32), dense)
    with pytest.raises(LowbitError, match="layout 'triton' can't be used on cpu"):
        ops.matmul(x, operand)
