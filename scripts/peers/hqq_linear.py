"""HQQ, which needs no data: integer codes, and a scale and a zero of 16 bits for every group."""

from __future__ import annotations

import dense
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def main() -> None:
    options = dense.arguments("hqq")
    cost = dense.Cost()
    config = BaseQuantizeConfig(nbits=options.bits, group_size=options.group_size)
    weights = {}
    for name, weight in dense.load_source(options.model).items():
        if dense.is_linear(name, weight):
            layer = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
            layer.weight.data = weight
            made = HQQLinear(layer, config, compute_dtype=torch.bfloat16, device="cpu", del_orig=True)
            weights[name] = made.dequantize()
    size = dense.bits_per_weight(options.bits, options.group_size, zero_bits=16)
    dense.save(options, "hqq", cost.stop(), weights, bits_per_weight=size)


if __name__ == "__main__":
    main()
