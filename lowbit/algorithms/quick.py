"""GPTQ for those in a hurry: few ranges are tried, and no code is gone over again.

What takes GPTQ's time on a few thousand tokens is neither the tokens nor its one pass over the columns, but
what comes before it (two dozen ranges for every group) and behind it (coordinate descent). On 4096 tokens
or fewer one pass with four ranges keeps most of what GPTQ gains over rounding to nearest, for a third of
the time (docs/ACCURACY.md).
"""

from __future__ import annotations

from functools import partial

from lowbit.algorithms import gptq

NEEDS_HESSIAN = True
SHRINKS = (0.95, 0.9, 0.8)

quantize_weight = partial(gptq.quantize_weight, shrinks=SHRINKS, rounds=0)
"""As `gptq.quantize_weight`."""
