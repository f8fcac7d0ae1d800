"""llama.cpp's plain 4-bit types, by the quantizers of its own `gguf` package: groups of 32, no data."""

from __future__ import annotations

import dense
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize


def main() -> None:
    options = dense.arguments("Q4_0", "Q4_1")
    kind = GGMLQuantizationType[options.method]
    block, size = GGML_QUANT_SIZES[kind]
    cost = dense.Cost()
    weights = {}
    for name, weight in dense.load_source(options.model).items():
        if dense.is_linear(name, weight):
            packed = quantize(weight.float().numpy(), kind)
            weights[name] = torch.from_numpy(dequantize(packed, kind))
    dense.save(options, "gguf", cost.stop(), weights, bits_per_weight=8 * size / block, group_size=block)


if __name__ == "__main__":
    main()
