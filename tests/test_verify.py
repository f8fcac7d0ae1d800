"""A checkpoint that is not what was computed never gets its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit import QuantScheme, pipeline
from lowbit.checkpoint import CheckpointWriter
from lowbit.errors import LowbitError, VerificationError
from lowbit.formats import awq, compressed_tensors, gptq
from lowbit.stream import Stream
from lowbit.verify import verify
from tests.tiny import FAMILIES

Folders = Callable[..., Path]
Damage = Callable[[dict[str, Tensor]], None]


def run(folder: Path, output: Path, format_name: str = "compressed-tensors", **options: Any) -> None:
    scheme = QuantScheme(4, 32, symmetric=format_name != "awq")
    pipeline.quantize(folder, scheme, output=output, method="rtn", format=format_name, **options)


def damage_on_disk(monkeypatch: pytest.MonkeyPatch, damage: Damage) -> None:
    """Let `damage` change the tensors of every checkpoint right after it is written."""
    finish = CheckpointWriter.finish

    def damaged(self: CheckpointWriter, *args: Any) -> None:
        finish(self, *args)
        [file] = self.folder.glob("*.safetensors")
        tensors = load_file(file)
        damage(tensors)
        save_file(tensors, file, {"format": "pt"})

    monkeypatch.setattr(CheckpointWriter, "finish", damaged)


def flip(suffix: str) -> Damage:
    """One bit of one word of one layer in the middle block."""

    def damage(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in sorted(tensors) if ".1." in key and key.endswith(suffix))
        tensors[key].view(torch.int32)[0, 0] ^= 1

    return damage


def next_scale(tensors: dict[str, Tensor]) -> None:
    """One scale becomes its neighbour in bfloat16, which is all that a loader sees of it."""
    key = next(key for key in sorted(tensors) if ".1." in key and key.endswith(("weight_scale", ".scales")))
    tensors[key][0, 0] *= 1 + 2**-7


def neutral_norm(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.input_layernorm.weight"].fill_(1)


def lost(*parts: str) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            if any(part in key for part in parts):
                del tensors[key]

    return damage


def swapped(tensors: dict[str, Tensor]) -> None:
    """The right tensors under each other's names."""
    for part in ("weight_packed", "weight_scale"):
        one, two = (f"model.layers.{i}.mlp.up_proj.{part}" for i in (0, 1))
        tensors[one], tensors[two] = tensors[two], tensors[one]


@pytest.mark.parametrize(
    ("format_name", "damage"),
    [
        ("compressed-tensors", flip("weight_packed")),
        ("gptq", flip("qweight")),
        ("awq", flip("qweight")),
        ("awq", flip("qzeros")),
        ("gptq", flip("qzeros")),
        ("compressed-tensors", next_scale),
        ("gptq", next_scale),
        ("compressed-tensors", swapped),
        ("compressed-tensors", neutral_norm),
        ("gptq", neutral_norm),
        ("compressed-tensors", lost("layers.1.mlp.up_proj.weight_scale")),
        ("compressed-tensors", lost("layers.1.mlp.up_proj.")),
        ("gptq", lost("layers.1.mlp.up_proj.qweight")),
        ("gptq", lost("layers.1.mlp.up_proj.")),
        ("compressed-tensors", lost("layers.1.input_layernorm")),
        ("gptq", lost("layers.1.input_layernorm")),
        ("compressed-tensors", lost("embed_tokens")),
        ("compressed-tensors", lost("lm_head")),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_removed(
    tiny_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: str, damage: Damage
) -> None:
    damage_on_disk(monkeypatch, damage)
    with pytest.raises((VerificationError, LowbitError)) as caught:
        run(tiny_model("llama", tied=False), tmp_path / "out", format_name)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["qwen2", "opt", "gpt2"])
def test_a_lost_bias_is_noticed(
    tiny_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    damage_on_disk(monkeypatch, lost("1.self_attn.q_proj.bias", "1.attn.c_attn.bias"))
    with pytest.raises((VerificationError, LowbitError)):
        run(tiny_model(family), tmp_path / "out", "gptq")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_one_bit_is_noticed_in_every_kind_of_layer(
    tiny_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Experts and Conv1D too: a bit that moves no logit by a thousandth."""
    suffix = "experts.0.w1.qweight" if family == "mixtral" else ".qweight"
    suffix = "experts.0.gate_proj.qweight" if family == "qwen3_moe" else suffix
    damage_on_disk(monkeypatch, flip(suffix))
    with pytest.raises(VerificationError):
        run(tiny_model(family), tmp_path / "out", "gptq")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "name"), [(compressed_tensors, "compressed-tensors"), (gptq, "gptq"), (awq, "awq")]
)
def test_a_format_that_packs_wrongly_is_noticed(
    tiny_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    pack = module.pack

    def rotated(weight: Any) -> dict[str, Tensor]:
        tensors = pack(weight)
        first = next(iter(tensors))
        return {**tensors, first: tensors[first].roll(1, 0).contiguous()}

    monkeypatch.setattr(module, "pack", rotated)
    with pytest.raises(VerificationError):
        run(tiny_model("llama"), tmp_path / "out", name)
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_loaders_misread_is_noticed(
    tiny_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `quantization_status` transformers fills the model with random numbers, silently."""
    make = compressed_tensors.quantization_config

    def without(*args: Any) -> dict[str, Any]:
        return {key: value for key, value in make(*args).items() if key != "quantization_status"}

    monkeypatch.setattr(compressed_tensors, "quantization_config", without)
    with pytest.raises((VerificationError, LowbitError)):
        run(tiny_model("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_good_checkpoint_that_stands_there_survives(
    tiny_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_model("llama"), tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    damage_on_disk(monkeypatch, flip("weight_packed"))
    with pytest.raises(VerificationError):
        run(tiny_model("qwen2"), tmp_path / "out", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nan_logits_are_not_equal(tiny_model: Folders, tmp_path: Path) -> None:
    run(tiny_model("llama"), tmp_path / "out")
    ids = torch.arange(3, 20)[None]
    logits = torch.full((1, 17, 352), float("nan"))
    with pytest.raises(VerificationError, match="nan nats away"):
        verify(tmp_path / "out", "compressed-tensors", ids, logits, {})


def test_a_fingerprint_without_its_module_is_noticed(tiny_model: Folders, tmp_path: Path) -> None:
    run(tiny_model("llama"), tmp_path / "out")
    ids = torch.arange(3, 20)[None]
    with pytest.raises(VerificationError, match="can't be read back"):
        verify(tmp_path / "out", "compressed-tensors", ids, torch.zeros(1, 17, 352), {"no.such": b""})


def test_the_loader_is_named(tiny_model: Folders, tmp_path: Path) -> None:
    report = pipeline.quantize(
        tiny_model("llama"), QuantScheme(4, 32), output=tmp_path / "a", method="rtn", format="gptq"
    )
    assert report.verification is not None
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["bits"] == 4
    assert report.verification.loader in (
        "stock transformers",
        "lowbit's own reader (transformers needs gptqmodel for gptq)",
    )


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq"])
def test_one_block_is_in_memory_at_a_time(
    tiny_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: str
) -> None:
    run(tiny_model("llama"), tmp_path / "out", format_name, verify_output=False)
    held: list[int] = []
    advance = Stream.advance

    def counted(self: Stream, *args: Any) -> Iterator[int]:
        held.append(sum(not next(block.parameters()).is_meta for block in self.blocks))
        return advance(self, *args)

    monkeypatch.setattr(Stream, "advance", counted)
    with pytest.raises(VerificationError, match="nats away"):
        verify(tmp_path / "out", format_name, torch.arange(3, 20)[None], 9 * torch.rand(1, 17, 352), {})
    assert held == [1, 1, 1]
