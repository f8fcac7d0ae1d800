"""Every family through every method and format that may hold it: files first, then readers.

The oracle is the quantized model as it was in memory, caught on its way to the verification, and
the original checkpoint for everything that must not change.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lowbit import grid, hf, pipeline, road, verify
from lowbit.algorithms import REWRITES, awq
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.quantized import QuantizedWeight
from lowbit.results import Report
from lowbit.scheme import QuantScheme
from tests.tiny import FAMILIES

Folders = Callable[..., Path]
MOE = ("mixtral", "qwen3_moe")
METHODS = ("rtn", "gptq", "awq")
HELD = [
    ("compressed-tensors", True),
    ("compressed-tensors", False),
    ("gptq", True),
    ("gptq", False),
    ("awq", False),
]


def is_held(family: str, format_name: str, symmetric: bool) -> bool:
    if family == "gpt2":
        return format_name == "gptq"
    return not (family in MOE and format_name == "compressed-tensors" and not symmetric)


@dataclass(frozen=True)
class Run:
    """A finished run and the in-memory model's logits for the text that verifies it."""

    original: Path
    report: Report
    ids: Tensor
    logits: Tensor


@pytest.fixture(scope="module")
def quantized(
    tiny_model: Folders, tmp_path_factory: pytest.TempPathFactory, text_file: str
) -> Iterator[Callable[..., Run]]:
    made: dict[tuple[str, ...], Run] = {}

    def run(family: str, method: str, format_name: str, symmetric: bool) -> Run:
        key = (family, method, format_name, str(symmetric))
        if key in made:
            return made[key]
        seen: list[Tensor] = []

        def record(folder: Path, name: str, ids: Tensor, logits: Tensor, *rest: object) -> object:
            seen.extend((ids, logits))
            return verify.verify(folder, name, ids, logits, *rest)  # type: ignore[arg-type]

        with mock.patch.object(road, "verify", record):
            report = pipeline.quantize(
                tiny_model(family, blocks=2),
                QuantScheme(4, 32, symmetric),
                output=tmp_path_factory.mktemp("out") / "checkpoint",
                method=method,
                format=format_name,
                dataset=text_file,
                samples=3,
                seq_len=48,
            )
        made[key] = Run(tiny_model(family, blocks=2), report, *seen)
        return made[key]

    yield run
    made.clear()


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


PAIRS = [
    (family, METHODS[(row + column) % len(METHODS)], *held)
    for row, family in enumerate(FAMILIES)
    for column, held in enumerate(HELD)
]
"""Every family in every format, the methods in turn: each meets each family and each format."""


def usual(family: str, method: str) -> tuple[str, str, str, bool]:
    """One of `PAIRS`, which other tests have made already, or another where no format of theirs holds it."""
    fitting = [pair for pair in PAIRS if pair[:2] == (family, method) and is_held(family, *pair[2:])]
    return fitting[0] if fitting else (family, method, "gptq", True)


@pytest.mark.parametrize(("family", "method", "format_name", "symmetric"), PAIRS)
def test_what_is_loaded_is_what_was_computed(
    quantized: Callable[..., Run], family: str, method: str, format_name: str, symmetric: bool
) -> None:
    if not is_held(family, format_name, symmetric):
        with pytest.raises(LowbitError) as caught:
            quantized(family, method, format_name, symmetric)
        assert "\n" not in str(caught.value)
        assert "use " in str(caught.value)
        return
    run = quantized(family, method, format_name, symmetric)
    model = hf.load(run.report.output, packed=False)
    found = logits_of(model, run.ids)
    assert torch.isfinite(found).all()
    expected = run.logits.float()
    if family in MOE:
        # Loaders sum experts in another order, in their grouped products; a router that is nearly tied then
        # sends a token to another expert: few tokens may differ, and all others hardly do.
        off = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert off.median() <= 0.03
        assert off.flatten().quantile(0.9) <= 0.1
    else:
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert run.report.verification is not None
    assert run.report.verification.weights == len(run.report.layers)
    assert run.report.verification.kl < 1e-6
    if format_name == "compressed-tensors":
        assert run.report.verification.loader == "stock transformers"
    elif importlib.util.find_spec("gptqmodel") is None:
        assert run.report.verification.loader.startswith("lowbit's own reader")


@pytest.mark.parametrize(
    ("family", "method", "format_name", "symmetric"),
    [pair for pair in PAIRS if pair[2] == "compressed-tensors" and is_held(pair[0], *pair[2:])],
)
def test_stock_transformers_holds_the_same_weights(
    quantized: Callable[..., Run], family: str, method: str, format_name: str, symmetric: bool
) -> None:
    run = quantized(family, method, format_name, symmetric)
    ours, stock = hf.load(run.report.output, packed=False), hf.load_stock(run.report.output)
    torch.testing.assert_close(logits_of(stock, run.ids), logits_of(ours, run.ids), rtol=0, atol=0.02)
    mine = dict(ours.named_parameters())
    shared = [(n, p) for n, p in stock.named_parameters() if n in mine and p.is_floating_point()]
    assert len(shared) >= 3
    for name, parameter in shared:
        assert torch.equal(parameter, mine[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_in_full_precision_without_a_word(
    quantized: Callable[..., Run], tiny_model: Folders, family: str, method: str
) -> None:
    report = quantized(*usual(family, method)).report
    layers = {layer.name for layer in report.layers}
    assert not layers & set(report.skipped)
    assert all(report.skipped.values())
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family, blocks=2))
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        module = name.removesuffix(".weight")
        if parameter.ndim == 3:
            assert {f"{module}.{i}" for i in range(len(parameter))} <= layers | set(report.skipped), name
        else:
            assert module in layers | set(report.skipped), name
    in_blocks = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    experts = sum(p.shape[0] for p in model.parameters() if p.ndim == 3)
    assert len(layers) == len(in_blocks) - 1 + experts  # all but the head
    assert "lm_head" in report.skipped


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_all_but_the_quantized_weights_is_as_it_was(
    quantized: Callable[..., Run], family: str, method: str
) -> None:
    """Norms, biases, embeddings, routers: these methods touch none of them."""
    run = quantized(family, method, "gptq", True)
    before = load_file(run.original / "model.safetensors")
    after = load_file(run.report.output / "model.safetensors")
    packed = {key.rpartition(".")[0] for key in after if key.endswith(".qweight")}
    assert packed
    rest = {
        key: tensor for key, tensor in after.items() if key.rpartition(".")[2] not in FORMATS["gptq"].TENSORS
    }
    assert set(rest) == {key for key in before if key.removesuffix(".weight") not in packed}
    for key, tensor in rest.items():
        assert torch.equal(tensor, before[key]), key
    biases = [key for key in before if key.endswith(".bias")]
    assert set(biases) <= set(rest)
    assert len(biases) > 0 if family in ("qwen2", "phi", "gpt2", "opt") else not biases


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_rounded_weight_is_the_nearest_on_its_grid(
    quantized: Callable[..., Run], family: str, symmetric: bool
) -> None:
    """RTN needs no data, so each weight can be rounded again from the original, one by one."""
    run = quantized(family, "rtn", "gptq", symmetric)
    model = hf.load(run.report.output, packed=False)
    original = AutoModelForCausalLM.from_pretrained(run.original, dtype=torch.bfloat16)
    scheme = QuantScheme(4, 32, symmetric)
    names = [layer.name for layer in run.report.layers]
    checked = 0
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        source = original.get_parameter(name)
        transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
        parts: list[tuple[str, Tensor, Tensor]] = [(module, source, parameter)]
        if parameter.ndim == 3:
            parts = [(f"{module}.{i}", source[i], parameter[i]) for i in range(len(parameter))]
        for part, before, after in parts:
            if part in names:
                checked += 1
                before, after = (before.T, after.T) if transposed else (before, after)
                scales, zeros = grid.find_params(before, scheme, torch.float16)
                expected = grid.dequantize(
                    grid.quantize(before, scales, zeros, scheme), scales, zeros, scheme
                )
                assert torch.equal(after, expected.bfloat16()), part
    assert checked == len(names)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in MOE])
def test_awq_before_rounding_is_the_original(
    tiny_model: Folders, text_file: str, tmp_path: Path, family: str
) -> None:
    """With rounding switched off, what AWQ writes is another way to write the same function."""
    scaled = 0

    def as_it_is(
        weight: Tensor, hessian: object, scheme: QuantScheme, dtype: torch.dtype
    ) -> tuple[object, str]:
        # Eight bits and a group of eight: exact enough to tell a fold from a slip.
        fine = QuantScheme(8, 8, False)
        scales, zeros = grid.find_params(weight, fine, dtype)
        codes = grid.quantize(weight, scales, zeros, fine)
        return QuantizedWeight(codes, scales.to(dtype), zeros.to(torch.uint8), fine), ""

    def factors(weights: list[Tensor], hessian: Tensor, *rest: object) -> Tensor:
        nonlocal scaled
        scaled += 1
        generator = torch.Generator().manual_seed(scaled)
        return torch.rand(hessian.shape[0], generator=generator) * 1.5 + 0.5

    with mock.patch.object(awq, "quantize_weight", as_it_is), mock.patch.dict(REWRITES, {"awq": factors}):
        report = pipeline.quantize(
            tiny_model(family),
            QuantScheme(8, 8, False),
            output=tmp_path / "out",
            method="awq",
            format="gptq",
            dataset=text_file,
            samples=2,
            seq_len=32,
        )
    assert scaled >= 3
    ids = torch.arange(3, 99)[None]
    original = logits_of(
        AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.bfloat16).eval(), ids
    )
    found = logits_of(hf.load(report.output, packed=False), ids)
    p = original.log_softmax(-1)
    kl = (p.exp() * (p - found.log_softmax(-1))).sum(-1).mean()
    assert kl < 2e-3


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_what_is_saved_of_buffers_stays(
    tiny_model: Folders, text_file: str, tmp_path: Path, method: str
) -> None:
    """DeepSeek's routers hold a bias that is no parameter; AWQ writes blocks from memory."""
    original = tiny_model("deepseek_v3")
    report = pipeline.quantize(
        original, QuantScheme(4, 32), output=tmp_path / "out", method=method, dataset=text_file, samples=4,
        seq_len=32,
    )  # fmt: skip
    before, after = (load_file(folder / "model.safetensors") for folder in (original, report.output))
    biases = [key for key in before if key.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert all(torch.equal(before[key], after[key]) and before[key].any() for key in biases)
