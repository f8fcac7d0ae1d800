"""Weights out of a checkpoint in the GPTQ format, for peers that write nothing else.

Written from the layout alone (AutoGPTQ's: packed along the input, transposed), not by lowbit's own
reader, so that a mistake in either shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import dense
import numpy as np
import torch


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[rows, n]` out of int32 words: along a row one little-endian stream of bits."""
    stream = np.unpackbits(
        np.ascontiguousarray(words.astype("<i4")).view(np.uint8), axis=1, bitorder="little"
    )
    return stream.reshape(len(words), -1, bits) @ (1 << np.arange(bits))


def dequantize(folder: Path, bits: int) -> dict[str, torch.Tensor]:
    """Weights `[out, in]` of a checkpoint in the GPTQ format, whose first version stores `zeros - 1`."""
    state = dense.load_source(folder)
    config = json.loads((folder / "quantize_config.json").read_text())
    offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    weights = {}
    for name in [name.removesuffix(".qweight") for name in state if name.endswith(".qweight")]:
        codes = unpack(state[f"{name}.qweight"].numpy().T, bits)
        zeros = (unpack(state[f"{name}.qzeros"].numpy(), bits) + offset) % 2**bits
        groups = state[f"{name}.g_idx"].numpy()
        scales = state[f"{name}.scales"].float().numpy()
        zeros = zeros[:, : scales.shape[1]]
        weights[f"{name}.weight"] = torch.from_numpy((codes - zeros[groups].T) * scales[groups].T).float()
    return weights
