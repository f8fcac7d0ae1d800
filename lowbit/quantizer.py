"""Packed checkpoints in transformers: the quantizer behind `lowbit.load` and `lowbit.enable`.

Which modules are packed, and in what tensors, is read from the headers of the checkpoint's files, not
guessed from lists of ignored names: a layer becomes a `QuantLinear` if its packed tensors are there,
with the shapes and dtypes that they have. Those shapes are checked against the configuration and
the model after loading; what does not fit is an error and never a random weight.

Matrices that transformers merges into others while it loads (the experts of a mixture) can't stay
packed: they are dequantized as they are read, and a warning says so. Such a model can't be saved.

Nothing here changes transformers until `enable` is called. `LowbitConfig` has a `quant_method` of its
own, which exists in memory only: what is saved is the configuration that was read.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit import formats, pages
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, Format
from lowbit.nn import DenseLinear, QuantLinear
from lowbit.ops import STREAM
from lowbit.scheme import QuantScheme

METHOD = "lowbit"
_ALIGNMENT = 64
_RELEASED_AT_ONCE = 2**27
"""Bytes of a checkpoint that may be resident beside the kernels' layouts made from them."""
_DTYPES = {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8, "I8": torch.int8,
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
}  # fmt: skip


def find_format(config: Mapping[str, Any]) -> str | None:
    """Key in `FORMATS` of the layout that a `quantization_config` describes, if lowbit reads it."""
    method, layout = config.get("quant_method"), config.get("format", "pack-quantized")
    if method == "compressed-tensors" and layout != "pack-quantized":
        return None
    return next((name for name, fmt in FORMATS.items() if method == fmt.QUANT_METHOD), None)


@register_quantization_config(METHOD)
class LowbitConfig(QuantizationConfigMixin):
    """The configuration of a checkpoint that stays packed.

    Args:
        source: The checkpoint's own `quantization_config`; it is what gets saved.
    """

    def __init__(self, source: Mapping[str, Any], **unused: Any) -> None:
        del unused
        self.quant_method: Any = METHOD
        self.source = dict(source)

    @classmethod
    def wrap(cls, source: Mapping[str, Any]) -> dict[str, Any]:
        """The dictionary that a model's config must hold so that transformers asks for this class."""
        return {"quant_method": METHOD, "source": dict(source)}

    def to_dict(self) -> dict[str, Any]:
        """The checkpoint's own configuration."""
        return copy.deepcopy(self.source)


class Dequantize(ConversionOps):
    """Packed tensors of the parts of a merged parameter to dense ones, as transformers reads them."""

    def __init__(self, hf_quantizer: LowbitQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # its presence also keeps the loader from casting scales

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **rest: Any
    ) -> dict[str, Any]:
        """`{"...gate_proj.qweight": [one per expert], ...}` to `{"...gate_proj.weight": [...]}`.

        Raises:
            LowbitError: a part lacks a tensor.
        """
        del source_patterns, target_patterns
        quantizer, target, dense = self.hf_quantizer, rest["full_layer_name"], {}
        parts: dict[str, dict[str, list[Tensor]]] = defaultdict(dict)
        for pattern, tensors in input_dict.items():
            module, _, suffix = pattern.rpartition(".")
            parts[module][suffix] = tensors if isinstance(tensors, list) else [tensors]
        for module, tensors in parts.items():
            if "weight" in tensors:
                dense[f"{module}.weight"] = tensors["weight"]
                continue
            if len({len(found) for found in tensors.values()}) != 1:
                raise LowbitError(f"{target}: a part of it lacks a tensor: copy the checkpoint again")
            layers = zip(*tensors.values(), strict=True)
            scheme = quantizer.merged[target]
            dense[f"{module}.weight"] = [
                quantizer.dequantize_layer(dict(zip(tensors, layer, strict=True)), scheme) for layer in layers
            ]
        return dense


@register_quantizer(METHOD)
class LowbitQuantizer(HfQuantizer):
    """Keeps a compressed-tensors, GPTQ or AWQ checkpoint packed."""

    requires_calibration = True  # a checkpoint is needed: lowbit never quantizes while loading
    quantization_config: LowbitConfig

    def __init__(self, quantization_config: LowbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config.source
        self.format_name = find_format(self.config) or ""
        if not self.format_name:
            raise LowbitError(f"quant_method={self.config.get('quant_method')!r} is not one lowbit can read")
        self.serialized_names = {"weight": ["weight", *self.fmt.TENSORS]}
        self.merged: dict[str, QuantScheme] = {}
        self.dtype = torch.bfloat16

    @property
    def fmt(self) -> Format:
        """The module of the format (not an attribute: transformers copies quantizers deeply)."""
        return FORMATS[self.format_name]

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float16 becomes bfloat16 where there is no GPU: CPUs compute it a hundred times slower."""
        if dtype == torch.float16 and not torch.cuda.is_available():
            warnings.warn("lowbit: float16 is slow on a CPU, bfloat16 is used (see dtype=)", stacklevel=2)
            dtype = torch.bfloat16
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **unused: Any
    ) -> PreTrainedModel:
        del unused
        packed = self._packed_layers(checkpoint_files or ())
        for name, (path, tensors) in _resolve(model, packed).items():
            scheme = self.fmt.read_config(self.config, name)
            if path is None:
                raise LowbitError(f"{name} is packed, and the model has no such linear layer")
            if isinstance(path, _Merged):
                if self.merged.setdefault(path.target, scheme) != scheme:
                    raise LowbitError(f"{name}: parts of {path.target} must share a scheme")
                continue
            self._replace(model, name, path, tensors, scheme)
        if self.merged:
            warnings.warn(
                f"lowbit: {len(self.merged)} merged parameters ({next(iter(self.merged))}, ...) are "
                "dequantized while loading: stacked experts don't stay packed",
                stacklevel=2,
            )
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **unused: Any) -> PreTrainedModel:
        del unused
        read: list[Tensor] = []
        for layer in quant_layers(model):
            layer.requires_grad_(False)
            layer.prepare()
            if layer.operand is not None and layer.operand.layout != STREAM:
                read += layer.tensors().values()
            if sum(tensor.nbytes for tensor in read) > _RELEASED_AT_ONCE:
                pages.release(read)
                read = []
        pages.release(read)
        _speed_up_dense_layers(model)
        pages.trim()
        return model

    def dequantize_layer(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> Tensor:
        """The dense weight `[out, in]` of one packed layer, in the model's dtype."""
        weight, order = formats.read(self.fmt, tensors, scheme, self.config)
        dense = weight.dequantize(self.dtype)
        return dense if order is None else dense[:, torch.argsort(order)]

    def get_load_operations(self) -> dict[str, Any]:
        """What transformers runs before it merges parameters."""
        return {"dequantize": Dequantize}

    def is_serializable(self) -> bool:
        """Can it be saved as it was? Not if something was merged."""
        return not self.merged

    @property
    def is_trainable(self) -> bool:
        """Adapters on top can be trained; packed weights stay frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The op is one node of a graph."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, QuantLinear):
                linear = nn.Linear(
                    layer.in_features, layer.out_features, layer.bias is not None, device="meta"
                )
                linear.weight = nn.Parameter(layer.dense(dtype or layer.dtype), requires_grad=False)
                linear.bias = layer.bias
                model.set_submodule(name, linear)
        return model

    def _packed_layers(self, files: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Tensors on the meta device, by suffix, of every packed layer, by its name on disk."""
        found: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for file in files:
            if not str(file).endswith(".safetensors"):
                raise LowbitError(f"{file} is no safetensors file: convert the checkpoint")
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (not a mapping)
                    name, _, suffix = key.rpartition(".")
                    if suffix in self.fmt.TENSORS:
                        piece = opened.get_slice(key)
                        dtype = _DTYPES.get(piece.get_dtype(), torch.float32)
                        found[name][suffix] = torch.empty(piece.get_shape(), dtype=dtype, device="meta")
        if not found:
            raise LowbitError(f"the checkpoint says {self.format_name} and holds no packed layer")
        return found

    def _replace(
        self, model: PreTrainedModel, name: str, path: str, tensors: dict[str, Tensor], scheme: QuantScheme
    ) -> None:
        old = model.get_submodule(path)
        if not isinstance(old, nn.Linear | Conv1D):
            raise LowbitError(f"{name} is packed, and the model's {path} is a {type(old).__name__}")
        shape = old.weight.shape if isinstance(old, nn.Linear) else old.weight.shape[::-1]
        new = QuantLinear(
            name, shape[0], shape[1], tensors, scheme, self.format_name, self.config,
            bias=old.bias is not None, dtype=self.dtype,
        )  # fmt: skip
        model.set_submodule(path, new)
        getattr(model, "all_tied_weights_keys", {}).pop(f"{path}.weight", None)


class _Merged:
    """What a packed layer becomes a part of."""

    def __init__(self, target: str) -> None:
        self.target = target


def _resolve(
    model: PreTrainedModel, packed: Mapping[str, dict[str, Tensor]]
) -> dict[str, tuple[str | _Merged | None, dict[str, Tensor]]]:
    """Where every packed layer belongs in the model: a module's path, a merged parameter, or nowhere."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    found: dict[str, tuple[str | _Merged | None, dict[str, Tensor]]] = {}
    for name, tensors in packed.items():
        key = f"{name}.weight"
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if target not in known and key in known:
            target, pattern = key, None
        place = None if target not in known else target.removesuffix(".weight")
        found[name] = (place if place is None or pattern is None else _Merged(target), tensors)
    return found


def quant_layers(model: nn.Module) -> list[QuantLinear]:
    """Every packed layer of a model."""
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def _speed_up_dense_layers(model: PreTrainedModel) -> None:
    """Large dense layers on a CPU: their weights moved to where a vector starts, a row multiplied faster.

    In a mapped file tensors start anywhere, and each load of 64 bytes would touch two cache lines.
    """
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer.weight.numel() >= DenseLinear.MIN_WEIGHTS:
            if layer.weight.device.type == "cpu" and layer.weight.data_ptr() % _ALIGNMENT:
                mapped = layer.weight.data
                layer.weight.data = mapped.clone()  # the same parameter, so that a tied one stays tied
                pages.release([mapped])
            model.set_submodule(name, DenseLinear.of(layer))
