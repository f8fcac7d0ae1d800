"""`lowbit::int8_matmul`: activations rounded to int8 per token, times an int8 weight, summed as integers.

    y = (codes_x @ codes_w.T) * scale_x * scale_w + bias

where `codes_x`, `scale_x` are those of `activations.quantize_rows`. An `Operand` is the weight in the
layout of one implementation:

    plain    the checkpoint's own tensor; a float32 product of the codes, on any device
    onednn   packed by oneDNN, for its int8 product, which AMX and VNNI make faster than bfloat16's
    triton   the checkpoint's own tensor too: rows are what the tensor cores want

`prepare` picks one, once. oneDNN is only trusted where it gave the right answer to a product that makes
16-bit sums overflow, which is what CPUs without VNNI compute with, and gave it at once. It is handed codes
of activations as unsigned bytes, 128 too large, which it takes off again, exactly: for signed ones it has
no kernel on AMD's Zen 4, and its reference takes thousands of times as long. Its output is rounded to
bfloat16 before and after it takes the scale of its row; everything else is rounded once.

The op is opaque to `torch.compile`. The gradient of the activations is that of the dense weight: rounding
counts as the identity.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit.activations import LARGEST, TINY, quantize_rows
from lowbit.errors import LowbitError

PLAIN, ONEDNN, TRITON = "plain", "onednn", "triton"

_ROWS_AT_ONCE = 2**22
"""Codes of a plain weight that are made float32 at a time."""
_TILE = 2**17
"""Activations that are rounded at a time: what passes over them stays in a second-level cache."""
_MIDDLE = 128
"""What oneDNN takes off the codes of activations: its fast products are of unsigned by signed bytes."""
_REFERENCE = 50
"""Times a float32 product's time, between a kernel's (below 1) and the reference's (thousands)."""
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}

_LIBRARY = torch.library.Library("lowbit", "FRAGMENT")
_LIBRARY.define(
    "int8_matmul(Tensor x, Tensor? bias, Tensor codes, Tensor scales, *, int out_features, str layout)"
    " -> Tensor"
)


@dataclass(frozen=True)
class Operand:
    """An int8 weight in the layout of one implementation.

    Attributes:
        packed: int8. plain, triton: `[out, in]`. onednn: an opaque tensor, `[in, out]`.
        scales: float32 `[out]`.
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        layout: One of `PLAIN`, `ONEDNN`, `TRITON`.
    """

    packed: Tensor
    scales: Tensor
    in_features: int
    out_features: int
    layout: str

    @property
    def nbytes(self) -> int:
        """Memory of its tensors."""
        return self.in_features * self.out_features + self.scales.nbytes

    def __deepcopy__(self, memo: Any) -> Operand:
        return self  # immutable, and an opaque tensor can't be copied


def prepare(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Operand:
    """A weight in the fastest layout of the device it is on.

    Args:
        codes: int8 `[out, in]`.
        scales: float `[out, 1]`.
        dtype: dtype of the activations.
    """
    out_features, in_features = codes.shape
    layout, kept = PLAIN, codes
    if codes.device.type == "cpu" and onednn_is_good():
        layout, kept = ONEDNN, torch.ops.onednn.qlinear_prepack(codes, None)
    elif codes.device.type == "cuda" and _has_kernel(codes.device, dtype):
        layout = TRITON
    return Operand(kept, scales.float().flatten().contiguous(), in_features, out_features, layout)


@cache
def onednn_is_good() -> bool:
    """Does this machine's oneDNN multiply int8 without overflow, and by a kernel and not by its reference?

    Where it has no kernel for a product it takes seconds over what float32 does in a millisecond.
    """
    x = torch.full((16, 512), LARGEST + _MIDDLE, dtype=torch.uint8)
    weight = torch.full((512, 512), -128, dtype=torch.int8)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        product = _onednn(x, packed, torch.ones(512), torch.float32)
        seconds = _cpu_seconds(lambda: _onednn(x, packed, torch.ones(512), torch.float32))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    rows, columns = x.float(), weight.T.float()
    slow = seconds > _REFERENCE * _cpu_seconds(lambda: rows @ columns)
    return not slow and bool((product == 512.0 * LARGEST * -128).all())


def _cpu_seconds(run: Callable[[], object]) -> float:
    """Of a second run."""
    run()
    begin = time.process_time()
    run()
    return time.process_time() - begin


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        from lowbit_kernels import int8
    except ImportError:
        return False
    return int8.unsupported(dtype, device) is None


def matmul(x: Tensor, weight: Operand, bias: Tensor | None = None) -> Tensor:
    """`x [..., in] @ weight.T + bias`, `[..., out]` in the dtype of `x`, which is rounded on the way."""
    if weight.layout == ONEDNN and _is_plain(x):
        _check(x, weight.in_features)
        return _multiply(x, bias, weight.packed, weight.scales, weight.out_features, _last)
    product: Tensor = torch.ops.lowbit.int8_matmul.default(
        x, bias, weight.packed, weight.scales, out_features=weight.out_features, layout=weight.layout
    )
    return product


def dequantize(weight: Operand, dtype: torch.dtype) -> Tensor:
    """The dense weight `[out, in]` that the operand stands for."""
    codes = weight.packed.to_dense().T if weight.layout == ONEDNN else weight.packed
    return (codes * weight.scales.unsqueeze(-1)).to(dtype)


def _is_plain(x: Tensor) -> bool:
    """Would the dispatcher find nothing to do but to call the CPU's implementation?"""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _check(x: Tensor, in_features: int) -> None:
    if x.shape[-1] != in_features:
        raise LowbitError(f"x has {x.shape[-1]} columns, the weight has in_features={in_features}")
    if x.dtype not in _BITS:
        raise LowbitError(f"x is {x.dtype}: activations must be bfloat16, float16 or float32")


class _Last(threading.local):
    """The codes that a thread made last, and the memory that it makes them in.

    Matrices that read one tensor (q/k/v, gate/up) follow one another: it is rounded once. A tensor
    changed in place has another version, one that died is no tensor's equal. Fresh memory
    for every call would cost more than its arithmetic.
    """

    def __init__(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._version = 0
        self._found: tuple[Tensor, Tensor] | None = None
        self._memory: dict[str, Tensor] = {}

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes + 128, uint8 `[rows, in]`, scales `[rows, 1]`; overwritten by the call for another tensor."""
        known = not x.is_inference()  # these count no versions
        if known and self._found and self._x is not None and self._x() is x and self._version == x._version:
            return self._found
        self._found = found = _quantize(x.reshape(-1, x.shape[-1]), self)
        self._x, self._version = (weakref.ref(x), x._version) if known else (None, 0)
        return found

    def take(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Uninitialized memory, the same for the same name."""
        size = shape[0] * shape[1] * dtype.itemsize
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = torch.empty(size, dtype=torch.uint8)
        return self._memory[name][:size].view(dtype).view(shape)


_last = _Last()


def _quantize(rows: Tensor, memory: _Last) -> tuple[Tensor, Tensor]:
    """As `activations.quantize_rows`, tile by tile.

    The pattern of a float without its sign bit is in the order of its magnitude: integers are compared
    ten times as fast, and a NaN is the largest.
    """
    count, width = rows.shape
    pattern = _BITS[rows.dtype]
    codes = memory.take("codes", (count, width), torch.uint8)
    scales = torch.empty(count, 1, dtype=torch.bfloat16)
    step = max(1, _TILE // width)
    rows = rows.contiguous()
    for start in range(0, count, step):
        part = rows[start : start + step]
        shape = (len(part), width)
        magnitude = memory.take("magnitude", shape, pattern)
        torch.bitwise_and(part.view(pattern), torch.iinfo(pattern).max, out=magnitude)
        largest = magnitude.amax(-1, keepdim=True).view(rows.dtype).float()
        scale = largest.div_(LARGEST).bfloat16().clamp_(min=TINY)
        wide = memory.take("wide", shape, torch.float32).copy_(part)
        signed = codes[start : start + step].view(torch.int8)
        signed.copy_(wide.mul_(scale.float().reciprocal_()).round_()).bitwise_xor_(-_MIDDLE)
        scales[start : start + step] = scale
    return codes, scales


def _multiply(
    x: Tensor, bias: Tensor | None, packed: Tensor, weight_scales: Tensor, out_features: int, last: _Last
) -> Tensor:
    shape = (*x.shape[:-1], out_features)
    if x.numel() == 0:
        return x.new_zeros(shape)
    codes, scales = last.quantize(x)
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    scales, bias = scales.to(dtype), None if bias is None else bias.to(dtype)
    product = _onednn(codes, packed, weight_scales, dtype)
    product = product.mul_(scales) if bias is None else torch.addcmul(bias, product, scales)
    return product.to(x.dtype).view(shape)


def _onednn(x: Tensor, packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    product: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        x, 1.0, _MIDDLE, packed, scales, _zeros(len(scales)), None, 1.0, 0, dtype, "none", [], ""
    )
    return product


@cache
def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


@torch.library.impl(_LIBRARY, "int8_matmul", "CompositeExplicitAutograd")
def _matmul(
    x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor, *, out_features: int, layout: str
) -> Tensor:
    """The specification. Sums beyond 2^24 lose what float32 can't hold: less than a millionth."""
    _check(x, codes.shape[1])
    if layout == ONEDNN:
        raise LowbitError(f"a weight in layout {layout!r} can't be used on {x.device}: prepare it")
    rows, row_scales = quantize_rows(x)
    rows, row_scales = rows.float(), row_scales.float()
    product = x.new_empty(*x.shape[:-1], out_features)
    step = max(1, _ROWS_AT_ONCE // codes.shape[1])
    for start in range(0, out_features, step):
        part = slice(start, start + step)
        scaled = (rows @ codes[part].float().T).mul_(scales[part]).mul_(row_scales)
        product[..., part] = scaled if bias is None else scaled.add_(bias[part])
    return product


@torch.library.impl(_LIBRARY, "int8_matmul", "MkldnnCPU")
def _matmul_by_onednn(
    x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor, *, out_features: int, layout: str
) -> Tensor:
    del layout
    _check(x, codes.shape[0])
    return _multiply(x, bias, codes, scales, out_features, _Last())


@torch.library.impl(_LIBRARY, "int8_matmul", "CUDA")
def _matmul_on_cuda(
    x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor, *, out_features: int, layout: str
) -> Tensor:
    if layout != TRITON:
        return _matmul(x, bias, codes, scales, out_features=out_features, layout=layout)
    from lowbit_kernels import int8

    _check(x, codes.shape[1])
    product: Tensor = int8.int8_matmul(x, codes, scales, bias)
    return product


def _shape(
    x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor, *, out_features: int, layout: str
) -> Tensor:
    del bias, codes, scales, layout
    return x.new_empty(*x.shape[:-1], out_features)


def _remember(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    del output
    _, bias, codes, scales = inputs
    ctx.has_bias = bias is not None
    ctx.operand = Operand(codes, scales, 0, **keyword_only_inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the activations and of the bias; the weight is frozen."""
    bias = gradient.flatten(0, -2).sum(0) if ctx.has_bias and ctx.needs_input_grad[1] else None
    return gradient @ dequantize(ctx.operand, gradient.dtype), bias, None, None


torch.library.register_fake("lowbit::int8_matmul", _shape, lib=_LIBRARY)
torch.library.register_autograd("lowbit::int8_matmul", _backward, setup_context=_remember, lib=_LIBRARY)
