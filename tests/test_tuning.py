"""Quantization-aware training from end to end: formats, bytes, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit import QuantScheme, hf
from lowbit.blocks import fingerprint
from lowbit.distill import distill
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.judge import head_inputs
from lowbit.refine import _weights, _write, refine
from tests.refused import Refused
from tests.test_refine import divergence, rows, tensors

Folders = Callable[..., Path]
FORMATS_AND_SIGNS = [("compressed-tensors", True), ("gptq", True), ("gptq", False), ("awq", False)]


@pytest.mark.parametrize(("format", "symmetric"), FORMATS_AND_SIGNS)
def test_codes_scales_and_norms_change_and_nothing_else(
    format: str, symmetric: bool, tiny_model: Folders, checkpoint: Folders, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("lowbit.refine.LATENT_RATE", 0.03)  # a dozen steps are few
    original = tiny_model("llama")
    folder = checkpoint("llama", QuantScheme(4, 32, symmetric), format=format)
    done = refine(
        folder, original, tmp_path / "trained", rows(), epochs=6, weights_too=True, tokens_per_step=512,
        dtype=torch.float32,
    )  # fmt: skip
    assert done.kept
    before, after = tensors(folder), tensors(tmp_path / "trained")
    assert before.keys() == after.keys()
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    codes, scales = {"weight_packed", "qweight"}, {"weight_scale", "scales"}
    assert changed & codes
    assert changed & scales
    assert changed <= codes | scales | {"weight"}
    assert divergence(tmp_path / "trained", original) < divergence(folder, original)
    model = hf.load(tmp_path / "trained", packed=False)
    for name, digest in done.fingerprints.items():
        assert fingerprint(model.get_submodule(name).weight) == digest


@pytest.mark.parametrize(("format", "symmetric"), FORMATS_AND_SIGNS)
def test_without_a_step_the_file_is_the_same_to_the_byte(
    format: str, symmetric: bool, tiny_model: Folders, checkpoint: Folders, tmp_path: Path
) -> None:
    folder, fmt = checkpoint("llama", QuantScheme(4, 32, symmetric), format=format), FORMATS[format]
    quantization, _ = hf.quantization_of(folder)
    targets = [
        found[0] for found in head_inputs(hf.load_stock(tiny_model("llama"), torch.bfloat16), rows().split(1))
    ]
    model = hf.load(folder, packed=False, dtype=torch.bfloat16)
    done = distill(
        model, _weights(folder, fmt, quantization), rows(), targets, learning_rate=0.0, latent_rate=0.0
    )
    _write(folder, tmp_path / "same", fmt, done, "model.", 5 * 10**9)
    (one,), (other,) = (list(each.glob("*.safetensors")) for each in (folder, tmp_path / "same"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("loss", ["original", "data"])
def test_qat_is_one_call(loss: str, tiny_model: Folders, text_file: str, tmp_path: Path) -> None:
    report = lowbit.qat(
        tiny_model("llama"), QuantScheme(2, 32), output=tmp_path / "out", dataset=text_file, epochs=20,
        effort="fast", loss=loss, samples=48, seq_len=24, dtype="float32",
    )  # fmt: skip
    (note,) = [note for note in report.notes if note.startswith("weights, scales and norms trained for")]
    assert ("cross-entropy on" if loss == "data" else "KL on") in note
    assert report.method == "qat"
    assert report.verification is not None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"loss": "kl"}, "loss='kl' is unknown: use one of ['original', 'data']"),
        ({"loss": "data"}, "loss='data' trains the weights: add method='qat'"),
        ({"epochs": 3}, "epochs=3 needs training: use effort='high', 'max' or method='qat'"),
        ({"method": "qat", "epochs": 0}, "epochs=0 trains nothing: use 1 or more"),
        (
            {"method": "qat", "scheme": QuantScheme(8, -1, activation_bits=8)},
            "method='qat' trains for exact activations, not w8a8: use gptq",
        ),
    ],
)
def test_what_does_not_fit_together(
    options: dict[str, object], expected: str, tiny_model: Folders, tmp_path: Path
) -> None:
    with pytest.raises(LowbitError, match="^" + expected.replace("[", r"\[")):
        lowbit.quantize(tiny_model("llama"), output=tmp_path / "out", dataset="self", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_that_cannot_be_trained(
    refused: Refused, tiny_model: Folders, text_file: str
) -> None:
    line = refused(
        tiny_model("gpt2"), "--format", "gptq", "--group-size", 32, "--dataset", text_file,
        "--samples", 16, "--seq-len", 24, method="qat",
    )  # fmt: skip
    assert line == "GPT2LMHeadModel has no linear layer that can be trained: use --method gptq"
