"""Memory does not grow with the number of blocks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "scale_report.py"


@pytest.mark.slow
def test_sixteen_blocks_take_the_memory_of_four() -> None:
    command = [sys.executable, str(SCRIPT), "--blocks", "4", "16", "--samples", "4", "--seq-len", "128"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"16 blocks take ([+-][0-9.]+)% of the memory of 4", done.stdout)
    assert found, done.stdout
    assert abs(float(found[1])) <= 10
