"""lowbit: quantize the weights of language models to a few bits, in formats that load everywhere.

The public names, imported when they are first used (so that `import lowbit` is instant and needs
neither a GPU nor Triton):

- `quantize`: a model in, a quantized checkpoint out.
- `load`: any checkpoint folder in, a transformers model out, its weights packed.
- `enable`: the same for whatever `from_pretrained` and `pipeline` load from then on.
- `qat`: the same with the weights trained on your data (quantization-aware training).
- `convert`: a quantized checkpoint in, the same weights in another format out.
- `perplexity`: what the quantization cost.
- `QuantScheme`, `QuantizedWeight`: the grid, and a weight on it.
- `Target`: how small a checkpoint must be, where schemes are to be chosen.
- `LowbitError`: every refusal, one line that says what to do.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from lowbit.conversion import convert
    from lowbit.errors import LowbitError
    from lowbit.evaluate import perplexity
    from lowbit.pipeline import quantize
    from lowbit.quantized import QuantizedWeight
    from lowbit.scheme import QuantScheme
    from lowbit.switch import enable
    from lowbit.target import Target
    from lowbit.tuning import qat

try:
    __version__ = version("lowbit")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"

_HOMES = {
    "LowbitError": "errors",
    "QuantScheme": "scheme",
    "QuantizedWeight": "quantized",
    "Target": "target",
    "convert": "conversion",
    "enable": "switch",
    "perplexity": "evaluate",
    "qat": "tuning",
    "quantize": "pipeline",
}
__all__ = [
    "LowbitError",
    "QuantScheme",
    "QuantizedWeight",
    "Target",
    "convert",
    "enable",
    "load",
    "perplexity",
    "qat",
    "quantize",
]


def load(
    folder: str | Path,
    *,
    packed: bool = True,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "auto",
) -> PreTrainedModel:
    """Load a model folder or hub id, quantized or not, in evaluation mode.

    Args:
        folder: A checkpoint that lowbit or another tool wrote, or any causal language model. A hub id may
            name a branch, tag or commit: `org/name@revision`.
        packed: Keep quantized weights packed, in memory too; False gives a dense model, except where
            activations are rounded too, which no dense model does.
        dtype: Precision of the activations, and of weights that are not packed; "auto" takes the
            checkpoint's.
        device: Where to put it: `auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, ...

    Raises:
        LowbitError: there is no model, its tensors don't fit its configuration, or the device can't be used.

    >>> model = load(checkpoint)
    >>> model.generate(prompt.to(model.device), max_new_tokens=4).shape[-1] == prompt.shape[-1] + 4
    True
    """
    from lowbit import hf

    return hf.load(folder, packed=packed, dtype=dtype, device=device)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lowbit.{_HOMES[name]}"), name)
