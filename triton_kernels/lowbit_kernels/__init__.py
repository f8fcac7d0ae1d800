"""Triton kernels for weights of 4 or 8 bits: `y = x @ dequantize(weight).T + bias`, weight kept packed.

The package imports torch and triton and nothing of `lowbit`, which in turn imports it lazily, where it
multiplies (`lowbit/ops.py`, `grouped.py`, `int8.py`), rounds (`algorithms/columns.py`), times (`tiles.py`):
lowbit installs and works where there is no GPU and no Triton.
Importing it touches no driver. Every kernel has a naive twin in plain PyTorch, in `reference.py`, that
is its specification.

Two forms of a weight:

*canonical*, what a compressed-tensors checkpoint stores: `packed` int32 `[out, ceil(in * bits / 32)]`,
a little-endian stream of codes; `scales` `[out, groups]`, bfloat16 or float16, of any sign; `zeros`
uint8 `[out, groups]`, all `2 ** (bits - 1)` where symmetric. `w = (codes - zeros) * scales`.

*kernel layout*, made from it once at load, derived and never saved: `codes` int16 and `scale_zero`
int32 (`layout.py` tells the order of their bits). Stacked experts put `[experts]` before both shapes.

The functions::

    unsupported(bits, group_size, in_features, dtype, device) -> str | None
        Why this weight must take another path, in one line; None: it can run here.

    to_layout(packed, scales, zeros, *, bits, group_size, in_features) -> Layout(codes, scale_zero)
    from_layout(codes, scale_zero, *, bits, group_size, in_features, out_features, scale_dtype)
        -> (packed, scales, zeros)

    dequant_matmul(x, codes, scale_zero, bias=None, *, bits, group_size, out_features, scale_dtype) -> Tensor
        x `[..., in]` float16 or bfloat16, any strides, any number of rows, none included. Decode kernel
        up to 32 rows, prefill kernel up to 256 or 1024, above that dequantize and torch.matmul. The same
        bits on every run.

    dequantize(codes, scale_zero, *, bits, group_size, in_features, out_features, scale_dtype, dtype)
        -> Tensor `[out, in]`

    grouped_dequant_matmul(x, experts, codes, scale_zero, *, ...as dequant_matmul) -> Tensor
        Mixture of experts: row `i` of x `[rows, in]` goes through expert `experts[i]` of the stack.

    int8.int8_matmul(x, weight, scales, bias=None) -> Tensor
        x rounded to int8 per row, times an int8 weight `[out, in]` as the checkpoint has it.

    sweep.round_columns(base, mixing, scales, zeros, groups, largest, start, inverse=None)
        -> levels, errors. For quantizing: the columns of a block rounded one after the other.

None of them synchronises with the host; `dequant_matmul` allocates its output and, where K is split
between programs, one workspace, both from torch's caching allocator, so CUDA graphs can hold it.
"""

from lowbit_kernels.grouped import grouped_dequant_matmul
from lowbit_kernels.layout import Layout, from_layout, to_layout
from lowbit_kernels.matmul import dequant_matmul, dequantize, unsupported

__all__ = [
    "Layout",
    "dequant_matmul",
    "dequantize",
    "from_layout",
    "grouped_dequant_matmul",
    "to_layout",
    "unsupported",
]
