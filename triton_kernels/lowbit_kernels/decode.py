"""Decode: up to 32 rows of x, a matrix-vector product whose cost is reading the weights once.

Each program takes `BN` output features and a run of blocks of K. Group scales multiply the float32
accumulator, once per group, so that a weight costs no multiplication of its own.

There are seldom enough output features to occupy a GPU, so K is split between programs. Their float32
parts go to a workspace and `reduce_kernel` adds them in a fixed order: the result does not depend on
which program finishes first. The split is by whole blocks, since an offset that is a multiple of a
constant keeps the loads 16 bytes wide. Where the GPU can (`OVERLAP`), `reduce_kernel` is launched while
the parts are made, and waits for them.

With `EXPERTS`, a tile of rows belongs to one expert of a stack and is gathered: `experts [tiles, 3]` gives
its expert, and the part of `order` that lists its rows (`grouped.py` makes both).
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
    """`acc` plus a block of 4-bit weights times x, scaled by group."""
    g0, g1, g2, g3 = load_groups(groups, GROUPS)
    w0, w1, w2, w3 = centred4(words, g0, g1, g2, g3, x.dtype.element_ty, ASM)
    x0 = load_x(x, x_mask, column, K, EVEN_K)
    x1 = load_x(x + R, x_mask, column + R, K, EVEN_K)
    x2 = load_x(x + 2 * R, x_mask, column + 2 * R, K, EVEN_K)
    x3 = load_x(x + 3 * R, x_mask, column + 3 * R, K, EVEN_K)
    part = tl.dot(w0, x0)
    if GROUPS == 4:
        acc += part * scale_of(g0, SCALE)
        part = tl.dot(w1, x1)
    else:
        part = tl.dot(w1, x1, part)
    if GROUPS == 1:
        part = tl.dot(w2, x2, part)
    else:
        acc += part * scale_of(g1, SCALE)
        part = tl.dot(w2, x2)
    if GROUPS == 4:
        acc += part * scale_of(g2, SCALE)
        part = tl.dot(w3, x3)
    else:
        part = tl.dot(w3, x3, part)
    return acc + part * scale_of(g3, SCALE)


@triton.jit
def multiply8(acc, words, x, x_mask, column, K, groups, GROUPS: tl.constexpr, R: tl.constexpr,
              EVEN_K: tl.constexpr, SCALE: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """`acc` plus a block of 8-bit weights times x, scaled by group."""
    g0, _, g1, _ = load_groups(groups, GROUPS)
    w0, w1 = centred8(words, g0, g1, x.dtype.element_ty, ASM)
    x0 = load_x(x, x_mask, column, K, EVEN_K)
    x1 = load_x(x + R, x_mask, column + R, K, EVEN_K)
    part = tl.dot(w0, x0)
    if GROUPS == 2:
        acc += part * scale_of(g0, SCALE)
        part = tl.dot(w1, x1)
    else:
        part = tl.dot(w1, x1, part)
    return acc + part * scale_of(g1, SCALE)


@triton.jit(do_not_specialize=["M", "blocks_per_part"])
def decode_kernel(
    x, codes, scale_zero, bias, out, experts, order,
    M, N, K, x_stride, num_tiles, num_groups, blocks_per_part,
    BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCKS_PER_GROUP: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    BIAS: tl.constexpr, EXPERTS: tl.constexpr, ASM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (features, rows, part of K); `out` is y `[M, N]`, or its float32 parts `[parts, M, N]`."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    R: tl.constexpr = BK * BITS // 16
    tile, part, blocks = tl.program_id(0), tl.program_id(2), tl.cdiv(K, BK)
    first = part * blocks_per_part
    last = tl.minimum(first + blocks_per_part, blocks)
    feature = tile * BN + tl.arange(0, BN)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    if EXPERTS:
        experts += tl.program_id(1) * 3
        expert, start, end = tl.load(experts), tl.load(experts + 1), tl.load(experts + 2)
        codes += expert.to(tl.int64) * num_tiles * blocks * (ROW_TILE * R)
        scale_zero += expert.to(tl.int64) * num_tiles * num_groups * ROW_TILE
        last = tl.where(start < end, last, first)
        position = start + tl.arange(0, BM)
        x_mask = (position < end)[None, :]
        row = tl.load(order + position, mask=position < end, other=0).to(tl.int64)
    else:
        x_mask = (row < M)[None, :]

    column = (first * BK + tl.arange(0, R))[:, None]
    x_pointers = x + row[None, :] * x_stride + column
    code_pointers = codes + row_offsets(tile, blocks, BN, R)[:, None] + tl.arange(0, R)[None, :]
    code_pointers += first * (ROW_TILE * R)
    group_pointers = scale_zero + row_offsets(tile, num_groups, BN, 1)

    acc = tl.zeros((BN, BM), tl.float32)
    for block in range(first, last):
        words = tl.load(code_pointers)
        if BLOCKS_PER_GROUP == 0:
            groups = group_pointers
        else:
            groups = group_pointers + block * GROUPS // BLOCKS_PER_GROUP * ROW_TILE
        if BITS == 4:
            acc = multiply4(acc, words, x_pointers, x_mask, column, K, groups, GROUPS, R, EVEN_K, SCALE, ASM)
        else:
            acc = multiply8(acc, words, x_pointers, x_mask, column, K, groups, GROUPS, R, EVEN_K, SCALE, ASM)
        code_pointers += ROW_TILE * R
        x_pointers += BK
        column += BK

    if BIAS and not SPLIT:
        acc += tl.load(bias + feature, mask=feature < N, other=0.0).to(tl.float32)[:, None]
    if SPLIT:
        out += part.to(tl.int64) * M * N
    y = out + row[None, :].to(tl.int64) * N + feature[:, None]
    tl.store(y, acc.to(out.dtype.element_ty), mask=x_mask & (feature < N)[:, None])


@triton.jit(do_not_specialize=["num_parts"])
def reduce_kernel(
    parts, bias, out, num_parts, size, N, BLOCK: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """`out[i] = sum of parts[p, i] over p, in order, + bias[i % N]`, rounded once; `size` is M * N."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = tl.zeros((BLOCK,), tl.float32)
    parts += index
    for first in range(0, num_parts, 4):  # four loads under way at a time
        a = tl.load(parts, mask=mask, other=0.0)
        b = tl.load(parts + size, mask=mask & (first + 1 < num_parts), other=0.0)
        c = tl.load(parts + 2 * size, mask=mask & (first + 2 < num_parts), other=0.0)
        d = tl.load(parts + 3 * size, mask=mask & (first + 3 < num_parts), other=0.0)
        total = (((total + a) + b) + c) + d
        parts += 4 * size
    if BIAS:
        total += tl.load(bias + index % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=mask)
