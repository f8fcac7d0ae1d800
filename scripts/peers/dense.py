"""What the peers' scripts share: their arguments, what they cost, and the dense model they leave.

Each script runs inside its peer's own environment, so nothing here imports lowbit and only torch,
numpy and safetensors are needed. Its last line on stdout is one JSON object; what the peer prints
itself goes before it.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ROWS_CHECKED = 16  # rows of a matrix whose groups are counted through


def arguments(*methods: str) -> argparse.Namespace:
    """The command line that all peers share."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("tokens", help=".npy of token ids [samples, seq_len]")
    parser.add_argument("--method", choices=methods, default=methods[0])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=False)
    options = parser.parse_args()
    for name in ("model", "output", "tokens"):  # a peer may change the working directory
        setattr(options, name, Path(getattr(options, name)).resolve())
    return options


def load_tokens(path: Path) -> torch.Tensor:
    """Calibration tokens, int64 `[samples, seq_len]`."""
    return torch.from_numpy(np.load(path))


class Cost:
    """CPU seconds and peak memory of this process and of the children that it waited for.

    The clock starts where the object is made: after the imports, before the model is read.
    """

    def __init__(self) -> None:
        self.wall, self.cpu = time.monotonic(), self._used()

    @staticmethod
    def _used() -> float:
        both = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
        return sum(used.ru_utime + used.ru_stime for used in both)

    def stop(self) -> dict[str, float]:
        # getrusage would count what this process's parent held when it started it.
        status = Path("/proc/self/status").read_text()
        own = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])  # type: ignore[index]
        return {
            "cpu_seconds": self._used() - self.cpu,
            "seconds": time.monotonic() - self.wall,
            "peak_memory": 1024 * max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss),
        }


def load_source(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is the weight of a linear layer inside a block: what every peer quantizes."""
    return tensor.ndim == 2 and re.search(r"\.layers\.\d+\..*\.weight$", name) is not None


def bits_per_weight(bits: float, group_size: int, *, scale_bits: float = 16, zero_bits: float = 0) -> float:
    """Storage of a weight with its share of its group's scale and zero.

    >>> bits_per_weight(4, 64, zero_bits=4)
    4.3125
    """
    return bits + (scale_bits + zero_bits) / group_size


def most_levels(weight: torch.Tensor, group_size: int) -> int:
    """Most distinct values in any group of `weight [rows, in]`: `2 ** bits` at most if it is quantized.

    >>> most_levels(torch.tensor([[0.0, 1, 1, 0], [3, 4, 5, 6]]), 4)
    4
    """
    ordered = weight.float().reshape(-1, group_size).sort(1).values
    return int((ordered.diff(dim=1) != 0).sum(1).max()) + 1


def save(
    options: argparse.Namespace, package: str, cost: dict[str, float], tensors: dict[str, torch.Tensor], *,
    bits_per_weight: float, grids: dict[str, tuple[int, int]] | None = None,
) -> None:  # fmt: skip
    """Write the source with `tensors` in place of its own, in bfloat16, and print what it took.

    Args:
        options: From `arguments`.
        package: The peer's name on PyPI.
        cost: From `Cost.stop`.
        tensors: Dequantized weights of every linear layer, and whatever else the peer changed.
        bits_per_weight: Storage of the quantized layers, scales and zeros counted.
        grids: Bits of a code and weights that share a scale, by tensor, where they are not the options'.

    Raises:
        SystemExit: a linear layer is missing, a name or shape is foreign, or a group holds more
            values than its bits can say.
    """
    source = load_source(options.model)
    missing = {name for name, tensor in source.items() if is_linear(name, tensor)} - tensors.keys()
    foreign = [n for n, t in tensors.items() if n not in source or t.shape != source[n].shape]
    if missing or foreign:
        raise SystemExit(f"not quantized: {sorted(missing)[:3]}; not in the source: {foreign[:3]}")
    for name, tensor in tensors.items():
        if is_linear(name, source[name]):
            bits, group_size = (grids or {}).get(name, (options.bits, options.group_size))
            levels = most_levels(tensor[:ROWS_CHECKED], group_size)
            if levels > 2**bits:
                raise SystemExit(f"{name}: {levels} values in a group of {bits} bits")
        source[name] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    options.output.mkdir(parents=True, exist_ok=True)
    save_file(source, options.output / "model.safetensors", {"format": "pt"})
    for file in options.model.iterdir():
        if file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json"):
            shutil.copy(file, options.output)
    facts: dict[str, Any] = {"version": version(package), "bits_per_weight": bits_per_weight, **cost}
    print("\n" + json.dumps(facts), flush=True)
