"""A GGUF file written tensor by tensor: names, hyperparameters, tokenizer, and what llama.cpp reorders.

As in `checkpoint.py`, data goes to a file beside the target as it comes, and is put behind the header
at the end. Names and the file's layout are the gguf package's. Architectures are those whose
hyperparameters are the common ones of Llama; every other is refused.

llama.cpp rotates neighbouring pairs of a head's rows for Llama, transformers rows that are half a head
apart. Rows of the query and key projections are therefore written in another order: for a
quantized matrix too, because codes, scales and zeros belong to rows, and no number changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from lowbit import gguf_header, untrusted
from lowbit.errors import LowbitError
from lowbit.formats import gguf as blocks
from lowbit.gguf_vocab import add_vocab
from lowbit.quantized import QuantizedWeight

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""`model_type` -> architecture of the gguf package."""

_FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8}
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COMPUTED = "rope_freqs.weight"
"""The one tensor of a file that is in no checkpoint."""

_UNUSED = (".rotary_emb.inv_freq",)  # computed by every reader; old checkpoints store it
_ROPE_KEYS = {
    "default": {"rope_type", "rope_theta"},
    "linear": {"rope_type", "rope_theta", "factor"},
    "llama3": {"rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"},
}  # fmt: skip


class GgufWriter:
    """A GGUF file in the making.

    Attributes:
        kinds: Type of every tensor added so far, by its name in the file.
        total_size: Their bytes.
    """

    def __init__(self, path: Path, folder: Path, config: PretrainedConfig) -> None:
        """Begin the file.

        Args:
            path: The file.
            folder: The source, for its tokenizer.
            config: The source's configuration.

        Raises:
            LowbitError: llama.cpp computes something else than this configuration says, or the
                tokenizer can't be written.
        """
        try:
            import gguf
        except ImportError:
            raise LowbitError(
                f"{path.name}: writing GGUF needs the gguf package: pip install 'lowbit[gguf]'"
            ) from None

        self.config: Any = config.get_text_config()
        arch = ARCHITECTURES.get(self.config.model_type)
        if arch is None:
            raise LowbitError(
                f"{self.config.model_type} can't be written as gguf: lowbit knows {sorted(ARCHITECTURES)}"
            )
        self.arch = gguf.MODEL_ARCH[arch]
        self._names = gguf.get_tensor_name_map(self.arch, self.config.num_hidden_layers)
        self.head_dim = getattr(self.config, "head_dim", None) or (
            self.config.hidden_size // self.config.num_attention_heads
        )
        self.kinds: dict[str, str] = {}
        self.total_size = 0
        self._path, self._offsets = path, list[tuple[str, tuple[int, ...], str, int]]()
        self._data = path.with_name(f"{path.name}.data")
        self._writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[self.arch])
        self._add_hyperparameters()
        add_vocab(self._writer, folder, self.config.vocab_size)

    def add(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Append a dense tensor, exactly: vectors as float32, matrices in the dtype they have.

        Returns:
            Its name in the file and its bytes; None if no reader needs it.

        Raises:
            LowbitError: the architecture has no such tensor, or its dtype has no name.
        """
        if name.endswith(_UNUSED):
            return None
        place = self._place(name)
        tensor = self._reorder(place, tensor.float() if tensor.ndim == 1 else tensor).contiguous()
        kind = next((kind for kind, dtype in DENSE.items() if dtype == tensor.dtype), None)
        if kind is None:
            raise LowbitError(f"{name}: gguf has no {tensor.dtype} matrices: use a checkpoint in bfloat16")
        data = tensor.view(torch.uint8)
        self._append(place, kind, data)
        return place, data

    def add_packed(self, name: str, weight: QuantizedWeight) -> tuple[str, str, QuantizedWeight]:
        """Append the matrix of module `name`.

        Returns:
            Its name in the file, its type, and the matrix with its rows in the file's order.

        Raises:
            LowbitError: as `add` and `formats.gguf.pack`.
        """
        place = self._place(f"{name}.weight")
        reordered = replace(
            weight,
            codes=self._reorder(place, weight.codes),
            scales=self._reorder(place, weight.scales),
            zeros=self._reorder(place, weight.zeros),
        )
        kind, data = blocks.pack(reordered)
        self._append(place, kind, data)
        return place, kind, reordered

    def finish(self) -> None:
        """Put the header and the data together."""
        import gguf

        packed = [kind for kind in self.kinds.values() if kind in _FILE_TYPES]
        self._writer.add_file_type(_FILE_TYPES[max(packed, key=packed.count)] if packed else 1)
        for place, shape, kind, size in self._offsets:
            self._writer.add_tensor_info(
                place, shape, np.dtype(np.uint8), size, raw_dtype=gguf.GGMLQuantizationType[kind]
            )
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        offset = 0
        for _, _, _, size in self._offsets:
            self._writer.write_tensor_data(np.memmap(self._data, np.uint8, "r", offset, (size,)))
            offset += size
        self._writer.close()
        self._data.unlink()

    def _append(self, place: str, kind: str, data: Tensor) -> None:
        with self._data.open("ab") as file:
            data.numpy().tofile(file)
        self._offsets.append((place, tuple(data.shape), kind, data.numel()))
        self.kinds[place] = kind
        self.total_size += data.numel()

    def _place(self, name: str) -> str:
        place: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise LowbitError(f"{name} has no place in a gguf file of {self.config.model_type}")
        return place

    def _reorder(self, place: str, rows: Tensor) -> Tensor:
        """Rows of Llama's query and key projections, halves of a head interleaved."""
        heads = {"attn_q": self.config.num_attention_heads, "attn_k": self.config.num_key_value_heads}
        count = heads.get(place.split(".")[-2])
        if count is None or self._writer.arch != "llama":
            return rows
        order = torch.arange(rows.shape[0]).reshape(count, 2, -1).transpose(1, 2).flatten()
        return rows[order]

    def _add_hyperparameters(self) -> None:
        config, writer = self.config, self._writer
        if config.hidden_act != "silu":
            raise LowbitError(
                f"hidden_act={config.hidden_act!r} is not what llama.cpp computes: use another format"
            )
        window = getattr(config, "sliding_window", None) or math.inf
        if getattr(config, "use_sliding_window", True) is False:
            window = math.inf
        writer.add_name(config.name_or_path.rstrip("/").rsplit("/", 1)[-1] or config.model_type)
        writer.add_quantized_by("lowbit")
        writer.add_quantization_version(2)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(int(min(config.max_position_embeddings, window)))
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(self.head_dim)
        self._add_rope()

    def _add_rope(self) -> None:
        """Rotary frequencies: plain, stretched (linear), or Llama 3.1's, which are a tensor."""
        rope = {key: value for key, value in self.config.rope_parameters.items() if value is not None}
        kind = rope.get("rope_type", "default")
        if kind not in _ROPE_KEYS or rope.keys() - _ROPE_KEYS[kind]:
            raise LowbitError(f"rope_type={kind!r} can't be written as gguf: use one of {sorted(_ROPE_KEYS)}")
        self._writer.add_rope_freq_base(rope["rope_theta"])
        if kind == "linear":
            from gguf import RopeScalingType

            self._writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            self._writer.add_rope_scaling_factor(rope["factor"])
        elif kind == "llama3":
            factors = llama3_factors(rope, self.head_dim)
            self._append(COMPUTED, "F32", factors.view(torch.uint8))


def llama3_factors(rope: dict[str, float], head_dim: int) -> Tensor:
    """By what llama.cpp divides each rotary frequency, float32 `[head_dim / 2]`.

    Long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1's scheme, as
    in transformers' `_compute_llama3_parameters`).
    """
    frequencies = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


def read(path: Path) -> Iterator[tuple[str, str, Tensor]]:
    """Name, type and bytes `[rows, bytes]` of every tensor of a file, one at a time."""
    from gguf import GGUFReader

    gguf_header.check(path)
    with untrusted.reading(path):
        tensors = GGUFReader(path).tensors
    for tensor in tensors:
        data = np.array(tensor.data).view(np.uint8)
        yield tensor.name, tensor.tensor_type.name, torch.from_numpy(data.reshape(data.shape))
