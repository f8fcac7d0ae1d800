"""What works on this machine, found by trying it, and why the rest doesn't.

A kernel counts as usable after it has multiplied a small weight and agreed with the dense product, so
a broken driver or a torch built without its CPU kernels shows here and not in the middle of a run.
Libraries are imported inside the functions: a library that can't be imported is a finding, not a crash.
"""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lowbit.scheme import SUPPORTED_BITS, QuantScheme

if TYPE_CHECKING:
    import torch

NEEDED = ("torch", "transformers", "compressed-tensors", "accelerate", "safetensors", "datasets",
          "huggingface_hub")  # fmt: skip
OTHERS = ("triton", "gguf", "lm_eval", "peft", "vllm", "sglang", "gptqmodel")

LAYOUTS = {
    "stream": "unpacked at every call (slow)",
    "triton": "Triton kernel",
}
"""What a layout of `ops.py` means to a user; one that is missing here is shown by its name."""

INSTRUCTIONS = ("avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
LARGEST_ERROR = 0.05
"""Of a product against the dense one, root mean square, relative; bfloat16 alone makes 0.005."""


@dataclass(frozen=True)
class Finding:
    """One thing that works here, or not.

    Attributes:
        name: What.
        usable: Does it work here?
        detail: How it works, or why not and what to do about it.
        needed: Do `quantize`, `load` and `eval` depend on it?
    """

    name: str
    usable: bool
    detail: str
    needed: bool = False


@dataclass(frozen=True)
class Device:
    """A processor.

    Attributes:
        name: As `--device` takes it.
        model: What it is.
        features: Instruction sets, or the compute capability.
        memory: Bytes of its memory; 0 where the system does not say.
        free: Bytes of it that are free; 0 where the system does not say.
    """

    name: str
    model: str
    features: tuple[str, ...]
    memory: int
    free: int


@dataclass(frozen=True)
class Diagnosis:
    """Everything `lowbit doctor` shows.

    Attributes:
        system: Operating system and machine.
        python: Version of Python.
        versions: Installed version of each library, None where it is not installed.
        devices: Processors that `--device` may name.
        kernels: One finding per device and width of a code, and one for the rounding of columns.
        formats: One per format that is read or written.
        extras: One per optional feature.
        libraries: One per library that is missing, broken or of a version that lowbit doesn't work with.
    """

    system: str
    python: str
    versions: dict[str, str | None]
    devices: list[Device]
    kernels: list[Finding]
    formats: list[Finding]
    extras: list[Finding]
    libraries: list[Finding]

    @property
    def healthy(self) -> bool:
        """Can `quantize`, `load` and `eval` work here?"""
        findings = (*self.libraries, *self.kernels, *self.formats, *self.extras)
        return all(finding.usable for finding in findings if finding.needed)


def diagnose() -> Diagnosis:
    """Look at this machine; takes some seconds, most of them to import torch and transformers.

    >>> diagnose().healthy
    True
    """
    broken = check_imports()
    works = not any(finding.name == "torch" for finding in broken)
    return Diagnosis(
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        python=platform.python_version(),
        versions={name: installed(name) for name in ("lowbit", *NEEDED, *OTHERS)},
        devices=find_devices() if works else [],
        kernels=check_kernels() if works else [],
        formats=check_formats(),
        extras=check_extras(),
        libraries=[*check_versions(), *broken],
    )


def installed(name: str) -> str | None:
    """Version of a distribution, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_versions() -> list[Finding]:
    """The requirements of lowbit's own metadata that the installed versions do not meet."""
    from packaging.requirements import Requirement

    try:
        declared = metadata.requires("lowbit") or []
    except metadata.PackageNotFoundError:  # a checkout that was never installed declares nothing
        declared = []
    wrong = []
    for requirement in map(Requirement, declared):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found = "is not installed" if version is None else f"is {version}"
            fix = f"pip install '{requirement.name}{requirement.specifier}'"
            wrong.append(Finding(requirement.name, False, f"{found}: {fix}", needed=True))
    return wrong


def check_imports() -> list[Finding]:
    """The libraries that are installed and can't be imported, or are not there at all."""
    wrong = []
    for name in NEEDED:
        try:
            importlib.import_module(name.replace("-", "_"))
        except Exception as error:  # whatever a broken installation throws
            reason = f"can't be imported ({type(error).__name__}: {error})".splitlines()[0]
            wrong.append(Finding(name, False, f"{reason}: pip install --force-reinstall {name}", needed=True))
    return wrong


def find_devices() -> list[Device]:
    """The CPU and every CUDA device."""
    import torch

    ask: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # not in torch 2.8
    known = ask()
    model = str(known.get("cpu_name") or platform.processor() or platform.machine())
    features = tuple(name for name in INSTRUCTIONS if known.get(name))
    cores = f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    devices = [Device("cpu", cores, features, *_memory())]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        devices.append(Device(f"cuda:{index}", properties.name, (capability,), total, free))
    return devices


def _memory() -> tuple[int, int]:
    """Bytes of main memory, in all and free."""
    import psutil

    memory = psutil.virtual_memory()
    return memory.total, memory.available


def check_kernels() -> list[Finding]:
    """Each width of a code multiplied on each device, and columns rounded, or why they can't be."""
    import torch

    from lowbit import native

    native.prefer()
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    findings = [_try_kernel(name, bits) for name in devices for bits in SUPPORTED_BITS]
    findings.append(_try_rounding())
    if len(devices) == 1:
        findings.append(Finding("cuda", False, _why_no_gpu()))
    return findings


def _try_kernel(device: str, bits: int) -> Finding:
    import torch

    name = f"{device} {bits} bits"
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            layout, error = _product_error(torch.device(device), bits)
    except Exception as problem:  # whatever a compiler or a driver throws
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
        return Finding(name, False, f"fails ({reason})", needed=True)
    detail = "; ".join([_means(layout), *(str(one.message) for one in warned)])
    if not error < LARGEST_ERROR:
        wrong = f"{detail}: gives wrong results (relative error {error:.2g}); use another version of torch"
        return Finding(name, False, wrong, needed=True)
    return Finding(name, True, detail, needed=True)


def _try_rounding() -> Finding:
    """Columns rounded by the kernel that GPTQ uses on this CPU, against the grid itself."""
    import torch

    from lowbit import grid
    from lowbit.algorithms import columns

    kernel = columns.sweep(torch.device("cpu"), 64)
    if kernel is None:
        return Finding("cpu rounding", True, f"torch's operations; {columns.lacking(torch.device('cpu'))}")
    scheme, random = QuantScheme(4, 64), torch.Generator().manual_seed(0)
    values = torch.randn(64, 96, generator=random)
    scales, zeros = torch.full((1, 96), 0.3), torch.full((1, 96), 8.0)
    groups, alone = torch.zeros(64, dtype=torch.int64), torch.zeros(64, 64)
    levels, _ = kernel(values, alone, scales, zeros, groups, scheme.levels - 1, values)
    if not torch.equal(levels + zeros, grid.nearest_codes(values, scales, zeros, scheme)):
        return Finding("cpu rounding", False, "gives wrong results: set CC to another compiler", needed=True)
    return Finding("cpu rounding", True, "C kernel", needed=True)


def _means(layout: str) -> str:
    from lowbit import native

    if layout == "tiles":
        return "C kernel" if native.enabled() else f"torch's four-bit kernel; {native.lacking()}"
    return LAYOUTS.get(layout, layout)


def _product_error(device: torch.device, bits: int) -> tuple[str, float]:
    """Layout of a random weight on `device`, and the relative error of a product with it."""
    import torch

    from lowbit import ops
    from lowbit.quantized import QuantizedWeight

    random, scheme = torch.Generator().manual_seed(0), QuantScheme(bits, 64)
    codes = torch.randint(0, scheme.levels, (128, 256), generator=random, dtype=torch.uint8)
    scales = (0.5 + torch.rand(128, 4, generator=random)).bfloat16()
    zeros = torch.full((128, 4), scheme.middle, dtype=torch.uint8)
    weight = QuantizedWeight(codes, scales, zeros, scheme)
    moved = QuantizedWeight(codes.to(device), scales.to(device), zeros.to(device), scheme)
    x = torch.randn(2, 256, generator=random).bfloat16()
    operand = ops.prepare(moved, x.dtype)
    with torch.inference_mode():
        found = ops.matmul(x.to(device), operand).float().cpu()
    expected = x.float() @ weight.dequantize().T
    return operand.layout, ((found - expected).norm() / expected.norm()).item()


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return "this torch is built for CPUs: install its CUDA build to use an NVIDIA GPU"
    if find_spec("triton") is None:
        return "no GPU is visible, and Triton is not installed"
    return "no GPU is visible: is there one, does nvidia-smi list it, is CUDA_VISIBLE_DEVICES set?"


def check_formats() -> list[Finding]:
    """What can be read and written, and what stock transformers can read beside it."""
    stock = "read and written"
    if find_spec("gptqmodel") is None:
        stock += "; for transformers without lowbit: pip install gptqmodel"
    return [
        Finding("compressed-tensors", True, "read and written; transformers reads it too"),
        Finding("gptq", True, stock),
        Finding("awq", True, stock),
        _extra("gguf", ("gguf", "sentencepiece"), "gguf", "read"),
    ]


def check_extras() -> list[Finding]:
    """Features that need more than `pip install lowbit`."""
    return list(_extras())


def _extras() -> Iterator[Finding]:
    yield _extra("eval --tasks", ("lm_eval",), "tasks", "lm-evaluation-harness")


def _extra(name: str, modules: tuple[str, ...], extra: str, detail: str) -> Finding:
    missing = [module for module in modules if find_spec(module) is None]
    if not missing:
        return Finding(name, True, detail)
    return Finding(name, False, f"{' and '.join(missing)} not installed: pip install 'lowbit[{extra}]'")
