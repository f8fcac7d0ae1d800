"""Rounding the columns of a block one after the other, each making up for the errors of those before it.

GPTQ and coordinate descent both do that, a column at a time, and rows of the weight never meet. As torch
operations it is a dozen launches a column, 23 000 columns in a block of a 7B model, several times over: the
GPU waits for Python. Here a program takes 32 rows of the weight through all columns of a block in one launch.
What the columns still to come want stays in registers; after a column is rounded, its error is added to all
of them (a rank-one update), so nothing is summed twice and no memory is read but the next column's.

The twin is `reference.round_columns`. The order of the sums differs from it, and a value half way between two
codes may fall to the other one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 128
"""Of a block: so many values a thread holds."""
_ROWS = 32


@triton.jit(do_not_specialize=["count"])
def round_columns_kernel(
    base, mixing, scales, zeros, groups, start, inverse, levels, errors,
    count, N, largest,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, DESCENT: tl.constexpr,
):  # fmt: skip
    """Program (rows of the weight); `mixing[i, k]` is what k takes over of i's error, the rest `[.., N]`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < N
    index = tl.arange(0, COLUMNS)
    pointers = base + index[:, None] * N + row[None, :]
    pending = tl.load(pointers, mask=(index < count)[:, None] & mask[None, :], other=0.0)
    for k in range(count):
        group = tl.load(groups + k)
        scale = tl.load(scales + group * N + row, mask=mask, other=1.0)
        zero = tl.load(zeros + group * N + row, mask=mask, other=0.0)
        before = tl.load(start + k * N + row, mask=mask, other=0.0)
        share = tl.load(mixing + k * count + index, mask=(index > k) & (index < count), other=0.0)
        wanted = tl.sum(tl.where((index == k)[:, None], pending, 0.0), 0)
        if DESCENT:
            wanted = wanted * tl.load(inverse + k) + before * scale
        # Far from the grid the nearest code is the last one; near it, adding 1.5 * 2^23 rounds, half to even.
        steps = tl.minimum(tl.maximum(tl.div_rn(wanted, scale), -65536.0), 65536.0)
        steps = (steps + 12582912.0) - 12582912.0
        level = tl.minimum(tl.maximum(steps + zero, 0.0), largest) - zero
        error = (before - level) * scale if DESCENT else before - level * scale
        tl.store(levels + k * N + row, level, mask=mask)
        tl.store(errors + k * N + row, error, mask=mask)
        pending += share[:, None] * error[None, :]


def round_columns(
    base: Tensor, mixing: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, largest: int, start: Tensor,
    inverse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `reference.round_columns`, in one launch.

    Raises:
        ValueError: more than `MOST_COLUMNS` columns, or a tensor that is not contiguous.
    """
    count, rows = base.shape
    if count > MOST_COLUMNS or not all(one.is_contiguous() for one in (base, scales, zeros, groups, start)):
        raise ValueError(f"{count} columns, at most {MOST_COLUMNS}; every tensor has to be contiguous")
    levels, errors = torch.empty_like(start), torch.empty_like(start)
    with torch.cuda.device_of(base):
        round_columns_kernel[(-(-rows // _ROWS),)](
            base, mixing.T.contiguous(), scales, zeros, groups, start, inverse, levels, errors,
            count, rows, float(largest), COLUMNS=MOST_COLUMNS, ROWS=_ROWS, DESCENT=inverse is not None,
            num_warps=1,
        )  # fmt: skip
    return levels, errors
