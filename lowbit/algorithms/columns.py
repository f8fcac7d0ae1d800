"""Where columns are rounded one after the other: in one call a block, or by torch's operations.

A loop of torch's operations is a dozen calls a column. A GPU waits for Python that often, so
`lowbit_kernels.sweep` takes the loop's place there. On a CPU `sweep.c` does, compiled when it is first
needed: it keeps what the loop sends through memory in the first-level cache (docs/LOG.md). Where neither
can be had, the loop serves; `notes` says why.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit import compiled
from lowbit.errors import LowbitError

Sweep = Callable[..., tuple[Tensor, Tensor]]
"""`lowbit_kernels.sweep.round_columns`."""
MOST_COLUMNS = 1024
"""Of a block on a CPU: a thread holds 256 bytes for each on its stack."""
_SOURCE = Path(__file__).with_name("sweep.c")
_FEATURES = (("avx512f",), ("avx2", "fma"))
"""Of a processor, the best first. With less the loop is as fast."""


def sweep(device: torch.device, block_size: int) -> Sweep | None:
    """The kernel, where it runs; None: use the loop. A warning says so on a GPU, and of too large a block."""
    if device.type == "cuda":
        return _on_gpu(device, block_size)
    kernel = _on_cpu()[0] if device.type == "cpu" else None
    if kernel is None or block_size <= MOST_COLUMNS:
        return kernel
    warnings.warn(
        f"lowbit: columns are rounded several times slower with block_size={block_size}: "
        f"the C kernel takes {MOST_COLUMNS} at most",
        stacklevel=3,
    )
    return None


def notes(device: torch.device) -> list[str]:
    """What a summary has to say of the way that columns are rounded on `device`: what can be mended."""
    reason = lacking(device)
    if not reason or (device.type == "cpu" and _features() is None):
        return []
    return [f"columns were rounded by torch's operations, which takes longer: {reason}"]


def name(device: torch.device) -> str:
    """What rounds columns there: the order of sums depends on it, and so do codes half way between two."""
    return "torch" if lacking(device) else {"cpu": "C", "cuda": "triton"}[device.type]


def lacking(device: torch.device) -> str:
    """Why the loop of torch's operations has to serve on a device; empty where it need not."""
    if device.type == "cpu":
        return _on_cpu()[1]
    return _lacking_gpu(device, 1) if device.type == "cuda" else f"no kernel is for {device.type}"


@cache
def _on_cpu() -> tuple[Sweep | None, str]:
    """The C kernel, or why it can't be had."""
    features = _features()
    if features is None:
        return None, "the C kernel is for Linux on x86-64 with AVX2"
    try:
        library = compiled.library(_SOURCE, features)
    except LowbitError as error:
        return None, str(error)
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    library.lowbit_round_columns.argtypes = [
        *[pointer] * 2, size, *[pointer] * 3, number, *[pointer] * 4, size, size, ctypes.c_int
    ]  # fmt: skip
    library.lowbit_round_columns.restype = None
    return partial(_round_columns, library), ""


def _features() -> tuple[str, ...] | None:
    own = compiled.processor()
    return next((some for some in _FEATURES if own.issuperset(some)), None)


def _round_columns(
    library: ctypes.CDLL, base: Tensor, mixing: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor,
    largest: int, start: Tensor, inverse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `lowbit_kernels.reference.round_columns`.

    Raises:
        ValueError: what C could not tell: another dtype, a tensor that is not contiguous, shapes that differ.
    """
    if mixing.stride(1) != 1:
        mixing = mixing.contiguous()
    values = [base, scales, zeros, start] + ([] if inverse is None else [inverse])
    if not all(one.is_contiguous() and one.dtype == torch.float32 for one in values):
        raise ValueError("every tensor has to be contiguous and float32")
    if base.shape != start.shape or not scales.shape == zeros.shape == (len(scales), base.shape[1]):
        raise ValueError(f"columns of {[tuple(one.shape) for one in values]} don't go together")
    if mixing.dtype != torch.float32 or groups.dtype != torch.int64 or not groups.is_contiguous():
        raise ValueError(f"mixing is {mixing.dtype}, groups are {groups.dtype}: use float32 and int64")
    levels, errors = torch.empty_like(start), torch.empty_like(start)
    library.lowbit_round_columns(
        base.data_ptr(), mixing.data_ptr(), mixing.stride(0), scales.data_ptr(), zeros.data_ptr(),
        groups.data_ptr(), largest, start.data_ptr(), None if inverse is None else inverse.data_ptr(),
        levels.data_ptr(), errors.data_ptr(), *base.shape, torch.get_num_threads(),
    )  # fmt: skip
    return levels, errors


@cache
def _on_gpu(device: torch.device, block_size: int) -> Sweep | None:
    reason = _lacking_gpu(device, block_size)
    if not reason:
        return _kernels().round_columns  # type: ignore[no-any-return]
    warnings.warn(
        f"lowbit: rounding on {device} is many times slower than it could be: {reason}", stacklevel=3
    )
    return None


def _lacking_gpu(device: torch.device, block_size: int) -> str:
    try:
        most = _kernels().MOST_COLUMNS
    except ImportError as error:
        return f"Triton's kernels can't be imported ({error})"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need Ampere (sm_80) or newer"
    if block_size > most:
        return f"block_size={block_size} is more than the kernel's {most}"
    return ""


def _kernels() -> Any:
    from lowbit_kernels import sweep as module

    return module
