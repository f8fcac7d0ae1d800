"""One scheme per matrix: mixed checkpoints, held against uniform ones and read by stock transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit import QuantScheme
from lowbit.errors import LowbitError
from lowbit.inspection import inspect
from lowbit.results import Report
from tests.page import Page

W4, W8, W3 = QuantScheme(4, 32), QuantScheme(8, -1), QuantScheme(3, 16)
SCHEMES = {"down_proj": W8, "layers.0.mlp.down_proj": W3, "layers.1.self_attn.[qkv]_proj": QuantScheme(4, 64)}


def scheme_of(name: str) -> QuantScheme:
    """What `SCHEMES` says, written out."""
    if "down_proj" in name:
        return W3 if ".0." in name else W8
    return QuantScheme(4, 64) if ".1.self_attn" in name and ".o_proj" not in name else W4


def test_every_matrix_is_what_its_scheme_alone_makes_of_it(
    quantize: Callable[..., Report], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Rounding to nearest knows no neighbours: a mixed checkpoint is cut together from uniform ones."""
    model = tiny_model("llama")
    report = quantize(model, W4, schemes=SCHEMES)
    assert report.scheme == "w3g16+w4g64+w4g32+w8row"
    uniform = {}
    for scheme in (W4, W8, W3, QuantScheme(4, 64)):
        quantize(model, scheme, output=tmp_path / str(scheme))
        uniform[scheme] = load_file(tmp_path / str(scheme) / "model.safetensors")
    mixed = load_file(report.output / "model.safetensors")
    packed = [name for name in mixed if "weight_" in name]
    assert len(packed) == 3 * len(report.layers)
    for name in packed:
        assert torch.equal(mixed[name], uniform[scheme_of(name)][name]), name
    assert {layer.name: layer.scheme for layer in report.layers} == {
        layer.name: str(scheme_of(layer.name)) for layer in report.layers
    }


@pytest.mark.parametrize("method", ["rtn", "awq", "qronos"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_stock_transformers_reads_it(
    quantize: Callable[..., Report], tiny_model: Callable[..., Path], method: str, family: str
) -> None:
    schemes = SCHEMES if family == "llama" else {"o_proj": W8, "layers.1.self_attn.[qkv]_proj": W3}
    report = quantize(tiny_model(family), W4, schemes=schemes, method=method)
    assert report.verification is not None
    assert report.verification.loader == "stock transformers"
    ids = torch.arange(3, 60)[None]
    stock = AutoModelForCausalLM.from_pretrained(report.output)(input_ids=ids).logits
    assert torch.equal(lowbit.load(report.output, packed=False)(input_ids=ids).logits, stock)


def test_bits_per_weight_are_those_of_the_parts(
    quantize: Callable[..., Report], tiny_model: Callable[..., Path]
) -> None:
    report = quantize(tiny_model("llama"), W4, schemes=SCHEMES)
    bits = sum(
        layer.shape[0] * layer.shape[1] * scheme_of(layer.name).bits_per_weight(layer.shape[1])
        + 2 * 64  # weight_shape
        for layer in report.layers
    )
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    assert inspect(report.output).bits_per_weight(True) == pytest.approx(bits / weights)
    page = Page.of(report.output)
    (shown,) = [table for table in page.tables if table[0] == ["", "self_attn", "mlp"]][1:]
    columns, rows = shown[1][1:], {row[0]: row[1:] for row in shown[2:]}
    assert rows["0"][columns.index("down")] == "4"  # 3 + 16 / 16
    assert rows["1"][columns.index("down")] == f"{8 + 16 / 128:.3g}"
    assert rows["1"][columns.index("q")] == "4.25"
    card = (report.output / "README.md").read_text(encoding="utf-8")
    assert f"`w3g16+w4g64+w4g32+w8row`: {bits / weights:.2f} bits per quantized weight" in card
    assert all(f"- {width}-bit" in card for width in (3, 4, 8))


def test_what_engines_fuse_is_alike(quantize: Callable[..., Report], tiny_model: Callable[..., Path]) -> None:
    report = quantize(tiny_model("llama"), W4, schemes={"layers.0.self_attn.k_proj": W8, "up_proj": W3})
    schemes = {layer.name.removeprefix("model.layers."): layer.scheme for layer in report.layers}
    assert {schemes[f"0.self_attn.{part}_proj"] for part in "qkv"} == {"w8row"}
    assert schemes["0.self_attn.o_proj"] == schemes["1.self_attn.q_proj"] == "w4g32"
    assert {schemes[f"{block}.mlp.{part}_proj"] for block in (0, 1) for part in ("gate", "up")} == {"w4g32"}
    assert (
        "model.layers.0.self_attn.q_proj is w8row too: engines fuse it with model.layers.0.self_attn.k_proj"
        in report.notes
    )


@pytest.mark.parametrize(
    ("family", "scheme", "options", "message"),
    [
        ("llama", W4, {"format": "gptq", "schemes": {"o_proj": W8}}, "gptq holds one scheme per checkpoint"),
        ("llama", QuantScheme(4, 32, False), {"schemes": {"o_proj": W4}}, "asymmetric weights in mixed"),
        ("llama", W4, {"schemes": {"nothing": W8}}, "scheme for 'nothing' matches no linear layer: .*q_proj"),
        ("llama", W4, {"schemes": {"o_proj": QuantScheme(4, 48)}}, "o_proj: group_size=48 does not divide"),
        ("mixtral", W4, {"schemes": {"experts.down_proj.*": W8}}, "experts must share a scheme"),
    ],
)
def test_refusals(
    quantize: Callable[..., Report],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    family: str,
    scheme: QuantScheme,
    options: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(LowbitError, match=message):
        quantize(tiny_model(family), scheme, **options)
    assert not (tmp_path / "out").exists()
