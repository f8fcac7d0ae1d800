"""`interpreted/` is not collected here: `test_interpreted.py` runs it in a process of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # kernel_compile, kernel_report

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
