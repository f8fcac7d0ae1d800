"""`interpreted/` is not collected here: `test_interpreted.py` runs it in a process of its own."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
