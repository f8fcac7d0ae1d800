"""int8 times int8: activations rounded per token, weights per row, sums in int32.

    y[m, n] = (codes_x[m] . codes_w[n]) * scale_x[m] * scale_w[n] + bias[n]

Both operands are read as they are, along K, which is how the integer tensor cores want them; the weight is
the checkpoint's own tensor. `round_rows_kernel` makes the codes of x first: a pass over x that costs little
beside the product, and once for all features. Scales meet the accumulator, after the last sum.

Up to 16 rows a tile is narrow in features, so that reading the weights occupies the GPU. Tiles are
fixed numbers: none of this has been timed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.matmul import target

_DTYPES = (torch.float16, torch.bfloat16)
_BAND = 8
_LARGEST_BLOCK = 4096
ROUNDING = {"num_warps": 4, "enable_fp_fusion": False}
"""For `round_rows_kernel`: fused, `x * inverse + 1.5 * 2^23` is rounded once, and ties have other codes."""


def unsupported(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the product must take another path, in one line; None where the kernel runs it."""
    if dtype not in _DTYPES:
        return f"no kernel for activations in {dtype}: float16 or bfloat16"
    if device.type != "cuda":
        return f"no kernel for a device of type {device.type!r}"
    arch = target(device).arch
    if arch.startswith("sm_") and int(arch[3:]) < 80:
        return f"no kernel for {arch}: Ampere (sm_80) or newer"
    return None


@triton.jit
def round_rows_kernel(x, codes, scales, K, x_stride, BLOCK: tl.constexpr):
    """Program (row): its scale, bfloat16, then its codes. A row that is not finite gets a NaN scale."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * K
    largest = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.abs(tl.load(x + column, mask=column < K, other=0.0).to(tl.float32))
        bad |= (value < float("inf")).to(tl.int32) ^ 1  # infinite or NaN
        largest = tl.maximum(largest, value)
    scale = tl.div_rn(tl.max(largest, 0), 127.0).to(tl.bfloat16).to(tl.float32)
    scale = tl.maximum(scale, 1.1754943508222875e-38)
    inverse = tl.div_rn(1.0, scale)
    scale = tl.where(tl.max(bad, 0) > 0, float("nan"), scale)
    tl.store(scales + row, scale.to(tl.bfloat16))
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32) * inverse
        # Adding 1.5 * 2^23 leaves no bits for fractions: the sum is rounded to nearest even.
        value = (value + 12582912.0) - 12582912.0
        tl.store(codes + column, value.to(tl.int8), mask=column < K)


@triton.jit(do_not_specialize=["M"])
def int8_kernel(
    x, weight, x_scales, w_scales, bias, out, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, EVEN_K: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Program (tile of y); row tiles run fastest within a band, so that those together share weights."""
    program, feature_tiles, row_tiles = tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(M, BM)
    band = program // (BAND * feature_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    within = program % (BAND * feature_tiles)
    tile, row_tile = within // height, band * BAND + within % height
    row, feature = row_tile * BM + tl.arange(0, BM), tile * BN + tl.arange(0, BN)
    column = tl.arange(0, BK)
    # Rows and features beyond the last are read from the first again; nobody stores them.
    x_pointers = x + (row % M).to(tl.int64)[:, None] * K + column[None, :]
    w_pointers = weight + (feature % N).to(tl.int64)[None, :] * K + column[:, None]
    acc = tl.zeros((BM, BN), tl.int32)
    for start in range(0, K, BK):
        if EVEN_K:
            a, b = tl.load(x_pointers), tl.load(w_pointers)
        else:
            a = tl.load(x_pointers, mask=(start + column < K)[None, :], other=0)
            b = tl.load(w_pointers, mask=(start + column < K)[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        x_pointers += BK
        w_pointers += BK
    row_mask, feature_mask = row < M, feature < N
    y = acc.to(tl.float32) * tl.load(w_scales + feature, mask=feature_mask, other=0.0)[None, :]
    y *= tl.load(x_scales + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        y += tl.load(bias + feature, mask=feature_mask, other=0.0).to(tl.float32)[None, :]
    out += row.to(tl.int64)[:, None] * N + feature[None, :]
    tl.store(out, y.to(out.dtype.element_ty), mask=row_mask[:, None] & feature_mask[None, :])


def tile(rows: int) -> dict[str, int]:
    """Sizes of a tile, warps and stages for so many rows of x."""
    if rows <= 16:
        return {"BM": 16, "BN": 32, "BK": 256, "num_warps": 4, "num_stages": 4}
    if rows <= 64:
        return {"BM": 64, "BN": 64, "BK": 128, "num_warps": 4, "num_stages": 4}
    return {"BM": 128, "BN": 128, "BK": 128, "num_warps": 8, "num_stages": 3}


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of `x [rows, in]`, contiguous, and bfloat16 scales `[rows, 1]`.

    `scale = max|x| / 127`, rounded to bfloat16; `codes = round(x / scale)`, half to even.
    """
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.bfloat16, device=x.device)
    if codes.numel():
        block = min(_LARGEST_BLOCK, triton.next_power_of_2(columns))
        with torch.cuda.device_of(x):
            round_rows_kernel[(rows,)](x, codes, scales, columns, x.stride(0), BLOCK=block, **ROUNDING)
    return codes, scales


def int8_matmul(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ (weight * scales).T + bias`, with the rows of x rounded to int8 on the way.

    Args:
        x: float16 or bfloat16 `[..., in]`, of any strides and any number of rows, none included.
        weight: int8 `[out, in]`, contiguous.
        scales: float32 `[out]`.
        bias: `[out]`, or None.

    Returns:
        `[..., out]` in x's dtype; the sum is exact, and rounded once.

    Raises:
        ValueError: the tensors do not fit one another.
    """
    out_features, in_features = weight.shape
    if x.dtype not in _DTYPES or x.shape[-1] != in_features:
        raise ValueError(f"x must be float16 or bfloat16 [..., {in_features}], got {x.dtype} {list(x.shape)}")
    if weight.dtype != torch.int8 or not weight.is_contiguous():
        raise ValueError(f"weight must be int8 and contiguous, got {weight.dtype}, strides {weight.stride()}")
    if scales.dtype != torch.float32 or scales.shape != (out_features,) or not scales.is_contiguous():
        raise ValueError(f"scales must be float32 [{out_features}], got {scales.dtype} {list(scales.shape)}")
    rows = x.reshape(-1, in_features)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y = x.new_empty(len(rows), out_features)
    if y.numel():
        codes, row_scales = quantize_rows(rows)
        sizes = tile(len(rows))
        grid = (-(-len(rows) // sizes["BM"]) * -(-out_features // sizes["BN"]),)
        with torch.cuda.device_of(x):
            int8_kernel[grid](
                codes, weight, row_scales, scales, bias, y, len(rows), out_features, in_features,
                **sizes, BAND=_BAND, EVEN_K=in_features % sizes["BK"] == 0, BIAS=bias is not None,
            )  # fmt: skip
    return y.view(*x.shape[:-1], out_features)
