"""Codes of 2, 3, 4 or 8 bits as a dense stream of bits in int32 words: the only file that shifts.

Code `i` occupies bits `i * bits ... (i + 1) * bits - 1` of a little-endian stream along the last
dimension. Three-bit codes straddle bytes and words; nothing is padded but the end of the row.

Eight codes fill exactly `bits` bytes, so both directions work on bytes, column by column of
`[..., groups of 8]`: eight strided passes over uint8, hundreds of millions of codes a second on one
core, and no intermediate wider than the input. Bytes are then viewed as words, which assumes a
little-endian host, as safetensors files do.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OCTET = 8  # codes that fill a whole number of bytes, whatever their width
_WORD = 32


def num_words(count: int, bits: int) -> int:
    """Words that hold `count` codes of `bits` bits."""
    return -(-count * bits // _WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes`, uint8 `[..., n]` in `0 ... 2**bits - 1`, into int32 `[..., num_words(n, bits)]`.

    Raises:
        ValueError: `codes` is not uint8, or a code is too wide (it would spoil its neighbour).

    >>> hex(pack(torch.arange(8, dtype=torch.uint8), bits=4).item())
    '0x76543210'
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    count = codes.shape[-1]
    if count % _WORD:
        codes = torch.nn.functional.pad(codes, (0, _WORD - count % _WORD))
    octets = codes.reshape(*codes.shape[:-1], -1, _OCTET)
    packed = torch.zeros(*octets.shape[:-1], bits, dtype=torch.uint8, device=codes.device)
    for i in range(_OCTET):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= octets[..., i] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= octets[..., i] >> (8 - shift)
    return packed.flatten(-2).view(torch.int32)[..., : num_words(count, bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 `[..., count]` from int32 `[..., num_words(count, bits)]`.

    Raises:
        ValueError: `words` is not int32, or has another number of words.

    >>> unpack(torch.tensor([0x76543210], dtype=torch.int32), bits=4, count=8).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if words.dtype != torch.int32:
        raise ValueError(f"words must be int32, got {words.dtype}")
    expected = num_words(count, bits)
    if words.shape[-1] != expected:
        raise ValueError(f"{count} codes of {bits} bits fill {expected} words, got {words.shape[-1]}")
    octets = -(-count // _OCTET)
    packed = words.contiguous().view(torch.uint8)
    short = octets * bits - packed.shape[-1]
    if short > 0:
        packed = torch.nn.functional.pad(packed, (0, short))
    packed = packed[..., : octets * bits].reshape(*words.shape[:-1], octets, bits)
    codes = torch.empty(*packed.shape[:-1], _OCTET, dtype=torch.uint8, device=words.device)
    for i in range(_OCTET):
        byte, shift = divmod(i * bits, 8)
        code = packed[..., byte] >> shift
        if shift + bits > 8:
            code |= packed[..., byte + 1] << (8 - shift)
        codes[..., i] = code & (2**bits - 1)
    codes = codes.flatten(-2)
    return codes if codes.shape[-1] == count else codes[..., :count].contiguous()


def nibbles(octets: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The low and the high four bits of every entry of a uint8 tensor, each in its shape and dtype.

    >>> low, high = nibbles(torch.tensor([0x21, 0x43], dtype=torch.uint8))
    >>> low.tolist(), high.tolist()
    ([1, 3], [2, 4])
    """
    low, high = out or (torch.empty_like(octets), torch.empty_like(octets))
    return torch.bitwise_and(octets, 15, out=low), torch.bitwise_right_shift(octets, 4, out=high)
