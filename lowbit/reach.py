"""How much the tokens of a row count for a matrix whose output later tokens read.

What an attention's key and value matrices make of a token is read by every token after it, and of the
first token by nearly all, whatever it is: models rest their attention there (Xiao et al. 2023,
arXiv:2309.17453). So an error at an early token costs more than one at a late token. How much more, the
second moment of the gradient at the outputs says, by which GuidedQuant (Kim et al. 2025, arXiv:2505.07004)
weighs tokens, in all matrices and for a pass back through the model. Where it was measured, it gained
something in these matrices alone, by the place in the row above all, and places follow a law that needs no
gradient (docs/LOG.md):

    the token at place p = 2, 3, ... counts for p ** -DECAY, and the first for a share FIRST of its row.

Which matrices these are is found by trying: where their output for the first token is replaced by random
numbers, what comes out of the block for the last token is another, or it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lowbit.calibration import Group
from lowbit.correction import Silence
from lowbit.stream import Stream

DECAY = 0.3
FIRST = 1 / 6
LOUDNESS = 100.0
"""Size of the random numbers beside the output's: what reads them at all is moved by much."""
MOVED = 1e-5
"""Of the squared norm of what comes out: more than sums in another order move in bfloat16."""


def weigh(stream: Stream, block: int, batch: int, groups: Sequence[Group]) -> None:
    """Give the groups whose outputs later tokens read the weights of their tokens.

    Args:
        stream: Drives the block.
        block: Its number.
        batch: A short batch to try on.
        groups: All of the block's.
    """
    length, usual = stream.batches[0].shape[1], stream.run(block, batch)
    for group in groups:
        if length > 1 and group.matrices[0].kind != "Expert" and _is_read(stream, block, batch, group, usual):
            group.weights = places(length).to(group.moment.total.device)


def places(length: int) -> Tensor:
    """What the tokens of a row count for, float32 `[length]`, 1 on average.

    >>> [round(each, 2) for each in places(5).tolist()]
    [0.83, 1.21, 1.07, 0.98, 0.92]
    """
    weights = torch.arange(1, length + 1, dtype=torch.float64).pow(-DECAY)
    weights *= (1 - FIRST) * length / weights[1:].sum()
    weights[0] = FIRST * length
    return weights.float()


def _is_read(stream: Stream, block: int, batch: int, group: Group, usual: Tensor) -> bool:
    """Does the last token read what any matrix of a group makes of the first?

    What short convolutions make of it, it does not read. Matrices that see some of the tokens (a pooled
    row, an expert's share) have no places to go by.
    """
    rows, length = stream.batches[batch].shape
    changed = partial(_changed, rows=rows, length=length)
    for matrix in reversed(group.matrices):  # values are mostly last, and are read whatever the keys are
        with Silence([matrix], [], changed):
            found = stream.run(block, batch)
        last = usual[:, -1].float()
        if float((found[:, -1].float() - last).square().sum()) > MOVED * float(last.square().sum()):
            return True
    return False


def _changed(output: Tensor, rows: int, length: int) -> Tensor:
    """Loud random numbers in place of an output's first token in every row, if it has all tokens."""
    if output.numel() != rows * length * output.shape[-1]:
        return output
    by_row = output.reshape(rows, length, -1).clone()
    noise = torch.randn(by_row[:, 0].shape, generator=torch.Generator().manual_seed(0))
    size = LOUDNESS * by_row.float().square().mean().sqrt()
    by_row[:, 0] = (noise.to(by_row.device) * size).to(by_row.dtype)
    return by_row.view_as(output)
