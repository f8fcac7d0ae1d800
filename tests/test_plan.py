"""What is quantized, what is not and why: decided, or refused, on the skeleton."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.plan import Plan, make_plan, matches
from lowbit.scheme import QuantScheme
from tests.tiny import FAMILIES, make_config

W4 = QuantScheme(4, 32)
CT, GPTQ, AWQ = FORMATS["compressed-tensors"], FORMATS["gptq"], FORMATS["awq"]


@pytest.fixture(scope="module")
def skeleton() -> Callable[..., PreTrainedModel]:
    def make(family: str, **changes: object) -> PreTrainedModel:
        config = make_config(family)
        for name, value in changes.items():
            setattr(config, name, value)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]

    return make


def wanted(plan: Plan) -> list[str]:
    names = [m.module_name for block in range(len(plan.blocks)) for m in plan.matrices(block)]
    return [name for name in names if name not in plan.skipped]


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_planned_or_has_a_reason(skeleton: Callable[..., PreTrainedModel], family: str) -> None:
    model = skeleton(family)
    plan = make_plan(model, W4, GPTQ)
    names = set(wanted(plan))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            module = name.removesuffix(".weight")
            assert (module in names) != bool(plan.skipped.get(module)), name
        if parameter.ndim == 3:
            assert {f"{name}.{i}" for i in range(len(parameter))} <= names
    assert plan.skipped["lm_head"] == "the output head (see --head-bits)"
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.0.mlp.down_proj", "down_proj", True),
        ("model.layers.0.mlp.down_proj", "*.down_proj", True),
        ("model.layers.0.mlp.down_proj", "layers.0.*", True),
        ("model.layers.0.mlp.down_proj", "mlp.down_proj", True),
        ("model.layers.0.mlp.down_proj", "model.layers.?.mlp.*", True),
        ("model.layers.10.mlp.down_proj", "layers.0.*", False),
        ("model.layers.10.mlp.down_proj", "layers.?.*", False),
        ("model.layers.0.mlp.down_proj", "proj", False),
        ("model.layers.0.mlp.down_proj", "mlp", False),
        ("model.layers.0.mlp.down_proj", "DOWN_PROJ", False),
    ],
)
def test_patterns_match_from_a_dot_to_the_end(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, pattern) == expected


def test_skipping(skeleton: Callable[..., PreTrainedModel]) -> None:
    plan = make_plan(skeleton("llama"), W4, CT, skip=["layers.1.*", "down_proj"])
    assert all(".1." not in name and "down_proj" not in name for name in wanted(plan))
    assert len(wanted(plan)) == 12
    assert plan.skipped["model.layers.1.mlp.up_proj"] == "--skip layers.1.*"
    assert plan.skipped["model.layers.0.mlp.down_proj"] == "--skip down_proj"
    make_plan(skeleton("llama"), W4, CT, skip=["lm_head"])  # what is skipped anyway may be named


@pytest.mark.parametrize(
    ("family", "fmt", "scheme", "options", "message"),
    [
        (
            "llama",
            CT,
            W4,
            {"skip": ["nothing"]},
            "--skip 'nothing' matches no linear layer: .*q_proj",
        ),
        ("llama", CT, W4, {"skip": ["*"]}, "no linear layer left to quantize"),
        (
            "llama",
            CT,
            QuantScheme(4, 48),
            {},
            r"in_features=\[64, 128\]: use one of \[64, 32, 16, -1\] or auto",
        ),
        ("llama", AWQ, W4, {}, "awq holds no symmetric scheme"),
        ("llama", AWQ, QuantScheme(8, 32, False), {}, "awq holds 4 bits only"),
        ("gpt2", CT, W4, {}, "compressed-tensors knows no Conv1D layers: use --format gptq"),
        ("mixtral", CT, QuantScheme(4, 32, False), {}, "cannot load experts in w4g32-asym"),
        ("llama", GPTQ, W4, {"skip": ["layers.0.mlp.down_proj"]}, "gptq cannot leave it in full precision"),
        ("llama", GPTQ, W4, {"head_bits": 8}, "gptq holds one scheme per checkpoint"),
        ("llama", GPTQ, W4, {"head_bits": 4}, "lm_head: gptq loaders quantize only decoder blocks"),
        ("llama", CT, W4, {"head_bits": 5}, "bits=5 is not supported"),
        ("llama", CT, QuantScheme(4, 32, False), {"head_bits": 8}, "cannot load asymmetric weights in mixed"),
        ("llama", CT, W4, {"head_bits": 8, "skip": ["lm_head"]}, "--skip lm_head and --head-bits 8"),
        ("mixtral", GPTQ, W4, {"skip": ["experts.gate_up_proj.0"]}, "takes all experts of .* or none: use '"),
        ("mixtral", CT, W4, {"skip": ["*experts*"]}, "cannot load dense experts"),
    ],
)
def test_refusals(
    skeleton: Callable[..., PreTrainedModel],
    family: str,
    fmt: object,
    scheme: QuantScheme,
    options: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(LowbitError, match=message) as caught:
        make_plan(skeleton(family), scheme, fmt, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_the_remedy_that_a_refusal_names_works(skeleton: Callable[..., PreTrainedModel]) -> None:
    plan = make_plan(skeleton("mixtral"), W4, GPTQ, skip=["mlp.experts.gate_up_proj.*"])
    assert not any("gate_up_proj" in name for name in wanted(plan))


@pytest.mark.parametrize(
    ("hidden", "intermediate", "expected"), [(64, 128, 64), (128, 256, 128), (96, 128, 32)]
)
def test_auto_group_is_the_largest_that_fits(
    skeleton: Callable[..., PreTrainedModel], hidden: int, intermediate: int, expected: int
) -> None:
    model = skeleton("llama", hidden_size=hidden, intermediate_size=intermediate, head_dim=hidden // 4)
    assert make_plan(model, W4, CT, auto_group=True).scheme == QuantScheme(4, expected)


def test_auto_group_minds_only_what_is_quantized(skeleton: Callable[..., PreTrainedModel]) -> None:
    model = skeleton("llama", hidden_size=128, intermediate_size=208, head_dim=32)
    with pytest.raises(LowbitError, match=r"none of .* in_features=\[128, 208\]: use --group-size -1"):
        make_plan(model, W4, CT, auto_group=True)
    assert make_plan(model, W4, CT, auto_group=True, skip=["down_proj"]).scheme.group_size == 128
    assert make_plan(model, QuantScheme(4, -1), CT).scheme.group_size == -1


def test_the_head_gets_a_scheme_of_its_own(skeleton: Callable[..., PreTrainedModel]) -> None:
    plan = make_plan(skeleton("llama"), W4, CT, head_bits=8)
    assert plan.head == QuantScheme(8, 32)
    assert "lm_head" not in plan.skipped


def test_what_is_as_wide_as_there_are_experts_is_no_router(skeleton: Callable[..., PreTrainedModel]) -> None:
    """Keys and values here, as in Qwen3-Next, whose queries would be quantized alone."""
    plan = make_plan(skeleton("qwen3_moe", num_experts=32), W4, GPTQ)
    assert plan.blocks[0].self_attn.k_proj.out_features == 32
    assert not [name for name in plan.skipped if name.endswith("_proj")]


def test_a_router_that_is_a_linear_layer_stays(skeleton: Callable[..., PreTrainedModel]) -> None:
    """DeepSeek and others keep it as `nn.Linear`; here with 48 experts, and a gate with one output."""
    model = skeleton("mixtral", num_local_experts=48)
    for layer in model.model.layers:
        layer.mlp.gate = torch.nn.Linear(64, 48, bias=False, device="meta")
        layer.mlp.shared_gate = torch.nn.Linear(64, 1, bias=False, device="meta")
    plan = make_plan(model, W4, GPTQ)
    assert plan.skipped["model.layers.2.mlp.gate"] == "a router or gate (48 outputs)"
    assert plan.skipped["model.layers.2.mlp.shared_gate"] == "a router or gate (1 outputs)"
