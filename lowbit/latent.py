"""A linear layer whose codes learn: quantization-aware training, in the memory of its own weight.

Behind every code lies a latent, a real number in units of the step, which is rounded in the forward and
learns as if it were not (the straight-through estimator of `trainable.py`): `w = (round(latent) - zero) *
scale`, and `dL/dlatent = dL/dw * scale`. In units of the step one learning rate suits every layer and
every bit width; and a scale moves without moving a code, so the gradient of a gain stays the one of
`trainable.py`. (LSQ, Esser et al. 2019, arXiv:1902.08153, section 2, rounds `w / scale`, and its gradient
of the scale has a second term.) A latent is kept between the outermost codes, so no gradient is masked and
no weight gets stuck. Zeros are integers and stay.

At the start a latent is the code itself, the middle of its cell, so nothing moves without a reason. A
weight changes by a whole step of its grid or not at all, and only a few per cent should: those with a
large gradient that keeps its direction. Adam (Kingma and Ba 2014, arXiv:1412.6980, algorithm 1) moves
every weight alike, however small its gradient, and does harm here. Its second moment is shared instead, as
in Adafactor (Shazeer and Stern 2018, arXiv:1804.04235, section 3), between a row and a column: a latent moves
in proportion to its own gradient, beside what is usual in its row and its column. Without the columns those
with a few huge inputs, whose gradients are huge in every row, would go first, and ruin a model of 4 bits.

The layer takes that step inside its own backward pass, some rows at a time, and the gradient of a weight is
never whole in memory; so what is usual in a column is known from the passes before, and nothing moves in the
layer's first. (A layer that runs twice in a pass takes two steps.) Bytes per weight: 4 for the
latent, 2 for its first moment (bfloat16: a mean over 10 steps, whose noise is far above the rounding), 1
for the code, and 2 or 4 for the weight itself, as the model works in bfloat16 or in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import grid
from lowbit.quantized import QuantizedWeight
from lowbit.trainable import TrainableLinear

BETAS = (0.9, 0.95)
CLIP = 10.0
"""No latent moves further than so many usual ones."""
LEAST = 1e-3
"""Of the mean: below it a column's second moment counts as this much, or idle columns would move most."""
TINY = torch.finfo(torch.float32).tiny
EPSILON = 1e-12  # only against 0 / 0: in units of the step gradients are small


class LatentLinear(TrainableLinear):
    """`TrainableLinear` with trainable codes.

    Attributes:
        latents: float32 `[out, in]`, in units of the step, between the outermost codes.
        means: bfloat16 `[out, in]`, running mean of the gradients of the latents.
        squares: float32 `[out, 1]`, running mean of their squares, over a row.
        columns: float32 `[1, in]`, running mean of their squares summed over a column.
        sums: float32 `[1, in]`, these sums in the last pass.
    """

    LEARNED = ("codes", "latents", "means", "squares", "columns", "sums")
    latents: Tensor
    means: Tensor
    squares: Tensor
    columns: Tensor
    sums: Tensor

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(quantized, bias, dtype)
        self.learner = self._learn
        self.register_buffer("codes", quantized.codes.clone())  # the caller's stay as they are
        self.register_buffer("latents", quantized.codes.float())
        self.register_buffer("means", torch.zeros_like(self.latents, dtype=torch.bfloat16))
        self.register_buffer("squares", torch.zeros_like(self.latents[:, :1]))
        self.register_buffer("columns", torch.zeros_like(self.latents[:1]))
        self.register_buffer("sums", torch.zeros_like(self.columns))
        self.pace(1, 0.0)

    def pace(self, step: int, rate: float) -> None:
        """Tell which step the next backward pass is, from 1 on, and how far the usual latent moves in it."""
        self._step, self._rate = step, rate
        self.columns.lerp_(self.sums, 1 - BETAS[1])
        self.sums.zero_()

    @torch.no_grad()
    def _learn(self, rows: slice, gradient: Tensor) -> None:
        """A step on some rows, from `dL/dw`, float32 `[rows, in]`. `refresh` puts it into effect."""
        scales = grid.round_scales(self.scales[rows].float() * self.gains[rows], self.scales.dtype)
        gradient = (grid.to_groups(gradient, self.scheme) * scales.unsqueeze(-1)).flatten(-2)
        mean = self.means[rows].float().lerp_(gradient, 1 - BETAS[0])
        square = self.squares[rows].lerp(gradient.square().mean(-1, keepdim=True), 1 - BETAS[1])
        self.means[rows], self.squares[rows] = mean, square
        self.sums += gradient.square().sum(0)
        average = self.columns.mean()
        share = (self.columns / average.clamp(min=TINY)).clamp(min=LEAST)
        usual = (square * share / (1 - BETAS[1] ** self._step)).sqrt() + EPSILON
        mean *= self._rate / (1 - BETAS[0] ** self._step) / usual * (average > 0)
        mean.clamp_(-CLIP * self._rate, CLIP * self._rate)
        moved = (self.latents[rows] - mean).clamp_(0, self.scheme.levels - 1)
        self.latents[rows], self.codes[rows] = moved, moved.round().to(torch.uint8)
