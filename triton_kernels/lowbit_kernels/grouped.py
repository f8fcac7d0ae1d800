"""A mixture of experts: each row of x goes through one weight of a stack, all in one launch.

Rows are sorted by expert, and an expert's rows are cut into tiles. How many tiles there are depends on the
routing, which only the GPU knows; the launch takes the most that there can be, and programs without rows
leave at once. So nothing waits for the GPU and the launch has the same shape every time, as CUDA graphs need.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels import tiles
from lowbit_kernels.matmul import check, decode, grid_constants, target

FEW_ROWS = 4096
"""Up to here one launch that compares all rows with one another beats a dozen that sort them."""
_ROWS = 64


def tile_rows(experts: Tensor, num_experts: int, height: int) -> tuple[Tensor, Tensor]:
    """Cut the rows of each expert into tiles of at most `height`.

    Args:
        experts: int `[rows]`, the expert of each row.
        num_experts: Experts in the stack.
        height: Rows of a tile.

    Returns:
        int32 `[tiles, 3]`, each tile's expert and the range of its rows in the order (empty where there
        are fewer tiles than the most possible), and int32 `[rows]`, the order: rows sorted by expert.
    """
    rows = experts.numel()
    order = torch.argsort(experts, stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
    counts.scatter_add_(0, experts.long(), torch.ones_like(experts, dtype=torch.int64))
    ends = counts.cumsum(0)
    tiles_before = (-(-counts // height)).cumsum(0)
    most = rows // height + min(rows, num_experts)
    tile = torch.arange(most, device=experts.device)
    expert = torch.searchsorted(tiles_before, tile, right=True)
    used = expert < num_experts
    expert = expert.clamp(max=num_experts - 1)
    first_tile = tiles_before[expert] - -(-counts[expert] // height)
    start = ends[expert] - counts[expert] + (tile - first_tile) * height
    end = torch.minimum(start + height, ends[expert])
    ranges = torch.stack((expert, start.where(used, 0), end.where(used, 0)), dim=1)
    return ranges.int(), order.int()


@triton.jit
def _count(experts, rows, index, CHUNK: tl.constexpr):
    """Rows of each expert in `index`."""
    counts = tl.zeros_like(index)
    for start in range(0, rows, CHUNK):
        row = start + tl.arange(0, CHUNK)
        expert = tl.load(experts + row, mask=row < rows, other=-1).to(tl.int32)
        counts += tl.sum((expert[None, :] == index[:, None]).to(tl.int32), 1)
    return counts


@triton.jit(do_not_specialize=["rows", "most"])
def tile_rows_kernel(
    experts, ranges, order, rows, num_experts, most,
    HEIGHT: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`tile_rows` at once: program 0 makes `ranges`, each other one finds the places of `ROWS` rows."""
    program = tl.program_id(0)
    if program > 0:
        row = (program - 1) * ROWS + tl.arange(0, ROWS)
        expert = tl.load(experts + row, mask=row < rows, other=num_experts).to(tl.int32)
        place = tl.zeros((ROWS,), tl.int32)
        for start in range(0, rows, CHUNK):
            other_row = start + tl.arange(0, CHUNK)
            other = tl.load(experts + other_row, mask=other_row < rows, other=num_experts).to(tl.int32)
            tied = (other[None, :] == expert[:, None]) & (other_row[None, :] < row[:, None])
            place += tl.sum(((other[None, :] < expert[:, None]) | tied).to(tl.int32), 1)
        tl.store(order + place, row, mask=row < rows)
    else:
        index = tl.arange(0, EXPERTS)
        counts = _count(experts, rows, index, CHUNK)
        tiles_of = tl.cdiv(counts, HEIGHT)
        last_tile, last_row = tl.cumsum(tiles_of, 0), tl.cumsum(counts, 0)
        first_tile, first_row = last_tile - tiles_of, last_row - counts
        for begin in range(0, most, CHUNK):
            tile = begin + tl.arange(0, CHUNK)
            mine = (tile[:, None] >= first_tile[None, :]) & (tile[:, None] < last_tile[None, :])
            start = first_row[None, :] + (tile[:, None] - first_tile[None, :]) * HEIGHT
            end = tl.minimum(start + HEIGHT, last_row[None, :])
            used = tl.sum(mine.to(tl.int32), 1) > 0
            expert = tl.sum(tl.where(mine, index[None, :], 0), 1)
            entry = ranges + tile * 3
            tl.store(entry, tl.where(used, expert, num_experts - 1), mask=tile < most)
            tl.store(entry + 1, tl.sum(tl.where(mine, start, 0), 1), mask=tile < most)
            tl.store(entry + 2, tl.sum(tl.where(mine, end, 0), 1), mask=tile < most)


def tile_few_rows(experts: Tensor, num_experts: int, height: int) -> tuple[Tensor, Tensor]:
    """As `tile_rows`, in one launch instead of a dozen; its work grows with the square of the rows."""
    rows = experts.numel()
    most = rows // height + min(rows, num_experts)
    ranges = torch.empty(most, 3, dtype=torch.int32, device=experts.device)
    order = torch.empty(rows, dtype=torch.int32, device=experts.device)
    with torch.cuda.device_of(experts):
        tile_rows_kernel[(1 + -(-rows // _ROWS),)](
            experts.contiguous(), ranges, order, rows, num_experts, most,
            HEIGHT=height, ROWS=_ROWS, EXPERTS=triton.next_power_of_2(num_experts), CHUNK=32, num_warps=4,
        )  # fmt: skip
    return ranges, order


def grouped_dequant_matmul(
    x: Tensor,
    experts: Tensor,
    codes: Tensor,
    scale_zero: Tensor,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    scale_dtype: torch.dtype,
) -> Tensor:
    """Row `i` of `x [rows, in]` times the weight of expert `experts[i]`.

    Args:
        x: float16 or bfloat16 `[rows, in]`. A token that is routed to two experts is two rows.
        experts: integers `[rows]`, each in `0 ... experts - 1`. That is checked on the CPU (where Triton
            interprets) and never on a GPU, which would have to be waited for: there a number outside makes
            rows of the result garbage, others' too.
        codes: int16, from `to_layout` of a stack `[experts, ...]`.
        scale_zero: int32, from `to_layout` of a stack.
        bits: 4 or 8.
        group_size: Input columns that share a scale; -1 means the whole row.
        out_features: Rows of each weight, without padding.
        scale_dtype: bfloat16 or float16, that of the scales given to `to_layout`.

    Returns:
        `[rows, out]` in x's dtype.

    Raises:
        ValueError: the tensors do not fit one another, or an expert on the CPU is not in the stack.
    """
    constants = grid_constants(bits, group_size, x.shape[-1], scale_dtype)
    check(x, codes, scale_zero, constants, x.shape[-1], out_features)
    if codes.dim() != 5 or experts.shape != x.shape[:1]:
        raise ValueError(
            f"experts must be [{len(x)}] and codes a stack, got {list(experts.shape)}, {list(codes.shape)}"
        )
    if experts.device.type == "cpu":
        outside = [expert for expert in experts.tolist() if not 0 <= expert < len(codes)]
        if outside:
            raise ValueError(f"experts must be from 0 to {len(codes) - 1}, got {outside[0]}")
    y = x.new_empty(len(x), out_features)
    if y.numel():
        rows_of_expert = -(-len(x) // len(codes))  # on average, which chooses the height of a tile
        tile = tiles.choose("decode", target(x.device).arch, bits, x.dtype, rows_of_expert)
        cut = tile_few_rows if len(x) <= FEW_ROWS else tile_rows
        ranges, order = cut(experts, len(codes), tile.rows)
        rows = x if x.stride(-1) == 1 else x.contiguous()
        with torch.cuda.device_of(x):
            decode(rows, codes, scale_zero, None, y, constants, ranges, order, tile)
    return y
