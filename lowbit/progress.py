"""How a long step tells how far it is: a plain call. A terminal makes bars of it, a library may ignore it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int, str], None]
"""Called with a stage, steps done, steps in all, and what is going on."""

Count: TypeAlias = Callable[[int, int], None]
"""The same of a step with one stage: called with steps done and steps in all."""


def silent(stage: str, done: int, total: int, detail: str) -> None:
    """Tell nobody."""
