"""`checks/` is not collected here: `test_interpreted.py` runs it interpreted, `make test-gpu` on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # kernel_compile, kernel_report

collect_ignore = [] if os.environ.keys() & {"TRITON_INTERPRET", "LOWBIT_TEST_GPU"} else ["checks"]
