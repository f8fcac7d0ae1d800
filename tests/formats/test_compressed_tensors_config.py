"""The `quantization_config` against every reader's rules for finding the scheme of a module."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from lowbit.errors import LowbitError
from lowbit.formats import compressed_tensors as ct
from lowbit.scheme import QuantScheme
from tests.tiny import make_config

W4, W8, W4ROW, W4ASYM = QuantScheme(4, 32), QuantScheme(8, 32), QuantScheme(4, -1), QuantScheme(4, 32, False)
PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def llama(schemes: Callable[[int, str], QuantScheme], blocks: int = 3) -> dict[str, QuantScheme]:
    names = itertools.product(range(blocks), PARTS)
    return {f"model.layers.{block}.{part}": schemes(block, part) for block, part in names}


def all_targets(config: dict[str, Any]) -> list[str]:
    return [target for group in config["config_groups"].values() for target in group["targets"]]


def library_config(
    schemes: dict[str, QuantScheme], ignore: Iterable[str] = ("lm_head",)
) -> QuantizationConfig:
    return QuantizationConfig.model_validate(ct.quantization_config(schemes, list(ignore)))


def resolved_by_the_library(schemes: dict[str, QuantScheme]) -> dict[str, QuantScheme]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config("llama", tied=False))
    ignore = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in schemes]
    apply_quantization_config(model, library_config(schemes, ignore), show_progress=False)
    found = {}
    for name, module in model.named_modules():
        weights = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if weights is not None:
            found[name] = QuantScheme(weights.num_bits, weights.group_size or -1, weights.symmetric)
    return found


def resolved_by_an_engine(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The look-up of vLLM and SGLang: ignore, name, class (by substring), then all parts of a fused layer."""
    targets = [(target, group) for group in config["config_groups"].values() for target in group["targets"]]

    def first(value: str) -> dict[str, Any] | None:
        for target, group in targets:
            if re.match(target[3:], value) if target.startswith("re:") else target == value:
                return group
        return None

    parent, _, leaf = name.rpartition(".")
    parts = [f"{parent}.{part}" for part in FUSED[leaf]] if leaf in FUSED else [name]
    if all(part in config["ignore"] for part in parts):
        return None
    class_name = "ParallelLMHead" if leaf == "lm_head" else "QKVParallelLinear"
    by_class = next(
        (g for t, g in targets if not t.startswith("re:") and t.lower() in class_name.lower()), None
    )
    by_parts = [first(part) for part in parts]
    return first(name) or by_class or (by_parts[0] if all(by_parts) else None)


MIXED = {
    "one scheme": llama(lambda block, part: W4),
    "one part": llama(lambda block, part: W8 if part == "mlp.down_proj" else W4),
    "one block": llama(lambda block, part: W8 if block == 1 else W4),
    "fused parts": llama(lambda block, part: W8 if "gate" in part or "up" in part else W4),
    "three": llama(lambda block, part: W8 if block == 2 else W4ROW if "self_attn" in part else W4),
    "head": llama(lambda block, part: W4) | {"lm_head": W8},
    "head alike": llama(lambda block, part: W4) | {"lm_head": W4},
    "head and parts": llama(lambda block, part: W8 if "mlp" in part else W4) | {"lm_head": W8},
    "some dense": {n: s for n, s in llama(lambda block, part: W4).items() if "layers.1.mlp" not in n},
    "asymmetric": llama(lambda block, part: W4ASYM),
}


@pytest.mark.parametrize("schemes", MIXED.values(), ids=MIXED)
def test_every_reader_finds_the_scheme_of_every_module(schemes: dict[str, QuantScheme]) -> None:
    assert resolved_by_the_library(schemes) == schemes
    dense = [name for name in llama(lambda block, part: W4) if name not in schemes]
    config = ct.quantization_config(schemes, dense)
    for name, scheme in schemes.items():
        assert ct.read_config(config, name) == scheme
        parent, _, leaf = name.rpartition(".")
        fused = next((whole for whole, parts in FUSED.items() if leaf in parts), None)
        group = resolved_by_an_engine(config, f"{parent}.{fused}" if fused else name)
        assert group is not None, name
        assert ct._read_weights(group["weights"], name) == scheme, name
    for name in dense:
        assert resolved_by_an_engine(config, name) is None
        with pytest.raises(LowbitError, match="ignores it"):
            ct.read_config(config, name)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([W4, W8, W4ROW]), min_size=28, max_size=28))
def test_any_mixture_is_read_back(drawn: list[QuantScheme]) -> None:
    choice = iter(drawn)
    schemes = llama(lambda block, part: next(choice), blocks=4)
    config = ct.quantization_config(schemes, [])
    assert {name: ct.read_config(config, name) for name in schemes} == schemes
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    for name in schemes:  # no two groups claim a module, so their order cannot matter
        hits = [t for g in groups for t in g.targets if t == "Linear" or re.match(t[3:], name)]
        assert len(hits) == 1, hits


def test_expressions_match_whole_names() -> None:
    schemes = llama(lambda block, part: W8 if block == 1 else W4, blocks=13)
    schemes |= {"model.layers.0.mlp.up": W8}  # part of the name of an up_proj
    config = ct.quantization_config(schemes, [])
    for name in ("model.layers.11.mlp.up_proj", "model.layers.0.mlp.up_proj"):
        assert ct.read_config(config, name) == W4
        assert sum(bool(re.match(t[3:], name)) for t in all_targets(config)) == 1
    for name in ("model.layers.1.mlp.up_proj", "model.layers.0.mlp.up"):
        assert ct.read_config(config, name) == W8


def test_a_place_with_one_scheme_takes_one_expression() -> None:
    config = ct.quantization_config(MIXED["one part"], [])
    expected = {rf"re:^model\.layers\.\d+\.{re.escape(part)}$" for part in PARTS}
    assert set(all_targets(config)) == expected


def test_the_config_is_what_stock_transformers_needs() -> None:
    schemes = llama(lambda block, part: W4)
    config = ct.quantization_config(schemes, ["lm_head"])
    parsed = CompressedTensorsConfig.from_dict(config)
    assert parsed.is_quantization_compressed
    assert not parsed.dequantize
    assert parsed.quantization_config.ignore == ["lm_head"]
    assert "dequantize" not in config
    asymmetric = ct.quantization_config(llama(lambda block, part: W4ASYM), ["lm_head"])
    assert CompressedTensorsConfig.from_dict(asymmetric).dequantize


def test_check_refuses() -> None:
    name, other = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    with pytest.raises(LowbitError, match="asymmetric weights in mixed schemes, got w4g32-asym, w8g32"):
        ct.check({name: W4ASYM, other: W8}, [])
    with pytest.raises(LowbitError, match="experts must share a scheme"):
        ct.check({f"model.layers.{i}.mlp.experts.0.up_proj": s for i, s in enumerate((W4, W8))}, [])
    with pytest.raises(LowbitError, match="--format gptq"):
        ct.check_layer("h.0.attn.c_attn", 64, 64, W4, "Conv1D")
    with pytest.raises(LowbitError, match="experts in w4g32-asym"):
        ct.check_layer("model.layers.0.mlp.experts.0.up_proj", 64, 64, W4ASYM, "Expert")
    ct.check_layer("model.layers.0.mlp.experts.0.up_proj", 64, 64, W4, "Expert")


def test_the_experts_group_comes_first_and_names_them() -> None:
    """transformers takes the first expression with "experts" in it for all experts."""
    experts = {f"model.layers.{i}.mlp.experts.{e}.up_proj": W4 for i in range(2) for e in range(4)}
    shared = {f"model.layers.{i}.mlp.shared_experts.up_proj": W8 for i in range(2)}
    config = ct.quantization_config(shared | experts, [])
    first = next(iter(config["config_groups"].values()))
    assert first["weights"]["num_bits"] == 4
    assert "experts" in first["targets"][0]
    assert {name: ct.read_config(config, name) for name in shared | experts} == shared | experts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_status": "frozen"}, "quantization_status='frozen'"),
        ({"format": "naive-quantized"}, "format='naive-quantized'"),
        ({"format": "int-quantized"}, "input_activations have num_bits="),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"transform_config": {"config_groups": {}}}, "transform_config"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "preset"),
        ({"ignore": ["re:.*up_proj"]}, "ignores it"),
        ({"group": {"targets": ["re:.*down_proj", "Embedding"]}}, "no config group targets it"),
        ({"group": {"input_activations": {"num_bits": 8}}}, "input_activations"),
        ({"weights": {"type": "float"}}, "type='float'"),
        ({"weights": {"strategy": "tensor"}}, "strategy='tensor'"),
        ({"weights": {"actorder": "group"}}, "actorder='group'"),
        ({"weights": {"actorder": True}}, "actorder=True"),
        ({"weights": {"dynamic": True}}, "dynamic=True"),
        ({"weights": {"num_bits": 5}}, "bits=5"),
    ],
)
def test_read_config_refuses(change: dict[str, Any], message: str) -> None:
    name = "model.layers.0.mlp.up_proj"
    config = ct.quantization_config({name: W4}, [])
    group = config["config_groups"]["group_0"]
    group["format"] = None  # then the format of the whole checkpoint holds
    group["weights"] |= change.pop("weights", {})
    group |= change.pop("group", {})
    with pytest.raises(LowbitError, match=re.escape(message)) as error:
        ct.read_config(config | change, name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("actorder", ["weight", "static", None, False])
def test_what_llm_compressor_writes_is_read(actorder: str | None) -> None:
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128,
        "dynamic": False, "actorder": actorder, "block_structure": None, "observer": "minmax",
        "observer_kwargs": {}, "scale_dtype": None, "zp_dtype": None,
    }  # fmt: skip
    row = weights | {"num_bits": 8, "strategy": "channel", "group_size": None}
    config = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
        "ignore": ["lm_head", r"re:.*mlp\.gate$"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights},
            "group_1": {"targets": [r"re:.*down_proj$"], "weights": row},
            "group_2": {"targets": ["model.layers.0.mlp.down_proj"], "weights": weights},
        },
    }
    for group in config["config_groups"].values():
        group["format"] = "pack-quantized"
    assert ct.read_config(config, "model.layers.0.mlp.up_proj") == QuantScheme(4, 128)
    assert ct.read_config(config, "model.layers.1.mlp.down_proj") == QuantScheme(8, -1)
    assert ct.read_config(config, "model.layers.0.mlp.down_proj") == QuantScheme(4, 128)


def test_warnings_name_the_engines() -> None:
    def engines(*schemes: QuantScheme) -> list[str]:
        names = [f"model.layers.{i}.mlp.up_proj" for i in range(len(schemes))]
        shapes = dict.fromkeys(names, (128, 128))
        lines = ct.warnings(dict(zip(names, schemes, strict=True)), shapes)
        assert all("will not load" in line for line in lines)
        return [line.split(" will")[0] for line in lines]

    assert engines(W4) == []
    assert engines(W4ASYM) == []
    assert engines(W4, W8) == ["vLLM on CPU"]
    assert engines(QuantScheme(2, 32)) == ["vLLM on CPU", "vLLM on GPU", "SGLang"]
    assert engines(QuantScheme(3, 32)) == ["transformers", "vLLM on CPU", "vLLM on GPU", "SGLang"]
