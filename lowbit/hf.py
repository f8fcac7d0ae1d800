"""A checkpoint folder in, a transformers model out.

`load` gives an ordinary dense model. Checkpoints in a format of lowbit's are unpacked by lowbit's
own codecs, so that no further package is needed (transformers itself wants gptqmodel for GPTQ and
AWQ), and everything else is left to transformers. `load_stock` is what a user without lowbit runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, Format
from lowbit.quantized import QuantizedWeight
from lowbit.quiet import quiet


def load(
    folder: str | Path, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load a model folder or hub id, quantized or not, as a dense model in evaluation mode.

    Args:
        folder: A checkpoint that lowbit or another tool wrote, or any causal language model.
        dtype: Precision of the weights; "auto" takes the checkpoint's.
        device: Where to put it.

    Raises:
        LowbitError: there is no model, or its tensors don't fit its configuration.

    >>> model = load(checkpoint)
    >>> model.generate(prompt, max_new_tokens=4).shape[-1] == prompt.shape[-1] + 4
    True
    """
    config = _config(folder)
    quantization = _quantization(config)
    fmt = _format(quantization)
    if fmt is None or not Path(folder).is_dir():
        return load_stock(folder, dtype, device)
    del config.quantization_config
    try:
        with quiet():
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(config)
            transposed = {name for name, module in skeleton.named_modules() if isinstance(module, Conv1D)}
            state = dict(dense_tensors(Path(folder), fmt, quantization, transposed))
            loaded = type(skeleton).from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=_resolve(config, dtype),
                output_loading_info=True,
            )
        model = _complete(loaded, folder)
        if (Path(folder) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except LowbitError:
        raise
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise LowbitError(f"{folder} can't be loaded: {str(error).strip().splitlines()[0]}") from error
    return model.eval().to(device)  # type: ignore[no-any-return]


def load_stock(
    folder: str | Path, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load with transformers alone, as someone without lowbit does.

    Raises:
        LowbitError: transformers can't load it.
    """
    try:
        with quiet():
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (ImportError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise LowbitError(f"{folder} can't be loaded: {str(error).strip().splitlines()[0]}") from error
    return _complete(loaded, folder).eval().to(device)  # type: ignore[no-any-return]


def _complete(loaded: Any, folder: str | Path) -> Any:
    """The model of a `(model, loading info)`; transformers fills missing tensors in and says nothing."""
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise LowbitError(f"{folder} lacks {len(missing)} tensors (first: {missing[0]}): get a complete copy")
    return model


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the hub.

    Raises:
        LowbitError: there is none that works.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise LowbitError(
            f"{folder} has no usable tokenizer: {str(error).strip().splitlines()[0]}"
        ) from error


def quantization_of(folder: str | Path) -> tuple[dict[str, Any], Format | None]:
    """`quantization_config` of a folder (empty if none) and the format that reads it, if any does."""
    quantization = _quantization(_config(folder))
    return quantization, _format(quantization)


def dense_tensors(
    folder: Path, fmt: Format, quantization: Mapping[str, Any], transposed: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a packed checkpoint, the packed ones as a bfloat16 loader holds them.

    `transposed` names the modules that keep their weight as `[in, out]` (GPT-2's Conv1D).
    """
    for name, value in packed_tensors(folder, fmt, quantization):
        if isinstance(value, Tensor):
            yield name, value
        else:
            weight = value.dequantize(torch.bfloat16)
            yield f"{name}.weight", weight.T.contiguous() if name in transposed else weight


def packed_tensors(
    folder: Path, fmt: Format, quantization: Mapping[str, Any]
) -> Iterator[tuple[str, QuantizedWeight | Tensor]]:
    """Tensors of a checkpoint; those of one packed layer come as one `QuantizedWeight` by module name.

    Raises:
        LowbitError: a layer lacks a tensor or does not fit the configuration.
    """
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (not a mapping)
                module, _, suffix = key.rpartition(".")
                if suffix in fmt.TENSORS:
                    parts[module][suffix] = opened.get_tensor(key)
                else:
                    yield key, opened.get_tensor(key)
    for module, tensors in parts.items():
        scheme = fmt.read_config(quantization, module)
        yield module, fmt.unpack(tensors, scheme, quantization)


def _config(folder: str | Path) -> Any:
    path = str(folder)
    if not Path(path).is_dir() and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
        raise LowbitError(f"{folder} does not exist: give a folder or a hub id (org/name)")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise LowbitError(f"{folder} is no model: {str(error).strip().splitlines()[0]}") from error


def _quantization(config: Any) -> dict[str, Any]:
    found = getattr(config, "quantization_config", None) or {}
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def _format(quantization: Mapping[str, Any]) -> Format | None:
    method, layout = quantization.get("quant_method"), quantization.get("format", "pack-quantized")
    if method == "compressed-tensors" and layout != "pack-quantized":
        return None
    return next((fmt for fmt in FORMATS.values() if method == fmt.QUANT_METHOD), None)


def _resolve(config: Any, dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    return (config.dtype or torch.bfloat16) if dtype == "auto" else getattr(torch, dtype)
