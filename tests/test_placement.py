"""What is packed in the files of a checkpoint, as far as their headers tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.placement import packed_layers

PACKED = FORMATS["compressed-tensors"]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e8m0fnu, torch.uint16, torch.float64], ids=str
)
def test_parts_have_the_dtype_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a.weight_packed": torch.zeros(2, 3, dtype=torch.int32), "a.weight_scale": torch.ones(2, 1)}
    tensors["a.weight_scale"] = tensors["a.weight_scale"].to(dtype)
    save_file(tensors, tmp_path / "a.safetensors")
    parts = packed_layers([str(tmp_path / "a.safetensors")], PACKED)["a"]
    assert {suffix: (part.shape, part.dtype, part.is_meta) for suffix, part in parts.items()} == {
        "weight_packed": ((2, 3), torch.int32, True),
        "weight_scale": ((2, 1), dtype, True),
    }


def test_a_dtype_that_is_not_known_is_refused(tmp_path: Path) -> None:
    pairs = torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file({"a.weight_scale": pairs}, tmp_path / "a.safetensors")
    with pytest.raises(LowbitError, match=r"a\.safetensors: a\.weight_scale is stored as F4: convert it"):
        packed_layers([str(tmp_path / "a.safetensors")], PACKED)
