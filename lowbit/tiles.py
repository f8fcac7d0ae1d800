"""Kernel tiles for the shapes of a checkpoint, timed on a GPU of this machine: `lowbit tune`.

The Triton kernels ship with tiles that were chosen by counting in compiled code, on Hopper by the clock for
common shapes. Here the GPU at hand decides, for the shapes of one checkpoint; what it finds is kept in the
user's cache and used from then on by every process on this machine, for every weight of such a shape. What
is timed, and how, is `lowbit_kernels/tune.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from lowbit import formats, hf, source
from lowbit.errors import LowbitError
from lowbit.hardware import find_device
from lowbit.progress import Progress, silent
from lowbit.untrusted import NEVER_TRUSTED

Shape = tuple[int, int, int, int, torch.dtype]
"""Bits, group size, outputs, inputs, and what is multiplied: fields of `lowbit_kernels.tune.Weight`."""


@dataclass(frozen=True)
class Timed:
    """One entry of the result.

    Attributes:
        name: Kernel, scheme and shape, as in `decode w4 bfloat16 m8 g128 4096x4096`.
        rows: Of x, in the measurement.
        shipped: Microseconds with the tile that ships.
        best: Microseconds with the one that is kept.
        replaced: Is that another one?
        dropped: Candidates that could not be used: the reasons.
    """

    name: str
    rows: int
    shipped: float
    best: float
    replaced: bool
    dropped: list[str]


def shapes_of(model: str, device: torch.device) -> tuple[list[Shape], list[str]]:
    """Different weights of a quantized checkpoint that the kernels run, and the others, with the reason.

    Raises:
        LowbitError: there is no such checkpoint, or nothing in it is quantized.
    """
    from lowbit_kernels import unsupported

    found, left = dict[Shape, None](), dict[str, None]()
    with tempfile.TemporaryDirectory() as scratch:  # what a .gguf file becomes goes with it
        folder = source.find(model, Path(scratch))
        quantization, fmt = hf.quantization_of(folder)
        if fmt is None:
            raise LowbitError(f"{model} is not quantized: give a checkpoint of lowbit quantize")
        stored = getattr(AutoConfig.from_pretrained(folder, **NEVER_TRUSTED), "dtype", None)
        dtype = torch.float16 if stored == torch.float16 else torch.bfloat16
        for name, tensors in hf.layers(folder, fmt):
            if isinstance(tensors, torch.Tensor):
                continue
            weight, _ = formats.read(fmt, tensors, fmt.read_config(quantization, name), quantization)
            (out, columns), scheme = weight.shape, weight.scheme
            reason = unsupported(scheme.bits, scheme.group_size, columns, dtype, device)
            if reason is None:
                found[scheme.bits, scheme.group_size, out, columns, dtype] = None
            else:
                left[f"{scheme} {out}x{columns}: {reason}"] = None
    return list(found), list(left)


def tune(
    model: str, device: str = "auto", progress: Progress = silent
) -> tuple[list[Timed], list[str], Path]:
    """Time tiles for a checkpoint's shapes and keep the best.

    Args:
        model: A quantized checkpoint: hub id or folder.
        device: `auto` or `cuda:1`.
        progress: Told about every entry.

    Returns:
        What was found, what no kernel runs, and the file that keeps it.

    Raises:
        LowbitError: there is no GPU, or nothing to time.
    """
    place = find_device(device)
    if place.type != "cuda":
        raise LowbitError(f"--device {device}: lowbit tune times kernels on a GPU, and there is none here")
    from lowbit_kernels import tuned

    weights, left = shapes_of(model, place)
    if not weights:
        raise LowbitError(f"{model} has no weight that the kernels run: {left[0]}")
    path = tuned.path_of(torch.cuda.get_device_name(place))
    return list(_timed(weights, place, path, progress)), left, path


def _timed(weights: list[Shape], device: torch.device, path: Path, progress: Progress) -> Iterator[Timed]:
    """Entry after entry; each is kept at once, so that a run that is stopped was not for nothing."""
    from lowbit_kernels import tuned
    from lowbit_kernels.tune import Weight, entries
    from lowbit_kernels.tune import tune as time_tiles

    total = len(weights) * len(entries(device))
    for number, found in enumerate(time_tiles([Weight(*weight) for weight in weights], device), start=1):
        tuned.write(path, {found.name: found.tile})
        progress("tune", number, total, found.name)
        dropped = [f"{list(tile)}: {reason}" for tile, reason in found.dropped.items()]
        replaced = found.best < found.shipped
        yield Timed(found.name, found.rows, found.shipped, found.best, replaced, dropped)
