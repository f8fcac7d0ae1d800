"""The opt-in that makes transformers' own loading functions keep packed weights packed.

Transformers looks a checkpoint's configuration class up by its `quant_method`. `enable` puts a class
in that place which asks whether lowbit can read the checkpoint and otherwise hands it to the class that
was there before. Nothing else of transformers is touched.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.formats import FORMATS
from lowbit.quantizer import LowbitConfig, find_format


class enable:
    """Keep packed what `from_pretrained` and `pipeline` load from now on, or inside `with enable():`.

    compressed-tensors (pack-quantized), GPTQ and AWQ checkpoints, lowbit's and other tools'. What lowbit
    can't read goes where it went before. Leaving the `with`, or `disable()`, restores that for all.

    >>> from transformers import AutoModelForCausalLM
    >>> with enable():
    ...     model = AutoModelForCausalLM.from_pretrained(checkpoint)
    >>> type(model.model.layers[0].mlp.up_proj).__name__
    'QuantLinear'
    """

    def __init__(self) -> None:
        self._before: dict[str, Any] = {}
        for fmt in FORMATS.values():
            method, before = fmt.QUANT_METHOD, AUTO_QUANTIZATION_CONFIG_MAPPING[fmt.QUANT_METHOD]
            if not issubclass(before, _Switch):
                self._before[method] = before
                switch = type("LowbitSwitch", (_Switch,), {"before": before})
                AUTO_QUANTIZATION_CONFIG_MAPPING[method] = switch

    def disable(self) -> None:
        """Give these checkpoints back to transformers; models that are loaded stay as they are."""
        AUTO_QUANTIZATION_CONFIG_MAPPING.update(self._before)
        self._before = {}

    def __enter__(self) -> enable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


class _Switch(QuantizationConfigMixin):
    """Stands in for a configuration class of transformers, and decides on what is in the dictionary."""

    before: type[QuantizationConfigMixin]

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """`LowbitConfig` for what lowbit reads, else what transformers makes of it."""
        if find_format(config_dict) is None:
            return cls.before.from_dict(config_dict, return_unused_kwargs, **kwargs)
        return LowbitConfig(config_dict)
