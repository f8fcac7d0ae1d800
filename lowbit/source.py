"""The model to be quantized: found, checked, and read one part at a time.

A source is a hub id, a local folder or a `.gguf` file; all three end as a folder of safetensors
(a GGUF file is converted once, into a temporary folder, by transformers' own
loaders). The model itself is built as a skeleton on the meta device: it has every module and no
weights. `load` brings the weights of one module in, `free` lets them go, so a model larger than
memory passes through block by block.

Names on disk and names in the model differ for many architectures (prefixes, one tensor per expert
on disk against one stacked parameter in memory). Transformers knows the way there and back, so both
directions are its own code: `load` calls its loader on the tensors of one module, `names_on_disk`
its reverse. These functions are not public API; this file, `readback.py` on top of it and
`quantizer.py` alone touch them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from lowbit import identity, origin, pages, places, untrusted
from lowbit.errors import LowbitError
from lowbit.moments import is_finite
from lowbit.quiet import quiet
from lowbit.untrusted import NEVER_TRUSTED

MOST_COMPUTED = 2**30
"""Bytes of buffers (rotary frequencies, masks) beyond the size of the weights."""

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def find(model: str, scratch: Path) -> Path:
    """The folder of safetensors behind `model`.

    Args:
        model: Hub id, with or without `@revision`, local folder, or `.gguf` file.
        scratch: Where a GGUF file is converted to; the caller removes it.

    Raises:
        LowbitError: nothing there, no config, no weights, or the hub can't be reached or refuses.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return origin.from_gguf(path, scratch)
    if path.is_dir():
        folder = path
    elif path.exists():
        raise LowbitError(f"{model} is a file: give a folder, a .gguf file or a hub id")
    else:
        folder = origin.from_hub(model)
    if not (folder / "config.json").is_file():
        raise LowbitError(f"{model} has no config.json: give the folder of a Hugging Face model")
    if any(folder.glob("*.safetensors")):
        return folder
    if any(folder.glob("*.bin")) or (folder != path and origin.has_pickled(model, folder)):
        raise LowbitError(
            f"{model} has pickled weights (*.bin), which can run code: if you trust their author, load and "
            "save them once with transformers (from_pretrained, save_pretrained)"
        )
    raise LowbitError(f"{model} has no weights (*.safetensors): download the model completely")


class Source:
    """An opened model: a skeleton on the meta device and an index of the tensors on disk.

    Attributes:
        folder: Where the files are.
        config: The model's configuration.
        model: The skeleton, in evaluation mode.
        dtype: Working precision of whatever is loaded.
        stored_dtype: The model's precision on disk.
        extra_keys: Tensors on disk that the architecture does not use (draft layers and the like).
        files: All weight files.
        bytes: Their size.
        quantizer: transformers' own, where packed weights are read; see `readback.py`.
        whole: Do all files lie in `folder`? `hub_source.py` fetches them one at a time.
        held: Bytes of files that a run has on the disk only for itself.
        seen: What a run that goes on must know of files that are gone: plain JSON values.
    """

    quantizer: Any = None
    whole = True
    held = 0

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        """Open `folder`.

        Raises:
            LowbitError: not a causal LM, already quantized, or a file is corrupt or missing a tensor.
        """
        self.folder = folder
        self.config = self._read_config()
        self.dtype = dtype
        stored: Any = self.config.dtype  # before the skeleton sets it
        self.stored_dtype: torch.dtype = stored or torch.float32
        self._file_of = self._index_files()
        untrusted.check_config(folder, len(self._file_of))
        self.files = set(self._file_of.values())
        self.bytes = self._count_bytes()
        self.seen: dict[str, Any] = {}
        with untrusted.reading(f"{folder}/config.json"):
            self._check_buffers()
            self.model = self._skeleton()
            self._parameter_of, self.extra_keys = self._match_keys()
        self._used_conversions: list[Any] = []

    def _read_config(self) -> PretrainedConfig:
        return origin.read_config(self.folder)

    def _check_buffers(self) -> None:
        """Refuse what would fill the memory with computed tensors; weights stay on the meta device."""
        with quiet(), torch.device("meta"):
            try:
                model = AutoModelForCausalLM.from_config(self.config, **NEVER_TRUSTED)
            except NotImplementedError:  # looks at the values of a buffer that it makes
                return
        needed = sum(buffer.nbytes for buffer in model.buffers())
        if needed > self.bytes + MOST_COMPUTED:
            raise LowbitError(f"{self.folder}/config.json asks for {needed / 1e9:.0f} GB of computed tensors")

    def _skeleton(self) -> PreTrainedModel:
        # Eager experts multiply by one expert's matrix at a time, which is what calibration observes.
        with quiet(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                self.config, dtype=self.dtype, experts_implementation="eager", **NEVER_TRUSTED
            )
        model.eval().requires_grad_(False)
        model.tie_weights()
        return model  # type: ignore[no-any-return]

    def _index_files(self) -> dict[str, Path]:
        file_of = {}
        for file in untrusted.weight_files(self.folder):
            try:
                with safe_open(file, framework="pt") as opened:
                    file_of.update(dict.fromkeys(opened.keys(), file))
            except (SafetensorError, OSError) as error:
                raise LowbitError(f"{file} is corrupt or truncated ({error}): download it again") from None
        return file_of

    def _count_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def identity(self) -> str:
        """Digest by which a run that goes on knows the model."""
        names = {file.relative_to(self.folder).as_posix(): file for file in self.files}
        digests = {name: identity.of_weights(file) for name, file in names.items()}
        return identity.of_model(digests, self._around())

    def known(self) -> dict[str, str]:
        """The digest of the same files in a folder as `model`, where `identity` is another one."""
        return {}

    def notes(self) -> list[str]:
        """What the summary must say of where the files came from."""
        return []

    def _around(self) -> list[Path]:
        return [self.folder / "config.json", *sidecars(self.folder)]

    def _mapping(self) -> Any:
        return get_model_conversion_mapping(self.model, hf_quantizer=self.quantizer)

    def _match_keys(self) -> tuple[dict[str, str], list[str]]:
        """Parameter of every key on disk, and the keys that no parameter takes."""
        mapping = self._mapping()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        known = self.model.state_dict()
        parameter_of, extra = {}, []
        for key in self._file_of:
            renamed, pattern = rename_source_key(
                key, renamings, converters, self.model.base_model_prefix, known
            )
            if renamed not in known and key in known:
                renamed = key
            if renamed in known:
                parameter_of[key] = renamed
            elif pattern is None:
                extra.append(key)
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        converted = {name for c in converters for name in c.target_patterns}
        missing = [
            name
            for name, _ in self.model.named_parameters()
            if name not in parameter_of.values() and name not in tied
            and not any(part.strip("^$.\\") in name for part in converted)
        ]  # fmt: skip
        if missing:
            raise LowbitError(
                f"{self.folder} lacks {len(missing)} tensors (first: {missing[0]}): download it again"
            )
        return parameter_of, extra

    def keys_under(self, prefixes: Iterable[str]) -> list[str]:
        """Keys on disk that belong to the modules or parameters named by `prefixes`."""
        wanted = tuple(prefixes)
        return [
            key
            for key, name in self._parameter_of.items()
            if any(name == prefix or name.startswith(f"{prefix}.") for prefix in wanted)
        ]

    def keys_outside(self, prefixes: Iterable[str]) -> list[str]:
        """Keys on disk that belong to the model but to none of `prefixes`, in file order."""
        inside = set(self.keys_under(prefixes))
        return [key for key in self._parameter_of if key not in inside]

    def extra_parts(self) -> dict[str, int]:
        """How many of `extra_keys` each part of the checkpoint has that no other key is in.

        A draft layer beside the others is `model.layers.61`, a vision tower `visual`.
        """
        known = {
            ".".join(parts[:end])
            for parts in (key.split(".") for key in self._parameter_of)
            for end in range(len(parts))
        }
        counts: dict[str, int] = {}
        for parts in (key.split(".") for key in self.extra_keys):
            prefixes = (".".join(parts[: end + 1]) for end in range(len(parts)))
            part = next((prefix for prefix in prefixes if prefix not in known), ".".join(parts))
            counts[part] = counts.get(part, 0) + 1
        return counts

    def parameter_of(self, key: str) -> str:
        """Name in the model of a key on disk (the first, where one tensor feeds several)."""
        return self._parameter_of[key]

    def read(self, key: str) -> Tensor:
        """One tensor as it is on disk."""
        file = self._file_of[key]
        with untrusted.reading(file), safe_open(file, framework="pt") as opened:
            return opened.get_tensor(key)  # type: ignore[no-any-return]

    def load(self, keys: Iterable[str], device: torch.device) -> None:
        """Bring these keys' parameters into the skeleton, in the working precision.

        Raises:
            LowbitError: a weight is NaN or infinite, has the wrong shape, or can't be converted.
        """
        settings = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            device_map={"": device},
            weight_mapping=self._mapping(),
            hf_quantizer=self.quantizer,
        )
        with quiet(), ExitStack() as files, untrusted.reading(self.folder):
            slices = self._slices(keys, files)
            info, _ = convert_and_load_state_dict_in_model(self.model, slices, settings)
        problems = [*info.conversion_errors, *(name for name, *_ in info.mismatched_keys)]
        if problems:
            raise LowbitError(f"{self.folder}: {problems[0]} does not fit its configuration")
        used: Any = self.model._weight_conversions
        self._used_conversions += used
        self.model.tie_weights()  # a parameter that was just replaced may have a tied twin
        self._check_finite(slices)

    def _slices(self, keys: Iterable[str], files: ExitStack) -> dict[str, Any]:
        """What transformers' loader reads these tensors from; `files` closes them."""
        opened: dict[Path, Any] = {}
        slices = {}
        for key in keys:
            file = self._file_of[key]
            if file not in opened:
                opened[file] = files.enter_context(safe_open(file, framework="pt"))
            slices[key] = opened[file].get_slice(key)
        return slices

    def _check_finite(self, keys: Iterable[str]) -> None:
        for name in {self._parameter_of[key] for key in keys}:
            weight = self.model.get_parameter_or_buffer(name)
            if weight.is_floating_point() and not is_finite(weight):
                raise LowbitError(f"{self.folder}: {name} holds NaN or infinite weights: get a sound copy")

    def rest(self) -> None:
        """Give back the memory of mapped weights that wait to be read again, and of temporaries."""
        pages.release(p.data for p in self.model.parameters() if not p.is_meta)
        pages.trim()

    def release(self) -> None:
        """Let all weights go."""
        free(self.model)

    def names_on_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by parameter name, renamed (and unstacked) to the names of the source files.

        Rows and experts are cut, never columns, so codes, scales and zeros pass through alike.
        """
        self.model._weight_conversions = self._used_conversions  # type: ignore[assignment]
        return revert_weight_conversion(self.model, dict(tensors))  # type: ignore[no-any-return]


def free(module: nn.Module) -> None:
    """Send the parameters of `module` back to the meta device."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                owner._parameters[name] = nn.Parameter(empty, requires_grad=False)


def sidecars(folder: Path) -> list[Path]:
    """Everything beside the weights and the config: tokenizer, chat templates, generation config.

    Not what is hidden: the notes of other tools, and maybe secrets.
    """
    skipped = {file for pattern in WEIGHT_FILES for file in folder.glob(pattern)}
    skipped |= {folder / "config.json", folder / "README.md"}
    suffixes = {".json", ".jinja", ".txt", ".model", ".py", ".md", ".tiktoken", ""}
    templates = sorted((folder / places.CHAT_TEMPLATES).glob("*.jinja"))
    names = [path.relative_to(folder).as_posix() for path in templates if not path.name.startswith(".")]
    return [
        Path(entry.path)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
        if entry.is_file()
        and not entry.name.startswith(".")
        and Path(entry.path) not in skipped
        and Path(entry.name).suffix in suffixes
        and untrusted.inside(folder, entry.name)
    ] + [untrusted.inside(folder, name) for name in names]
