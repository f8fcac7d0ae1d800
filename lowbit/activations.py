"""Activations rounded on the fly: every row (a token) gets a scale of its own, symmetric, eight bits.

    scale = max|x| / 127, rounded to bfloat16        codes = round(x / scale), in -127 ... 127

The scale is rounded *before* any code is chosen, so no error comes from storing it, and codes never
clip: bfloat16 is off by 2^-9 at most, which takes 127 to 127.25. bfloat16 has the range of float32, so
rows of every dtype share one rule. A row that holds a NaN or an infinity comes out as NaN.

This is the specification. `int8.py` computes the same codes and scales in less time.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
TINY = torch.finfo(torch.bfloat16).tiny
"""The scale of a row of zeros."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes in the shape of `x [..., in]`, and bfloat16 scales `[..., 1]`.

    >>> codes, scales = quantize_rows(torch.tensor([[0.0, -127.0, 25.4]]))
    >>> codes, scales
    (tensor([[   0, -127,   25]], dtype=torch.int8), tensor([[1.]], dtype=torch.bfloat16))
    """
    wide = x.float()
    scales = (wide.abs().amax(-1, keepdim=True) / LARGEST).bfloat16().clamp(min=TINY)
    return (wide * scales.float().reciprocal()).round().to(torch.int8), scales


def round_rows(x: Tensor) -> Tensor:
    """What is left of `x` once it went through its codes, in the dtype of `x`."""
    codes, scales = quantize_rows(x)
    return (codes * scales.float()).to(x.dtype)
