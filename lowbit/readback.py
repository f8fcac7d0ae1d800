"""A written checkpoint, read back one module at a time.

`Source` brings the weights of one module into a skeleton. Here the same is done with a quantized
checkpoint, by the code that a user's `from_pretrained` runs: transformers' own quantizer prepares the
skeleton, its own loader fills it, and compressed-tensors unpacks the weights. Only that it is done block
by block: a model that passed through memory in parts can be read back in parts. Where transformers needs
a package that is not here, lowbit's own codecs read the packed layers and transformers the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from lowbit import hf
from lowbit.errors import LowbitError
from lowbit.source import Source
from lowbit.untrusted import NEVER_TRUSTED

CPU = torch.device("cpu")


class Written(Source):
    """A quantized checkpoint, opened; `bring` loads modules, dense when it returns."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(folder, dtype)

    def bring(self, keys: Iterable[str], paths: Iterable[str]) -> None:
        """Load these tensors; the modules at `paths` must be complete then.

        Raises:
            LowbitError: a tensor is missing (loaders would fill it with random numbers) or misfits.
        """
        self.load(keys, CPU)
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        for path in paths:
            module = self.model.get_submodule(path)
            for name, tensor in module.named_parameters(prefix=path):
                if tensor.is_meta and name not in tied:
                    raise LowbitError(f"{self.folder} lacks {name}: copy the checkpoint again")
            self._unpack(path)
            if self.dtype == torch.float32:  # loaders leave stacked experts in the dtype of their scales
                module.float()

    def _unpack(self, path: str) -> None:
        """Make what was loaded at `path` dense, where the loader did not."""


class StockReader(Written):
    """Read by transformers and compressed-tensors alone."""

    def _read_config(self) -> PretrainedConfig:
        config: PretrainedConfig = AutoConfig.from_pretrained(self.folder, **NEVER_TRUSTED)
        self.quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
        self.quantizer.validate_environment()
        del config.quantization_config
        return config

    def _skeleton(self) -> PreTrainedModel:
        model = super()._skeleton()
        with torch.device("meta"):
            self.quantizer.preprocess_model(model=model, dtype=self.dtype)
        self.quantizer.compressor.remove_decompression_hook(model)  # would unpack all blocks at once
        return model

    def _unpack(self, path: str) -> None:
        if self.quantizer.quantization_config.dequantize:
            return
        from compressed_tensors.compressors.base import decompress_module
        from compressed_tensors.quantization.utils.helpers import is_module_quantized

        for module in self.model.get_submodule(path).modules():
            if is_module_quantized(module):
                decompress_module(module)
                if self.dtype == torch.float32:  # as what was computed: `dequantize` rounds to bfloat16
                    module.weight.data = module.weight.data.bfloat16().float()


class OwnReader(Written):
    """Read by lowbit's codecs, and what is not packed by transformers."""

    def _read_config(self) -> PretrainedConfig:
        self._quantization, fmt = hf.quantization_of(self.folder)
        if fmt is None:
            raise LowbitError(f"{self.folder} is in no format that lowbit reads")
        self._fmt = fmt
        config: PretrainedConfig = AutoConfig.from_pretrained(self.folder, **NEVER_TRUSTED)
        del config.quantization_config
        return config

    def _index_files(self) -> dict[str, Path]:
        self._places, self._packed = hf.index(self.folder, self._fmt)
        parts = {f"{module}.{end}" for module, ends in self._packed.items() for end in ends}
        files = {key: file for key, file in self._places.items() if key not in parts}
        return files | {f"{m}.weight": self._places[f"{m}.{ends[0]}"] for m, ends in self._packed.items()}

    def _slices(self, keys: Iterable[str], files: ExitStack) -> dict[str, Any]:
        conv1d = {name for name, module in self.model.named_modules() if isinstance(module, Conv1D)}
        names = {key.removesuffix(".weight"): key for key in keys}
        rest = [key for name, key in names.items() if name not in self._packed]
        found = super()._slices(rest, files)
        for name, key in names.items():
            if name in self._packed:
                tensors = {end: self._part(f"{name}.{end}") for end in self._packed[name]}
                found[key] = hf.dense(name, tensors, self._fmt, self._quantization, conv1d)
        return found

    def _part(self, key: str) -> Tensor:
        with safe_open(self._places[key], framework="pt") as opened:
            return opened.get_tensor(key)  # type: ignore[no-any-return]
