"""Packed to dense: for whoever wants the dense weight, and for very many rows of x.

There, expanding the weight once and leaving the rest to `torch.matmul` is the faster way.

One program takes a block of a tile of rows. A code less its zero is exact in 16 bits, its product with the
scale is rounded once, from float32: the result is the dense weight of the checkpoint, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit_kernels.tile import ROW_TILE, centred4, centred8, load_groups, row_offsets, scale_of


@triton.jit
def store_slice(out, w, group, row, column, N, K, SCALE: tl.constexpr):
    """One slice of a block, scaled, to its columns of `out [N, K]`."""
    w = (w.to(tl.float32) * scale_of(group, SCALE)).to(out.dtype.element_ty)
    mask = (row < N)[:, None] & (column < K)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * K + column[None, :], w, mask=mask)


@triton.jit
def dequantize_kernel(
    codes, scale_zero, out, N, K, num_groups,
    BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCKS_PER_GROUP: tl.constexpr, SCALE: tl.constexpr,
    BK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, block of columns)."""
    R: tl.constexpr = BK * BITS // 16
    DTYPE: tl.constexpr = out.dtype.element_ty
    tile, block = tl.program_id(0), tl.program_id(1)
    r = tl.arange(0, R)
    row, column = tile * ROW_TILE + tl.arange(0, ROW_TILE), block * BK + r
    code_rows = row_offsets(tile, tl.cdiv(K, BK), ROW_TILE, R)[:, None] + block * (ROW_TILE * R)
    words = tl.load(codes + code_rows + r[None, :])
    groups = scale_zero + row_offsets(tile, num_groups, ROW_TILE, 1)
    if BLOCKS_PER_GROUP:
        groups += block * GROUPS // BLOCKS_PER_GROUP * ROW_TILE
    g0, g1, g2, g3 = load_groups(groups, GROUPS)
    if BITS == 4:
        w0, w1, w2, w3 = centred4(words, g0, g1, g2, g3, DTYPE, ASM)
        store_slice(out, w0, g0, row, column, N, K, SCALE)
        store_slice(out, w1, g1, row, column + R, N, K, SCALE)
        store_slice(out, w2, g2, row, column + 2 * R, N, K, SCALE)
        store_slice(out, w3, g3, row, column + 3 * R, N, K, SCALE)
    else:
        w0, w1 = centred8(words, g0, g2, DTYPE, ASM)
        store_slice(out, w0, g0, row, column, N, K, SCALE)
        store_slice(out, w1, g2, row, column + R, N, K, SCALE)
