"""Where columns are rounded one after the other: in one launch a block, or by torch's operations.

On a CPU a loop of torch's operations is fast: each works on thousands of rows. On a GPU the same loop waits
for Python a dozen times a column, so `lowbit_kernels.sweep` takes its place there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

Sweep = Callable[..., tuple[Tensor, Tensor]]
"""`lowbit_kernels.sweep.round_columns`."""


@cache
def sweep(device: torch.device, block_size: int) -> Sweep | None:
    """The kernel, where it runs; None: use the loop. Where a GPU has to, a warning says so."""
    if device.type != "cuda":
        return None
    reason = _lacking(device)
    if reason is None:
        kernels: Any = _kernels()
        return kernels.round_columns if block_size <= kernels.MOST_COLUMNS else None
    warnings.warn(
        f"lowbit: rounding on {device} is many times slower than it could be: {reason}", stacklevel=2
    )
    return None


def _lacking(device: torch.device) -> str | None:
    try:
        _kernels()
    except ImportError as error:
        return f"Triton's kernels can't be imported ({error})"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need Ampere (sm_80) or newer"
    return None


def _kernels() -> Any:
    from lowbit_kernels import sweep as module

    return module
