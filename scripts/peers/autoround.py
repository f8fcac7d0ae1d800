"""AutoRound: `signround` is its default of 200 steps, `rtn` its optimized rounding without any."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import dense
from auto_round import AutoRound

STEPS = {"rtn": 0, "signround-50": 50, "signround": 200}


def main() -> None:
    options = dense.arguments(*STEPS)
    tokens = dense.load_tokens(options.tokens)
    known = dense.load_source(options.model).keys()
    with tempfile.TemporaryDirectory(dir=options.output.parent) as folder:
        os.chdir(folder)  # it leaves a work folder where it stands
        cost = dense.Cost()
        rounding = AutoRound(
            str(options.model), bits=options.bits, group_size=options.group_size, sym=options.symmetric,
            dataset=list(tokens[:, None].unbind()), nsamples=len(tokens), seqlen=tokens.shape[1],
            iters=STEPS[options.method], device_map="cpu",
        )  # fmt: skip
        rounding.quantize_and_save("made", format="fake")
        spent = cost.stop()
        parts = {file.parent for file in Path("made").rglob("*.safetensors")}
        found = {name: t for part in parts for name, t in dense.load_source(part).items() if name in known}
        os.chdir("/")
    zero_bits = 0 if options.symmetric else options.bits
    size = dense.bits_per_weight(options.bits, options.group_size, zero_bits=zero_bits)
    dense.save(options, "auto-round", spent, found, bits_per_weight=size)


if __name__ == "__main__":
    main()
