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
    reason = _lacking(device, block_size)
    if reason is None:
        return _kernels().round_columns  # type: ignore[no-any-return]
    warnings.warn(
        f"lowbit: rounding on {device} is many times slower than it could be: {reason}", stacklevel=2
    )
    return None


def _lacking(device: torch.device, block_size: int) -> str | None:
    try:
        most = _kernels().MOST_COLUMNS
    except ImportError as error:
        return f"Triton's kernels can't be imported ({error})"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need Ampere (sm_80) or newer"
    if block_size > most:
        return f"block_size={block_size} is more than the kernel's {most}"
    return None


def _kernels() -> Any:
    from lowbit_kernels import sweep as module

    return module
