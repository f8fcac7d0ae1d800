"""A mixture of experts: each row of x goes through one weight of a stack, all in one launch.

Rows are sorted by expert, and an expert's rows are cut into tiles. How many tiles there are depends on the
routing, which only the GPU knows; the launch takes the most that there can be, and programs without rows
leave at once. So nothing waits for the GPU and the launch has the same shape every time, as CUDA graphs need.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_kernels import tiles
from lowbit_kernels.matmul import check, decode, grid_constants, target


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
        experts: integers `[rows]`, each in `0 ... experts - 1`.
        codes: int16, from `to_layout` of a stack `[experts, ...]`.
        scale_zero: int32, from `to_layout` of a stack.
        bits: 4 or 8.
        group_size: Input columns that share a scale; -1 means the whole row.
        out_features: Rows of each weight, without padding.
        scale_dtype: bfloat16 or float16, that of the scales given to `to_layout`.

    Returns:
        `[rows, out]` in x's dtype.

    Raises:
        ValueError: the tensors do not fit one another.
    """
    constants = grid_constants(bits, group_size, x.shape[-1], scale_dtype)
    check(x, codes, scale_zero, constants, x.shape[-1], out_features)
    if codes.dim() != 5 or experts.shape != x.shape[:1]:
        raise ValueError(
            f"experts must be [{len(x)}] and codes a stack, got {list(experts.shape)}, {list(codes.shape)}"
        )
    y = x.new_empty(len(x), out_features)
    if y.numel():
        rows_of_expert = -(-len(x) // len(codes))  # on average, which chooses the height of a tile
        tile = tiles.choose("decode", target(x.device).arch, bits, x.dtype, rows_of_expert)
        ranges, order = tile_rows(experts, len(codes), tile.rows)
        rows = x if x.stride(-1) == 1 else x.contiguous()
        with torch.cuda.device_of(x):
            decode(rows, codes, scale_zero, None, y, constants, ranges, order, tile)
    return y
