"""What `compare_peers.py` compares: how each peer is installed, and a line for every row of the table."""

from __future__ import annotations

from typing import NamedTuple


class Peer(NamedTuple):
    """How a peer is installed, and the script that runs it."""

    script: str
    requirements: list[str]
    alone: tuple[str, ...] = ()  # installed without their own requirements


PEERS = {
    "llmcompressor": Peer("llm_compressor.py", ["llmcompressor==0.14.0.1"]),
    # It asks for a newer torch than the others run with, and does not need it here.
    "gptqmodel": Peer(
        "gptq_model.py",
        ["transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0", "torchao==0.18.0",
         "defuser==0.0.28", "device-smi==0.5.7", "logbar==0.4.15", "maturin==1.16.0", "ninja==1.13.2",
         "pillow==13.0.0", "protobuf==7.36.2", "pypcre==0.6.4", "requests==2.34.2", "setuptools==84.2.1",
         "threadpoolctl==3.8.0", "tokenicer==0.0.14", "wheel==0.48.0"],
        ("gptqmodel==7.7.0",),
    ),
    "auto-round": Peer("autoround.py", ["auto-round==0.16.1"]),
    "hqq": Peer("hqq_linear.py", ["hqq==0.2.8.post1"]),
    "bitsandbytes": Peer("bnb.py", ["bitsandbytes==0.50.2", "safetensors==0.8.0"]),
    "llama.cpp": Peer(
        "llama_cpp.py",
        ["xllamacpp==2026.10.11549", "gguf==0.19.0", "transformers==5.23.0", "safetensors==0.8.0"],
    ),
}  # fmt: skip


class Run(NamedTuple):
    """One row: a peer's method under one scheme. `group_size` 0 stands for `--group-size`."""

    peer: str
    method: str
    bits: int = 4
    symmetric: bool = False
    group_size: int = 0

    @property
    def name(self) -> str:
        """As `--only` takes it."""
        return f"{self.peer}-{self.method}-{self.bits}-{'symmetric' if self.symmetric else 'asymmetric'}"


def both(peer: str, method: str, bits: int = 4) -> list[Run]:
    """The same with and without zeros."""
    return [Run(peer, method, bits, symmetric) for symmetric in (False, True)]


RUNS = [
    *both("llmcompressor", "rtn"),
    Run("hqq", "hqq"),
    Run("bitsandbytes", "nf4", symmetric=True, group_size=64),
    Run("bitsandbytes", "nf4-double", symmetric=True, group_size=64),
    Run("llama.cpp", "Q4_0", symmetric=True, group_size=32),
    Run("llama.cpp", "Q4_1", group_size=32),
    Run("llama.cpp", "Q4_K_M", group_size=32),
    Run("llama.cpp", "Q4_K_M-imatrix", group_size=32),
    *both("auto-round", "rtn"),
    *both("llmcompressor", "gptq"),
    *both("gptqmodel", "gptq"),
    *both("llmcompressor", "awq"),
    *both("llmcompressor", "imatrix"),
    Run("auto-round", "signround-50", symmetric=True),  # for those who have no night to wait
    *both("auto-round", "signround"),
    *(Run(*peer, bits=bits) for bits in (3, 2) for peer in (
        ("llmcompressor", "gptq"), ("gptqmodel", "gptq"), ("llmcompressor", "awq"), ("hqq", "hqq"),
        ("auto-round", "rtn"), ("auto-round", "signround"), ("llmcompressor", "rtn"),
    )),
    *(run for method in ("fast", "gptq", "awq", "balanced", "high", "max") for run in both("lowbit", method)),
    *(Run("lowbit", method, bits) for bits in (3, 2) for method in ("gptq", "balanced", "high")),
    Run("lowbit", "rtn", 8, symmetric=True),
    Run("lowbit", "target-5.53", symmetric=True),  # the bits that Q4_K_M takes on SmolLM2
]  # fmt: skip
