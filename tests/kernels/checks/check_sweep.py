"""Columns rounded one after the other in one launch, against the loop that says what that is."""

from __future__ import annotations

import pytest
import torch

from lowbit import QuantScheme
from lowbit.algorithms import columns, gptq
from lowbit_kernels import reference
from lowbit_kernels.sweep import MOST_COLUMNS, round_columns


@pytest.mark.parametrize("descent", [False, True], ids=["gptq", "descent"])
@pytest.mark.parametrize(("columns", "out"), [(MOST_COLUMNS, 70), (40, 32), (1, 5)])
def test_columns_are_rounded_alike(columns: int, out: int, descent: bool) -> None:
    groups = torch.arange(columns) // 16
    shape = (int(groups.max()) + 1, out)
    scales = (torch.rand(shape) * 0.1 + 0.02) * (torch.randint(0, 2, shape) * 2 - 1)
    zeros = torch.randint(0, 16, shape).float()
    mixing = torch.randn(columns, columns) / columns**0.5
    start = torch.randn(columns, out)
    inverse = torch.rand(columns) + 0.5 if descent else None
    if descent:
        start = torch.randint(0, 16, (columns, out)) - zeros[groups]
    base = torch.randn(columns, out) if descent else start.clone()
    given = (base, mixing, scales, zeros, groups, 15, start, inverse)
    before = [part.clone() for part in given if isinstance(part, torch.Tensor)]
    levels, errors = round_columns(*given)
    expected, expected_errors = reference.round_columns(*given)
    assert torch.equal(levels, expected)
    torch.testing.assert_close(errors, expected_errors, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, before, (part for part in given if isinstance(part, torch.Tensor))))


def test_what_is_far_from_the_grid_gets_its_last_code() -> None:
    base = torch.tensor([[1e30, -1e30, 7e4, 0.5, 1.5, 2.5]])
    scales, zeros = torch.ones(1, 6), torch.full((1, 6), 8.0)
    levels, _ = round_columns(base, torch.zeros(1, 1), scales, zeros, torch.zeros(1).long(), 15, base)
    assert levels.tolist() == [[7, -8, 7, 0, 2, 2]]


@pytest.mark.parametrize("scheme", [QuantScheme(4, 32), QuantScheme(3, 64, False)], ids=str)
def test_gptq_rounds_alike(scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole algorithm with the kernel and with the loop: the same codes but for ties, the same error."""
    x = torch.randn(400, 64) @ torch.randn(64, 64) / 8
    weight, hessian = torch.randn(40, 64), x.T @ x / 400
    found = []
    for kernel in (round_columns, None):
        monkeypatch.setattr(columns, "sweep", lambda device, block_size, kernel=kernel: kernel)
        rounded, note = gptq.quantize_weight(weight, hessian, scheme, torch.bfloat16, block_size=32)
        assert not note
        found.append(rounded)
    assert (found[0].codes != found[1].codes).float().mean() < 0.02
    errors = [float((((weight - one.dequantize()) @ x.T) ** 2).sum()) for one in found]
    assert errors[0] == pytest.approx(errors[1], rel=5e-3)


def test_strided_columns_are_refused() -> None:
    base, scales, zeros = torch.zeros(6, 4).T, torch.ones(1, 6), torch.zeros(1, 6)
    with pytest.raises(ValueError, match="contiguous"):
        round_columns(base, torch.zeros(4, 4), scales, zeros, torch.zeros(4).long(), 15, base)
