"""Naive packers and unpackers of every layout: Python integers and loops, sharing nothing with lowbit.

Each follows the published code of the format's own tool rather than a formula that lowbit also uses:
words are built field by field as the original CUDA and numpy packers do.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray  # integers, two-dimensional


def signed(word: int) -> int:
    """The int32 with the bits of an unsigned 32-bit word."""
    return word - 2**32 if word >= 2**31 else word


def pack_stream(codes: list[int], bits: int) -> list[int]:
    """One row as text: every code in binary, last first, then cut into words from the right."""
    text = "".join(format(code, f"0{bits}b") for code in reversed(codes))
    text = text.zfill(-(-len(text) // 32) * 32)
    return [
        signed(int(text[len(text) - 32 * (i + 1) : len(text) - 32 * i], 2)) for i in range(len(text) // 32)
    ]


def pack_rows(codes: Array, bits: int) -> Array:
    """`pack_stream` on every row."""
    return np.array([pack_stream([int(code) for code in row], bits) for row in codes], dtype=np.int64)


def autogptq_pack_columns(rows: Array, bits: int) -> Array:
    """AutoGPTQ's packer along dim 0: 2, 4, 8 bits by `32 / bits` fields, 3 bits by hand in three words."""
    packed = []
    if bits != 3:
        fields = 32 // bits
        for start in range(0, len(rows), fields):
            packed.append(
                sum(rows[start + j].astype(np.uint64) << np.uint64(bits * j) for j in range(fields))
            )
    else:
        for start in range(0, len(rows), 32):
            row = [rows[start + j].astype(np.uint64) for j in range(32)]
            first = sum(row[j] << np.uint64(3 * j) for j in range(10)) + ((row[10] & 3) << np.uint64(30))
            second = (row[10] >> 2) + sum(row[11 + j] << np.uint64(3 * j + 1) for j in range(10))
            second = second + ((row[21] & 1) << np.uint64(31))
            third = (row[21] >> 1) + sum(row[22 + j] << np.uint64(3 * j + 2) for j in range(10))
            packed += [first, second, third]
    return np.array(packed, dtype=np.uint64).astype(np.uint32).view(np.int32)


def gptq(codes: Array, zeros: Array, bits: int, v1: bool) -> tuple[Array, Array]:
    """`(qweight, qzeros)` of `codes [out, in]`, `zeros [out, groups]` in either convention."""
    stored = zeros - 1 if v1 else zeros
    return autogptq_pack_columns(codes.T, bits), autogptq_pack_columns(stored, bits).T


def awq(codes: Array, zeros: Array) -> tuple[Array, Array]:
    """`(qweight, qzeros)` by AutoAWQ's loop over words and nibbles."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(matrix: Array) -> Array:
        words = np.zeros((matrix.shape[0], matrix.shape[1] // 8), dtype=np.int64)
        for row in range(words.shape[0]):
            for column in range(words.shape[1]):
                word = 0
                for nibble in range(8):
                    word |= int(matrix[row, column * 8 + order[nibble]]) << (4 * nibble)
                words[row, column] = signed(word)
        return words

    return pack(codes.T), pack(zeros.T)
