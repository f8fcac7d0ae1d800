"""Where a model comes from, and whether it is one to quantize.

What is no local folder of safetensors yet (on the hub, in a GGUF file, in memory) becomes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lowbit import gguf_header, places, untrusted
from lowbit.errors import LowbitError
from lowbit.quiet import quiet
from lowbit.untrusted import NEVER_TRUSTED

NEVER_READ = (
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
)
"""Files of a repository that no step reads, as patterns."""


def from_hub(model: str) -> Path:
    """The snapshot of a hub id, with or without `@revision`; raises `LowbitError` if it can't be had."""
    from huggingface_hub import snapshot_download

    with asking_hub(model):
        hub_id, revision = places.split_revision(model)
        return Path(snapshot_download(hub_id, revision=revision, ignore_patterns=list(NEVER_READ)))


def has_pickled(model: str, snapshot: Path) -> bool:
    """Does the hub have pickled weights, which were left out of a snapshot? False where it can't be asked."""
    from huggingface_hub import HfApi

    hub_id, _ = places.split_revision(model)
    try:
        names = HfApi().list_repo_files(hub_id, revision=snapshot.name)
    except Exception:  # each has its own "can't reach", as below
        return False
    return any(name.endswith(".bin") and "/" not in name for name in names)


@contextmanager
def asking_hub(model: str) -> Iterator[None]:
    """Whatever keeps the hub from giving `model` becomes a `LowbitError` that says what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    places.check_source(model)
    try:
        yield
    except LowbitError:
        raise
    except GatedRepoError:
        raise LowbitError(f"{model} is gated: accept its licence on the hub, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise LowbitError(f"{model} is neither a local folder nor a public hub id: check the name") from None
    except RevisionNotFoundError:
        raise places.no_revision(model) from None
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
    from transformers import GgufConfig

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


def from_memory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, scratch: Path) -> Path:
    """A loaded model as a folder in `scratch`; its tokenizer is that of its own folder, where none is given.

    Raises:
        LowbitError: it is already quantized, or has no tokenizer.
    """
    if getattr(model.config, "quantization_config", None):
        raise LowbitError("the loaded model is already quantized: start from the original model")
    folder = scratch / "source"
    with quiet():
        model.save_pretrained(folder)
        if tokenizer is None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, **NEVER_TRUSTED)
            except (OSError, ValueError):
                raise LowbitError(
                    "the model has no folder to take its tokenizer from: pass tokenizer="
                ) from None
        tokenizer.save_pretrained(folder)
    return folder


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a model that can be quantized.

    Raises:
        LowbitError: it can't be read, or is of a quantized model or of none that writes text.
    """
    try:
        untrusted.check_config(folder)
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, **NEVER_TRUSTED)
    except LowbitError:
        raise
    except Exception as error:  # it may hold anything
        first_line = str(error).strip().split("\n")[0]
        raise LowbitError(f"{folder}/config.json can't be used: {first_line}") from error
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        method = dict(quantized).get("quant_method") if isinstance(quantized, dict) else quantized
        raise LowbitError(f"{folder} is already quantized ({method}): start from the original model")
    architectures = config.architectures if isinstance(config.architectures, list) else []
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if not causal.intersection(map(str, architectures)):
        raise LowbitError(
            f"{folder} is {architectures or config.model_type}, not a causal language model "
            "that transformers knows: give a text-generation model"
        )
    if config.get_text_config() is not config:
        raise LowbitError(
            f"{folder} is {architectures}, which reads more than text: give a model of text alone, as "
            "google/gemma-3-1b-it is beside google/gemma-3-4b-it"
        )
    return config
