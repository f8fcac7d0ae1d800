"""What decode and prefill share: one block of packed weights times one block of x, on tensor cores.

The weights are the first operand (`acc[out, rows] += w[out, in] @ x[rows, in].T`). Warps divide the
output features between them, so that every code is expanded once, by the warp that multiplies it, in the
registers that the tensor cores read (on Hopper, wgmma takes its first operand from there).

Codes become floats without a conversion, which would run on a unit with an eighth of the lanes: or-ed
into the mantissa of a power of two whose last bit is worth 1, they *are* floats, `1024 + code` in float16
and `128 + code` in bfloat16, and one exact addition takes off the power and the zero together. The
float16 form also reads codes four bits up, as `1024 + 16 * code`, and a fused multiply-add divides, which
saves two of three shifts. bfloat16 has too few mantissa bits for that, and for 8-bit codes it has too few
altogether: those go through `2**23 + code` in float32, whose upper half is the bfloat16 once the zero is
off. (The idea is Kim et al., "Who Says Elephants Can't Run", 2022, section 3.3.)

Two spellings of the same values, chosen by `ASM`: inline PTX for NVIDIA, two codes an instruction, and
plain Triton for everything else.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Operands: one slice of results each, the register of packed codes, `-(power + zero)` for each slice.
_FOUR_F16 = tl.constexpr("""{
    .reg .b32 a, b, c, d, high, sixteenth;
    mov.b32 sixteenth, 0x2c002c00;
    shr.b32 high, $4, 8;
    lop3.b32 a, $4, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 b, $4, 0x00f000f0, 0x64006400, 0xea;
    lop3.b32 c, high, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 d, high, 0x00f000f0, 0x64006400, 0xea;
    add.f16x2 $0, a, $5;
    fma.rn.f16x2 $1, b, sixteenth, $6;
    add.f16x2 $2, c, $7;
    fma.rn.f16x2 $3, d, sixteenth, $8;
}""")
# sm_80 has no packed addition of bfloat16, so it multiplies by one.
_FOUR_BF16 = tl.constexpr("""{
    .reg .b32 a, b, c, d, one;
    mov.b32 one, 0x3f803f80;
    shr.b32 b, $4, 4;
    shr.b32 c, $4, 8;
    shr.b32 d, $4, 12;
    lop3.b32 a, $4, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 b, b, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 c, c, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 d, d, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, a, one, $5;
    fma.rn.bf16x2 $1, b, one, $6;
    fma.rn.bf16x2 $2, c, one, $7;
    fma.rn.bf16x2 $3, d, one, $8;
}""")
_TWO_F16 = tl.constexpr("""{
    .reg .b32 a, b, power;
    mov.b32 power, 0x64646464;
    prmt.b32 a, $2, power, 0x5250;
    prmt.b32 b, $2, power, 0x5351;
    add.f16x2 $0, a, $3;
    add.f16x2 $1, b, $4;
}""")
_TWO_BF16 = tl.constexpr("""{
    .reg .b32 a, b, c, d, power;
    mov.b32 power, 0x4b000000;
    prmt.b32 a, $2, power, 0x7650;
    prmt.b32 b, $2, power, 0x7651;
    prmt.b32 c, $2, power, 0x7652;
    prmt.b32 d, $2, power, 0x7653;
    add.rn.f32 a, a, $3;
    add.rn.f32 b, b, $5;
    add.rn.f32 c, c, $4;
    add.rn.f32 d, d, $6;
    prmt.b32 $0, a, c, 0x7632;
    prmt.b32 $1, b, d, 0x7632;
}""")


@triton.jit
def split_scale_zero(word, SCALE: tl.constexpr):
    """One int32 of the layout as a float32 scale and an int32 zero."""
    if SCALE == tl.bfloat16:
        scale = (word << 16).to(tl.float32, bitcast=True)
    else:
        scale = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, word >> 16


@triton.jit
def load_groups(pointers, stride, GROUPS: tl.constexpr, SCALE: tl.constexpr):
    """Scales and zeros of the four quarters of a block that has `GROUPS` groups: 1, 2 or 4."""
    s0, z0 = split_scale_zero(tl.load(pointers), SCALE)
    if GROUPS == 1:
        return s0, s0, s0, s0, z0, z0, z0, z0
    elif GROUPS == 2:
        s2, z2 = split_scale_zero(tl.load(pointers + stride), SCALE)
        return s0, s0, s2, s2, z0, z0, z2, z2
    else:
        s1, z1 = split_scale_zero(tl.load(pointers + stride), SCALE)
        s2, z2 = split_scale_zero(tl.load(pointers + 2 * stride), SCALE)
        s3, z3 = split_scale_zero(tl.load(pointers + 3 * stride), SCALE)
        return s0, s1, s2, s3, z0, z1, z2, z3


@triton.jit
def minus(bits, shape: tl.constexpr, DTYPE: tl.constexpr):
    """The float whose bit pattern is the low half of `bits [out]`, for every code of a row."""
    return tl.broadcast_to(bits.to(tl.int16).to(DTYPE, bitcast=True)[:, None], shape)


@triton.jit
def centred4(words, z0, z1, z2, z3, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The four slices of 4-bit `words`, each less its zero: exact, in float16 or bfloat16."""
    MINUS: tl.constexpr = 0xE400 if DTYPE == tl.float16 else 0xC300
    n0 = minus(z0 | MINUS, words.shape, DTYPE)
    n2 = minus(z2 | MINUS, words.shape, DTYPE)
    if ASM and DTYPE == tl.float16:
        n1 = minus(z1 << 4 | 0xD400, words.shape, DTYPE)  # 64 + zero: the code was divided by 16
        n3 = minus(z3 << 4 | 0xD400, words.shape, DTYPE)
    else:
        n1 = minus(z1 | MINUS, words.shape, DTYPE)
        n3 = minus(z3 | MINUS, words.shape, DTYPE)
    if ASM:
        return tl.inline_asm_elementwise(
            _FOUR_F16 if DTYPE == tl.float16 else _FOUR_BF16,
            "=r,=r,=r,=r,r,r,r,r,r",
            [words, n0, n1, n2, n3],
            dtype=(DTYPE, DTYPE, DTYPE, DTYPE),
            is_pure=True,
            pack=2,
        )
    POWER: tl.constexpr = MINUS - 0x8000
    w0 = (words & 15 | POWER).to(DTYPE, bitcast=True) + n0
    w1 = (words >> 4 & 15 | POWER).to(DTYPE, bitcast=True) + n1
    w2 = (words >> 8 & 15 | POWER).to(DTYPE, bitcast=True) + n2
    w3 = (words >> 12 & 15 | POWER).to(DTYPE, bitcast=True) + n3
    return w0, w1, w2, w3


@triton.jit
def centred8(words, z0, z1, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The two slices of 8-bit `words`, each less its zero: exact, in float16 or bfloat16."""
    if ASM and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            _TWO_F16,
            "=r,=r,r,r,r",
            [words, minus(z0 | 0xE400, words.shape, DTYPE), minus(z1 | 0xE400, words.shape, DTYPE)],
            dtype=(DTYPE, DTYPE),
            is_pure=True,
            pack=2,
        )
    elif ASM:
        n0 = (z0 - 0x35000000).to(tl.float32, bitcast=True)  # the bits of -(2**23 + zero)
        n1 = (z1 - 0x35000000).to(tl.float32, bitcast=True)
        n0, n1 = tl.broadcast_to(n0[:, None], words.shape), tl.broadcast_to(n1[:, None], words.shape)
        return tl.inline_asm_elementwise(
            _TWO_BF16, "=r,=r,r,r,r,r,r", [words, n0, n1], dtype=(DTYPE, DTYPE), is_pure=True, pack=2
        )
    else:
        w0 = ((words & 255).to(tl.float32) - z0.to(tl.float32)[:, None]).to(DTYPE)
        w1 = ((words >> 8 & 255).to(tl.float32) - z1.to(tl.float32)[:, None]).to(DTYPE)
        return w0, w1


@triton.jit
def load_x(pointers, row_mask, column, K, EVEN_K: tl.constexpr):
    """A slice of x, `[in, rows]`; 0 beyond its rows and its K columns."""
    if EVEN_K:
        return tl.load(pointers, mask=row_mask, other=0.0)
    return tl.load(pointers, mask=row_mask & (column < K), other=0.0)


@triton.jit
def scaled(w, scale, DTYPE: tl.constexpr):
    """Weights of one group in 16 bits: what a dense checkpoint would hold."""
    return w * scale.to(DTYPE)[:, None]
