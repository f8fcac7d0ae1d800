"""Packed checkpoints in transformers: the quantizer behind `lowbit.load` and `lowbit.enable`.

Which modules are packed, and in what tensors, is read from the headers of the checkpoint's files, not
guessed from lists of ignored names: a layer becomes a `QuantLinear` if its packed tensors are there,
with the shapes and dtypes that they have. Those shapes are checked against the configuration and
the model after loading; what does not fit is an error and never a random weight.

Experts, which transformers merges into stacks while it loads, become `QuantExperts`. What it merges in
another way can't stay packed: it is dequantized as it is read, and a warning says so. Such a model
can't be saved.

Nothing here changes transformers until `enable` is called. `LowbitConfig` has a `quant_method` of its
own, which exists in memory only: what is saved is the configuration that was read.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit import formats, native, pages, placement
from lowbit.errors import LowbitError
from lowbit.experts import QuantExperts
from lowbit.formats import FORMATS, Format, compressed_tensors
from lowbit.nn import DenseLinear, PackedWeight, QuantLinear
from lowbit.scheme import QuantScheme

METHOD = "lowbit"
_ALIGNMENT = 64
_RELEASED_AT_ONCE = 2**27
"""Bytes of a checkpoint that may be resident beside the kernels' layouts made from them."""


def find_format(config: Mapping[str, Any]) -> str | None:
    """Key in `FORMATS` of the layout that a `quantization_config` describes, if lowbit reads it."""
    method = config.get("quant_method")
    if method == compressed_tensors.QUANT_METHOD and not compressed_tensors.reads(config):
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
        self.serialized_names = {"weight": sorted({"weight", *self.fmt.TENSORS})}
        self.merged: dict[str, QuantScheme] = {}
        self.merged_patterns: set[str] = set()
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
        packed = placement.packed_layers(checkpoint_files or (), self.fmt)
        if not packed:
            raise LowbitError(f"the checkpoint says {self.format_name} and holds no packed layer")
        places = placement.find_places(model, packed)
        schemes = {name: self.fmt.read_config(self.config, name) for name in packed}
        for name, scheme in schemes.items():
            if scheme.activation_bits is not None and name not in places.linear:
                raise LowbitError(f"{name}: lowbit can't run experts in {scheme}: use another checkpoint")
        for name, path in places.linear.items():
            self._replace(model, name, path, packed[name], schemes[name])
        for path, stack in places.experts.items():
            self._replace_experts(model, path, stack, packed, schemes)
        for name, target in places.merged.items():
            if self.merged.setdefault(target, schemes[name]) != schemes[name]:
                raise LowbitError(f"{name}: parts of {target} must share a scheme")
        self.merged_patterns = places.patterns
        if self.merged:
            warnings.warn(
                f"lowbit: {len(self.merged)} merged parameters ({next(iter(self.merged))}, ...) are "
                "dequantized while loading: lowbit can't keep this kind packed",
                stacklevel=2,
            )
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **unused: Any) -> PreTrainedModel:
        del unused
        read: list[Tensor] = []
        if self.dtype == torch.bfloat16 and any(p.device.type == "cpu" for p in model.parameters()):
            native.prefer()
        for layer in packed_modules(model):
            layer.requires_grad_(False)
            layer.prepare()
            tensors = layer.tensors().values()
            shared = {tensor.data_ptr() for tensor in tensors}
            if layer.operands and not any(_lies_at(operand.packed, shared) for operand in layer.operands):
                read += tensors
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

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """`Dequantize` before the merges that need it, and before no others."""
        updated: list[Any] = []
        for entry in weight_conversions:
            dense = self.merged_patterns.intersection(entry.source_patterns)
            updated += super().update_weight_conversions([entry], model) if dense else [entry]  # type: ignore
        return updated

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
            elif isinstance(layer, QuantExperts):
                model.set_submodule(name, layer.dense(dtype or layer.dtype))
        return model

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

    def _replace_experts(
        self,
        model: PreTrainedModel,
        path: str,
        stack: placement.Stack,
        packed: Mapping[str, dict[str, Tensor]],
        schemes: Mapping[str, QuantScheme],
    ) -> None:
        old, weights = model.get_submodule(path), {}
        for parameter, parts in stack.parts.items():
            experts, rows, columns = getattr(old, parameter).shape
            for key in (f"{expert}.{part}" for expert in range(experts) for part in parts):
                name, first = stack.names[key], stack.names[f"0.{parts[0]}"]
                if schemes[name] != schemes[first]:
                    raise LowbitError(f"{name}: parts of {path}.{parameter} must share a scheme")
                weights[key] = PackedWeight(
                    name,
                    rows // len(parts),
                    columns,
                    packed[name],
                    schemes[name],
                    self.format_name,
                    self.config,
                )
        model.set_submodule(path, QuantExperts(old, stack.parts, weights, self.dtype))


def quant_layers(model: nn.Module) -> list[QuantLinear]:
    """Every packed linear layer of a model."""
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def packed_modules(model: nn.Module) -> list[QuantLinear | QuantExperts]:
    """Every module of a model that multiplies by packed weights."""
    return [module for module in model.modules() if isinstance(module, QuantLinear | QuantExperts)]


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


def _lies_at(packed: Tensor, addresses: Collection[int]) -> bool:
    """Is it the memory of one of them? oneDNN's own layouts have no address."""
    return not packed.is_mkldnn and packed.data_ptr() in addresses
