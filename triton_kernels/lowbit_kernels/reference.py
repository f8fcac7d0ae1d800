"""The specification: every kernel's naive twin in plain PyTorch, on the canonical layout, in float64.

Nothing here is fast and nothing here is shared with the kernels, so that a test of one against the
other tests both. `w = (codes - zeros) * scales`, exact: a code less its zero is a small integer.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row, uint8 `[..., count]`.

    Args:
        packed: int32 `[..., ceil(count * bits / 32)]`, a little-endian stream of codes.
        bits: Width of a code; divides 32, so that no code straddles two words.
        count: Codes in a row.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    flat: Tensor = codes.flatten(-2)
    return flat[..., :count].to(torch.uint8)


def dequantize(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The weight `[..., out, in]`: the exact product, rounded once to `dtype`.

    Args:
        packed: int32 `[..., out, ceil(in * bits / 32)]`.
        scales: float `[..., out, groups]`.
        zeros: uint8 `[..., out, groups]`.
        bits: Width of a code.
        group_size: Input columns that share a scale; -1 means the whole row.
        in_features: Columns of the weight.
        dtype: Of the result.
    """
    columns = in_features if group_size == -1 else group_size
    codes = unpack(packed, bits, in_features).double()
    group = torch.arange(in_features, device=packed.device) // columns
    return ((codes - zeros.double()[..., group]) * scales.double()[..., group]).to(dtype)


def dequant_matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
) -> Tensor:
    """`x @ w.T + bias` in float64, for `x [..., in]` and `bias [out]`."""
    weight = dequantize(packed, scales, zeros, bits=bits, group_size=group_size, in_features=x.shape[-1])
    y = x.double() @ weight.mT
    return y if bias is None else y + bias.double()


def grouped_dequant_matmul(
    x: Tensor, experts: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, group_size: int
) -> Tensor:
    """Row `i` of `x [rows, in]` through weight `experts[i]` of the stack; float64 `[rows, out]`."""
    rows = [
        dequant_matmul(row, packed[e], scales[e], zeros[e], bits=bits, group_size=group_size)
        for row, e in zip(x, experts.tolist(), strict=True)
    ]
    return torch.stack(rows) if rows else x.new_empty(0, packed.shape[-2], dtype=torch.float64)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and bfloat16 scales `[..., 1]` of every row: `max|x| / 127`, `round(x / scale)`."""
    values = x.float()
    scales = (values.abs().amax(-1, keepdim=True) / 127).bfloat16()
    scales = scales.clamp(min=torch.finfo(torch.bfloat16).tiny)
    return (values * (1 / scales.float())).round().to(torch.int8), scales


def int8_matmul(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x [..., in]`, its rows rounded, times `weight [out, in] * scales [out]`, in float64."""
    codes, row_scales = quantize_rows(x)
    y = (codes.double() @ weight.double().mT) * scales.double() * row_scales.double()
    return y if bias is None else y + bias.double()


def round_columns(
    base: Tensor, mixing: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, largest: int, start: Tensor,
    inverse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Round columns one after the other, each told of the errors of those before it.

    With `z_k = base_k + sum_{i<k} mixing[k, i] errors_i` and `l_k` the level nearest to what is wanted,
    GPTQ (no `inverse`) wants `z_k` and errs by `start_k - l_k scale`, `start` being the weight. Descent wants
    `z_k inverse_k + start_k scale` and changes by `(start_k - l_k) scale`, `start` being the levels so far.

    Args:
        base: float32 `[columns, out]`, as all that follows where no shape is given.
        mixing: float32 `[columns, columns]`; what lies on or above the diagonal is not read.
        scales: `[groups, out]`.
        zeros: `[groups, out]`.
        groups: integers `[columns]`, the group of each column.
        largest: Code; the smallest is 0, and a level is a code less its zero.
        start: The weight, or the levels so far.
        inverse: float32 `[columns]`, one over the curvature of each column.

    Returns:
        Levels, and errors or changes.
    """
    levels, errors = torch.empty_like(start), torch.zeros_like(start)
    for k, group in enumerate(groups.tolist()):
        scale, zero = scales[group], zeros[group]
        wanted = base[k] + mixing[k, :k] @ errors[:k]
        if inverse is not None:
            wanted = wanted * inverse[k] + start[k] * scale
        levels[k] = (torch.round(wanted / scale) + zero).clamp(0, largest) - zero
        errors[k] = start[k] - levels[k] * scale if inverse is None else (start[k] - levels[k]) * scale
    return levels, errors
