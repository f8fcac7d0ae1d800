"""`lowbit convert` on checkpoints as the hub has them: packed by another tool, in shards, with its own files.

The stranger's codes are read here by the loops of its tool, ours by compressed-tensors' own function.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from lowbit.cli import app
from tests.packed import foreign

Folders = Callable[..., Path]
KINDS = [("gptq", True), ("gptq", False), ("gptq_v2", True), ("gptq_v2", False), ("awq", False)]


def as_on_the_hub(packed: Path) -> Path:
    """Two shards and an index, and the file in which the tool repeats its settings."""
    whole = packed / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    weight_map = {
        name: f"model-0000{1 + number % 2}-of-00002.safetensors"
        for number, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name, where in weight_map.items() if where == file}
        save_file(part, packed / file, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (packed / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = json.loads((packed / "config.json").read_text())["quantization_config"]
    (packed / "quantize_config.json").write_text(json.dumps(settings))
    return packed


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def strangers_codes(kind: str, qweight: Tensor) -> np.ndarray:
    """`[out, in]`: AutoGPTQ packs eight rows of the transposed weight into a word, AutoAWQ eight columns."""
    words = qweight.numpy().view(np.uint32)
    places = [0, 4, 1, 5, 2, 6, 3, 7] if kind == "awq" else range(8)
    fields = np.stack([(words >> np.uint32(4 * place)) & 15 for place in places], axis=-1)
    if kind == "awq":
        return fields.reshape(len(words), -1).T
    return fields.transpose(0, 2, 1).reshape(-1, words.shape[1]).T


@pytest.mark.parametrize(("kind", "symmetric"), KINDS)
def test_the_same_codes_there_and_back(
    tiny_model: Folders, tmp_path: Path, kind: str, symmetric: bool
) -> None:
    packed, _ = foreign(tiny_model("llama"), tmp_path / "stranger", kind, symmetric, act_order=False)
    stranger = as_on_the_hub(packed)
    ours, back = tmp_path / "ours", tmp_path / "back"
    for source, target, form in (
        (stranger, ours, "compressed-tensors"),
        (ours, back, kind.replace("_", "-")),
    ):
        done = CliRunner().invoke(app, ["convert", str(source), str(target), "--format", form, "--json"])
        assert done.exit_code == 0, done.output
    before, between, after = tensors_of(stranger), tensors_of(ours), tensors_of(back)
    layers = [name.removesuffix(".qweight") for name in before if name.endswith(".qweight")]
    assert len(layers) == 21
    for name in layers:
        codes = strangers_codes(kind, before[f"{name}.qweight"])
        found = unpack_from_int32(between[f"{name}.weight_packed"], 4, torch.Size(codes.shape))
        assert np.array_equal(found.numpy().astype(np.int64) + 8, codes.astype(np.int64)), name
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert not (ours / "quantize_config.json").exists()
