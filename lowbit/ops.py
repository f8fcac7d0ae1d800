"""`lowbit::dequant_matmul`: activations times a weight that stays packed, one op on every device.

An `Operand` is a weight in the layout of one implementation:

    stream   codes as a compressed-tensors file holds them; runs anywhere, unpacks at every call
    tiles    torch's four-bit CPU kernel (`cpu.py`)
    triton   `lowbit_kernels`, which is imported when the first weight is prepared for a GPU

`prepare` picks the layout for a device, once, when a model is loaded. It is derived data: whoever
holds the checkpoint's own tensors can make it again, and nobody saves it.

The default implementation of the op is its specification: unpack, `(codes - zeros) * scales` rounded
once to the dtype of the activations, multiply. It works on blocks of rows, so the dense weight never
exists as a whole. The op is opaque to `torch.compile`, and differentiable in the activations (the
weight is frozen), which is what adapters on top of it need.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit import cpu, grid, packing
from lowbit.errors import LowbitError
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme

STREAM, TILES, TRITON = "stream", "tiles", "triton"

_ROWS_AT_ONCE = 2**22
"""Dense weights that the default implementation makes at a time."""
WEIGHT = (
    "Tensor packed, Tensor scales, Tensor? zeros, *, int in_features, int out_features, "
    "int bits, int group_size, ScalarType scale_dtype, str layout"
)
_LIBRARY = torch.library.Library("lowbit", "DEF")
_LIBRARY.define(f"dequant_matmul(Tensor x, Tensor? bias, {WEIGHT}) -> Tensor")
_LIBRARY.define(f"dequantize({WEIGHT}, ScalarType dtype) -> Tensor")


@dataclass(frozen=True)
class Operand:
    """A weight in the layout of one implementation; the op takes its fields.

    Attributes:
        packed: Codes. stream: int32 `[out, words]`. tiles: uint8. triton: int16.
        scales: stream: `[out, groups]`. tiles: bfloat16 pairs. triton: int32 pairs.
        zeros: stream: uint8 `[out, groups]`; None everywhere on a symmetric grid.
        in_features: Columns of the weight.
        out_features: Rows of the weight; a layout may pad them.
        bits: Width of a code.
        group_size: Columns that share a scale; -1 means the whole row.
        scale_dtype: dtype of the scales as stored in the checkpoint.
        layout: One of `STREAM`, `TILES`, `TRITON`.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    in_features: int
    out_features: int
    bits: int
    group_size: int
    scale_dtype: torch.dtype
    layout: str

    @property
    def nbytes(self) -> int:
        """Memory of its tensors."""
        return sum(part.nbytes for part in (self.packed, self.scales, self.zeros) if part is not None)

    def fields(self) -> tuple[tuple[Tensor, Tensor, Tensor | None], dict[str, Any]]:
        """Positional and keyword arguments of the op, but for `x` and `bias`."""
        tensors = (self.packed, self.scales, self.zeros)
        rest = ("in_features", "out_features", "bits", "group_size", "scale_dtype", "layout")
        return tensors, {name: getattr(self, name) for name in rest}


def matmul(x: Tensor, weight: Operand, bias: Tensor | None = None) -> Tensor:
    """`x [..., in] @ weight.T + bias`, `[..., out]` in the dtype of `x`."""
    if weight.layout == TILES and is_plain(x):
        return _matmul_tiles(x, bias, weight.packed, weight.scales, weight.in_features, weight.out_features)
    tensors, rest = weight.fields()
    product: Tensor = torch.ops.lowbit.dequant_matmul.default(x, bias, *tensors, **rest)
    return product


def is_plain(x: Tensor) -> bool:
    """Would the dispatcher find nothing to do but to call the CPU's implementation?

    The way through it and the autograd wrapper takes 17 us, a fifth of the time of a small layer.
    """
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def dequantize(weight: Operand, dtype: torch.dtype) -> Tensor:
    """The dense weight `[out, in]` that the operand stands for."""
    tensors, rest = weight.fields()
    dense: Tensor = torch.ops.lowbit.dequantize.default(*tensors, **rest, dtype=dtype)
    return dense


def stream(weight: QuantizedWeight, packed: Tensor | None = None) -> Operand:
    """`weight` as a stream of bits; `packed` saves packing it where the checkpoint has it like that."""
    scheme = weight.scheme
    words = packing.pack(weight.codes, scheme.bits) if packed is None else packed
    zeros = None if scheme.symmetric else weight.zeros
    return _operand(weight, words, weight.scales, zeros, STREAM)


def prepare(weight: QuantizedWeight, dtype: torch.dtype) -> Operand:
    """`weight` in the fastest layout of the device it is on, for activations of `dtype`."""
    device = weight.codes.device
    if device.type == "cpu" and cpu.fits(weight):
        return _operand(weight, *cpu.tile(weight), None, TILES)
    if device.type == "cuda":
        reason = _why_not_triton(weight, dtype)
        if reason is None:
            return _to_triton(weight)
        _warn(f"lowbit: {weight.scheme} on {device} is dequantized at every call: {reason}")
    return stream(weight)


def _operand(
    weight: QuantizedWeight, packed: Tensor, scales: Tensor, zeros: Tensor | None, layout: str
) -> Operand:
    out_features, in_features = weight.shape
    scheme, dtype = weight.scheme, weight.scales.dtype
    return Operand(
        packed, scales, zeros, in_features, out_features, scheme.bits, scheme.group_size, dtype, layout
    )


@cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _why_not_triton(weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
    try:
        import lowbit_kernels
    except ImportError as error:
        return f"the Triton kernels can't be imported ({error})"
    scheme = weight.scheme
    reason: str | None = lowbit_kernels.unsupported(
        scheme.bits, scheme.group_size, weight.shape[1], dtype, weight.codes.device
    )
    return reason


def _to_triton(weight: QuantizedWeight) -> Operand:
    import lowbit_kernels

    scheme = weight.scheme
    codes, scale_zero = lowbit_kernels.to_layout(
        packing.pack(weight.codes, scheme.bits),
        weight.scales,
        weight.zeros,
        bits=scheme.bits,
        group_size=scheme.group_size,
        in_features=weight.shape[1],
    )
    return _operand(weight, codes, scale_zero, None, TRITON)


def _dequantize_stream(packed: Tensor, scales: Tensor, zeros: Tensor | None, **rest: Any) -> Tensor:
    scheme = QuantScheme(rest["bits"], rest["group_size"], zeros is None)
    codes = packing.unpack(packed, rest["bits"], rest["in_features"])
    if zeros is None:
        zeros = torch.full(scales.shape, scheme.middle, dtype=torch.uint8, device=scales.device)
    return grid.dequantize(codes, scales, zeros, scheme)


def _check(x: Tensor, in_features: int) -> None:
    if x.shape[-1] != in_features:
        raise LowbitError(f"x has {x.shape[-1]} columns, the weight has in_features={in_features}")
    if not x.is_floating_point():
        raise LowbitError(f"x is {x.dtype}: activations must be a floating-point type")


@torch.library.impl(_LIBRARY, "dequantize", "CompositeExplicitAutograd")
def _dequantize(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, *, dtype: torch.dtype, **rest: Any
) -> Tensor:
    if rest["layout"] == STREAM:
        return _dequantize_stream(packed, scales, zeros, **rest).to(dtype)
    if rest["layout"] == TILES:
        return cpu.dense(packed, scales, rest["bits"], dtype).T[: rest["out_features"]].contiguous()
    import lowbit_kernels

    sizes = {name: rest[name] for name in ("bits", "group_size", "in_features", "out_features")}
    dense: Tensor = lowbit_kernels.dequantize(
        packed, scales, **sizes, scale_dtype=rest["scale_dtype"], dtype=dtype
    )
    return dense


@torch.library.impl(_LIBRARY, "dequant_matmul", "CompositeExplicitAutograd")
def _matmul(
    x: Tensor, bias: Tensor | None, packed: Tensor, scales: Tensor, zeros: Tensor | None, **rest: Any
) -> Tensor:
    _check(x, rest["in_features"])
    if rest["layout"] != STREAM:
        raise LowbitError(f"a weight in layout {rest['layout']!r} can't be used on {x.device}: prepare it")
    product = x.new_empty(*x.shape[:-1], rest["out_features"])
    step = max(1, _ROWS_AT_ONCE // rest["in_features"])
    for start in range(0, rest["out_features"], step):
        part = slice(start, start + step)
        rows = None if zeros is None else zeros[part]
        weight = _dequantize_stream(packed[part], scales[part], rows, **rest).to(x.dtype)
        product[..., part] = torch.nn.functional.linear(x, weight, None if bias is None else bias[part])
    return product


@torch.library.impl(_LIBRARY, "dequant_matmul", "CPU")
def _matmul_on_cpu(
    x: Tensor, bias: Tensor | None, packed: Tensor, scales: Tensor, zeros: Tensor | None, **rest: Any
) -> Tensor:
    if rest["layout"] != TILES:
        return _matmul(x, bias, packed, scales, zeros, **rest)
    return _matmul_tiles(x, bias, packed, scales, rest["in_features"], rest["out_features"])


def _matmul_tiles(
    x: Tensor, bias: Tensor | None, packed: Tensor, scales: Tensor, in_features: int, out_features: int
) -> Tensor:
    _check(x, in_features)
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], out_features)
    return cpu.matmul(x, packed, scales, out_features, bias)


@torch.library.impl(_LIBRARY, "dequant_matmul", "CUDA")
def _matmul_on_cuda(
    x: Tensor, bias: Tensor | None, packed: Tensor, scales: Tensor, zeros: Tensor | None, **rest: Any
) -> Tensor:
    if rest["layout"] != TRITON:
        return _matmul(x, bias, packed, scales, zeros, **rest)
    import lowbit_kernels

    _check(x, rest["in_features"])
    sizes = {name: rest[name] for name in ("bits", "group_size", "out_features", "scale_dtype")}
    product: Tensor = lowbit_kernels.dequant_matmul(x, packed, scales, bias, **sizes)
    return product


def _matmul_shape(x: Tensor, bias: Tensor | None, *tensors: Tensor, **rest: Any) -> Tensor:
    del bias, tensors
    return x.new_empty(*x.shape[:-1], rest["out_features"])


def _dequantize_shape(packed: Tensor, *tensors: Tensor, dtype: torch.dtype, **rest: Any) -> Tensor:
    del tensors
    return packed.new_empty(rest["out_features"], rest["in_features"], dtype=dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    del output
    _, ctx.has_bias, *tensors = inputs
    ctx.has_bias = ctx.has_bias is not None
    ctx.save_for_backward(*tensors)
    ctx.rest = keyword_only_inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the activations and of the bias; the weight is frozen."""
    weight = torch.ops.lowbit.dequantize.default(*ctx.saved_tensors, **ctx.rest, dtype=gradient.dtype)
    bias = gradient.flatten(0, -2).sum(0) if ctx.has_bias and ctx.needs_input_grad[1] else None
    return gradient @ weight, bias, None, None, None


torch.library.register_fake("lowbit::dequant_matmul", _matmul_shape, lib=_LIBRARY)
torch.library.register_fake("lowbit::dequantize", _dequantize_shape, lib=_LIBRARY)
torch.library.register_autograd("lowbit::dequant_matmul", _backward, setup_context=_remember, lib=_LIBRARY)
