"""A linear layer whose codes stay and whose scales learn.

The weight is `(codes - zeros) * scales * gains`: one trainable gain per group, about 1 at the start, so that
one learning rate suits every layer. Codes and zeros are integers and stay as they are; a gain only
moves a scale that the file holds anyway, so what was learned costs no storage.

At the start a scale is a number of its stored dtype, and were its gain 1, it would not move before half a
step of that dtype was learned, 0.2 to 0.4 % in bfloat16, which is as far as most ever go. So gains begin
anywhere within that half step (`within_steps`): scales are what they were, and of what little is learned
some shows at once.

Scales are rounded to the stored dtype in the forward, and the weight to bfloat16: the loss is that of
what will be loaded. The gradient passes both roundings as if they were not there (Bengio et al. 2013,
arXiv:1308.3432). It needs no codes: with `w = c * s * gain`, `dL/dgain = sum(dL/dw * w) / gain` over
the group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import grid
from lowbit.quantized import QuantizedWeight

GOLDEN = (5**0.5 - 1) / 2
Learner = Callable[[slice, Tensor], None]
"""Takes some rows of a weight by their numbers, and their gradient, float32 `[rows, in]`."""


def within_steps(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Gains near 1 on `values`, spread evenly over what `dtype` rounds to the same numbers; float32.

    Args:
        values: Numbers of `dtype`, in that or a wider dtype, of any shape.
        dtype: In which they will be stored.
    """
    count = torch.arange(values.numel(), dtype=torch.float64, device=values.device).reshape(values.shape)
    spread = (count * GOLDEN).frac_().sub_(0.5)  # any few neighbours are far apart
    exact = values.double()
    step = torch.exp2(exact.abs().log2().floor()) * torch.finfo(dtype).eps
    gains = (1 + spread * step / exact).float()
    # Below a power of two a step is half as long; 0 has no gain.
    same = (values.float() * gains).to(dtype) == values.to(dtype)
    return torch.where(same, gains, 1.0)


class TrainableLinear(nn.Module):
    """`nn.Linear` on a quantized weight with trainable gains.

    Attributes:
        gains: float32 `[out, groups]`, factors on the scales.
        weight: bfloat16 numbers in the model's dtype `[out, in]`, what a loader sees; kept up to date by
            `refresh`.
        codes: uint8 `[out, in]`.
        scales: `[out, groups]` in the stored dtype, before the gains.
        zeros: uint8 `[out, groups]`.
    """

    weight: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    learner: Learner | None = None
    """Wants the gradient of the weight."""

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme = quantized.scheme
        self.bias = bias
        for name in ("codes", "scales", "zeros"):
            self.register_buffer(name, getattr(quantized, name), persistent=False)
        self.gains = nn.Parameter(within_steps(quantized.scales, quantized.scales.dtype))
        self.register_buffer("weight", torch.empty(quantized.shape, dtype=dtype), persistent=False)
        self.refresh()

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The weight with its gains in its scales, rounded to the stored dtype.

        Raises:
            LowbitError: a scale overflowed.
        """
        scales = grid.round_scales(self.scales.float() * self.gains, self.scales.dtype)
        return QuantizedWeight(self.codes, scales.to(self.scales.dtype), self.zeros, self.scheme)

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow the gains after a step of the optimizer."""
        now, rows = self.quantized(), max(1, grid.SEARCHED_AT_ONCE // self.codes.shape[1])
        for start in range(0, len(now.codes), rows):  # few rows at a time: they stay in the cache
            part = slice(start, start + rows)
            dense = grid.dequantize(now.codes[part], now.scales[part], now.zeros[part], now.scheme)
            self.weight[part] = dense.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`."""
        output: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, self.gains, self.weight, self.bias, self.learner
        )
        return output


class _Product(torch.autograd.Function):
    """`x @ weight.T + bias`, with a gradient for the gains; that of the weight goes to the learner."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gains: Tensor, weight: Tensor, bias: Tensor | None, learner: Learner | None
    ) -> Tensor:
        ctx.save_for_backward(x, gains, weight)
        ctx.learner = learner
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        x, gains, weight = ctx.saved_tensors
        gradient = outputs[0]
        rows, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        found = torch.empty_like(gains)
        step = max(1, grid.SEARCHED_AT_ONCE // weight.shape[1])
        for start in range(0, len(weight), step):
            part = slice(start, start + step)
            # A few rows of dL/dw at a time: the whole of it is never in memory.
            product = (rows[:, part].T @ inputs).float()
            if ctx.learner is not None:
                ctx.learner(part, product)
            product *= weight[part]
            found[part] = product.unflatten(-1, (gains.shape[1], -1)).sum(-1)
        return gradient @ weight, found / gains, None, None, None
