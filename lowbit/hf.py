"""A checkpoint folder in, a transformers model out.

`load` keeps a quantized checkpoint packed and runs it through lowbit's op; with `packed=False` it gives
an ordinary dense model, which is what measures and verifies. Either way lowbit's own codecs read it,
so that no further package is needed (transformers itself wants gptqmodel for GPTQ and AWQ), and
everything else is left to transformers. `load_stock` is what a user without lowbit runs.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import RevisionNotFoundError
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

from lowbit import formats, origin, untrusted
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, Format, int_quantized
from lowbit.hardware import find_device
from lowbit.places import check_source, no_revision, split_revision
from lowbit.quantizer import LowbitConfig, find_format
from lowbit.quiet import quiet
from lowbit.untrusted import NEVER_TRUSTED


def load(
    folder: str | Path,
    *,
    packed: bool = True,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """`lowbit.load`, which says what is what, on the CPU unless a device is named.

    Raises:
        LowbitError: as there.
    """
    config = _config(folder)
    quantization = _quantization(config)
    fmt = _format(quantization)
    device = find_device(device) if isinstance(device, str) else device
    if fmt is None:
        return load_stock(folder, dtype, device)
    if packed or int_quantized.LAYOUT in str(quantization.get("format")):
        config.quantization_config = LowbitConfig.wrap(quantization)
        return _load_packed(folder, config, dtype, device)
    del config.quantization_config
    return _load_dense(folder, config, fmt, quantization, dtype).to(device)  # type: ignore


def _load_packed(
    folder: str | Path, config: Any, dtype: torch.dtype | str, device: torch.device
) -> PreTrainedModel:
    places = {} if device.type == "cpu" else {"device_map": {"": device}}
    name, at = _named(folder)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                **at,
                use_safetensors=True,
                **NEVER_TRUSTED,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                **places,
            )
    except Exception as error:  # a file may hold anything
        raise _refusal(folder, "can't be loaded", error) from error
    model, info = loaded
    if info["missing_keys"]:
        raise LowbitError(f"{folder} lacks {sorted(info['missing_keys'])[0]}: copy the checkpoint again")
    return model.eval()  # type: ignore[no-any-return]


def _load_dense(
    folder: str | Path, config: Any, fmt: Format, quantization: Mapping[str, Any], dtype: torch.dtype | str
) -> PreTrainedModel:
    path = _on_disk(folder)
    try:
        with quiet():
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(config, **NEVER_TRUSTED)
            transposed = {name for name, module in skeleton.named_modules() if isinstance(module, Conv1D)}
            state = dict(dense_tensors(path, fmt, quantization, transposed))
            loaded = type(skeleton).from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=_resolve(config, dtype),
                output_loading_info=True,
            )
        model = _complete(loaded, folder)
        model.name_or_path = model.config.name_or_path = str(folder)  # "None" where tensors were given
        if (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
    except LowbitError:
        raise
    except Exception as error:  # likewise
        raise _refusal(folder, "can't be loaded", error) from error
    return model.eval()  # type: ignore[no-any-return]


def _on_disk(folder: str | Path) -> Path:
    """The folder, or the snapshot of a hub id, whose configuration is looked at as a folder's is."""
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    snapshot = origin.from_hub(str(folder))
    untrusted.check_config(snapshot)
    return snapshot


def load_stock(
    folder: str | Path, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load with transformers alone, as someone without lowbit does.

    Raises:
        LowbitError: transformers can't load it.
    """
    name, at = _named(folder)
    try:
        with quiet():
            loaded = AutoModelForCausalLM.from_pretrained(
                name, **at, use_safetensors=True, **NEVER_TRUSTED, dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # a file may hold anything
        raise _refusal(folder, "can't be loaded", error) from error
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
    name, at = _named(folder)
    try:
        return AutoTokenizer.from_pretrained(name, **at, **NEVER_TRUSTED)
    except Exception as error:  # a file may hold anything
        raise _refusal(folder, "has no usable tokenizer", error) from error


def _refusal(folder: str | Path, what: str, error: Exception) -> LowbitError:
    """What to raise where a library can't read a model: the first line of its error, or its name."""
    if isinstance(error, torch.OutOfMemoryError):  # no fault of the model's
        raise error
    if isinstance(error.__cause__, RevisionNotFoundError):
        return no_revision(str(folder))
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return LowbitError(f"{folder} {what}: {reason}")


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
    for module, tensors in layers(folder, fmt):
        if isinstance(tensors, Tensor):
            yield module, tensors
            continue
        yield f"{module}.weight", dense(module, tensors, fmt, quantization, transposed)


def dense(
    module: str,
    tensors: Mapping[str, Tensor],
    fmt: Format,
    quantization: Mapping[str, Any],
    transposed: Collection[str] = (),
) -> Tensor:
    """One packed layer as a bfloat16 loader holds it: `[out, in]`, or `[in, out]` if in `transposed`."""
    weight, order = formats.read(fmt, tensors, fmt.read_config(quantization, module), quantization)
    found = weight.dequantize(torch.bfloat16)
    if order is not None:
        found = found[:, torch.argsort(order)]
    return found.T.contiguous() if module in transposed else found


def index(folder: Path, fmt: Format) -> tuple[dict[str, Path], dict[str, list[str]]]:
    """File of every tensor of a checkpoint, and suffixes of the tensors of every packed layer.

    Raises:
        LowbitError: there is no safetensors file, or one is corrupt.
    """
    file_of: dict[str, Path] = {}
    packed: dict[str, list[str]] = {}
    for file in untrusted.weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (not a mapping)
                    file_of[key] = file
                    module, _, suffix = key.rpartition(".")
                    if formats.is_part(fmt, suffix, opened.get_slice(key).get_dtype()):
                        packed.setdefault(module, []).append(suffix)
        except (SafetensorError, OSError) as error:
            raise LowbitError(f"{file} is corrupt or truncated ({error}): get a sound copy") from None
    if not file_of:
        raise LowbitError(f"{folder} has no *.safetensors: give the folder of a checkpoint")
    return file_of, packed


def layers(folder: Path, fmt: Format) -> Iterator[tuple[str, dict[str, Tensor] | Tensor]]:
    """Tensors of a checkpoint by key; those of one packed layer by suffix, under its module's name.

    One tensor or layer is in memory at a time, also where a layer lies across two files.
    """
    file_of, packed = index(folder, fmt)
    with ExitStack() as stack:
        opened = {
            file: stack.enter_context(safe_open(file, framework="pt")) for file in set(file_of.values())
        }
        done: set[str] = set()
        for key, file in file_of.items():
            module, _, suffix = key.rpartition(".")
            if suffix not in packed.get(module, ()):
                yield key, opened[file].get_tensor(key)
            elif module not in done:
                done.add(module)
                parts = {suffix: f"{module}.{suffix}" for suffix in packed[module]}
                yield module, {end: opened[file_of[part]].get_tensor(part) for end, part in parts.items()}


def _named(folder: str | Path) -> tuple[str, dict[str, str]]:
    """What transformers' `from_pretrained` wants: a path or hub id, and apart from it the revision.

    Raises:
        LowbitError: as `places.check_source`.
    """
    check_source(str(folder), "a folder or a hub id (org/name)")
    name, revision = split_revision(str(folder))
    return os.path.expanduser(name), {} if revision is None else {"revision": revision}


def _config(folder: str | Path) -> Any:
    name, at = _named(folder)
    if Path(name).is_file():  # transformers would read all of it as a configuration
        raise LowbitError(f"{folder} is a file: give a folder or a hub id (org/name)")
    try:
        if (Path(name) / "config.json").exists():
            untrusted.check_config(Path(name))
        return AutoConfig.from_pretrained(name, **at, **NEVER_TRUSTED)
    except Exception as error:  # a file may hold anything
        raise _refusal(folder, "is no model", error) from error


def _quantization(config: Any) -> dict[str, Any]:
    found = getattr(config, "quantization_config", None) or {}
    with untrusted.reading("quantization_config"):
        return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def _format(quantization: Mapping[str, Any]) -> Format | None:
    with untrusted.reading("quantization_config"):
        name = find_format(quantization)
    return None if name is None else FORMATS[name]


def _resolve(config: Any, dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    return (config.dtype or torch.bfloat16) if dtype == "auto" else getattr(torch, dtype)
