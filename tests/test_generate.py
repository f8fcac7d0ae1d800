"""`lowbit generate` and `lowbit bench` from the command line, and what they measure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lowbit
from lowbit import LowbitError, QuantScheme, hf, nn, speed
from lowbit.cli import app
from lowbit.nn import DenseLinear


def test_streams_what_it_generates(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("llama", QuantScheme(4, 32))
    model, tokenizer = lowbit.load(folder), hf.load_tokenizer(folder)
    pieces: list[str] = []
    done = speed.generate(model, tokenizer, "The river", max_new_tokens=9, chat=False, write=pieces.append)
    ids = tokenizer("The river", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    assert "".join(pieces) == done.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert done.prompt_tokens == ids.shape[1]
    assert done.new_tokens == len(expected) > 1
    assert done.first_seconds > 0
    assert done.decode_cpu_seconds > 0
    assert done.tokens_per_second == pytest.approx((done.new_tokens - 1) / done.decode_seconds)


def test_applies_the_chat_template(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("llama", QuantScheme(4, 32))
    model, tokenizer = lowbit.load(folder), hf.load_tokenizer(folder)
    chat = speed.generate(model, tokenizer, "The river", max_new_tokens=2)
    raw = speed.generate(model, tokenizer, "The river", max_new_tokens=2, chat=False)
    assert chat.prompt_tokens > raw.prompt_tokens
    assert speed.generate(model, tokenizer, "x", max_new_tokens=3, temperature=0.7).new_tokens <= 3


def test_no_prompt_is_refused(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen2", QuantScheme(4, 32), head_bits=8, tied=True)
    with pytest.raises(LowbitError, match="holds no token"):
        speed.generate(lowbit.load(folder), hf.load_tokenizer(folder), "", chat=False)


def test_generate_command(checkpoint: Callable[..., Path]) -> None:
    folder = str(checkpoint("llama", QuantScheme(4, 32)))
    command = [
        "generate",
        folder,
        "--prompt",
        "The river",
        "--raw",
        "--max-new-tokens",
        "5",
        "--device",
        "cpu",
    ]
    plain = CliRunner().invoke(app, command)
    assert plain.exit_code == 0, plain.output
    assert re.search(r"[\d.]+ tokens/s, \d+ tokens \(\d+ in, first after [\d.]+ s\)", plain.stderr)
    as_json = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert as_json["text"] in plain.stdout
    assert as_json["new_tokens"] == 5


def test_bench_command(checkpoint: Callable[..., Path], tiny_model: Callable[..., Path]) -> None:
    folder, original = str(checkpoint("llama", QuantScheme(4, 32))), str(tiny_model("llama", tied=None))
    command = ["bench", folder, "--reference", original, "--prompt-tokens", "16", "--new-tokens", "4",
               "--threads", "1", "--device", "cpu", "--json"]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found) == [folder, original]
    for one in found.values():
        assert min(one[key] for key in ("prefill", "prefill_cpu", "decode", "decode_cpu")) > 0
        assert one["peak_memory"] > one["weight_bytes"] > 0
    assert found[folder]["weight_bytes"] < 0.6 * found[original]["weight_bytes"]


def test_bench_names_what_it_cannot_load(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="is no model"):
        speed.bench([str(tmp_path)], prompt_tokens=4, new_tokens=1)


def test_weight_bytes_counts_what_is_multiplied(checkpoint: Callable[..., Path]) -> None:
    packed, dense = (lowbit.load(checkpoint("llama", QuantScheme(4, 32)), packed=p) for p in (True, False))
    linears = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    rest = 352 * 64 + 7 * 64
    assert speed.weight_bytes(dense) == 2 * (linears + rest)
    codes, pairs, blocks = linears // 2, linears // 32 * 4, 3 * 2 * 32 * (64 // 2 + 64 // 32 * 4)
    # a scale and a zero of 16 bits for 32 codes; k and v, of 32 rows, fill half of a block of 64
    assert speed.weight_bytes(packed) in (codes + pairs + 2 * rest, codes + pairs + blocks + 2 * rest)


@pytest.mark.parametrize("way", ["mv", "linear"])
def test_dense_layer_multiplies_a_row_as_linear_does(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn, "_mv_is_faster", lambda: way == "mv")
    linear = torch.nn.Linear(96, 40).bfloat16()
    layer = DenseLinear.of(linear)
    assert layer.weight is linear.weight
    for shape in ((96,), (1, 96), (1, 1, 96), (2, 3, 96)):
        x = torch.randn(shape).bfloat16()
        with torch.no_grad():
            found, expected = layer(x), linear(x)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
    assert layer(torch.randn(1, 96).bfloat16()).requires_grad
