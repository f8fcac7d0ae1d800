"""Your own rounding algorithm in 30 lines, with everything around it: formats, verification, report.

python examples/own_algorithm.py ./my-model my-model-w4 --dataset train.jsonl

An algorithm is a `quantize_weight` that takes one matrix and the second moment of its inputs; it never sees a
model. This one rounds to nearest, on the range for each group of columns that makes the error smallest where
inputs are large: between RTN and GPTQ, in seconds.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import lowbit
from lowbit import QuantizedWeight, QuantScheme, grid
from lowbit.algorithms import ALGORITHMS


class Diagonal:
    """Rounding to nearest, with ranges weighted by the inputs' squares."""

    NEEDS_HESSIAN = True

    @staticmethod
    def quantize_weight(
        weight: Tensor, hessian: Tensor | None, scheme: QuantScheme, scale_dtype: torch.dtype
    ) -> tuple[QuantizedWeight, str]:
        """`weight [out, in]`, `hessian [in, in]`, the mean of `x x^T`."""
        assert hessian is not None
        weight = weight.float()
        importance = grid.to_groups(hessian.diagonal()[None], scheme)  # [1, groups, columns of a group]

        def errors(difference: Tensor) -> Tensor:
            return (difference.square() * importance).sum(-1)

        scales, zeros = grid.search_params(weight, scheme, scale_dtype, errors)
        codes = grid.quantize(weight, scales, zeros, scheme)
        return QuantizedWeight(codes, scales.to(scale_dtype), zeros.to(torch.uint8), scheme), ""


ALGORITHMS["diagonal"] = Diagonal()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--dataset", help="calibration text, as lowbit quantize takes it")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    options = parser.parse_args()
    report = lowbit.quantize(
        options.model,
        output=options.output,
        method="diagonal",
        dataset=options.dataset,
        samples=options.samples,
        seq_len=options.seq_len,
        auto_group=True,
    )
    mean = sum(layer.error for layer in report.layers) / len(report.layers)
    print(f"{len(report.layers)} layers, {report.scheme}, mean relative output error {100 * mean:.3g} %")


if __name__ == "__main__":
    main()
