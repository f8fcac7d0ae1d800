"""CPUs that do not multiply bfloat16: float32 takes its place, and checkpoints are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit import QuantScheme, hardware, hf
from lowbit.comparison import compare_checkpoints
from lowbit.errors import LowbitError
from lowbit.evaluate import perplexity
from lowbit.results import Report

CPU = torch.device("cpu")


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


def test_what_is_measured_in() -> None:
    assert hardware.evaluation_dtype("auto", CPU) == "auto"
    assert hardware.evaluation_dtype("float32", CPU) == torch.float32
    assert hardware.evaluation_dtype(torch.float64, CPU) == torch.float64
    with pytest.raises(LowbitError, match="--dtype float8"):
        hardware.evaluation_dtype("float8", CPU)


@pytest.mark.usefixtures("without_bfloat16")
def test_float32_is_measured_in_where_bfloat16_is_emulated() -> None:
    assert hardware.evaluation_dtype("auto", CPU) == torch.float32
    assert hardware.evaluation_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.usefixtures("without_bfloat16")
@pytest.mark.parametrize(
    ("given", "measured"),
    [({}, "float32"), ({"dtype": "bfloat16"}, "bfloat16"), ({"dtype": torch.bfloat16}, "bfloat16")],
)
def test_python_compares_in_what_the_command_compares_in(
    checkpoint: Callable[..., Path],
    tiny_model: Callable[..., Path],
    text_file: str,
    given: Any,
    measured: str,
) -> None:
    original = str(tiny_model("llama"))
    found = compare_checkpoints([str(checkpoint())], original, text_file, seq_len=64, windows=1, **given)
    assert [model.result.dtype for model in found.models] == [measured]


@pytest.mark.usefixtures("without_bfloat16")
@pytest.mark.parametrize(
    ("family", "format_name"),
    [("llama", "compressed-tensors"), ("llama", "gptq"), ("llama", "awq"),
     ("mixtral", "compressed-tensors"), ("qwen3_moe", "compressed-tensors")],
)  # fmt: skip
def test_a_checkpoint_is_read_back_in_the_precision_it_was_computed_in(
    quantize: Callable[..., Report],
    tiny_model: Callable[..., Path],
    text_file: str,
    family: str,
    format_name: str,
) -> None:
    """In bfloat16 a router decides otherwise, and the logits of a good checkpoint seem wrong."""
    scheme = QuantScheme(4, 32, symmetric=format_name != "awq")
    report = quantize(tiny_model(family), scheme, method="rtn", format=format_name)
    assert report.verification is not None
    assert report.verification.kl < 1e-9  # what is multiplied is the same to the bit
    assert 0 < (perplexity(report.output, text_file, reference=tiny_model(family), seq_len=64).kl or 0) < 0.5


@pytest.mark.usefixtures("without_bfloat16")
def test_a_model_is_compared_with_a_path_in_its_own_precision(
    tiny_model: Callable[..., Path], text_file: str
) -> None:
    model, tokenizer = (
        hf.load_stock(tiny_model("llama"), torch.bfloat16),
        hf.load_tokenizer(tiny_model("llama")),
    )
    one = perplexity(model, text_file, tokenizer, reference=tiny_model("llama"), seq_len=64, windows=2)
    other = perplexity(str(tiny_model("llama")), text_file, reference=model, seq_len=64, windows=2)
    assert (one.dtype, one.kl, other.dtype, other.kl) == ("bfloat16", 0, "bfloat16", 0)


def test_effort_high_trains_inside_inference_mode(
    quantize: Callable[..., Report], tiny_model: Callable[..., Path]
) -> None:
    with torch.inference_mode():
        report = quantize(tiny_model("llama"), method=None, effort="high")
    assert any("KL on 1 rows not trained on" in note for note in report.notes), report.notes
