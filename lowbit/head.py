"""Rounding the output head: the run's own algorithm, on what the head reads behind the quantized blocks.

A vocabulary has many rows, and rows never meet while they are rounded, so some are rounded at a time. Only
the first rank works here, on its own share of the calibration data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.algorithms import ALGORITHMS
from lowbit.moments import Moment
from lowbit.progress import Progress
from lowbit.quantized import QuantizedWeight
from lowbit.rounding import row_errors
from lowbit.scheme import QuantScheme
from lowbit.stream import Stream

ROWS = 8192


def round_head(
    stream: Stream,
    batches: Sequence[int],
    scheme: QuantScheme,
    method: str,
    scale_dtype: torch.dtype,
    progress: Progress,
    rows: int | None = None,
) -> tuple[QuantizedWeight, float, str]:
    """Round the head of the stream's model, which must be loaded together with the norm before it.

    Args:
        stream: Carried over all blocks.
        batches: Numbers of the batches to calibrate on.
        scheme: The grid.
        method: Key of `ALGORITHMS`.
        scale_dtype: dtype in which the format stores scales.
        progress: Told about every batch and every rows that are rounded.
        rows: How many are rounded at once; None: `ROWS`.

    Returns:
        The quantized weight, the share of the output's energy that rounding costs (without data: of the
        weight's), and the algorithm's note.
    """
    weight = stream.model.get_output_embeddings().weight.data
    parts = weight.split(min(rows or ROWS, ROWS))
    calibrated = ALGORITHMS[method].NEEDS_HESSIAN
    steps, read = len(parts) + len(batches) * calibrated, 0
    hessian: Tensor | None = None
    if calibrated:
        moment = Moment(weight.shape[1], weight.device)
        for read, batch in enumerate(batches, start=1):
            moment.add(stream.head_input(batch))
            progress("head", read, steps, "observing")
        hessian = moment.mean()
    done, note, lost, whole = [], "", 0.0, 0.0
    for number, part in enumerate(parts, start=read + 1):
        rounded, note = ALGORITHMS[method].quantize_weight(part.float(), hessian, scheme, scale_dtype)
        done.append(rounded)
        a, b = row_errors(part.float(), rounded, hessian)
        lost, whole = lost + float(a.sum()), whole + float(b.sum())
        progress("head", number, steps, "rounding")
    return QuantizedWeight.stack_rows(done), lost / max(whole, 1e-30), note
