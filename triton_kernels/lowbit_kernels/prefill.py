"""Prefill: from 33 rows of x to 1024 (Hopper: 256; `matmul.prefill_rows`); the tensor cores are the cost.

Weights take their scale before they are multiplied, as a dense checkpoint's have: an instruction for two
weights, against one for every accumulator of a tile that now has as many rows as features. A tile of x is
wide, so a step goes through `STEP` words of each row of a block, not all of them, and the parts of a block
that a step leaves out are read by the next.

Programs run down the rows first, in bands of `BAND` row tiles: those that run together share weights in L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit_kernels.tile import (
    ROW_TILE,
    centred4,
    centred8,
    load_groups,
    load_x,
    row_offsets,
    scale_of,
)


@triton.jit
def multiply4(acc, words, x, x_mask, column, K, groups, GROUPS: tl.constexpr, R: tl.constexpr,
              EVEN_K: tl.constexpr, SCALE: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """`acc` plus a step of 4-bit weights, scaled, times x."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    g0, g1, g2, g3 = load_groups(groups, GROUPS)
    w0, w1, w2, w3 = centred4(words, g0, g1, g2, g3, DTYPE, ASM)
    x0 = load_x(x, x_mask, column, K, EVEN_K)
    x1 = load_x(x + R, x_mask, column + R, K, EVEN_K)
    x2 = load_x(x + 2 * R, x_mask, column + 2 * R, K, EVEN_K)
    x3 = load_x(x + 3 * R, x_mask, column + 3 * R, K, EVEN_K)
    acc = tl.dot(w0 * scale_of(g0, SCALE).to(DTYPE), x0, acc)
    acc = tl.dot(w1 * scale_of(g1, SCALE).to(DTYPE), x1, acc)
    acc = tl.dot(w2 * scale_of(g2, SCALE).to(DTYPE), x2, acc)
    return tl.dot(w3 * scale_of(g3, SCALE).to(DTYPE), x3, acc)


@triton.jit
def multiply8(acc, words, x, x_mask, column, K, groups, GROUPS: tl.constexpr, R: tl.constexpr,
              EVEN_K: tl.constexpr, SCALE: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """`acc` plus a step of 8-bit weights, scaled, times x."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    g0, _, g1, _ = load_groups(groups, GROUPS)
    w0, w1 = centred8(words, g0, g1, DTYPE, ASM)
    x0 = load_x(x, x_mask, column, K, EVEN_K)
    x1 = load_x(x + R, x_mask, column + R, K, EVEN_K)
    acc = tl.dot(w0 * scale_of(g0, SCALE).to(DTYPE), x0, acc)
    return tl.dot(w1 * scale_of(g1, SCALE).to(DTYPE), x1, acc)


@triton.jit(do_not_specialize=["M", "blocks_per_part"])
def prefill_kernel(
    x, codes, scale_zero, bias, out, M, N, K, x_stride, num_groups, blocks_per_part,
    BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCKS_PER_GROUP: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STEP: tl.constexpr, BAND: tl.constexpr,
    EVEN_K: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (tile of y, part of K); row tiles run fastest within a band; `out` as in `decode_kernel`."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    R: tl.constexpr = BK * BITS // 16
    STEPS: tl.constexpr = R // STEP
    program, feature_tiles, row_tiles = tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(M, BM)
    band = program // (BAND * feature_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    within = program % (BAND * feature_tiles)
    tile, row_tile = within // height, band * BAND + within % height
    row = row_tile * BM + tl.arange(0, BM)
    feature = tile * BN + tl.arange(0, BN)
    x_mask = (row < M)[None, :]

    step_column = tl.arange(0, STEP)
    x_pointers = x + row[None, :].to(tl.int64) * x_stride + step_column[:, None]
    blocks = tl.cdiv(K, BK)
    code_pointers = codes + row_offsets(tile, blocks, BN, R)[:, None] + step_column[None, :]
    group_pointers = scale_zero + row_offsets(tile, num_groups, BN, 1)

    acc = tl.zeros((BN, BM), tl.float32)
    part = tl.program_id(1)
    first = part * blocks_per_part
    last = tl.minimum(first + blocks_per_part, blocks)
    for step in range(first * STEPS, last * STEPS):
        block, start = step // STEPS, step % STEPS * STEP
        words = tl.load(code_pointers + (block * (ROW_TILE * R) + start))
        column = block * BK + start
        if BLOCKS_PER_GROUP == 0:
            groups = group_pointers
        else:
            groups = group_pointers + block * GROUPS // BLOCKS_PER_GROUP * ROW_TILE
        if BITS == 4:
            acc = multiply4(acc, words, x_pointers + column, x_mask, column + step_column[:, None], K, groups,
                            GROUPS, R, EVEN_K, SCALE, ASM)  # fmt: skip
        else:
            acc = multiply8(acc, words, x_pointers + column, x_mask, column + step_column[:, None], K, groups,
                            GROUPS, R, EVEN_K, SCALE, ASM)  # fmt: skip

    if BIAS and not SPLIT:
        acc += tl.load(bias + feature, mask=feature < N, other=0.0).to(tl.float32)[:, None]
    if SPLIT:
        out += part.to(tl.int64) * M * N
    y = out + row[None, :].to(tl.int64) * N + feature[:, None]
    tl.store(y, acc.to(out.dtype.element_ty), mask=x_mask & (feature < N)[:, None])
