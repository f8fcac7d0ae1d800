"""From tensors to launches: which kernel, how many programs, and nothing that waits for the GPU."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from lowbit_kernels.decode import decode_kernel, reduce_kernel
from lowbit_kernels.dequantize import dequantize_kernel
from lowbit_kernels.layout import ROW_TILE, WHOLE_ROW, block_columns, padded_tiles
from lowbit_kernels.prefill import prefill_kernel
from lowbit_kernels.tiles import Tiles, choose
from lowbit_kernels.tuned import for_device, shape_key

DECODE_ROWS = 32
_PREFILL_ROWS = {"sm_90": 256}
"""Measured on an H200: above this, a dense product is so much faster that expanding the weight pays."""
_PREFILL_ROWS_ELSEWHERE = 1024
"""Not measured; above this, expanding the weight costs less than a tenth of multiplying by it."""

_BAND = 8
_REDUCE_BLOCK = 256
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Target(NamedTuple):
    """What the host code asks about a device: `sm_90` or `gfx942`, its size, and whether it speaks PTX."""

    arch: str
    multiprocessors: int
    ptx: bool

    @property
    def overlaps(self) -> bool:
        """Can a kernel be launched before the one that it waits for ends (programmatic dependent launch)?"""
        return self.ptx and int(self.arch.removeprefix("sm_")) >= 90


@cache
def target(device: torch.device) -> Target:
    """The target behind `device`; asks the driver once."""
    if device.type != "cuda":  # the interpreter, which knows neither PTX nor multiprocessors
        return Target("sm_80", 4, ptx=False)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target(properties.gcnArchName.partition(":")[0], properties.multi_processor_count, ptx=False)
    return Target(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count, ptx=True)


def unsupported(
    bits: int, group_size: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why this weight must take another path, in one line; None where the kernels run it."""
    if block_columns(bits, group_size, in_features) is None:
        return (
            f"no kernel for {bits} bits in groups of {group_size}: 4 or 8 bits, groups of 32, 64 or 128 * n"
        )
    if dtype not in _DTYPES:
        return f"no kernel for activations in {dtype}: float16 or bfloat16"
    if device.type != "cuda":
        return f"no kernel for a device of type {device.type!r}"
    arch = target(device).arch
    if arch.startswith("sm_") and int(arch[3:]) < 80:
        return f"no kernel for {arch}: Ampere (sm_80) or newer"
    return None


def grid_constants(bits: int, group_size: int, in_features: int, scale_dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time constants that every kernel takes from the weight."""
    block = block_columns(bits, group_size, in_features)
    if block is None:
        raise ValueError(f"no kernel for {bits} bits in groups of {group_size}")
    one_group = group_size in (WHOLE_ROW, in_features)
    return {
        "BITS": bits,
        "BK": block,
        "GROUPS": 1 if one_group else max(1, block // group_size),
        "BLOCKS_PER_GROUP": 0 if one_group else max(1, group_size // block),
        "SCALE": _DTYPES[scale_dtype],
    }


def tile_for(
    kernel: str, device: torch.device, dtype: torch.dtype, rows: int, columns: int, features: int,
    constants: dict[str, Any],
) -> Tiles:  # fmt: skip
    """The tile that was timed here for such a product, or else the shipped one."""
    bits, per_group = constants["BITS"], constants["BLOCKS_PER_GROUP"]
    measured = for_device(device)
    if measured:
        group_size = constants["BK"] * per_group // constants["GROUPS"] if per_group else WHOLE_ROW
        found = measured.get(shape_key(kernel, bits, dtype, rows, group_size, features, columns))
        if found is not None:
            return found
    return choose(kernel, target(device).arch, bits, dtype, rows)


def split(blocks: int, programs: int, tile: Tiles, multiprocessors: int, most: int) -> tuple[int, int]:
    """`(parts, blocks per part)` of K.

    As many parts as bring `programs` up to what the device holds at once, but no more than `most` beyond
    what keeps every multiprocessor busy, and two blocks to a part, so that one loads while one is used.
    """
    fill = -(-tile.programs * multiprocessors // programs)
    busy = -(-multiprocessors // programs)
    parts = max(1, min(fill, max(busy, most), blocks // 2))
    per_part = -(-blocks // parts)
    return -(-blocks // per_part), per_part


def dequant_matmul(
    x: Tensor,
    codes: Tensor,
    scale_zero: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    scale_dtype: torch.dtype,
) -> Tensor:
    """`x @ w.T + bias`, with the weight in the kernel layout.

    Args:
        x: float16 or bfloat16 `[..., in]`, of any strides and any number of rows, none included.
        codes: int16, from `to_layout`.
        scale_zero: int32, from `to_layout`.
        bias: `[out]`, or None.
        bits: 4 or 8.
        group_size: Input columns that share a scale; -1 means the whole row.
        out_features: Rows of the weight, without padding.
        scale_dtype: bfloat16 or float16, that of the scales given to `to_layout`.

    Returns:
        `[..., out]` in x's dtype, accumulated in float32, the same on every run.

    Raises:
        ValueError: the tensors do not fit one another.
    """
    in_features = x.shape[-1]
    constants = grid_constants(bits, group_size, in_features, scale_dtype)
    check(x, codes, scale_zero, constants, in_features, out_features)
    rows = x.reshape(-1, in_features)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    if len(rows) > prefill_rows(x.device):
        weight = dequantize(
            codes, scale_zero, bits=bits, group_size=group_size, in_features=in_features,
            out_features=out_features, scale_dtype=scale_dtype, dtype=x.dtype,
        )  # fmt: skip
        return torch.nn.functional.linear(x, weight, bias)
    y = x.new_empty(len(rows), out_features)
    if y.numel():
        launch = decode if len(rows) <= DECODE_ROWS else prefill
        with torch.cuda.device_of(x):  # Triton launches on the current device
            launch(rows, codes, scale_zero, bias, y, constants)
    return y.view(*x.shape[:-1], out_features)


def prefill_rows(device: torch.device) -> int:
    """Rows up to which `prefill_kernel` runs; above them the weight is expanded."""
    return _PREFILL_ROWS.get(target(device).arch, _PREFILL_ROWS_ELSEWHERE)


def check(
    x: Tensor,
    codes: Tensor,
    scale_zero: Tensor,
    constants: dict[str, Any],
    in_features: int,
    out_features: int,
) -> None:
    """Refuse what would read beyond a tensor's end."""
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be float16 or bfloat16, got {x.dtype}")
    block, per_group = constants["BK"], constants["BLOCKS_PER_GROUP"]
    tiled, blocks = padded_tiles(out_features), -(-in_features // block)
    groups = -(-blocks * constants["GROUPS"] // per_group) if per_group else 1
    for name, tensor, dtype, shape in (
        ("codes", codes, torch.int16, (tiled, blocks, ROW_TILE, block * constants["BITS"] // 16)),
        ("scale_zero", scale_zero, torch.int32, (tiled, groups, ROW_TILE)),
    ):
        if tensor.shape[-len(shape) :] != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"a weight [{out_features}, {in_features}] has contiguous {name} {dtype} {list(shape)} "
                f"in the kernel layout, got {tensor.dtype} {list(tensor.shape)}"
            )


def decode(
    x: Tensor, codes: Tensor, scale_zero: Tensor, bias: Tensor | None, y: Tensor, constants: dict[str, Any],
    experts: Tensor | None = None, order: Tensor | None = None, tile: Tiles | None = None,
) -> None:  # fmt: skip
    """`y[rows, out] = x @ w.T + bias` by `decode_kernel`; by expert where `experts` and `order` are given."""
    device = target(x.device)
    tile = tile or tile_for("decode", x.device, x.dtype, *x.shape, y.shape[1], constants)
    (num_rows, in_features), out_features = x.shape, y.shape[1]
    row_tiles = -(-num_rows // tile.rows) if experts is None else len(experts)
    feature_tiles = -(-out_features // tile.features)
    blocks = codes.shape[-3]
    # Parts are written and read, 8 bytes an element: at most a quarter of the bytes of the weights.
    most = in_features * constants["BITS"] // (256 * num_rows)
    parts, per_part = split(blocks, feature_tiles * row_tiles, tile, device.multiprocessors, most)
    out = y if parts == 1 else y.new_empty(parts, num_rows, out_features, dtype=torch.float32)
    num_tiles, num_groups = scale_zero.shape[-3:-1]
    grid = (feature_tiles, row_tiles, parts)
    decode_kernel[grid](
        x, codes, scale_zero, bias, out, experts, order,
        num_rows, out_features, in_features, x.stride(0), num_tiles, num_groups, per_part,
        **constants, BM=tile.rows, BN=tile.features, EVEN_K=in_features % constants["BK"] == 0,
        SPLIT=parts > 1, BIAS=bias is not None, EXPERTS=experts is not None, ASM=device.ptx,
        OVERLAP=parts > 1 and device.overlaps, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts > 1:
        reduce(out, bias, y)


def reduce(parts: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """`y = parts.sum(0) + bias`, in order."""
    grid, overlap = (-(-y.numel() // _REDUCE_BLOCK),), target(y.device).overlaps
    reduce_kernel[grid](
        parts, bias, y, len(parts), y.numel(), y.shape[1], BLOCK=_REDUCE_BLOCK, BIAS=bias is not None,
        OVERLAP=overlap, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip


def prefill(
    x: Tensor, codes: Tensor, scale_zero: Tensor, bias: Tensor | None, y: Tensor, constants: dict[str, Any],
    tile: Tiles | None = None,
) -> None:  # fmt: skip
    """`y[rows, out] = x @ w.T + bias` by `prefill_kernel`."""
    device = target(x.device)
    tile = tile or tile_for("prefill", x.device, x.dtype, *x.shape, y.shape[1], constants)
    (num_rows, in_features), out_features = x.shape, y.shape[1]
    tiled = -(-num_rows // tile.rows) * -(-out_features // tile.features)
    parts, per_part = split(codes.shape[-3], tiled, tile, device.multiprocessors, most=1)
    out = y if parts == 1 else y.new_empty(parts, num_rows, out_features, dtype=torch.float32)
    grid = (tiled, parts)
    prefill_kernel[grid](
        x, codes, scale_zero, bias, out,
        num_rows, out_features, in_features, x.stride(0), scale_zero.shape[-2], per_part,
        **constants, BM=tile.rows, BN=tile.features, STEP=min(tile.step, codes.shape[-1]), BAND=_BAND,
        EVEN_K=in_features % constants["BK"] == 0, SPLIT=parts > 1, BIAS=bias is not None, ASM=device.ptx,
        OVERLAP=parts > 1 and device.overlaps, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts > 1:
        reduce(out, bias, y)


def dequantize(
    codes: Tensor,
    scale_zero: Tensor,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight `[out, in]` in `dtype`, float16 or bfloat16, each value rounded once."""
    constants = grid_constants(bits, group_size, in_features, scale_dtype)
    weight = torch.empty(out_features, in_features, dtype=dtype, device=codes.device)
    check(weight, codes, scale_zero, constants, in_features, out_features)
    grid = (codes.shape[-4], codes.shape[-3])
    with torch.cuda.device_of(codes):
        dequantize_kernel[grid](
            codes, scale_zero, weight, out_features, in_features, scale_zero.shape[-2],
            **constants, ASM=target(codes.device).ptx,
        )  # fmt: skip
    return weight
