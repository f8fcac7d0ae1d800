"""Where the four-bit kernel stops paying on this CPU: CPU milliseconds of one product, by rows.

    python scripts/cpu_thresholds.py [--out-features 4864] [--in-features 896] [--group-size 128] [--native]

Prints the four-bit kernel, dequantized tiles and a dense bfloat16 product, at 4 and at 8 bits, and the
number of rows up to which the kernel wins: `MOST_ROWS` of `lowbit/cpu.py` (`MOST_NATIVE_ROWS` with
`--native`), half of it at 8 bits. The
weights of several layers take turns, so that they come from memory as they do in a model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from lowbit import cpu, native
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme

ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 512)
LAYERS = 8


def cpu_milliseconds(run: Callable[[int], object], repeats: int = 3) -> float:
    """Least CPU milliseconds of `run(layer)` over rounds through all layers."""
    best = float("inf")
    for _ in range(repeats + 1):
        begin = time.process_time()
        for layer in range(LAYERS):
            run(layer)
        best = min(best, (time.process_time() - begin) / LAYERS)
    return 1e3 * best


def random_weight(shape: tuple[int, int], scheme: QuantScheme) -> QuantizedWeight:
    groups = (shape[0], scheme.num_groups(shape[1]))
    codes = torch.randint(0, scheme.levels, shape, dtype=torch.uint8)
    zeros = torch.full(groups, scheme.middle, dtype=torch.uint8)
    return QuantizedWeight(codes, torch.rand(groups).bfloat16() / 100, zeros, scheme)


def measure(shape: tuple[int, int], scheme: QuantScheme, limit_name: str) -> int:
    """Print a table for one scheme; the most rows at which the kernel wins."""
    tiled = [cpu.tile(random_weight(shape, scheme)) for _ in range(LAYERS)]
    dense = [torch.randn(shape).bfloat16() for _ in range(LAYERS)]
    print(f"\n{scheme}, {shape[0]} x {shape[1]}\n{'rows':>6}{'kernel':>10}{'tiles':>10}{'dense':>10}")
    most = 0
    default = getattr(cpu, limit_name)
    for rows in ROWS:
        x = torch.randn(rows, shape[1]).bfloat16()
        times = []
        for limit in (2 * rows, 0):
            setattr(cpu, limit_name, limit)
            times.append(cpu_milliseconds(lambda i, x=x: cpu.matmul(x, *tiled[i], shape[0])))
        times.append(cpu_milliseconds(lambda i, x=x: x @ dense[i].T))
        print(f"{rows:>6}" + "".join(f"{value:>10.3f}" for value in times), flush=True)
        most = rows if times[0] < times[1] else most
    setattr(cpu, limit_name, default)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out-features", type=int, default=4864)
    parser.add_argument("--in-features", type=int, default=896)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--native", action="store_true", help="the kernels of native.c")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{torch.backends.cpu.get_cpu_capability()}, {options.threads} threads, {cpu.block()}")
    if options.native:
        native.enable()
    limit_name = "MOST_NATIVE_ROWS" if options.native else "MOST_ROWS"
    shape = (options.out_features, options.in_features)
    for bits in (4, 8):
        most = measure(shape, QuantScheme(bits, options.group_size), limit_name)
        print(f"the kernel wins up to {most} rows ({limit_name} = {getattr(cpu, limit_name)})")


if __name__ == "__main__":
    main()
