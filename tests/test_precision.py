"""CPUs that do not multiply bfloat16: float32 takes its place, and checkpoints are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowbit import hardware
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
    with pytest.raises(LowbitError, match="--dtype float8"):
        hardware.evaluation_dtype("float8", CPU)


@pytest.mark.usefixtures("without_bfloat16")
def test_float32_is_measured_in_where_bfloat16_is_emulated() -> None:
    assert hardware.evaluation_dtype("auto", CPU) == torch.float32
    assert hardware.evaluation_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.usefixtures("without_bfloat16")
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_a_checkpoint_is_read_back_in_the_precision_it_was_computed_in(
    quantize: Callable[..., Report], tiny_model: Callable[..., Path], text_file: str, family: str
) -> None:
    """In bfloat16 a router decides otherwise, and the logits of a good checkpoint seem wrong."""
    report = quantize(tiny_model(family), method="rtn")
    assert report.verification is not None
    assert report.verification.kl < 2e-3
    assert 0 < (perplexity(report.output, text_file, reference=tiny_model(family), seq_len=64).kl or 0) < 0.5
