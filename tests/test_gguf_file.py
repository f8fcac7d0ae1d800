"""GGUF files, read by transformers' own loader, which undoes llama.cpp's order of rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import lowbit
from lowbit import LowbitError, QuantScheme, source
from lowbit.conversion import convert
from lowbit.gguf_file import llama3_factors
from lowbit.gguf_vocab import SPLITS
from tests.packed import foreign
from tests.refused import snapshot
from tests.tiny import TEXT

Folders = Callable[..., Path]
SCHEMES = {"Q4_0": QuantScheme(4, 64), "Q5_0": QuantScheme(4, 32, False), "Q8_0": QuantScheme(8, 32)}


def state(folder: Path) -> dict[str, torch.Tensor]:
    return dict(lowbit.load(folder, packed=False, dtype=torch.bfloat16).state_dict())


CASES = [("llama", "Q4_0"), ("mistral", "Q8_0"), ("qwen2", "Q5_0")]  # one of each


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_transformers_reads_the_same_model(
    checkpoint: Folders, tmp_path: Path, family: str, kind: str
) -> None:
    packed = checkpoint(family, SCHEMES[kind], format="awq" if kind == "Q5_0" else "compressed-tensors")
    result = convert(packed, tmp_path / "model.gguf")
    assert result.layers == {kind: 21}
    read = source.find(str(tmp_path / "model.gguf"), tmp_path)
    found, expected = state(read), state(packed)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    theirs, ours = AutoTokenizer.from_pretrained(packed), AutoTokenizer.from_pretrained(read)
    assert ours(TEXT, add_special_tokens=False) == theirs(TEXT, add_special_tokens=False)
    assert ours.chat_template == theirs.chat_template
    before, after = (AutoConfig.from_pretrained(folder) for folder in (packed, read))
    for name in (
        "rms_norm_eps",
        "num_key_value_heads",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
    ):
        assert getattr(after, name) == getattr(before, name), name
    assert after.rope_parameters["rope_theta"] == before.rope_parameters["rope_theta"]


def test_qwen3(checkpoint: Folders, tmp_path: Path) -> None:
    """transformers' loader takes every Qwen3 for one with heads of 128 columns."""
    packed = checkpoint("qwen3")
    convert(packed, tmp_path / "model.gguf")
    reader, expected = gguf.GGUFReader(tmp_path / "model.gguf"), state(packed)
    found = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    for ours, theirs in (("self_attn.q_proj", "attn_q"), ("self_attn.q_norm", "attn_q_norm"),
                         ("mlp.down_proj", "ffn_down")):  # fmt: skip
        assert torch.equal(
            found[f"blk.1.{theirs}.weight"].bfloat16(), expected[f"model.layers.1.{ours}.weight"]
        )
    length = reader.get_field("qwen3.attention.key_length")
    assert length is not None
    assert length.contents() == AutoConfig.from_pretrained(packed).head_dim


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(checkpoint: Folders, tmp_path: Path, tied: bool) -> None:
    convert(checkpoint("llama", tied=tied), tmp_path / "model.gguf")
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert ("output.weight" in names) is not tied


def test_a_strangers_gptq(tiny_model: Folders, tmp_path: Path) -> None:
    packed, dense = foreign(tiny_model("llama"), tmp_path / "stranger", "gptq", True, act_order=False)
    convert(packed, tmp_path / "model.gguf")
    found, expected = state(source.find(str(tmp_path / "model.gguf"), tmp_path)), state(dense)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def refusal(tmp_path: Path, source: Path, output: str = "out.gguf", **options: Any) -> str:
    before = snapshot(tmp_path)
    with pytest.raises(LowbitError) as error:
        convert(source, tmp_path / output, **options)
    assert snapshot(tmp_path) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_blocks_cannot_hold(checkpoint: Folders, tiny_model: Folders, tmp_path: Path) -> None:
    packed = checkpoint("llama", QuantScheme(4, 16))
    assert "groups of 16 columns are not made of gguf's blocks of 32" in refusal(tmp_path, packed)
    result = convert(packed, tmp_path / "model.gguf", lossy=True)
    assert len(result.requantized) == 21
    assert result.layers == {"Q4_0": 21}
    ordered, _ = foreign(tiny_model("llama"), tmp_path / "stranger", "gptq", True, act_order=True)
    assert "scattered over the columns (act-order), which gguf can't hold" in refusal(tmp_path, ordered)


def test_what_llama_cpp_cannot_compute(checkpoint: Folders, tmp_path: Path) -> None:
    assert "gemma3_text can't be written as gguf: lowbit knows" in refusal(tmp_path, checkpoint("gemma3"))
    other = shutil.copytree(checkpoint("llama"), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    for change, expected in (
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not what llama.cpp computes"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='dynamic'",
        ),
    ):
        (other / "config.json").write_text(json.dumps(config | change))
        assert expected in refusal(tmp_path, other)


def test_the_output(checkpoint: Folders, tmp_path: Path) -> None:
    packed = checkpoint("llama")
    assert "the format of" in refusal(tmp_path, packed, "out")
    assert "only a gguf file ends in .gguf" in refusal(tmp_path, packed, "out.gguf", format="gptq")
    assert "only a gguf file ends in .gguf" in refusal(tmp_path, packed, "out", format="gguf")
    (tmp_path / "out.gguf").write_text("something")
    assert "out.gguf exists: choose another or add --overwrite" in refusal(tmp_path, packed)
    convert(packed, tmp_path / "out.gguf", overwrite=True)
    assert {file.name for file in tmp_path.iterdir()} == {"out.gguf"}
    assert gguf.GGUFReader(tmp_path / "out.gguf").tensors


def test_llama3_frequencies() -> None:
    """Against the function that transformers computes with."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = AutoConfig.for_model("llama", rope_parameters=rope, head_dim=128, max_position_embeddings=131072)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    assert torch.allclose(llama3_factors(rope, 128), plain / stretched, rtol=1e-5)


def split_by(folder: Path, target: Path, splitter: dict[str, Any]) -> Path:
    shutil.copytree(folder, target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = splitter
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    return target


@pytest.mark.parametrize("name", ["gpt-2", "smollm", *SPLITS.values()])
def test_how_text_is_split(checkpoint: Folders, tmp_path: Path, name: str) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps = [byte_level]
    if name == "smollm":
        steps = [{"type": "Digits", "individual_digits": True}, byte_level]
    for expression, known in SPLITS.items():
        if name == known:
            split = {
                "type": "Split",
                "pattern": {"Regex": expression},
                "behavior": "Isolated",
                "invert": False,
            }
            steps = [split, byte_level | {"use_regex": False}]
    folder = split_by(checkpoint("llama"), tmp_path / "one", {"type": "Sequence", "pretokenizers": steps})
    AutoTokenizer.from_pretrained(folder)
    convert(folder, tmp_path / "model.gguf")
    field = gguf.GGUFReader(tmp_path / "model.gguf").get_field("tokenizer.ggml.pre")
    assert field is not None
    assert field.contents() == name


def test_an_unknown_split(checkpoint: Folders, tmp_path: Path) -> None:
    folder = split_by(checkpoint("llama"), tmp_path / "one", {"type": "Whitespace"})
    assert "splits text in a way that lowbit can't name to llama.cpp" in refusal(tmp_path, folder)
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json and no tokenizer.model" in refusal(tmp_path, folder)
