"""What single choices in the kernels are worth on the GPU at hand.

    python scripts/probe_kernels.py

Four questions, each answered in microseconds of a product in a graph of several (`bench_kernels.py` has the
whole table): from how many rows on is it faster to expand the weight first; what is the overlapped
reduction of split K worth; what is cutting the experts' rows into tiles in one launch worth; how fast is int8
by int8. The two ways of the second and the third must give the same bits, or the run ends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit_kernels import dequant_matmul, grouped, int8, matmul, to_layout
from lowbit_kernels.layout import Layout
from lowbit_kernels.tune import Weight, copies_of, on_gpu, random_weight

SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336))
EXPERTS, OUT, COLUMNS, EACH = 128, 1536, 2048, 8
"""A mixture's gate and up projections (Qwen3-30B-A3B), and to how many experts a token goes."""


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def random_rows(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda").bfloat16()


def multiply(weight: Weight, x: Tensor, layout: Layout) -> Tensor:
    return dequant_matmul(
        x, *layout, bits=weight.bits, group_size=weight.group_size,
        out_features=weight.out_features, scale_dtype=weight.dtype,
    )  # fmt: skip


def check_same(first: Tensor, second: Tensor) -> None:
    """Refuse a pair of ways that differ."""
    if not torch.equal(first, second):
        sys.exit("the two ways give other bits")


def expanding() -> None:
    print("\n| weight | rows | kernel, us | expanded first, us | dense, us |\n|---|---|---|---|---|")
    for bits in (4, 8):
        for shape in SHAPES:
            weight = Weight(bits, 128, *shape, torch.bfloat16)
            layouts = copies_of(random_weight(weight, torch.device("cuda"))[1])
            dense = [random_rows(*shape) for _ in range(4)]
            for rows in (128, 256, 384, 512, 1024):
                x, times = random_rows(rows, shape[1]), []
                calls = [partial(multiply, weight, x, layout) for layout in layouts]
                for most in (rows, 0):
                    with changed(matmul, "prefill_rows", lambda device, most=most: max(32, most)):
                        times.append(on_gpu(calls))
                times.append(on_gpu([partial(torch.nn.functional.linear, x, one) for one in dense]))
                cells = " | ".join(f"{one:.1f}" for one in times)
                print(f"| W{bits} {shape[0]} x {shape[1]} | {rows} | {cells} |", flush=True)


def overlapping() -> None:
    print("\n| weight, one row | overlapped, us | one after the other, us |\n|---|---|---|")
    for shape in SHAPES:
        weight = Weight(4, 128, *shape, torch.bfloat16)
        layouts = copies_of(random_weight(weight, torch.device("cuda"))[1])
        x = random_rows(1, shape[1])
        calls = [partial(multiply, weight, x, layout) for layout in layouts]
        expected, with_overlap = calls[0](), on_gpu(calls)
        with changed(matmul.Target, "overlaps", property(lambda self: False)):
            check_same(expected, calls[0]())
            print(f"| W4 {shape[0]} x {shape[1]} | {with_overlap:.2f} | {on_gpu(calls):.2f} |", flush=True)


def cutting() -> None:
    words = torch.randint(-(2**31), 2**31, (EXPERTS, OUT, COLUMNS // 8), dtype=torch.int32, device="cuda")
    scales = (torch.rand(EXPERTS, OUT, COLUMNS // 128, device="cuda") * 0.01).bfloat16()
    zeros = torch.full_like(scales, 8, dtype=torch.uint8)
    layout = to_layout(words, scales, zeros, bits=4, group_size=128, in_features=COLUMNS)
    print(f"\n| tokens, {EACH} experts of {EXPERTS} each | one launch, us | a dozen, us |\n|---|---|---|")
    for tokens in (1, 4, 16, 64, 256, 512):
        x = random_rows(tokens * EACH, COLUMNS)
        chosen = [torch.randperm(EXPERTS, device="cuda")[:EACH] for _ in range(tokens)]
        call = partial(
            grouped.grouped_dequant_matmul, x, torch.cat(chosen), *layout, bits=4, group_size=128,
            out_features=OUT, scale_dtype=torch.bfloat16,
        )  # fmt: skip
        expected, in_one = call(), on_gpu([call] * 4)
        with changed(grouped, "FEW_ROWS", 0):
            check_same(expected, call())
            print(f"| {tokens} | {in_one:.1f} | {on_gpu([call] * 4):.1f} |", flush=True)


def by_int8() -> None:
    print("\n| weight | rows | int8 by int8, us | dense bfloat16, us |\n|---|---|---|---|")
    for shape in SHAPES[1:3]:
        codes = [torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda") for _ in range(4)]
        scales, dense = torch.rand(shape[0], device="cuda") / 100, [random_rows(*shape) for _ in range(4)]
        for rows in (1, 16, 64, 256, 1024, 4096):
            x = random_rows(rows, shape[1])
            ours = on_gpu([partial(int8.int8_matmul, x, one, scales) for one in codes])
            theirs = on_gpu([partial(torch.nn.functional.linear, x, one) for one in dense])
            print(f"| {shape[0]} x {shape[1]} | {rows} | {ours:.1f} | {theirs:.1f} |", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU: scripts/kernel_report.py counts without one")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for question in (expanding, overlapping, cutting, by_int8):
        question()


if __name__ == "__main__":
    main()
