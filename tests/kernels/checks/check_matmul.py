"""Every kernel against its naive twin, at sizes that fit no tile, over poisoned memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit_kernels import dequant_matmul, dequantize, grouped_dequant_matmul, reference, to_layout
from lowbit_kernels.matmul import DECODE_ROWS
from tests.kernels.weights import Canonical, make_weight

ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}

# rows, out, in, group size: each kernel, each way that groups and blocks nest, padding in both directions
SHAPES = [
    (1, 130, 1024, 128),
    (3, 70, 512, 64),
    (16, 65, 416, 32),
    (16, 200, 200, -1),
    (17, 64, 768, 256),
    (40, 70, 1024, 128),
    (63, 130, 384, 128),
    (63, 70, 320, 64),
    (128, 65, 352, 32),
    (128, 129, 328, -1),
]


def padded_with_nan(x: Tensor) -> Tensor:
    """The same values, in a larger matrix that is NaN elsewhere."""
    rows, columns = x.shape
    larger = torch.full((rows + 40, columns + 264), torch.nan, dtype=x.dtype)
    larger[:rows, :columns] = x
    return larger[:rows, :columns]


def assert_close(
    y: Tensor, x: Tensor, weight: Canonical, bias: Tensor | None, bits: int, group_size: int
) -> None:
    """Element by element: one rounding of the result, float32 sums and, in prefill, rounded weights."""
    expected = reference.dequant_matmul(x, *weight, bias, bits=bits, group_size=group_size)
    dense = reference.dequantize(*weight, bits=bits, group_size=group_size, in_features=x.shape[-1])
    unit = ROUNDING[x.dtype]
    of_terms = unit if len(x) > DECODE_ROWS else 2**-20
    allowed = unit * expected.abs() + of_terms * (x.double().abs() @ dense.mT.abs())
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= allowed).all()


@pytest.mark.usefixtures("spelling")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "out", "columns", "group_size"), SHAPES)
def test_matmul(rows: int, out: int, columns: int, group_size: int, bits: int, dtype: torch.dtype) -> None:
    weight = make_weight(out, columns, bits=bits, group_size=group_size, scale_dtype=dtype)
    x, bias = padded_with_nan(torch.randn(rows, columns).to(dtype)), torch.randn(out).to(dtype)
    layout = to_layout(*weight, bits=bits, group_size=group_size, in_features=columns)
    y = dequant_matmul(
        x, *layout, bias, bits=bits, group_size=group_size, out_features=out, scale_dtype=dtype
    )
    assert_close(y, x, weight, bias, bits, group_size)


@pytest.mark.usefixtures("spelling")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "columns", "group_size"), [(70, 512, 128), (65, 416, 32), (66, 90, -1)])
def test_dequantize_is_exact(out: int, columns: int, group_size: int, bits: int, dtype: torch.dtype) -> None:
    weight = make_weight(out, columns, bits=bits, group_size=group_size)
    layout = to_layout(*weight, bits=bits, group_size=group_size, in_features=columns)
    grid = {"bits": bits, "group_size": group_size, "in_features": columns}
    dense = dequantize(*layout, **grid, out_features=out, scale_dtype=torch.bfloat16, dtype=dtype)
    assert torch.equal(dense, reference.dequantize(*weight, **grid, dtype=dtype))


@pytest.mark.usefixtures("spelling")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "num_experts"), [(1, 4), (6, 3), (40, 2)])
def test_grouped(rows: int, num_experts: int, bits: int) -> None:
    weight = make_weight(num_experts, 70, 384, bits=bits, group_size=128)
    layout = to_layout(*weight, bits=bits, group_size=128, in_features=384)
    x = padded_with_nan(torch.randn(rows, 384).half())
    experts = torch.randint(0, num_experts, (rows,))
    y = grouped_dequant_matmul(
        x, experts, *layout, bits=bits, group_size=128, out_features=70, scale_dtype=torch.bfloat16
    )
    expected = reference.grouped_dequant_matmul(x, experts, *weight, bits=bits, group_size=128)
    assert not y.isnan().any()
    torch.testing.assert_close(y.double(), expected, rtol=2**-11, atol=1e-4)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_expert_on_the_cpu_that_is_not_in_the_stack_is_refused(wrong: int) -> None:
    layout = to_layout(
        *make_weight(3, 70, 384, bits=4, group_size=128), bits=4, group_size=128, in_features=384
    )
    experts = torch.tensor([0, 2, wrong], device="cpu")
    with pytest.raises(ValueError, match=f"experts must be from 0 to 2, got {wrong}"):
        grouped_dequant_matmul(
            torch.randn(3, 384).half(), experts, *layout, bits=4, group_size=128, out_features=70,
            scale_dtype=torch.bfloat16,
        )  # fmt: skip


@pytest.mark.usefixtures("spelling")
class TestInputs:
    """What callers hand in: other strides, other shapes, nothing at all, the wrong thing."""

    weight = make_weight(70, 256, bits=4, group_size=128)
    layout = to_layout(*weight, bits=4, group_size=128, in_features=256)

    def run(self, x: Tensor, out_features: int = 70) -> Tensor:
        return dequant_matmul(
            x,
            *self.layout,
            bits=4,
            group_size=128,
            out_features=out_features,
            scale_dtype=torch.bfloat16,
        )

    def test_transposed_x(self) -> None:
        x = torch.randn(256, 3).half().t()
        assert torch.equal(self.run(x), self.run(x.contiguous()))

    def test_leading_dimensions(self) -> None:
        x = torch.randn(2, 3, 256).half()
        y = self.run(x)
        assert y.shape == (2, 3, 70)
        assert torch.equal(y.view(6, 70), self.run(x.view(6, 256)))

    @pytest.mark.parametrize("shape", [(0, 256), (2, 0, 256)])
    def test_no_rows(self, shape: tuple[int, ...]) -> None:
        assert self.run(torch.empty(shape).half()).shape == (*shape[:-1], 70)

    def test_above_prefill(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lowbit_kernels.matmul.prefill_rows", lambda _: 40)
        x = torch.randn(41, 256).bfloat16()
        assert_close(self.run(x), x, self.weight, None, 4, 128)

    def test_a_float32_x_is_refused(self) -> None:
        with pytest.raises(ValueError, match="float16 or bfloat16"):
            self.run(torch.randn(1, 256))

    def test_scales_of_another_weight_are_refused(self) -> None:
        other = to_layout(
            *make_weight(70, 512, bits=4, group_size=128), bits=4, group_size=128, in_features=512
        )
        mixed = {"bits": 4, "group_size": 128, "out_features": 70, "scale_dtype": torch.bfloat16}
        with pytest.raises(ValueError, match="scale_zero"):
            dequant_matmul(torch.randn(1, 256).half(), self.layout.codes, other.scale_zero, **mixed)

    @pytest.mark.parametrize(("columns", "out"), [(512, 70), (256, 129)])
    def test_a_weight_of_another_shape_is_refused(self, columns: int, out: int) -> None:
        with pytest.raises(ValueError, match="in the kernel layout, got"):
            self.run(torch.randn(1, columns).half(), out)
