"""The peak of a process is its own, however large the one is that started it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lowbit.hardware import peak_memory

SIZE = 2**30
CHILD = "from lowbit.hardware import peak_memory; print(peak_memory())"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process begins at its own size")
def test_what_the_parent_held_does_not_count() -> None:
    held = bytearray(b"x") * SIZE
    assert peak_memory() > SIZE
    child = subprocess.run([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, check=True)
    assert 10**7 < int(child.stdout) < SIZE
    del held
