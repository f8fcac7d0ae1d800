"""Packed checkpoints for tests: made, altered, written by an independent packer, and compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lowbit import QuantScheme
from tests.formats import reference
from tests.formats.samples import random_weight

IDS = torch.randint(3, 350, (2, 40), generator=torch.Generator().manual_seed(0))
# Root mean square over logits whose standard deviation is about one. Weights are rounded to bfloat16 in
# the dense model and not in the packed one, and sums in another order: about 0.02. A matrix
# read wrongly moves logits by 0.2 and more.
TOLERANCE = 0.05
CLEAR = 0.3  # a lead of the best token that such an error can't turn around


@torch.no_grad()
def logits(model: PreTrainedModel, rows: int = 40) -> Tensor:
    found: Tensor = model(IDS[:, :rows]).logits.float()
    return found


@torch.no_grad()
def assert_same_model(packed: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Logits of one token (the four-bit kernel), of many (dequantized tiles), and along greedy text."""
    for rows in (1, 40):
        assert distance(logits(packed, rows), logits(dense, rows)) < TOLERANCE
    answer = packed.generate(
        IDS[:1, :8], max_new_tokens=12, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    expected = dense(answer.sequences[:, :-1]).logits[0, 7:].float()
    found = torch.cat(answer.logits).float()
    assert distance(found, expected) < TOLERANCE
    margin = expected.topk(2).values
    clear = margin[:, 0] - margin[:, 1] > CLEAR
    assert clear.any()
    assert torch.equal(answer.sequences[0, 8:][clear], expected.argmax(-1)[clear])


def distance(found: Tensor, expected: Tensor) -> float:
    return (found - expected).square().mean().sqrt().item()


def assert_saved_as_read(model: PreTrainedModel, folder: Path, target: Path) -> None:
    model.save_pretrained(target)
    saved, read = load_file(target / "model.safetensors"), load_file(folder / "model.safetensors")
    assert saved.keys() == read.keys()
    for name, tensor in read.items():
        assert saved[name].dtype == tensor.dtype, name
        assert torch.equal(saved[name].view(torch.uint8), tensor.view(torch.uint8)), name
    configs = [json.loads((path / "config.json").read_text()) for path in (target, folder)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def rewrite(folder: Path, target: Path, layers: dict[str, dict[str, Any]], config: dict[str, Any]) -> Path:
    """A copy of the dense checkpoint `folder` with other tensors for some of its layers."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    for name, parts in layers.items():
        del tensors[f"{name}.weight"]
        for suffix, value in parts.items():
            value = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
            tensors[f"{name}.{suffix}"] = value.to(torch.int32) if suffix.startswith("q") else value
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    settings = json.loads((target / "config.json").read_text())
    settings["quantization_config"] = config
    (target / "config.json").write_text(json.dumps(settings))
    return target


def foreign(folder: Path, target: Path, kind: str, symmetric: bool, act_order: bool) -> tuple[Path, Path]:
    """A checkpoint by the independent packer, and the dense model that it stands for."""
    bits, group = 4, 32
    generator = torch.Generator().manual_seed(1)
    dense_tensors, layers = load_file(folder / "model.safetensors"), {}
    for seed, name in enumerate(sorted(dense_tensors)):
        if not name.endswith("_proj.weight"):
            continue
        rows, columns = dense_tensors[name].shape
        sample = random_weight(QuantScheme(bits, group, symmetric), (rows, columns), torch.float16, seed)
        scales = (sample.scales / 50).half()
        group_of = torch.arange(columns, dtype=torch.int32) // group
        if act_order:
            group_of = group_of[torch.randperm(columns, generator=generator)]
        zeros = sample.zeros.double()[:, group_of.long()]
        dense = (sample.codes.double() - zeros) * scales.double()[:, group_of.long()]
        dense_tensors[name] = dense.bfloat16()
        codes, zeros = sample.codes.numpy().astype(np.int64), sample.zeros.numpy().astype(np.int64)
        packed = (
            reference.awq(codes, zeros)
            if kind == "awq"
            else reference.gptq(codes, zeros, bits, kind == "gptq")
        )
        parts = {"qweight": packed[0], "qzeros": packed[1], "scales": scales.T}
        if kind != "awq":
            parts["g_idx"] = group_of
        layers[name.removesuffix(".weight")] = parts
    config: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric,
                              "desc_act": act_order, "checkpoint_format": kind}  # fmt: skip
    if kind == "awq":
        config = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group,
            "zero_point": True,
            "version": "gemm",
        }
    shutil.copytree(folder, target / "dense")
    save_file(dense_tensors, target / "dense" / "model.safetensors", {"format": "pt"})
    return rewrite(folder, target / "packed", layers, config), target / "dense"


def spoil(folder: Path, target: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target
