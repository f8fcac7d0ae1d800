"""Rounding the output head: the run's own algorithm, on what the head reads behind the last block.

That is what is carried there: the quantized model's activations, or the original's by a method of one pass.
Every rank looks at its own share of the calibration data; the first one rounds. A vocabulary has many rows,
and rows never meet while they are rounded, so some are rounded at a time.
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
"""Rounded at once. The blocks are gone by then, and for every lot a Hessian is factored."""


def observe_head(
    stream: Stream, batches: Sequence[int], tokens: int, device: torch.device, progress: Progress
) -> Tensor:
    """The mean of `x x^T` over what the head reads, float32 `[in, in]`; on the first rank, of all ranks.

    Args:
        stream: Carried over all blocks; the norm before the head must be loaded, the head need not be.
        batches: Numbers of this rank's batches.
        tokens: Of all ranks' batches together.
        device: Where they are.
        progress: Told about every batch.
    """
    moment = Moment(stream.model.get_output_embeddings().weight.shape[1], device)
    for read, batch in enumerate(batches, start=1):
        moment.add(stream.head_input(batch))
        progress("head", read, len(batches), "observing")
    moment.pool(tokens, [0])
    return moment.mean()


def round_head(
    weight: Tensor,
    hessian: Tensor | None,
    scheme: QuantScheme,
    method: str,
    scale_dtype: torch.dtype,
    progress: Progress,
    rows: int = ROWS,
) -> tuple[QuantizedWeight, float, str]:
    """Round the head's `weight [vocabulary, in]`.

    Args:
        weight: As it is loaded.
        hessian: From `observe_head`; None for a method that needs no data.
        scheme: The grid.
        method: Key of `ALGORITHMS`.
        scale_dtype: dtype in which the format stores scales.
        progress: Told about every lot of rows.
        rows: How many are rounded at once.

    Returns:
        The quantized weight, the share of the output's energy that rounding costs (without data: of the
        weight's), and the algorithm's note.
    """
    parts, done, note, lost, whole = weight.split(rows), [], "", 0.0, 0.0
    for number, part in enumerate(map(Tensor.float, parts), start=1):
        rounded, note = ALGORITHMS[method].quantize_weight(part, hessian, scheme, scale_dtype)
        done.append(rounded)
        a, b = row_errors(part, rounded, hessian)
        lost, whole = lost + float(a.sum()), whole + float(b.sum())
        progress("head", number, len(parts), "rounding")
    return QuantizedWeight.stack_rows(done), lost / max(whole, 1e-30), note
