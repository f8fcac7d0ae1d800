"""Blocks of 32 weights as llama.cpp stores them: how a `QuantizedWeight` fits into them exactly.

    Q4_0  scale                          16 bytes of nibbles   w = (code - 8) * scale
    Q4_1  scale, smallest                16 bytes of nibbles   w = code * scale + smallest
    Q5_0  scale, 4 bytes of high bits    16 bytes of nibbles   w = (code - 16) * scale
    Q8_0  scale                          32 signed bytes       w = code * scale

`scale` and `smallest` are float16. Byte `j` of the nibbles holds weight `j` below and weight `j + 16`
above; bit `j` of the high bits belongs to weight `j`. (Source: ggml's quantize_row_*_ref, and the
numpy code of the gguf package, which the tests read with.)

A block is a group of 32, so larger groups that are multiples of it are carried by repeating their
scale. A step `code - zero` between -8 and 7 fits Q4_0. Beyond that, a four-bit grid with zeros fits Q4_1
if every `-zero * scale` happens to be a float16, which takes four more bits than the scale has; Q5_0
holds any of them, for half a bit more.

Not a `Format`: a GGUF file is one file with the tokenizer in it, and has no `quantization_config`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import packing
from lowbit.errors import LowbitError
from lowbit.quantized import QuantizedWeight

BLOCK = 32
SCALE_DTYPE = torch.float16
SCALE_DTYPES = (torch.float16,)

_RANGES = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
_HALF = 2  # bytes of a float16


def steps(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """`code - zero`, int16 `[out, in]`, and the scale of every block, `[out, in / 32]`.

    Raises:
        LowbitError: groups are not made of whole blocks.
    """
    out_features, in_features = weight.shape
    columns = weight.scheme.columns_per_group(in_features)
    if columns % BLOCK:
        raise LowbitError(
            f"groups of {columns} columns are not made of gguf's blocks of {BLOCK}: "
            "use --lossy to quantize again"
        )
    groups = weight.codes.to(torch.int16).reshape(out_features, -1, columns)
    found = groups - weight.zeros.to(torch.int16).unsqueeze(-1)
    return found.reshape(out_features, in_features), weight.scales.repeat_interleave(columns // BLOCK, 1)


def pack(weight: QuantizedWeight) -> tuple[str, Tensor]:
    """The smallest type that holds a weight exactly, and its bytes, uint8 `[out, blocks * block bytes]`.

    Raises:
        LowbitError: no type does.
        ValueError: scales are not float16.

    >>> from lowbit.scheme import QuantScheme
    >>> weight = QuantizedWeight(torch.full((1, 32), 9, dtype=torch.uint8), torch.tensor([[0.5]]).half(),
    ...                          torch.tensor([[8]], dtype=torch.uint8), QuantScheme(4, 32))
    >>> kind, data = pack(weight)
    >>> kind, bytes(data[0].tolist()).hex()
    ('Q4_0', '003899999999999999999999999999999999')
    """
    if weight.scales.dtype != SCALE_DTYPE:
        raise ValueError(f"scales must be {SCALE_DTYPE}, got {weight.scales.dtype}")
    found, scales = steps(weight)
    low, high = (int(bound) for bound in found.aminmax())
    fits = [kind for kind, (first, last) in _RANGES.items() if first <= low and high <= last]
    if not fits:
        raise LowbitError(
            f"codes reach from {low} to {high} steps around their zeros, and gguf's bytes from -128 to 127: "
            "use --lossy to quantize again"
        )
    if fits[0] == "Q5_0":
        smallest = _smallest(weight)
        if smallest is not None:
            codes = weight.codes
            return "Q4_1", _blocks([scales, smallest], [_nibbles(codes)])
    if fits[0] == "Q8_0":
        return "Q8_0", _blocks(
            [scales], [found.to(torch.int8).view(torch.uint8).reshape(*scales.shape, BLOCK)]
        )
    codes = (found - _RANGES[fits[0]][0]).to(torch.uint8)
    if fits[0] == "Q4_0":
        return "Q4_0", _blocks([scales], [_nibbles(codes)])
    return "Q5_0", _blocks([scales], [_bits(codes // 16), _nibbles(codes % 16)])


def unpack(kind: str, data: Tensor) -> tuple[Tensor, Tensor]:
    """What `steps` gives, from the bytes of a tensor of type `kind`; zeros of Q4_1 must be whole steps.

    Raises:
        LowbitError: another type, or a Q4_1 block that is no grid with a zero on it.
    """
    halves = 2 if kind == "Q4_1" else 1
    extra = {"Q4_0": 16, "Q4_1": 16, "Q5_0": 20, "Q8_0": 32}.get(kind)
    if extra is None:
        raise LowbitError(f"{kind} is not a uniform grid: use --lossy to quantize again")
    blocks = data.reshape(data.shape[0], -1, halves * _HALF + extra)
    floats = blocks[..., : halves * _HALF].contiguous().view(torch.float16)
    scales, body = floats[..., 0].contiguous(), blocks[..., halves * _HALF :]
    if kind == "Q8_0":
        return body.contiguous().view(torch.int8).to(torch.int16).flatten(-2), scales
    low, high = packing.nibbles(body[..., -16:])
    codes = torch.cat([low, high], -1).to(torch.int16)
    if kind == "Q5_0":
        bits = packing.unpack(body[..., :4].contiguous().view(torch.int32), 1, BLOCK)
        return (codes + 16 * bits.to(torch.int16) - 16).flatten(-2), scales
    if kind == "Q4_0":
        return (codes - 8).flatten(-2), scales
    zeros = -(floats[..., 1].double() / scales.double())
    if not torch.equal(zeros, zeros.round()):  # NaN too
        raise LowbitError("Q4_1 blocks have no zero on their grid: use --lossy to quantize again")
    return (codes - zeros.to(torch.int16).unsqueeze(-1)).flatten(-2), scales


def _smallest(weight: QuantizedWeight) -> Tensor | None:
    """`-zero * scale` of every block as float16, if all of them are exact and can be told apart from 0."""
    exact = -weight.zeros.double() * weight.scales.double()
    rounded = exact.to(torch.float16)
    if not torch.equal(rounded.double(), exact) or bool((weight.scales == 0).any()):
        return None
    return rounded.repeat_interleave(weight.scheme.columns_per_group(weight.shape[1]) // BLOCK, 1)


def _nibbles(codes: Tensor) -> Tensor:
    """uint8 `[out, blocks, 16]`: weight `j` of a block beside weight `j + 16`."""
    halves = codes.reshape(codes.shape[0], -1, 2, 16)
    return packing.pack(halves.transpose(-1, -2).flatten(-2).contiguous(), 4).view(torch.uint8)


def _bits(codes: Tensor) -> Tensor:
    """uint8 `[out, blocks, 4]`: one bit per weight."""
    return packing.pack(codes.reshape(codes.shape[0], -1, BLOCK), 1).view(torch.uint8)


def _blocks(floats: list[Tensor], body: list[Tensor]) -> Tensor:
    heads = [half.contiguous().unsqueeze(-1).view(torch.uint8) for half in floats]
    return torch.cat([*heads, *body], -1).flatten(-2)
