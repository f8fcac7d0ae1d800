"""A quantized checkpoint in another format, with the same codes, scales and zeros.

Nothing is rounded. A layer is read into the one currency, `QuantizedWeight`, and packed again as the
target stores it; dense tensors are copied. Formats differ in what they can hold (dtype of scales, a zero
of 0, groups scattered over the columns), and what the target can't hold exactly is refused with the
reason. With `lossy` such a layer is dequantized and rounded to nearest again, and the result names it.
Grids that differ in name only are carried: a symmetric one is an asymmetric one whose zeros all lie in
the middle, and a group of 128 is four of GGUF's blocks with one scale.

Layers pass through one at a time, into a scratch folder. What was written is read back, every tensor
compared with a digest of what was read from the source, and only then it gets its name.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from lowbit import beside, checkpoint, formats, gguf_file, hf, places
from lowbit import source as sources
from lowbit.algorithms import rtn
from lowbit.checkpoint import CheckpointWriter
from lowbit.errors import LowbitError, VerificationError
from lowbit.formats import FORMATS
from lowbit.formats import gguf as gguf_blocks
from lowbit.gguf_file import GgufWriter
from lowbit.packed import Packed, carry, digest
from lowbit.progress import Progress, silent
from lowbit.quantized import QuantizedWeight
from lowbit.results import Conversion
from lowbit.scheme import QuantScheme
from lowbit.untrusted import NEVER_TRUSTED

GGUF = "gguf"
LEFT_OUT = {"quantize_config.json", "quant_config.json", "quantization_config.json"}
"""Files of other tools that say what `config.json` says, about the source's format."""

_SAMPLE_LAYER = "model.layers.0.mlp.up_proj"


def convert(
    source: str | Path,
    output: str | Path,
    format: str | None = None,
    *,
    lossy: bool = False,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write a quantized checkpoint, of lowbit's or of another tool's, in another format.

    Args:
        source: Folder or hub id of a compressed-tensors, GPTQ or AWQ checkpoint.
        output: Folder to create; a file where the format is `gguf`.
        format: `compressed-tensors`, `gptq`, `gptq-v2`, `awq` or `gguf`; None takes `gguf` for an
            output that ends in `.gguf`.
        lossy: Round again what the format can't hold exactly.
        max_shard_size: Size of a safetensors shard.
        overwrite: Replace an existing checkpoint.
        progress: Told about every layer.

    Raises:
        LowbitError: the source can't be read, or the format can't hold it; nothing is left behind.
        VerificationError: what was written does not read back as it was; nothing is left behind.

    >>> result = convert(checkpoint, folder / "gptq", "gptq")
    >>> result.requantized, result.layers
    ({}, {'w4g32': 21})
    """
    format = _format(str(output), format)
    started, target = time.monotonic(), Path(output).expanduser().resolve()
    places.check_target(target, str(source), overwrite, as_file=format == GGUF)
    shard_bytes = checkpoint.parse_size(max_shard_size)
    with checkpoint.scratch_beside(target) as scratch:
        opened = Packed(sources.find(str(source), scratch))
        checkpoint.check_room(target.parent, int(2.4 * opened.bytes) + 50_000_000)
        result = Conversion(target, opened.quantization["quant_method"], format, source_bytes=opened.bytes)
        crossing: _Crossing
        if format == GGUF:
            crossing = _ToGguf(opened, result, lossy, scratch / "model.gguf")
        else:
            crossing = _ToCheckpoint(opened, result, lossy, scratch / "checkpoint", shard_bytes)
        crossing.write(progress or silent)
        crossing.verify()
        if format != GGUF:
            beside.write_sums(crossing.path)
        checkpoint.put_in_place(crossing.path, target)
    result.seconds = time.monotonic() - started
    return result


def _format(output: str, format: str | None) -> str:
    known = [*FORMATS, GGUF]
    is_file = output.endswith(".gguf")
    if format is None and is_file:
        return GGUF
    if format is None:
        raise LowbitError(f"the format of {output} is not known: add --format, one of {known}")
    if format not in known:
        raise LowbitError(f"format={format!r} is unknown: use one of {known}")
    if is_file != (format == GGUF):
        raise LowbitError(f"{output} is no name for {format}: only a gguf file ends in .gguf")
    return format


class _Crossing(ABC):
    """The way from an opened checkpoint to a written and verified one."""

    def __init__(self, source: Packed, result: Conversion, lossy: bool, path: Path) -> None:
        self.source, self.result, self.lossy, self.path = source, result, lossy, path
        self.digests: dict[str, bytes] = {}

    def write(self, progress: Progress) -> None:
        """All tensors, one at a time, and what belongs around them."""
        source, done = self.source, 0
        for name, found in hf.layers(source.folder, source.fmt):
            if isinstance(found, Tensor):
                self.copy(name, found)
                continue
            weight, order = source.read(name, found)
            try:
                self.store(name, weight, order)
            except LowbitError as error:
                reason = str(error).removeprefix(f"{name}: ")
                if not self.lossy:
                    raise LowbitError(f"{name}: {reason}") from None
                dense = weight.dequantize()
                self.round(name, dense if order is None else dense[:, torch.argsort(order)])
                self.result.requantized[name] = reason.split(": ")[0]
            done += 1
            progress("convert", done, len(source.schemes), name)
        self.finish()

    def count(self, kind: str) -> None:
        """One more layer of a scheme or type."""
        self.result.layers[kind] = self.result.layers.get(kind, 0) + 1

    @abstractmethod
    def copy(self, name: str, tensor: Tensor) -> None:
        """A tensor that is not quantized."""

    @abstractmethod
    def store(self, name: str, weight: QuantizedWeight, order: Tensor | None) -> None:
        """A layer as it is; raises `LowbitError`, before anything is written, if that can't be."""

    @abstractmethod
    def round(self, name: str, dense: Tensor) -> None:
        """A layer, float32 `[out, in]`, rounded to nearest on a grid that the target holds."""

    @abstractmethod
    def finish(self) -> None:
        """What belongs around the tensors."""

    @abstractmethod
    def read_back(self) -> dict[str, bytes]:
        """Digests of what is in the file, by the names of `digests`."""

    def verify(self) -> None:
        """Read the result back; raises `VerificationError` unless every tensor is what was carried."""
        found = self.read_back()
        for name, expected in self.digests.items():
            if found.get(name) != expected:
                raise VerificationError(f"{name} read back from {self.path} differs from the source's")
        if len(found) != len(self.digests):
            raise VerificationError(f"{self.path} holds tensors that the source does not")


class _ToCheckpoint(_Crossing):
    """To a folder of safetensors."""

    def __init__(self, source: Packed, result: Conversion, lossy: bool, path: Path, shard_bytes: int) -> None:
        super().__init__(source, result, lossy, path)
        self.fmt = FORMATS[result.format]
        self.schemes = {name: self._scheme(scheme) for name, scheme in source.schemes.items()}
        self.quantization = self.fmt.quantization_config(self.schemes, source.ignore)
        self.shapes: dict[str, tuple[int, int]] = {}
        self.writer = CheckpointWriter(path, shard_bytes)

    def _scheme(self, scheme: QuantScheme) -> QuantScheme:
        """The first grid that the format holds: the same one, the same one with zeros, a lossy one."""
        if scheme.activation_bits is not None:
            return scheme  # the inputs' rounding is half of the model: held as it is, or refused by `check`
        same = [scheme, replace(scheme, symmetric=False)]
        for trial in [*same, *(replace(s, bits=4) for s in same if self.lossy)]:
            try:
                self.fmt.check({_SAMPLE_LAYER: trial}, [])
                return trial
            except LowbitError as error:
                refusal = error
        raise refusal

    def copy(self, name: str, tensor: Tensor) -> None:
        self.digests[name] = digest(tensor)
        self.writer.add(name, tensor)

    def store(self, name: str, weight: QuantizedWeight, order: Tensor | None) -> None:
        self.fmt.check_layer(name, *weight.shape, self.schemes[name], self.source.kinds[name])
        carried = carry(weight, self.schemes[name], self.fmt.SCALE_DTYPES)
        self._add(name, formats.write(self.fmt, carried, order), weight, order)

    def round(self, name: str, dense: Tensor) -> None:
        scheme = self.schemes[name]
        self.fmt.check_layer(name, dense.shape[0], dense.shape[1], scheme, self.source.kinds[name])
        weight, _ = rtn.quantize_weight(dense, None, scheme, self.fmt.SCALE_DTYPE)
        self._add(name, self.fmt.pack(weight), weight, None)

    def _add(
        self, name: str, tensors: dict[str, Tensor], weight: QuantizedWeight, order: Tensor | None
    ) -> None:
        for suffix, tensor in tensors.items():
            self.writer.add(f"{name}.{suffix}", tensor)
        if order is not None:
            self.quantization["desc_act"] = True
        self.digests[name] = digest(weight.codes, weight.scales.float(), weight.zeros, order)
        self.shapes[name] = weight.shape
        self.count(str(self.schemes[name]))

    def finish(self) -> None:
        source, result = self.source, self.result
        config: dict[str, Any] = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
        config.pop("compression_config", None)  # what compressed-tensors' key was called before
        config["quantization_config"] = self.quantization
        beside = [file for file in sources.sidecars(source.folder) if file.name not in LEFT_OUT]
        self.writer.finish(config, beside)
        result.output_bytes = self.writer.total_size
        result.warnings = self.fmt.warnings(self.schemes, self.shapes)
        if any(not self.schemes[name].symmetric and s.symmetric for name, s in source.schemes.items()):
            result.notes.append(
                f"{result.format} has no symmetric scheme: zeros are stored, all in the middle"
            )
        if self.quantization.get("desc_act"):
            result.notes.append("groups are scattered over the columns (act-order), as in the source")

    def read_back(self) -> dict[str, bytes]:
        written, found = Packed(self.path), {}
        for name, tensors in hf.layers(self.path, written.fmt):
            if isinstance(tensors, Tensor):
                found[name] = digest(tensors)
            else:
                weight, order = written.read(name, tensors)
                found[name] = digest(weight.codes, weight.scales.float(), weight.zeros, order)
        return found


class _ToGguf(_Crossing):
    """To one file of llama.cpp's."""

    def __init__(self, source: Packed, result: Conversion, lossy: bool, path: Path) -> None:
        super().__init__(source, result, lossy, path)
        self.writer = GgufWriter(
            path, source.folder, AutoConfig.from_pretrained(source.folder, **NEVER_TRUSTED)
        )

    def copy(self, name: str, tensor: Tensor) -> None:
        added = self.writer.add(name, tensor)
        if added:
            self.digests[added[0]] = digest(added[1])

    def store(self, name: str, weight: QuantizedWeight, order: Tensor | None) -> None:
        if order is not None:
            raise LowbitError(
                "groups are scattered over the columns (act-order), which gguf can't hold: "
                "use --lossy to quantize again"
            )
        if weight.scheme.activation_bits is not None:
            raise LowbitError("inputs are rounded too, which gguf can't say: use lowbit quantize")
        carried = carry(weight, weight.scheme, gguf_blocks.SCALE_DTYPES)
        place, kind, reordered = self.writer.add_packed(name, carried)
        found, scales = gguf_blocks.steps(reordered)
        self.digests[place] = digest(found, scales)
        self.count(kind)

    def round(self, name: str, dense: Tensor) -> None:
        bits = 4 if self.source.schemes[name].bits <= 4 else 8
        scheme = QuantScheme(bits, gguf_blocks.BLOCK)
        weight, _ = rtn.quantize_weight(dense, None, scheme, gguf_blocks.SCALE_DTYPE)
        self.store(name, weight, None)

    def finish(self) -> None:
        self.writer.finish()
        self.result.output_bytes = self.writer.total_size

    def read_back(self) -> dict[str, bytes]:
        found = {}
        for name, kind, data in gguf_file.read(self.path):
            if name != gguf_file.COMPUTED:
                dense = kind in gguf_file.DENSE
                found[name] = digest(data) if dense else digest(*gguf_blocks.unpack(kind, data))
        return found
