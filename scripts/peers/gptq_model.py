"""GPTQModel with its defaults (activation-aware group order), read back from the checkpoint it writes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import dense
import gptq_file
import gptqmodel
from gptqmodel import GPTQModel, QuantizeConfig

BATCH = 4


def main() -> None:
    options = dense.arguments("gptq")
    # 7.7.0 fails on two cores: its pool has one CPU worker and its loader asks that pool for two.
    gptqmodel._default_cpu_workers = lambda: 2
    config = QuantizeConfig(bits=options.bits, group_size=options.group_size, sym=options.symmetric)
    rows = dense.load_tokens(options.tokens).tolist()
    cost = dense.Cost()
    model = GPTQModel.load(str(options.model), config)
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=BATCH)
    with tempfile.TemporaryDirectory(dir=options.output.parent) as folder:
        model.save(folder)
        spent = cost.stop()
        weights = gptq_file.dequantize(Path(folder), options.bits)
    # The format stores a zero whether or not the scheme has one.
    size = dense.bits_per_weight(options.bits, options.group_size, zero_bits=options.bits)
    dense.save(options, "gptqmodel", spent, weights, bits_per_weight=size)


if __name__ == "__main__":
    main()
