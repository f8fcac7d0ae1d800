"""Models that are not a local folder of safetensors yet: on the hub, in a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lowbit import gguf_header, places
from lowbit.errors import LowbitError
from lowbit.quiet import quiet
from lowbit.untrusted import NEVER_TRUSTED


def from_hub(model: str) -> Path:
    """The snapshot of a hub id; raises `LowbitError` if it can't be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    other = [
        "*.bin",
        "*.pt",
        "*.pth",
        "*.msgpack",
        "*.h5",
        "*.onnx*",
        "*.gguf",
        "*.ot",
        "original/*",
        "consolidated*",
    ]
    places.check_source(model)
    try:
        folder = Path(snapshot_download(model, ignore_patterns=other))
        return folder
    except GatedRepoError:
        raise LowbitError(f"{model} is gated: accept its licence on the hub, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise LowbitError(f"{model} is neither a local folder nor a public hub id: check the name") from None
    except HFValidationError:
        raise LowbitError(f"{model} is neither a local folder nor a valid hub id (org/name)") from None
    except Exception as error:  # huggingface_hub, httpx and the OS each have their own "can't reach"
        raise LowbitError(
            f"{model} is not a local folder and the hub could not give it ({type(error).__name__}): "
            "check the name and the network, or give a local folder"
        ) from error


def from_gguf(path: Path, scratch: Path) -> Path:
    """A GGUF file as a folder in `scratch`; raises `LowbitError` if it can't be read."""
    if not path.is_file():
        raise LowbitError(f"{path} does not exist: give an existing .gguf file")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise LowbitError(
            f"{path}: reading GGUF needs the gguf package: pip install 'lowbit[gguf]'"
        ) from None
    gguf_header.check(path)
    return _convert(scratch, str(path.parent.resolve()), path.name)


def _convert(scratch: Path, folder: str, gguf_file: str) -> Path:
    """Load with transformers, and save as a safetensors folder."""
    from transformers import AutoTokenizer, GgufConfig

    kwargs: dict[str, Any] = {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    kwargs |= NEVER_TRUSTED
    target = scratch / "source"
    try:
        with quiet(stderr=True):  # a bar for the tensors of a GGUF file
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kwargs)
            kwargs.pop("quantization_config", None)
            tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
            # GGUF holds neither: a length of 1e30 and an epsilon widened from float32.
            if tokenizer.model_max_length > 2**31:
                tokenizer.model_max_length = model.config.get_text_config().max_position_embeddings
            epsilon = getattr(model.config, "rms_norm_eps", None)
            if epsilon:
                model.config.rms_norm_eps = float(f"{epsilon:.6g}")
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
    except Exception as error:  # a file may hold anything
        first_line = str(error).strip().split("\n")[0]
        raise LowbitError(f"{gguf_file} could not be read: {first_line}") from error
    return target
