"""A quantized checkpoint, opened to be written in another format; what carrying a layer over means."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowbit import formats, hf, untrusted
from lowbit.errors import LowbitError
from lowbit.formats import Format
from lowbit.placement import find_places
from lowbit.quantized import QuantizedWeight
from lowbit.quiet import quiet
from lowbit.scheme import QuantScheme
from lowbit.untrusted import NEVER_TRUSTED


class Packed:
    """A quantized checkpoint, opened: its configuration, and what its headers say.

    Attributes:
        folder: Where it is.
        quantization: Its `quantization_config`.
        fmt: The format that reads it.
        schemes: Scheme of every packed layer, by name on disk.
        kinds: "Linear", "Conv1D" or "Expert", likewise.
        ignore: Linear modules in full precision, by name in the model.
        bytes: Size of its files.
    """

    def __init__(self, folder: Path) -> None:
        """Read the configuration and the headers.

        Raises:
            LowbitError: it is not quantized, or not in a format that lowbit reads.
        """
        self.folder = folder
        with untrusted.reading(folder):
            self._open(folder)

    def _open(self, folder: Path) -> None:
        self.quantization, fmt = hf.quantization_of(folder)
        if not self.quantization:
            raise LowbitError(f"{folder} is not quantized: use lowbit quantize")
        if fmt is None:
            method = self.quantization.get("quant_method")
            raise LowbitError(f"{folder} is quantized as {method}, which lowbit can't read")
        self.fmt: Format = fmt
        file_of, packed = hf.index(folder, fmt)
        self.bytes = sum(file.stat().st_size for file in set(file_of.values()))
        self.schemes = {name: fmt.read_config(self.quantization, name) for name in packed}
        self.kinds, self.ignore = self._modules()

    def _modules(self) -> tuple[dict[str, str], list[str]]:
        model = skeleton(self.folder)
        places = find_places(model, self.schemes)
        conv1d = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
        kinds = dict.fromkeys(self.schemes, "Expert")
        for name, path in places.linear.items():
            kinds[name] = "Conv1D" if path in conv1d else "Linear"
        packed = {*self.schemes, *places.linear.values()}
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return kinds, [name for name in linear if name not in packed]

    def read(self, name: str, tensors: dict[str, Tensor]) -> tuple[QuantizedWeight, Tensor | None]:
        """A layer; raises `LowbitError` as `formats.read`, with the layer's name."""
        try:
            return formats.read(self.fmt, tensors, self.schemes[name], self.quantization)
        except Exception as error:  # tensors may be of any shape and dtype
            raise LowbitError(f"{name}: {error}") from None


def skeleton(folder: Path) -> PreTrainedModel:
    """The model without weights.

    Raises:
        LowbitError: transformers does not know the architecture.
    """
    try:
        config = AutoConfig.from_pretrained(folder, **NEVER_TRUSTED)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with quiet(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **NEVER_TRUSTED)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise LowbitError(f"{folder}/config.json can't be used: {first_line}") from error


def carry(weight: QuantizedWeight, scheme: QuantScheme, dtypes: tuple[torch.dtype, ...]) -> QuantizedWeight:
    """The same weight on `scheme`, its scales in the first of `dtypes` that holds all of them exactly.

    Raises:
        LowbitError: none does, or `scheme` has other bits.
    """
    if weight.scheme.bits != scheme.bits:
        raise LowbitError(f"codes of {weight.scheme.bits} bits can't be carried over to {scheme.bits} bits")
    for dtype in dtypes:
        scales = weight.scales.to(dtype)
        if torch.equal(scales.double(), weight.scales.double()):
            return replace(weight, scheme=scheme, scales=scales)
    wrong = weight.scales[weight.scales.double() != scales.double()][0].item()
    raise LowbitError(
        f"a scale of {wrong:.6g} is not exact in {str(dtypes[-1]).removeprefix('torch.')}: "
        "use --format compressed-tensors, or --lossy to quantize again"
    )


def digest(*tensors: Tensor | None) -> bytes:
    """SHA-256 of the dtypes, shapes and bytes of some tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()
