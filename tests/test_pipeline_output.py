"""`lowbit.quantize` from end to end: what it writes, and what it leaves alone."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit import QuantScheme, dataset, hf
from lowbit.judge import head_inputs
from lowbit.results import Report

Folders = Callable[..., Path]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


# --- what is written


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_the_same_seed_gives_the_same_bytes(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path, method: str
) -> None:
    for name, options in [("a", {}), ("b", {}), ("c", {"seed": 1})]:
        quantize(tiny_model("mixtral"), method=method, output=tmp_path / name, dataset="self", samples=3,
                 seq_len=32, **options)  # fmt: skip
    # These tell how long this very run took, and the last one vouches for them.
    described = {"lowbit_report.json", "report.html", "README.md", "SHA256SUMS"}
    files = {
        name: {f.name: f.read_bytes() for f in (tmp_path / name).iterdir() if f.name not in described}
        for name in "abc"
    }
    assert files["a"] == files["b"]
    same_weights = files["a"]["model.safetensors"] == files["c"]["model.safetensors"]
    assert same_weights == (method == "rtn")


def test_what_stood_beside_the_model_comes_along(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (folder / "preprocessor.json").write_text('{"own": 1}')
    (folder / "modeling_own.py").write_text("# code of its own\n")
    (folder / "README.md").write_text("The card of the original.")
    report = quantize(folder)
    carried = {f.name for f in folder.iterdir()} - {"model.safetensors", "config.json", "README.md"}
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    } < carried
    for name in carried:
        assert (report.output / name).read_bytes() == (folder / name).read_bytes()
    ours = {
        "model.safetensors",
        "config.json",
        "README.md",
        "report.html",
        "lowbit_report.json",
        "SHA256SUMS",
    }
    assert {f.name for f in report.output.iterdir()} == carried | ours
    assert "The card of the original." not in (report.output / "README.md").read_text()
    chat = [{"role": "user", "content": "Who built the mill?"}]
    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(report.output)
    assert after.apply_chat_template(chat) == before.apply_chat_template(chat)
    assert AutoModelForCausalLM.from_pretrained(report.output).generation_config.eos_token_id == 2


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_shards_hold_what_one_file_holds(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path, family: str
) -> None:
    whole = tensors_of(quantize(tiny_model(family), output=tmp_path / "whole").output)
    parts = quantize(tiny_model(family), output=tmp_path / "parts", max_shard_size="60KB").output
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    shards = sorted(parts.glob("*.safetensors"))
    assert len(shards) > 2
    found = tensors_of(parts)
    assert set(index["weight_map"]) == set(found) == set(whole)
    for shard in shards:
        assert {k for k, name in index["weight_map"].items() if name == shard.name} == set(load_file(shard))
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())


def test_sharded_input_gives_the_same_output(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path
) -> None:
    one = tensors_of(quantize(tiny_model("llama"), output=tmp_path / "one", method="gptq").output)
    many = tiny_model("llama", max_shard_size="60KB")
    two = tensors_of(quantize(many, output=tmp_path / "two", method="gptq").output)
    assert set(one) == set(two)
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_a_tied_embedding_is_stored_once(
    quantize: Callable[..., Report], tiny_model: Folders, family: str
) -> None:
    report = quantize(tiny_model(family, tied=True))
    stored = tensors_of(report.output)
    assert not any(key.startswith("lm_head") for key in stored)
    assert config_of(report.output)["tie_word_embeddings"] is True
    model = AutoModelForCausalLM.from_pretrained(report.output)
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_a_quantized_head_is_untied(
    quantize: Callable[..., Report], tiny_model: Folders, family: str, tied: bool
) -> None:
    folder = tiny_model(family, tied=tied)
    report = quantize(folder, head_bits=8)
    before, after = tensors_of(folder), tensors_of(report.output)
    embedding = next(key for key in before if "embed_tokens" in key)
    assert torch.equal(after[embedding], before[embedding])
    assert {key for key in after if key.startswith("lm_head")} == {
        f"lm_head.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")
    }
    assert config_of(report.output)["tie_word_embeddings"] is False
    assert [(layer.name, layer.scheme) for layer in report.layers if layer.name == "lm_head"] == [
        ("lm_head", "w8g32")
    ]
    assert "lm_head" not in report.skipped
    stock, ours = (
        AutoModelForCausalLM.from_pretrained(report.output).eval(),
        hf.load(report.output, packed=False),
    )
    original = before.get("lm_head.weight", before[embedding]).float()
    dense = ours.lm_head.weight.float()
    assert 1e-4 < (dense - original).norm() / original.norm() < 0.01
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, ours(ids).logits, rtol=0, atol=0.02)
    assert not torch.equal(ours.get_input_embeddings().weight, ours.lm_head.weight)


@pytest.mark.parametrize("method", ["quick", "qronos"])
def test_a_head_is_rounded_by_the_method_on_what_it_reads(
    quantize: Callable[..., Report], tiny_model: Folders, method: str
) -> None:
    """Judged by the output that the original's head inputs lose, on tokens that are not the calibration's."""
    folder = tiny_model("llama")
    whole = hf.load_stock(folder, torch.float32)
    ids = torch.randint(0, whole.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(0))
    (read,) = head_inputs(whole, [ids])
    lost = {}
    for name in ("rtn", method):
        output = Path(quantize(folder, head_bits=4, method=name, dtype="float32", overwrite=True).output)
        head = hf.load(output, packed=False, dtype=torch.float32).get_output_embeddings().weight
        lost[name] = float((read @ (head - whole.get_output_embeddings().weight).T).square().mean().detach())
    assert lost[method] < 0.9 * lost["rtn"]


def test_a_quantized_head_is_verified(
    quantize: Callable[..., Report], tiny_model: Folders, recwarn: pytest.WarningsRecorder
) -> None:
    report = quantize(tiny_model("llama", tied=True), head_bits=8)
    assert report.verification is not None
    assert report.verification.weights == len(report.layers) == 22
    assert not [w for w in recwarn if "requires_grad" in str(w.message)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_what_is_written_is_bfloat16(
    quantize: Callable[..., Report], tiny_model: Folders, dtype: torch.dtype, method: str
) -> None:
    folder = tiny_model("llama", dtype=dtype)
    report = quantize(folder, method=method)
    floats = {t.dtype for t in tensors_of(report.output).values() if t.is_floating_point()}
    assert floats == {torch.bfloat16}
    config = config_of(report.output)
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config


def test_the_config_names_a_method_that_loaders_know(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path
) -> None:
    for format_name in ("compressed-tensors", "gptq", "awq"):
        scheme = QuantScheme(4, 32, symmetric=format_name != "awq")
        report = quantize(tiny_model("llama"), scheme, format=format_name, output=tmp_path / format_name)
        config = config_of(report.output)
        assert config["quantization_config"]["quant_method"] == format_name
        assert "lowbit" not in json.dumps(config["quantization_config"]).lower()
        source = config_of(tiny_model("llama"))
        kept = {k: v for k, v in config.items() if k not in ("quantization_config", "dtype", "lowbit")}
        assert kept == {k: v for k, v in source.items() if k != "dtype"}


def test_the_config_says_how_it_was_made(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path, text_file: str
) -> None:
    report = quantize(tiny_model("llama"), method="gptq", seed=3)
    made = config_of(report.output)["lowbit"]
    told = {
        "method": "gptq",
        "scheme": "w4g32",
        "dataset": "text.txt",
        "samples": 4,
        "seq_len": 48,
        "seed": 3,
    }
    assert {name: made[name] for name in told} == told
    assert made["torch"] == version("torch")
    assert str(Path(text_file).parent) not in json.dumps(made)
    ids = dataset.pack_tokens(
        dataset.read_documents(text_file), AutoTokenizer.from_pretrained(tiny_model("llama")), 4, 48, 3
    )
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
    assert made["tokens"] == digest
    assert digest in (report.output / "README.md").read_text()
    again = quantize(tiny_model("llama"), output=tmp_path / "rtn")
    assert "tokens" not in config_of(again.output)["lowbit"]


def test_tensors_that_the_architecture_does_not_use_are_copied(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    extra = {
        "mtp.head.weight": torch.randn(4, 4),
        "mtp.table": torch.arange(5),
        "model.layers.3.eh_proj.weight": torch.randn(4, 4),  # a draft layer beside the three
        "visual.blocks.0.weight": torch.randn(4, 4),
    }
    save_file(tensors_of(folder) | extra, folder / "model.safetensors", {"format": "pt"})
    report = quantize(folder)
    after = tensors_of(report.output)
    for key, tensor in extra.items():
        assert torch.equal(after[key], tensor)
        assert after[key].dtype == tensor.dtype
    for part in ("mtp.* (2 tensors)", "model.layers.3.* (1 tensors)", "visual.* (1 tensors)"):
        assert f"{part} is not used by the architecture: copied as it is" in report.notes


def test_names_without_the_prefix_of_the_model(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path
) -> None:
    """As in GPT-2's own repository, which also holds the causal masks."""
    folder = shutil.copytree(tiny_model("gpt2"), tmp_path / "model")
    plain = {key.removeprefix("transformer."): t for key, t in tensors_of(folder).items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(3)}
    save_file(plain | masks, folder / "model.safetensors", {"format": "pt"})
    report = quantize(folder, format="gptq")
    with torch.no_grad():
        found = hf.load(report.output, packed=False)(torch.arange(3, 40)[None]).logits
        reference = quantize(tiny_model("gpt2"), format="gptq", output=tmp_path / "reference").output
        assert torch.equal(found, hf.load(reference, packed=False)(torch.arange(3, 40)[None]).logits)


# --- what is left alone


def test_readers_of_one_input_are_skipped_together(
    quantize: Callable[..., Report], tiny_model: Folders
) -> None:
    report = quantize(tiny_model("llama"), skip=["layers.0.self_attn.q_proj", "layers.2.mlp.up_proj"])
    dense = {key.removesuffix(".weight") for key in tensors_of(report.output) if key.endswith("proj.weight")}
    assert dense == {f"model.layers.0.self_attn.{n}_proj" for n in "qkv"} | {
        f"model.layers.2.mlp.{n}_proj" for n in ("gate", "up")
    }
    assert dense <= set(report.skipped)
    assert report.skipped["model.layers.0.self_attn.v_proj"] == (
        "shares its input with model.layers.0.self_attn.q_proj, which is skipped"
    )
    assert sum("is skipped too" in note for note in report.notes) == 3
    assert set(config_of(report.output)["quantization_config"]["ignore"]) == dense | {"lm_head"}
    before = tensors_of(tiny_model("llama"))
    after = tensors_of(report.output)
    assert all(torch.equal(after[f"{name}.weight"], before[f"{name}.weight"]) for name in dense)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_skipped_layer_keeps_the_function_of_its_block(
    quantize: Callable[..., Report], tiny_model: Folders, method: str
) -> None:
    """AWQ may fold into a skipped layer; with eight bits the whole stays near the original."""
    report = quantize(tiny_model("opt"), QuantScheme(8, 32), skip=["v_proj", "fc1"], method=method)
    ids = torch.arange(3, 80)[None]
    with torch.no_grad():
        expected = hf.load(tiny_model("opt"), packed=False)(ids).logits.float().log_softmax(-1)
        found = hf.load(report.output, packed=False)(ids).logits.float().log_softmax(-1)
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-3


def test_group_size(quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path) -> None:
    assert quantize(tiny_model("llama"), None, output=tmp_path / "a").scheme == "w4g64"
    auto = quantize(tiny_model("llama"), QuantScheme(3, 128), auto_group=True, output=tmp_path / "b")
    assert auto.scheme == "w3g64"
    whole = quantize(tiny_model("llama"), QuantScheme(4, -1), output=tmp_path / "c")
    assert whole.scheme == "w4row"
    weights = config_of(whole.output)["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"]) == ("channel", None)
    scales = tensors_of(whole.output)["model.layers.0.mlp.down_proj.weight_scale"]
    assert scales.shape == (64, 1)
