"""What decode and prefill share: one block of packed weights times one block of x, on tensor cores.

The weights are the first operand (`acc[out, rows] += w[out, in] @ x[rows, in].T`). Warps divide the
output features between them, so that every code is expanded once, by the warp that multiplies it, in the
registers that the tensor cores read (on Hopper, wgmma takes its first operand from there).

Codes become floats without a conversion, which would run on a unit with an eighth of the lanes: or-ed
into the mantissa of a power of two whose last bit is worth 1, they *are* floats, `1024 + code` in float16
and `128 + code` in bfloat16, and one exact addition takes off the power and the zero together. The
float16 form also reads codes four bits up, as `1024 + 16 * code`, and a fused multiply-add divides, which
saves two of three shifts. bfloat16 has too few mantissa bits for that, and for 8-bit codes it has too few
altogether: seven of their bits go there, and the eighth into the exponent of another number, whose
difference from the first is `code - 128`, exactly. (The idea is Kim et al., "Who Says Elephants Can't Run",
2022, section 3.3.)

Two spellings of the same values, chosen by `ASM`: inline PTX for NVIDIA, two codes an instruction, and
plain Triton for everything else.
"""

# ruff: noqa: SIM300
from __future__ import annotations

import triton
import triton.language as tl

ROW_TILE = tl.constexpr(64)

# Results: the slices. Operands: a register of packed codes, then the layout's int32 of scale and zero of
# each slice, twice, which a byte permutation
# puts into the same power of two as the codes. An instruction holds one constant, so the permutations take
# theirs as the selector and share a register with the logic: that is worth a twentieth of the kernel.
_FOUR_F16 = tl.constexpr("""{
    .reg .b32 a, b, c, d, high, power, sixteenth, offset, za, zb, zc, zd;
    mov.b32 power, 0x64006400;
    mov.b32 sixteenth, 0x2c002c00;
    mov.b32 offset, 0x63806380;
    prmt.b32 za, $5, $5, 0x3232;
    prmt.b32 zb, $7, $7, 0x3232;
    prmt.b32 zc, $9, $9, 0x3232;
    prmt.b32 zd, $11, $11, 0x3232;
    sub.f16x2 zb, offset, zb;
    sub.f16x2 zd, offset, zd;
    shr.b32 high, $4, 8;
    lop3.b32 a, $4, 0x000f000f, power, 0xea;
    lop3.b32 b, $4, 0x00f000f0, power, 0xea;
    lop3.b32 c, high, 0x000f000f, power, 0xea;
    lop3.b32 d, high, 0x00f000f0, power, 0xea;
    sub.f16x2 $0, a, za;
    fma.rn.f16x2 $1, b, sixteenth, zb;
    sub.f16x2 $2, c, zc;
    fma.rn.f16x2 $3, d, sixteenth, zd;
}""")
# sm_80 has no packed subtraction of bfloat16, so it multiplies by minus one.
_FOUR_BF16 = tl.constexpr("""{
    .reg .b32 a, b, c, d, power, minus, za, zb, zc, zd;
    mov.b32 power, 0x43004300;
    mov.b32 minus, 0xbf80bf80;
    prmt.b32 za, $5, $5, 0x3232;
    prmt.b32 zb, $7, $7, 0x3232;
    prmt.b32 zc, $9, $9, 0x3232;
    prmt.b32 zd, $11, $11, 0x3232;
    lop3.b32 za, za, 0x00ff00ff, power, 0xea;
    lop3.b32 zb, zb, 0x00ff00ff, power, 0xea;
    lop3.b32 zc, zc, 0x00ff00ff, power, 0xea;
    lop3.b32 zd, zd, 0x00ff00ff, power, 0xea;
    shr.b32 b, $4, 4;
    shr.b32 c, $4, 8;
    shr.b32 d, $4, 12;
    lop3.b32 a, $4, 0x000f000f, power, 0xea;
    lop3.b32 b, b, 0x000f000f, power, 0xea;
    lop3.b32 c, c, 0x000f000f, power, 0xea;
    lop3.b32 d, d, 0x000f000f, power, 0xea;
    fma.rn.bf16x2 $0, za, minus, a;
    fma.rn.bf16x2 $1, zb, minus, b;
    fma.rn.bf16x2 $2, zc, minus, c;
    fma.rn.bf16x2 $3, zd, minus, d;
}""")
_TWO_F16 = tl.constexpr("""{
    .reg .b32 a, b, power, za, zb;
    mov.b32 power, 0x64006400;
    prmt.b32 za, $3, $3, 0x3232;
    prmt.b32 zb, $5, $5, 0x3232;
    prmt.b32 a, $2, power, 0x5250;
    prmt.b32 b, $2, power, 0x5351;
    sub.f16x2 $0, a, za;
    sub.f16x2 $1, b, zb;
}""")
# `128 + seven bits`, less 256 or 128 by the inverted eighth, which is the last bit of the exponent there.
_TWO_BF16 = tl.constexpr("""{
    .reg .b32 a, b, high, power, minus, za, zb, zah, zbh, ah, bh;
    mov.b32 power, 0x43004300;
    mov.b32 minus, 0xbf80bf80;
    prmt.b32 za, $3, $3, 0x3232;
    prmt.b32 zb, $5, $5, 0x3232;
    lop3.b32 zah, za, 0x00800080, power, 0xae;
    lop3.b32 zbh, zb, 0x00800080, power, 0xae;
    lop3.b32 za, za, 0x007f007f, power, 0xea;
    lop3.b32 zb, zb, 0x007f007f, power, 0xea;
    fma.rn.bf16x2 za, zah, minus, za;
    fma.rn.bf16x2 zb, zbh, minus, zb;
    shr.b32 high, $2, 8;
    lop3.b32 a, $2, 0x007f007f, power, 0xea;
    lop3.b32 ah, $2, 0x00800080, power, 0xae;
    lop3.b32 b, high, 0x007f007f, power, 0xea;
    lop3.b32 bh, high, 0x00800080, power, 0xae;
    fma.rn.bf16x2 a, ah, minus, a;
    fma.rn.bf16x2 b, bh, minus, b;
    fma.rn.bf16x2 $0, za, minus, a;
    fma.rn.bf16x2 $1, zb, minus, b;
}""")


@triton.jit
def row_offsets(tile, count, BN: tl.constexpr, WIDTH: tl.constexpr):
    """Where the rows of tile `tile` of `BN` rows begin, in `[rows / ROW_TILE, count, ROW_TILE, WIDTH]`."""
    row = tl.arange(0, BN)
    start = tile.to(tl.int64) * (BN // ROW_TILE) * count * (ROW_TILE * WIDTH)
    if BN == ROW_TILE:
        return start + row * WIDTH
    return start + row // ROW_TILE * (count * ROW_TILE * WIDTH) + row % ROW_TILE * WIDTH


@triton.jit
def load_groups(pointers, GROUPS: tl.constexpr):
    """Scale and zero of the four quarters of a block that has `GROUPS` groups: 1, 2 or 4."""
    g0 = tl.load(pointers)
    if GROUPS == 1:
        g1, g2, g3 = g0, g0, g0
    elif GROUPS == 2:
        g2 = tl.load(pointers + ROW_TILE)
        g1, g3 = g0, g2
    else:
        g1 = tl.load(pointers + ROW_TILE)
        g2 = tl.load(pointers + 2 * ROW_TILE)
        g3 = tl.load(pointers + 3 * ROW_TILE)
    return g0, g1, g2, g3


@triton.jit
def scale_of(group, SCALE: tl.constexpr):
    """The scale in the low half of the layout's int32, as float32 `[out, 1]`."""
    if SCALE == tl.bfloat16:
        scale = (group << 16).to(tl.float32, bitcast=True)
    else:
        scale = group.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale[:, None]


@triton.jit
def zero_of(group):
    """The zero in the high half of the layout's int32, as float32 `[out, 1]`."""
    return (group >> 16 & 255).to(tl.float32)[:, None]


@triton.jit
def spread(group, words):
    """`group [out]` beside every word of its row."""
    return tl.broadcast_to(group[:, None], words.shape)


@triton.jit
def centred4(words, g0, g1, g2, g3, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The four slices of 4-bit `words`, each less its zero: exact, in float16 or bfloat16."""
    if ASM and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            _FOUR_F16, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
            [words, spread(g0, words), spread(g1, words), spread(g2, words), spread(g3, words)],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    elif ASM:
        return tl.inline_asm_elementwise(
            _FOUR_BF16, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
            [words, spread(g0, words), spread(g1, words), spread(g2, words), spread(g3, words)],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        POWER: tl.constexpr = 0x6400 if DTYPE == tl.float16 else 0x4300
        VALUE: tl.constexpr = 1024.0 if DTYPE == tl.float16 else 128.0
        w0 = (words & 15 | POWER).to(DTYPE, bitcast=True) - (VALUE + zero_of(g0)).to(DTYPE)
        w1 = (words >> 4 & 15 | POWER).to(DTYPE, bitcast=True) - (VALUE + zero_of(g1)).to(DTYPE)
        w2 = (words >> 8 & 15 | POWER).to(DTYPE, bitcast=True) - (VALUE + zero_of(g2)).to(DTYPE)
        w3 = (words >> 12 & 15 | POWER).to(DTYPE, bitcast=True) - (VALUE + zero_of(g3)).to(DTYPE)
        return w0, w1, w2, w3


@triton.jit
def centred8(words, g0, g1, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The two slices of 8-bit `words`, each less its zero: exact, in float16 or bfloat16."""
    if ASM and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            _TWO_F16, "=r,=r,r,r,r,r,r", [words, spread(g0, words), spread(g1, words)],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    elif ASM:
        return tl.inline_asm_elementwise(
            _TWO_BF16, "=r,=r,r,r,r,r,r", [words, spread(g0, words), spread(g1, words)],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        w0 = ((words & 255).to(tl.float32) - zero_of(g0)).to(DTYPE)
        w1 = ((words >> 8 & 255).to(tl.float32) - zero_of(g1)).to(DTYPE)
        return w0, w1


@triton.jit
def load_x(pointers, row_mask, column, K, EVEN_K: tl.constexpr):
    """A slice of x, `[in, rows]`; 0 beyond its rows and its K columns."""
    if EVEN_K:
        return tl.load(pointers, mask=row_mask, other=0.0)
    return tl.load(pointers, mask=row_mask & (column < K), other=0.0)
