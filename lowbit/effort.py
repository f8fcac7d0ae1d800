"""One dial for how much work goes into a model, from seconds to hours.

What each step costs and gains is measured in docs/ACCURACY.md. A method given by name takes the place
of the effort's own; the training that `high` and `max` add stands behind any method.
"""

from __future__ import annotations

from typing import NamedTuple


class Effort(NamedTuple):
    """What an effort stands for.

    Attributes:
        method: Key of `algorithms.ALGORITHMS`.
        epochs: How often the training data is seen.
        training: Training data for scales and norms, in multiples of the calibration data; 0: none.
    """

    method: str
    epochs: int = 0
    training: int = 0


DEFAULT = "balanced"
EFFORTS: dict[str, Effort] = {
    "fast": Effort("rtn"),
    "balanced": Effort("qronos"),
    "high": Effort("qronos", epochs=1, training=1),
    "max": Effort("qronos", epochs=2, training=3),
}
