"""bitsandbytes' NF4, which needs no data: 16 fixed levels times one scale of 32 bits for every block.

`nf4-double` also quantizes the scales: 8 bits each and a second scale of 32 bits for 256 of them.
"""

from __future__ import annotations

import dense
from bitsandbytes import functional


def main() -> None:
    options = dense.arguments("nf4", "nf4-double")
    double = options.method == "nf4-double"
    cost = dense.Cost()
    weights = {}
    for name, weight in dense.load_source(options.model).items():
        if dense.is_linear(name, weight):
            codes, state = functional.quantize_4bit(
                weight, blocksize=options.group_size, quant_type="nf4", compress_statistics=double
            )
            weights[name] = functional.dequantize_4bit(codes, state)
    size = dense.bits_per_weight(4, options.group_size, scale_bits=8 + 32 / 256 if double else 32)
    dense.save(options, "bitsandbytes", cost.stop(), weights, bits_per_weight=size)


if __name__ == "__main__":
    main()
