"""Decode: up to 32 rows of x, a matrix-vector product whose cost is reading the weights once.

Each program takes `BN` output features and a run of blocks of K. Group scales multiply the float32
accumulator, once per group, so that a weight costs no multiplication of its own.

There are seldom enough output features to occupy a GPU, so K is split between programs. Their float32
parts go to a workspace and `reduce_kernel` adds them in a fixed order: the result does not depend on
which program finishes first. The split is by whole blocks, since an offset that is a multiple of a
constant keeps the loads 16 bytes wide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit_kernels.tile import centred4, centred8, load_groups, load_x


@triton.jit
def multiply4(acc, words, x, x_mask, column, K, groups, group_stride, GROUPS: tl.constexpr, BK: tl.constexpr,
              EVEN_K: tl.constexpr, SCALE: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """`acc` plus a block of 4-bit weights times x, scaled by group."""
    DTYPE: tl.constexpr = x.dtype.element_ty.element_ty if x.dtype.is_block() else x.dtype.element_ty
    R: tl.constexpr = BK // 4
    s0, s1, s2, s3, z0, z1, z2, z3 = load_groups(groups, group_stride, GROUPS, SCALE)
    w0, w1, w2, w3 = centred4(words, z0, z1, z2, z3, DTYPE, ASM)
    x0 = load_x(x, x_mask, column, K, EVEN_K)
    x1 = load_x(x + R, x_mask, column + R, K, EVEN_K)
    x2 = load_x(x + 2 * R, x_mask, column + 2 * R, K, EVEN_K)
    x3 = load_x(x + 3 * R, x_mask, column + 3 * R, K, EVEN_K)
    part = tl.dot(w0, x0)
    if GROUPS == 4:
        acc += part * s0[:, None]
        part = tl.dot(w1, x1)
    else:
        part = tl.dot(w1, x1, part)
    if GROUPS == 1:
        part = tl.dot(w2, x2, part)
    else:
        acc += part * s1[:, None]
        part = tl.dot(w2, x2)
    if GROUPS == 4:
        acc += part * s2[:, None]
        part = tl.dot(w3, x3)
    else:
        part = tl.dot(w3, x3, part)
    return acc + part * s3[:, None]


@triton.jit
def multiply8(acc, words, x, x_mask, column, K, groups, group_stride, GROUPS: tl.constexpr, BK: tl.constexpr,
              EVEN_K: tl.constexpr, SCALE: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """`acc` plus a block of 8-bit weights times x, scaled by group."""
    DTYPE: tl.constexpr = x.dtype.element_ty.element_ty if x.dtype.is_block() else x.dtype.element_ty
    s0, _, s1, _, z0, _, z1, _ = load_groups(groups, group_stride, GROUPS, SCALE)
    w0, w1 = centred8(words, z0, z1, DTYPE, ASM)
    x0 = load_x(x, x_mask, column, K, EVEN_K)
    x1 = load_x(x + BK // 2, x_mask, column + BK // 2, K, EVEN_K)
    part = tl.dot(w0, x0)
    if GROUPS == 2:
        acc += part * s0[:, None]
        part = tl.dot(w1, x1)
    else:
        part = tl.dot(w1, x1, part)
    return acc + part * s1[:, None]


@triton.jit
def decode_kernel(
    x, codes, scale_zero, bias, out, M, N, K, blocks_per_part, x_stride, code_stride, group_stride,
    BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCKS_PER_GROUP: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    BIAS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program (features, rows, part of K); `out` is y `[M, N]`, or its float32 parts `[parts, M, N]`."""
    R: tl.constexpr = BK * BITS // 16
    tile, part = tl.program_id(0), tl.program_id(2)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    feature = tile * BN + tl.arange(0, BN)
    x_mask = (row < M)[None, :]

    first = part * blocks_per_part
    last = tl.minimum(first + blocks_per_part, tl.cdiv(K, BK))
    column = (first * BK + tl.arange(0, R))[:, None]
    codes += (tile * BN).to(tl.int64) * code_stride
    word = tl.arange(0, BN)[:, None] * code_stride + (first * R + tl.arange(0, R))[None, :]
    x_pointers, code_pointers = x + row[None, :] * x_stride + column, codes + word
    group_pointers = scale_zero + feature

    acc = tl.zeros((BN, BM), tl.float32)
    for block in range(first, last):
        words = tl.load(code_pointers)
        if BLOCKS_PER_GROUP == 0:
            groups = group_pointers
        else:
            groups = group_pointers + block * GROUPS // BLOCKS_PER_GROUP * group_stride
        if BITS == 4:
            acc = multiply4(acc, words, x_pointers, x_mask, column, K, groups, group_stride, GROUPS, BK,
                            EVEN_K, SCALE, ASM)  # fmt: skip
        else:
            acc = multiply8(acc, words, x_pointers, x_mask, column, K, groups, group_stride, GROUPS, BK,
                            EVEN_K, SCALE, ASM)  # fmt: skip
        code_pointers += R
        x_pointers += BK
        column += BK

    if BIAS and not SPLIT:
        acc += tl.load(bias + feature, mask=feature < N, other=0.0).to(tl.float32)[:, None]
    if SPLIT:
        out += part.to(tl.int64) * M * N
    y = out + row[None, :].to(tl.int64) * N + feature[:, None]
    tl.store(y, acc.to(out.dtype.element_ty), mask=x_mask & (feature < N)[:, None])


@triton.jit
def reduce_kernel(parts, bias, out, num_parts, size, N, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    """`out[i] = sum of parts[p, i] over p, in order, + bias[i % N]`, rounded once; `size` is M * N."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(num_parts):
        total += tl.load(parts + index, mask=mask, other=0.0)
        parts += size
    if BIAS:
        total += tl.load(bias + index % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=mask)
