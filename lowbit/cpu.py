"""Packed weights on a CPU: torch's four-bit kernel, and its tiles turned back into dense ones.

For a few rows a product is bound by the memory it reads, and `_weight_int4pack_mm_for_cpu` reads
half a byte per weight. For many rows it is bound by arithmetic, where nothing beats a dense bfloat16
product: the weights are dequantized tile by tile, each small enough for the cache, and multiplied.
`MOST_ROWS` lies where the two cross; `scripts/cpu_thresholds.py` measures it. A CPU that has no bfloat16
products (AVX2: most laptops) takes twenty times as long for one as for a float32 one, so tiles and
activations are float32 there, and the result is rounded. On request `native.c` takes
both places, on the same layout.

The kernel computes `(code - 8) * scale + zero` with codes of four bits, bfloat16 scales and zeros,
and groups of 32 ... 256 columns. Every scheme is brought to that:

- Groups are cut into the largest the kernel knows; they must be a multiple of 32 wide.
- 2 and 3 bits: `code - zero + 8` fits four bits, which is exact.
- 4 bits: `zero = (8 - zeros) * scale`; 0 on a symmetric grid, else rounded to bfloat16. Dequantized tiles
  undo that rounding, the kernel does not.
- A bias is added to the kernel's result, which is rounded before and after; the other ways round once.
- 8 bits: `16 * high + low`, two codes of four bits. The row becomes twice as long, the activations
  are repeated, and one accumulator sums both halves. The two zeros hold what one would round off.

float16 scales (GPTQ, AWQ) are rounded to bfloat16 on the way; bfloat16 ones are exact.

Memory of the tiles: `[out / B, in, B / 2]` bytes, two rows of a block of `B` in each. With AVX-512
(B = 64) and AVX2 (B = 32) byte `j` holds row `j` and row `j + B / 2`, elsewhere (B = 32) rows `2 j` and
`2 j + 1`. `block` tells which by packing known codes, and refuses a layout that it doesn't know.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit import native, packing
from lowbit.quantized import QuantizedWeight

MOST_ROWS = 64
"""Up to here the four-bit kernel is used, above it dequantized tiles; half of it at 8 bits."""

MOST_NATIVE_ROWS = 24
"""The same for the native kernel, where that is enabled."""

_GROUPS = (256, 128, 64, 32)
_MIDDLE = 8
_TILE = 2**19
"""Dense weights of a tile: a megabyte of bfloat16, which a second-level cache holds."""
_NATIVE_TILE = 2**20
_ROWS_AT_ONCE = 4096
_aten = torch.ops.aten


class Block(NamedTuple):
    """How the kernel's layout orders rows on this machine.

    Attributes:
        rows: Rows of a block.
        paired: Do neighbouring rows share a byte, or row `j` and row `j + rows / 2`?
    """

    rows: int
    paired: bool

    @property
    def shape(self) -> tuple[int, int]:
        """A block's rows as a matrix one of whose dimensions is the half of the byte."""
        return (self.rows // 2, 2) if self.paired else (2, self.rows // 2)

    @property
    def side(self) -> int:
        """Which of the two dimensions that is, counted from the end."""
        return -1 if self.paired else -2


@cache
def block() -> Block | None:
    """The block of this machine, found by packing known codes; None if it is none of those known."""
    codes = torch.arange(128 * 32, dtype=torch.int32).view(128, 32) * 7 // 3 % 16
    tiles = _aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for found in (Block(64, False), Block(32, False), Block(32, True)):
        low, high = packing.nibbles(tiles.view(128 // found.rows, 32, found.rows // 2))
        rows = torch.stack([low, high], found.side).flatten(-2)
        if torch.equal(rows.transpose(1, 2).reshape(128, 32).int(), codes):
            return found
    return None


@cache
def has_bfloat16() -> bool:
    """Does oneDNN multiply bfloat16 on this CPU? Where it does not, torch does, one number at a time."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fits(weight: QuantizedWeight) -> bool:
    """Can the kernel hold it? Its groups must be a multiple of 32 columns wide."""
    return block() is not None and weight.scheme.columns_per_group(weight.shape[1]) % _GROUPS[-1] == 0


def tile(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """The kernel's own layout of a weight.

    Args:
        weight: Any scheme that `fits`.

    Returns:
        `tiles` uint8 `[rows, planes * in / 2]` and `scales` bfloat16 `[planes * groups, rows, 2]`
        holding scale and zero; `rows` is `out` rounded up to whole blocks, `planes` is 2 at 8 bits.
    """
    out_features, in_features = weight.shape
    scheme = weight.scheme
    width = scheme.columns_per_group(in_features)
    group = next(size for size in _GROUPS if width % size == 0)
    rows = -(-out_features // _block().rows) * _block().rows
    planes = 2 if scheme.bits == 8 else 1
    tiles = torch.empty(rows, planes * in_features // 2, dtype=torch.uint8)
    scales = torch.zeros(planes * in_features // group, rows, 2, dtype=torch.bfloat16)
    for start in range(0, rows, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, rows)
        codes, zeros = weight.codes[start:stop], weight.zeros[start:stop]
        packed, offsets = _split_planes(codes, zeros, scheme.bits)
        packed = torch.nn.functional.pad(packed, (0, 0, 0, stop - start - codes.shape[0]), value=_MIDDLE)
        tiles[start:stop] = _aten._convert_weight_to_int4pack_for_cpu(packed.int(), 1).view(stop - start, -1)
        pairs = _scales_and_zeros(weight.scales[start:stop].float(), offsets.float(), planes)
        scales[:, start : start + len(codes)] = pairs.repeat_interleave(width // group, 1).transpose(0, 1)
    return tiles, scales


def _split_planes(codes: Tensor, zeros: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of four bits, uint8 `[out, planes * in]`, and `middle - zeros`, what is left to add."""
    if bits == 8:
        low, high = packing.nibbles(codes)
        return torch.cat([high, low], 1), 16 * _MIDDLE + _MIDDLE - zeros.int()
    offsets = _MIDDLE - zeros.int()
    if bits == 4:
        return codes, offsets
    moved = codes.unflatten(1, (zeros.shape[1], -1)) + offsets.to(torch.uint8).unsqueeze(-1)
    return moved.flatten(1), torch.zeros_like(offsets)


def _scales_and_zeros(scales: Tensor, offsets: Tensor, planes: int) -> Tensor:
    """Scale and zero of every group, bfloat16 `[out, planes * groups, 2]`."""
    scales = scales.bfloat16().float()
    zeros = offsets * scales
    low = torch.stack([scales, zeros.bfloat16().float()], -1)
    if planes == 1:
        return low.bfloat16()
    high = torch.stack([16 * scales, zeros - low[..., 1]], -1)
    return torch.cat([high, low], 1).bfloat16()


def matmul(x: Tensor, tiles: Tensor, scales: Tensor, out_features: int, bias: Tensor | None = None) -> Tensor:
    """`x [..., in] @ weight.T + bias` in the dtype of `x`, `[..., out_features]`, contiguous."""
    in_features = x.shape[-1]
    count = x.numel() // in_features
    planes = 2 * tiles.shape[1] // in_features
    group = planes * in_features // scales.shape[0]
    if x.dtype == torch.bfloat16:
        if native.enabled() and count <= MOST_NATIVE_ROWS // planes:
            bias = None if bias is None else bias.to(x.dtype).contiguous()
            return native.matvec(x.contiguous(), tiles, scales, group, out_features, bias)
        if not native.enabled() and count <= MOST_ROWS // planes:
            rows = x.reshape(count, in_features)
            rows = torch.cat([rows, rows], 1) if planes == 2 else rows.contiguous()
            product: Tensor = _aten._weight_int4pack_mm_for_cpu(rows, tiles, group, scales)
            if product.shape[1] != out_features:
                product = product[:, :out_features].contiguous()
            return (product if bias is None else product.add_(bias)).view(*x.shape[:-1], out_features)
    product = _multiply_by_tiles(x.reshape(count, in_features), tiles, scales, out_features, planes, bias)
    return product.view(*x.shape[:-1], out_features)


def _multiply_by_tiles(
    x: Tensor, tiles: Tensor, scales: Tensor, out_features: int, planes: int, bias: Tensor | None
) -> Tensor:
    product = x.new_empty(x.shape[0], out_features)
    if not has_bfloat16():
        x = x.float()
    in_native = native.enabled() and x.dtype == torch.bfloat16
    group = planes * x.shape[1] // scales.shape[0]
    step = max(1, (_NATIVE_TILE if in_native else _TILE) // x.shape[1] // _block().rows) * _block().rows
    for start in range(0, tiles.shape[0], step):
        part = slice(start, start + step)
        if in_native:
            weight = _scratch.take("weight", (x.shape[1], min(step, tiles.shape[0] - start)), x.dtype)
            native.dequantize(tiles, scales, start, group, planes, weight)
        else:
            weight = _dense(tiles[part], scales[:, part], planes, x.dtype)
        columns = product[:, part]
        result = _scratch.take("result", (x.shape[0], weight.shape[1]), x.dtype)
        if bias is None:
            torch.mm(x, weight, out=result)
        else:  # added before the sum is rounded, as a dense layer does
            own = torch.nn.functional.pad(bias[part].to(x.dtype), (0, weight.shape[1] - columns.shape[1]))
            torch.addmm(own, x, weight, out=result)
        columns.copy_(result[:, : columns.shape[1]])
    return product


def dense(tiles: Tensor, scales: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The weight that the tiles stand for, transposed, `[in, rows]`."""
    parts = zip(tiles.split(_ROWS_AT_ONCE), scales.split(_ROWS_AT_ONCE, 1), strict=True)
    return torch.cat([_dense(*part, 2 if bits == 8 else 1, dtype).clone() for part in parts], 1)


def _dense(tiles: Tensor, scales: Tensor, planes: int, dtype: torch.dtype) -> Tensor:
    """As `dense`, in memory of `_scratch`: the next call overwrites it."""
    rows, shape, side_dim = _block().rows, _block().shape, _block().side
    in_features, groups = 2 * tiles.shape[1] // planes, scales.shape[0] // planes
    pairs = scales.unflatten(1, (-1, *shape)).unflatten(0, (planes, groups)).float()
    factors = pairs[-1, ..., 0].contiguous()
    # A zero is a whole number of scales, rounded to bfloat16: divided it is that number again. Digits are
    # not centred: `code * scale + (number - middle) * scale` has no rounding error in float32.
    number = (pairs[..., 1].sum(0) / factors).nan_to_num_(0, 0, 0).round_()
    zeros = factors * number.sub_(_MIDDLE if planes == 1 else 17 * _MIDDLE)
    octets = tiles.view(-1, planes, in_features, rows // 2)
    low, high = (_scratch.take(name, octets.shape, torch.uint8) for name in ("low", "high"))
    values = _scratch.take("values", (len(octets), in_features, rows // 2), torch.float32)
    weight = _scratch.take("weight", (groups, in_features // groups, len(octets), *shape), dtype)
    for side, digits in enumerate(packing.nibbles(octets, (low, high))):
        values.copy_(digits[:, 0] if planes == 1 else digits[:, 0].mul_(16).add_(digits[:, 1]))
        grouped = values.unflatten(1, (groups, -1))
        factor, zero = (part.select(side_dim, side).transpose(0, 1).unsqueeze(2) for part in (factors, zeros))
        weight.select(side_dim, side).permute(2, 0, 1, 3).copy_(grouped.mul_(factor).add_(zero))
    return weight.view(in_features, -1)


class _Scratch(threading.local):
    """Memory that a thread keeps: fresh pages for every tile would cost more than its arithmetic."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialized memory, the same for the same name."""
        size = math.prod(shape) * dtype.itemsize
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = torch.empty(size, dtype=torch.uint8)
        return self._memory[name][:size].view(dtype).view(*shape)


_scratch = _Scratch()


def _block() -> Block:
    found = block()
    assert found is not None, "fits() is False where the layout is unknown"
    return found
