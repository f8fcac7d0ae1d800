"""Time the kernels on a GPU, after checking them on it.

    python scripts/bench_kernels.py --out bench-kernels

First every kernel runs against its naive twin; one wrong result ends the run, since the speed of a wrong
answer means nothing. Then the linear shapes of three models, from 1 to 4096 rows: microseconds of a product
in a graph of several (weights in rotation, so that they come from memory and not from L2), TFLOP/s, GB/s of
packed weights, the fraction of the copy bandwidth measured in the same run, and how many times faster than
`torch.matmul` with a dense weight.
Writes `kernels.csv`, `kernels.md` and, where matplotlib is installed, `kernels.png`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lowbit_kernels import Layout, dequant_matmul, reference, unsupported
from lowbit_kernels.tune import Weight, copies_of, on_gpu, random_weight

SHAPES = {
    "Llama-3-8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "Llama-3-70B": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "Qwen3-32B": [(10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600)],
}
"""`(out, in)` of the fused query-key-value, output, fused gate-up and down projections."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUP_SIZE = 128
TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}


class Packed(NamedTuple):
    """A weight in both layouts."""

    canonical: tuple[Tensor, Tensor, Tensor]
    layout: Layout
    bits: int
    out_features: int
    scale_dtype: torch.dtype

    def multiply(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        return dequant_matmul(
            x,
            *(layout or self.layout),
            bits=self.bits,
            group_size=GROUP_SIZE,
            out_features=self.out_features,
            scale_dtype=self.scale_dtype,
        )


def make_weight(out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Packed:
    """Random codes, scales of both signs, and zeros, on the GPU."""
    weight = Weight(bits, GROUP_SIZE, out_features, in_features, dtype)
    return Packed(*random_weight(weight, torch.device("cuda")), bits, out_features, dtype)


def wrong(bits: int, dtype: torch.dtype) -> list[str]:
    """Every kernel against the naive twin: what differs by more than rounding."""
    found = []
    for rows, (out, columns) in itertools.product((1, 5, 16, 32, 33, 100, 1500), ((320, 1024), (1000, 2176))):
        weight = make_weight(out, columns, bits, dtype)
        x = torch.randn(rows, columns, device="cuda").to(dtype)
        expected = reference.dequant_matmul(x, *weight.canonical, bits=bits, group_size=GROUP_SIZE)
        y = weight.multiply(x)
        error = ((y.double() - expected).abs().max() / expected.abs().max()).item()
        if not error <= TOLERANCE[dtype]:
            found.append(f"W{bits} {dtype} x[{rows}, {columns}] out {out}: error {error:.2e}")
        if not torch.equal(y, weight.multiply(x)):
            found.append(f"W{bits} {dtype} x[{rows}, {columns}] out {out}: two runs differ")
    return found


def copy_bandwidth() -> float:
    """Bytes a second of a pass over a large tensor, read and written."""
    source = torch.ones(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / on_gpu([lambda: torch.add(source, 1, out=target)]) * 1e6


def measure(
    model: str, out: int, columns: int, bits: int, dtype: torch.dtype, bandwidth: float
) -> list[dict[str, Any]]:
    """One row a height."""
    weight = make_weight(out, columns, bits, dtype)
    size = sum(t.numel() * t.element_size() for t in weight.layout)
    copies = copies_of(weight.layout)
    dense = [torch.randn(out, columns, device="cuda").to(dtype) for _ in range(4)]
    found = []
    for rows in ROWS:
        x = torch.randn(rows, columns, device="cuda").to(dtype)
        ours = on_gpu([partial(weight.multiply, x, copy) for copy in copies])
        theirs = on_gpu([partial(torch.nn.functional.linear, x, w) for w in dense])
        found.append(
            {
                "model": model, "out": out, "in": columns, "bits": bits, "dtype": str(dtype)[6:],
                "rows": rows, "us": round(ours, 2), "torch_us": round(theirs, 2),
                "speedup": round(theirs / ours, 3),
                "tflops": round(2e-6 * rows * out * columns / ours, 1), "gb_s": round(size / ours / 1e3, 1),
                "of_copy": round(size / ours * 1e6 / bandwidth, 3),
            }
        )  # fmt: skip
        print(*found[-1].values(), sep="\t", flush=True)
    return found


def table(rows: list[dict[str, Any]], head: str) -> str:
    """Microseconds and, in brackets, times `torch.matmul`: one Markdown table a width and dtype.

    A shape that two models have was timed twice and has two columns.
    """
    found = [head]
    for bits, dtype in sorted({(int(row["bits"]), row["dtype"]) for row in rows}):
        chosen = [row for row in rows if (int(row["bits"]), row["dtype"]) == (bits, dtype)]
        shapes = list(dict.fromkeys((row["model"], row["out"], row["in"]) for row in chosen))
        found.append(f"\n| W{bits} {dtype}, rows of x | {' | '.join(f'{o} x {i}' for _, o, i in shapes)} |")
        found.append("|---" * (1 + len(shapes)) + "|")
        for height in dict.fromkeys(row["rows"] for row in chosen):
            cells = [f"{float(row['us']):.1f} us ({float(row['speedup']):.2f}x)"
                     for row in chosen if row["rows"] == height]  # fmt: skip
            found.append(f"| {height} | {' | '.join(cells)} |")
    return "\n".join(found) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over dense against rows, one line a shape."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    settings = sorted({(row["bits"], row["dtype"]) for row in rows})
    figure, axes = plt.subplots(1, len(settings), figsize=(6 * len(settings), 5), sharey=True, squeeze=False)
    for axis, (bits, dtype) in zip(axes[0], settings, strict=True):
        chosen = [row for row in rows if (row["bits"], row["dtype"]) == (bits, dtype)]
        for shape in sorted({(row["model"], row["out"], row["in"]) for row in chosen}):
            points = [row for row in chosen if (row["model"], row["out"], row["in"]) == shape]
            label = "{} {}x{}".format(*shape)
            axis.plot([p["rows"] for p in points], [p["speedup"] for p in points], marker=".", label=label)
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set(xscale="log", xlabel="rows", ylabel="times torch.matmul", title=f"W{bits} {dtype}")
    axes[0][-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench-kernels"))
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--bits", nargs="+", type=int, choices=(4, 8), default=[4, 8])
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float16", "bfloat16"), default=["float16", "bfloat16"]
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU: scripts/kernel_report.py counts without one")
    settings = [(bits, getattr(torch, dtype)) for bits in arguments.bits for dtype in arguments.dtypes]
    for bits, dtype in settings:
        if reason := unsupported(bits, GROUP_SIZE, 4096, dtype, torch.device("cuda", 0)):
            sys.exit(reason)
        if faults := wrong(bits, dtype):
            sys.exit("wrong results, nothing was timed:\n" + "\n".join(faults))
    bandwidth = copy_bandwidth()
    head = (
        f"{torch.cuda.get_device_name()}, copies {bandwidth / 1e9:.0f} GB/s, torch {torch.__version__}, "
        f"Triton {triton.__version__}, {datetime.date.today()}; every kernel agrees with its twin."
    )
    print(head)
    rows = []
    for model in dict.fromkeys(arguments.models):
        for (out, columns), (bits, dtype) in itertools.product(SHAPES[model], settings):
            rows += measure(model, out, columns, bits, dtype, bandwidth)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "kernels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (arguments.out / "kernels.md").write_text(table(rows, head), encoding="utf-8")
    plot(rows, arguments.out / "kernels.png")


if __name__ == "__main__":
    main()
