"""The kernels in Triton's interpreter: numbers without a GPU.

Triton decides at import whether it interprets, and other tests of this process may have imported it, so
`checks/check_*.py` run in a process of their own: in one, as importing takes as long as some of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECKS = sorted((Path(__file__).parent / "checks").glob("check_*.py"))


def test_interpreted() -> None:
    source = os.pathsep.join(map(str, (ROOT, ROOT / "triton_kernels")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", *map(str, CHECKS)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
