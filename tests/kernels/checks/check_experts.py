"""A stack of experts as `lowbit` makes it for a GPU, through the kernel, against float64."""

from __future__ import annotations

import pytest
import torch

from lowbit import grouped, ops
from lowbit.scheme import QuantScheme
from lowbit_kernels.grouped import tile_few_rows, tile_rows
from tests.formats.samples import random_weight


@pytest.mark.usefixtures("spelling")
@pytest.mark.parametrize("scheme", [QuantScheme(4, 32), QuantScheme(8, 64, False)], ids=str)
def test_a_stack_through_the_kernel(scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [random_weight(scheme, (96, 256), torch.bfloat16, seed) for seed in range(3)]
    x, experts = torch.randn(7, 256).bfloat16(), torch.tensor([2, 0, 2, 2, 0, 2, 2])
    dense = torch.stack([weight.dequantize(torch.float64) for weight in weights])
    expected = torch.einsum("ri,roi->ro", x.double(), dense[experts])

    monkeypatch.setattr(ops, "prepare", lambda weight, dtype: ops._to_triton(weight))
    stacked = grouped.stack(iter(weights), 3, torch.bfloat16)
    assert stacked.layout == ops.TRITON
    tensors, rest = stacked.fields()
    found = grouped._in_one_launch(x, experts, *tensors, **rest)
    assert ((found - expected).abs() <= 2**-8 * expected.abs() + 1e-4).all()


@pytest.mark.parametrize(
    ("rows", "num_experts", "height"), [(1, 8, 8), (8, 128, 8), (40, 3, 8), (130, 60, 16), (300, 5, 32)]
)
def test_rows_are_tiled_alike(rows: int, num_experts: int, height: int) -> None:
    experts = torch.randint(0, num_experts, (rows,))
    for found, expected in zip(
        tile_few_rows(experts, num_experts, height), tile_rows(experts, num_experts, height), strict=True
    ):
        assert torch.equal(found, expected)
