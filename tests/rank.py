"""Ranks of a test: processes that quantize as they are told, joined with each other.

    python -m tests.rank '[[{"model": ..., ...}, ...], [...]]'

One list per rank, of the runs that it makes; a run holds arguments of `lowbit.quantize`, with `scheme` as the
arguments of `QuantScheme`, and may have `die`: a rank and a text of its progress at which that rank is
killed. Prints one line per rank: exit code, what its runs told, how it ended, what it said on stderr.

The ranks are forked, as importing what they need takes longer than what they do. They multiply in float32
even where the CPU has units for bfloat16 (`exact_products`): there a sum taken in another order can round to
another bfloat16, a code to its neighbour, and a token to another expert.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import compressed_tensors  # noqa: F401
import datasets  # noqa: F401
import torch

from lowbit import QuantScheme, ranks
from lowbit.pipeline import quantize

SECONDS = 240


def exact_products() -> None:
    """Keep `lowbit.hardware.bfloat16_products` from changing anything, in this process; work in bfloat16."""
    torch.backends.mkldnn.is_available = lambda: False
    torch.cpu._is_avx512_bf16_supported = lambda: True


def run(options: dict[str, Any]) -> dict[str, Any]:
    """One run."""
    victim, moment = options.pop("die", (None, ""))

    def progress(stage: str, done: int, total: int, detail: str) -> None:
        if ranks.rank() == victim and moment in detail:
            os.kill(os.getpid(), signal.SIGKILL)

    report = quantize(**{**options, "scheme": QuantScheme(*options["scheme"])}, progress=progress)
    return {"ranks": report.ranks, "notes": report.notes}


def be(rank: int, count: int, port: int, runs: list[dict[str, Any]], place: Path) -> None:
    """Be one rank, and leave."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(place / f"{rank}.err", os.O_CREAT | os.O_WRONLY), 2)
    signal.alarm(SECONDS)
    found: dict[str, Any] = {"told": [], "error": ""}
    try:
        with ranks.joined():
            found["told"] = [run(options) for options in runs]
    except Exception as error:
        traceback.print_exc()
        found |= {"error": type(error).__name__, "line": str(error), "kept": str(getattr(error, "kept", ""))}
    (place / f"{rank}.json").write_text(json.dumps(found))
    sys.stderr.flush()
    os._exit(2 if found["error"] else 0)


def main() -> None:
    torch.set_num_threads(1)
    exact_products()
    runs = json.loads(sys.argv[1])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        place, pids = Path(folder), []
        for rank in range(len(runs)):
            pids.append(os.fork())
            if not pids[-1]:
                be(rank, len(runs), port, runs[rank], place)
        for rank, pid in enumerate(pids):
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            told = place / f"{rank}.json"
            found = json.loads(told.read_text()) if told.exists() else {}
            found |= {"code": code, "stderr": (place / f"{rank}.err").read_text()[-4000:]}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
