"""The currency keeps its promises: shapes checked, rows cut exactly, nothing changed on the way."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme

SCHEME = QuantScheme(4, 32, symmetric=False)


def example(rows: int = 6, columns: int = 64) -> QuantizedWeight:
    random = torch.Generator().manual_seed(0)
    groups = SCHEME.num_groups(columns)
    return QuantizedWeight(
        torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8),
        torch.randn(rows, groups, generator=random).to(torch.bfloat16),
        torch.randint(1, 16, (rows, groups), generator=random, dtype=torch.uint8),
        SCHEME,
    )


def test_dequantize_is_the_equation() -> None:
    weight = example()
    restored = weight.dequantize()
    assert weight.shape == tuple(restored.shape) == (6, 64)
    for row, column in ((0, 0), (2, 31), (2, 32), (5, 63)):
        group = column // 32
        code, zero = int(weight.codes[row, column]), int(weight.zeros[row, group])
        assert restored[row, column].item() == (code - zero) * weight.scales[row, group].item()


def test_dequantize_rounds_once_to_the_dtype_asked_for() -> None:
    weight = example()
    assert torch.equal(weight.dequantize(torch.bfloat16), weight.dequantize().to(torch.bfloat16))


def test_split_rows_cuts_and_keeps_everything() -> None:
    weight = example()
    parts = weight.split_rows([1, 3, 2])
    assert [part.shape[0] for part in parts] == [1, 3, 2]
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(weight, name))
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), weight.dequantize())


@pytest.mark.parametrize("wrong", ["scales", "zeros"])
def test_refuses_shapes_that_do_not_belong_together(wrong: str) -> None:
    weight = example()
    with pytest.raises(ValueError, match=r"must be \(6, 2\)"):
        dataclasses.replace(weight, **{wrong: getattr(weight, wrong)[:, :1]})


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        example().scheme = QuantScheme()  # type: ignore[misc]
