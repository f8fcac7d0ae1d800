"""The multiple-choice knapsack problem: one option of every item, least loss within a size.

Solved to the optimum as a mixed-integer linear program by HiGHS (Huangfu and Hall 2018), through scipy. In
the best fractional solution all items but one are whole already, so thousands of options take a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def solve(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], limit: int) -> list[int] | None:
    """One option of every item, such that the sum of losses is least and that of sizes within `limit`.

    Returns:
        The number of the option taken, by item; None if even the smallest do not fit.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    item = np.repeat(np.arange(len(losses)), [len(options) for options in losses])
    loss, size = np.concatenate(losses).astype(float), np.concatenate(sizes).astype(float)
    unit = math.gcd(*(int(value) for value in size)) or 1  # small whole numbers suit the solver's tolerances
    membership = coo_array((np.ones(len(item)), (item, np.arange(len(item)))), shape=(len(losses), len(item)))
    found = milp(
        loss / max(loss.max(), 1e-300),
        integrality=np.ones(len(item)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(membership, 1, 1),
            LinearConstraint(size[None] / unit, ub=limit // unit),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    if found.x is None:
        return None
    picked = np.flatnonzero(found.x > 0.5)
    starts = np.searchsorted(item, np.arange(len(losses)))
    return [int(number) for number in picked - starts]
