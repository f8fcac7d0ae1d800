"""The kernels' own order of a weight's bits, made once at load.

A row of codes is cut into blocks of 64, 128 or 256 columns, and a block into as many slices as an int16
holds codes (4 of 4 bits, 2 of 8). Element `r` of a block's int16 words holds column `r` of every slice,
slice 0 in the low bits::

    4 bits, block of 256:   word r = code[r] | code[64 + r] << 4 | code[128 + r] << 8 | code[192 + r] << 12

Two neighbouring words make one 32-bit register. Masking it with 0x000f000f leaves columns `r` and
`r + 1` of slice 0 in its two halves, just where a packed pair of 16-bit floats wants them: one logic
instruction turns two codes into two floats, and a slice of the tile, times the same slice of x, goes to
the tensor cores without any code ever changing threads.

Rows are cut into tiles of 64, and a block of a tile is contiguous: 64 rows of 128 bytes. A program streams
such pieces one after the other, and all addresses in one are a pointer and constants.

Scale and zero share one int32, tiled alike: the scale's 16 bits low, the zero high, as the float16 of
`1024 + zero` (0x6400 | zero), in which the kernels subtract it. Four bytes is the least that the GPU's
asynchronous copies move; two would be read unpipelined.

Columns are padded to whole blocks and rows to a multiple of 128, so that no load of weights needs a mask. The
padding has scale 0. Stacked experts keep their leading dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROW_TILE = 64
ROW_PADDING = 128  # output features of the widest tile of a kernel
WHOLE_ROW = -1
_POWER = 0x6400  # 1024 in float16

# Longest first. A block as long as possible spends the fewest instructions around the multiplication.
_BLOCKS = {4: (256, 128), 8: (256, 128, 64)}


class Layout(NamedTuple):
    """A weight as the kernels read it.

    Attributes:
        codes: int16 `[..., tiles, blocks, 64, words]`; words is 16, 32, 64 or 128.
        scale_zero: int32 `[..., tiles, groups, 64]`.
    """

    codes: Tensor
    scale_zero: Tensor


def block_columns(bits: int, group_size: int, in_features: int) -> int | None:
    """Columns of a block, or None where no block fits.

    A slice must lie in one group, and groups and blocks must nest. Among the blocks that allow it, the
    longest that divides the row wins, else the shortest, which pads least.
    """
    fits = []
    for block in _BLOCKS.get(bits, ()):
        one_group = group_size in (WHOLE_ROW, in_features)
        nested = group_size > 0 and (block % group_size == 0 or group_size % block == 0)
        if one_group or (nested and group_size % (block * bits // 16) == 0):
            fits.append(block)
    return next((block for block in fits if in_features % block == 0), fits[-1] if fits else None)


def padded_tiles(out_features: int) -> int:
    """Tiles of rows, padding included."""
    return -(-out_features // ROW_PADDING) * (ROW_PADDING // ROW_TILE)


def to_layout(
    packed: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, group_size: int, in_features: int
) -> Layout:
    """Rearrange a canonical weight for the kernels.

    Args:
        packed: int32 `[..., out, ceil(in * bits / 32)]`.
        scales: bfloat16 or float16 `[..., out, groups]`.
        zeros: uint8 `[..., out, groups]`.
        bits: 4 or 8.
        group_size: Input columns that share a scale; -1 means the whole row.
        in_features: Columns of the weight.

    Raises:
        ValueError: a shape or a dtype is not the one above, or no block fits.
    """
    block = block_columns(bits, group_size, in_features)
    if block is None:
        raise ValueError(f"no kernel for {bits} bits in groups of {group_size}")
    columns = in_features if group_size == WHOLE_ROW else group_size
    *stack, rows = packed.shape[:-1]
    num_words, groups = -(-in_features * bits // 32), -(-in_features // columns)
    if packed.dtype != torch.int32 or packed.shape[-1] != num_words:
        expected = [*stack, rows, num_words]
        raise ValueError(f"packed must be int32 {expected}, got {packed.dtype} {list(packed.shape)}")
    for name, tensor, dtypes in (
        ("scales", scales, (torch.bfloat16, torch.float16)),
        ("zeros", zeros, (torch.uint8,)),
    ):
        if tensor.dtype not in dtypes or tensor.shape != (*stack, rows, groups):
            raise ValueError(
                f"{name} must be {dtypes[0]} {[*stack, rows, groups]}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )

    row_padding, padding = -rows % ROW_PADDING, -in_features % block
    codes = packed.contiguous().view(torch.uint8)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    codes = torch.nn.functional.pad(codes[..., :in_features], (0, padding, 0, row_padding))
    slices = codes.unflatten(-1, (-1, 16 // bits, block * bits // 16)).unbind(-2)
    if bits == 4:
        slices = (slices[0] | slices[1] << 4, slices[2] | slices[3] << 4)
    words = torch.stack(slices, dim=-1).view(torch.int16).squeeze(-1)  # [..., rows, blocks, words]

    scale_zero = (scales.contiguous().view(torch.int16).int() & 0xFFFF) | (zeros.int() | _POWER) << 16
    more_groups = 0 if groups == 1 else -(-(in_features + padding) // columns) - groups
    scale_zero = torch.nn.functional.pad(scale_zero, (0, more_groups, 0, row_padding), value=_POWER << 16)
    return Layout(
        words.unflatten(-3, (-1, ROW_TILE)).transpose(-3, -2).contiguous(),
        scale_zero.unflatten(-2, (-1, ROW_TILE)).mT.contiguous(),
    )


def from_layout(
    codes: Tensor,
    scale_zero: Tensor,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `to_layout`: canonical `(packed, scales, zeros)`, bit for bit."""
    block = block_columns(bits, group_size, in_features)
    assert block is not None, "to_layout made no such layout"
    columns = in_features if group_size == WHOLE_ROW else group_size
    rows = codes.transpose(-3, -2).flatten(-4, -3)[..., :out_features, :, :].contiguous()
    low, high = rows.view(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    slices = (low & 15, low >> 4, high & 15, high >> 4) if bits == 4 else (low, high)
    flat = torch.stack(slices, dim=-2).flatten(-3)[..., :in_features]

    flat = torch.nn.functional.pad(flat, (0, -in_features % (32 // bits)))
    if bits == 4:
        flat = flat[..., 0::2] | flat[..., 1::2] << 4
    packed = flat.contiguous().view(torch.int32)

    groups = -(-in_features // columns)
    pairs = scale_zero.mT.flatten(-3, -2)[..., :out_features, :groups].contiguous()
    return packed, pairs.to(torch.int16).view(scale_dtype), (pairs >> 16 & 255).to(torch.uint8)
