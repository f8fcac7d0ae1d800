"""The CPU's packed products in C (`native.c`), compiled by the system's compiler and kept.

torch's four-bit kernel is bound by its arithmetic and not by memory. `native.c` reads the same layout with
the byte products of AVX-512 VNNI, and dequantizes for long prompts several times faster than a chain of
torch's operations can. Nothing needs it: where the processor or a compiler is lacking, `cpu.py` runs on what
torch has, and `lacking` says why.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from lowbit import compiled
from lowbit.errors import LowbitError

_SOURCE = Path(__file__).with_suffix(".c")
_NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512vbmi")
_USED = ("avx512_bf16",)
"""What the dense product needs besides."""
_library: ctypes.CDLL | None = None
_lacking = ""
_declined = False


def prefer() -> None:
    """Use the kernels from now on if this machine can and nobody has called `disable`.

    Called when packed layers come to a CPU. The first call may take some seconds of a compiler.
    """
    global _lacking
    if _library is None and not _declined and not _lacking:
        try:
            enable()
        except LowbitError as error:
            _lacking = str(error)


def lacking() -> str:
    """Why `prefer` could not use the kernels here; empty where it could."""
    return _lacking


def choose(wanted: bool | None) -> None:
    """Use the kernels (True; refused where they can't be), torch's (False), or what `prefer` finds (None)."""
    if wanted:
        enable()
    elif wanted is False:
        disable()


def enable() -> None:
    """Compile the kernels, if that was not done before, and use them in this process from now on.

    Raises:
        LowbitError: this processor lacks AVX-512 VNNI, or there is no C compiler that works.
    """
    global _library
    if _library is None:
        if not supported():
            lacking = next(name for name in _NEEDED if name not in compiled.processor())
            raise LowbitError(f"the native kernels need {lacking}, which this CPU lacks: run without them")
        if torch.backends.cpu.get_cpu_capability() != "AVX512":
            raise LowbitError("the native kernels need torch's AVX-512 layout: unset ATEN_CPU_CAPABILITY")
        _library = _open()


def disable() -> None:
    """Go back to torch's kernels, and stay there until `enable`."""
    global _library, _declined
    _library, _declined = None, True


def supported() -> bool:
    """Has this processor what the kernels are compiled for?"""
    return compiled.processor().issuperset(_NEEDED)


def enabled() -> bool:
    """Are the kernels in use?"""
    return _library is not None


def has_dense() -> bool:
    """Are they in use, and is `dense` among them?"""
    return _library is not None and hasattr(_library, "lowbit_dense")


def matvec(
    x: Tensor, tiles: Tensor, scales: Tensor, group: int, out_features: int, bias: Tensor | None
) -> Tensor:
    """`x [..., in] @ weight.T + bias`, bfloat16 `[..., out_features]`; for few rows.

    Args:
        x: bfloat16, contiguous.
        tiles: uint8 in blocks of 64 rows, see `cpu.tile`.
        scales: bfloat16 `[planes * groups, rows, 2]`.
        group: Columns that share a pair of scales.
        out_features: Rows of the weight, without padding.
        bias: bfloat16 `[out_features]`, contiguous.
    """
    assert _library is not None
    columns, planes = x.shape[-1], scales.shape[0] * group // x.shape[-1]
    out = x.new_empty(*x.shape[:-1], out_features)
    failed = _library.lowbit_matvec(
        x.data_ptr(), tiles.data_ptr(), scales.data_ptr(), None if bias is None else bias.data_ptr(),
        out.data_ptr(), x.numel() // columns, columns, scales.shape[1], group, planes,
        out_features, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the activations")
    return out


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`weight @ x + bias`, bfloat16 `[out]`, for `x [in]`; all bfloat16, contiguous. Only if `has_dense`."""
    assert _library is not None
    out = x.new_empty(len(weight))
    _library.lowbit_dense(
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
        *weight.shape, torch.get_num_threads(),
    )  # fmt: skip
    return out


def dequantize(tiles: Tensor, scales: Tensor, first: int, group: int, planes: int, out: Tensor) -> None:
    """Write rows `first ...` of the weight, as many as `out` `[in, rows]` bfloat16 has; whole blocks."""
    assert _library is not None
    _library.lowbit_dequantize(
        tiles.data_ptr() + first * tiles.shape[1], scales.data_ptr() + first * 4, out.data_ptr(),
        out.shape[1] // 64, out.shape[0], scales.shape[1], group, planes, torch.get_num_threads(),
    )  # fmt: skip


def _open() -> ctypes.CDLL:
    used = (*_NEEDED, *(name for name in _USED if name in compiled.processor()))
    library = compiled.library(_SOURCE, used)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.lowbit_matvec.argtypes = [*[pointer] * 5, *[size] * 6, ctypes.c_int]
    library.lowbit_matvec.restype = ctypes.c_int
    library.lowbit_dequantize.argtypes = [*[pointer] * 3, *[size] * 5, ctypes.c_int]
    library.lowbit_dequantize.restype = None
    if hasattr(library, "lowbit_dense"):
        library.lowbit_dense.argtypes = [*[pointer] * 4, *[size] * 2, ctypes.c_int]
        library.lowbit_dense.restype = None
    return library
