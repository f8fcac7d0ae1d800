"""GPTQ for those in a hurry: few ranges are tried, none twice; no code is gone over again, a block runs once.

On a few thousand tokens GPTQ's own pass over the columns is the least of it: what comes before it (two dozen
ranges for every group), behind it (coordinate descent) and around it (the block run again with its rounded
weights) takes two thirds of the time, and most of what GPTQ gains over rounding to nearest is there
without (docs/ACCURACY.md).
"""

from __future__ import annotations

from functools import partial

from lowbit.algorithms import gptq

NEEDS_HESSIAN = True
SHRINKS = (0.95, 0.9, 0.8)

quantize_weight = partial(gptq.quantize_weight, shrinks=SHRINKS, again=False, rounds=0)
"""As `gptq.quantize_weight`."""
