"""One dial for how much work goes into a model, from seconds to hours.

What each step costs and gains is measured in docs/ACCURACY.md. A method given by name takes the place
of the effort's own; the training that `high` and `max` add stands behind any method. The method `qat`
starts from what the effort's own rounds, and trains the weights as well as scales and norms.
"""

from __future__ import annotations

from typing import NamedTuple


class Effort(NamedTuple):
    """What an effort stands for.

    Attributes:
        method: Key of `algorithms.ALGORITHMS`.
        samples: Calibration rows, where nobody asks for another number.
        dataset: Calibration text, where nobody names another; None: a public data set.
        rounding: Calibration rows, in multiples of `samples`.
        epochs: How often the training data is seen.
        training: Training data, in multiples of `samples`; 0: none, and no training.
        weights: Train the weights as well as scales and norms.
        loss: What is made small: the divergence from the `original`, or the surprise at the `data`.
    """

    method: str
    samples: int = 128
    dataset: str | None = None
    rounding: int = 1
    epochs: int = 0
    training: int = 0
    weights: bool = False
    loss: str = "original"


DEFAULT = "balanced"
PASSAGES = "passages"
"""The text that comes with lowbit."""
QAT = "qat"
LOSSES = ("original", "data")
EFFORTS: dict[str, Effort] = {
    "fast": Effort("quick", samples=6, dataset=PASSAGES),
    "balanced": Effort("qronos"),
    "high": Effort("qronos", epochs=1, training=1),
    "max": Effort("qronos", rounding=2, epochs=2, training=2),
}
