"""`QuantLinear` and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowbit
from lowbit import LowbitError, QuantScheme
from lowbit.nn import QuantLinear
from lowbit.quantized import QuantizedWeight
from lowbit.quantizer import quant_layers
from tests.packed import foreign, logits, spoil


def test_compiles_as_one_graph(checkpoint: Callable[..., Path]) -> None:
    model = lowbit.load(checkpoint("llama", QuantScheme(4, 32)))
    layer = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 1, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(x), model.model.layers[0].mlp(x))


def test_dequantize_gives_the_dense_model(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen2", QuantScheme(4, 32))
    model = lowbit.load(folder).dequantize()
    assert not quant_layers(model)
    assert torch.equal(logits(model), logits(lowbit.load(folder, packed=False)))


def test_an_adapter_on_top_can_be_trained(checkpoint: Callable[..., Path]) -> None:
    """What LoRA does: wrap what is an `nn.Linear`, train two small matrices beside the frozen one."""
    model = lowbit.load(checkpoint("llama", QuantScheme(4, 32)))
    adapters = []
    for block in model.model.layers:
        layer = block.self_attn.q_proj
        assert isinstance(layer, torch.nn.Linear)
        down = torch.nn.Linear(layer.in_features, 2, bias=False, dtype=layer.weight.dtype)
        up = torch.nn.Linear(2, layer.out_features, bias=False, dtype=layer.weight.dtype)
        layer.register_forward_hook(lambda _, args, out, a=down, b=up: out + b(a(args[0])))
        adapters.append(up)
    ids = torch.arange(3, 23)[None]
    model(ids, labels=ids).loss.backward()
    assert all(up.weight.grad is not None and up.weight.grad.abs().sum() > 0 for up in adapters)
    assert not any(p.grad is not None for layer in quant_layers(model) for p in layer.parameters())


def test_weight_of_a_layer(checkpoint: Callable[..., Path]) -> None:
    layer = lowbit.load(checkpoint()).model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantLinear)
    weight, order = layer.read()
    assert isinstance(weight, QuantizedWeight)
    assert order is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = layer.to(torch.float32)  # what `.float()` on a model does
    assert moved.weight_scale.dtype == torch.bfloat16


UP = "model.layers.1.mlp.up_proj"


def _lose(suffix: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def spoiled(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del config
        del tensors[f"{UP}.{suffix}"]

    return spoiled


def _set(
    suffix: str, change: Callable[[Tensor], Tensor]
) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def spoiled(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del config
        tensors[f"{UP}.{suffix}"] = change(tensors[f"{UP}.{suffix}"]).contiguous()

    return spoiled


def _weights(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda _, config: config["config_groups"]["group_0"]["weights"].update(changes)


BAD = {
    "no scale": (_lose("weight_scale"), "up_proj.*weight_scale"),
    "no shape": (_lose("weight_shape"), "up_proj.*weight_shape"),
    "short scale": (_set("weight_scale", lambda t: t[:-1]), "up_proj.*scales"),
    "short codes": (_set("weight_packed", lambda t: t[:, :-1]), "up_proj.*weight_packed"),
    "codes of another dtype": (_set("weight_packed", lambda t: t.long()), "up_proj.*int32"),
    "another shape": (_set("weight_shape", lambda t: t.flip(0)), "up_proj"),
    "other bits": (_weights(num_bits=8), "weight_packed"),
    "unknown bits": (_weights(num_bits=5), "bits=5"),
    "other group": (_weights(group_size=64), "scales"),
    "asymmetric without zeros": (_weights(symmetric=False), "weight_zero_point"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_refused_in_one_line(
    checkpoint: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    change, message = BAD[case]
    folder = spoil(checkpoint("llama", QuantScheme(4, 32)), tmp_path / "bad", change)
    with pytest.raises(LowbitError, match=message) as caught:
        lowbit.load(folder)
    assert "\n" not in str(caught.value)


def test_missing_dense_weight_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    gone = "model.layers.1.input_layernorm.weight"
    folder = spoil(checkpoint(), tmp_path / "bad", lambda tensors, _: tensors.__delitem__(gone))
    with pytest.raises(LowbitError, match=f"lacks {gone}"):
        lowbit.load(folder)


def test_uneven_g_idx_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder, _ = foreign(tiny_model("qwen2"), tmp_path, "gptq", True, True)
    bad = spoil(folder, tmp_path / "bad", _set("g_idx", lambda t: torch.zeros_like(t)))
    with pytest.raises(LowbitError, match=r"up_proj.*g_idx does not spread 64 columns"):
        lowbit.load(bad)
