"""llama.cpp's types, by its own quantizer (`ggml_quantize_chunk` of the library that xllamacpp ships).

`Q4_0` and `Q4_1` are one type throughout. `Q4_K_M` is llama-quantize's mixture: Q6_K for the values
and for the second layer of the MLP in the blocks that `more_bits` names, Q4_K elsewhere, and a type
with groups of 32 where a row is no multiple of 256 (llama.cpp, src/llama-quant.cpp). The importance
matrix of `Q4_K_M-imatrix` is what llama-imatrix collects, the mean square of every input.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from pathlib import Path

import dense
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM

Type = GGMLQuantizationType
FALLBACK = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}
# Bits of a code, and how many weights share a scale.
GRIDS = {
    Type.Q4_0: (4, 32), Type.Q4_1: (4, 32), Type.Q5_0: (5, 32), Type.Q8_0: (8, 32), Type.Q4_K: (4, 32),
    Type.Q6_K: (6, 16),
}  # fmt: skip


def library() -> ctypes.CDLL:
    """The shared library of xllamacpp, without its Python part."""
    found = importlib.util.find_spec("xllamacpp")
    assert found is not None
    assert found.origin is not None
    shared = ctypes.CDLL(str(next(Path(found.origin).parent.glob("xllamacpp*.so"))))
    shared.ggml_quantize_chunk.restype = ctypes.c_size_t
    return shared


def quantize(
    shared: ctypes.CDLL, weight: np.ndarray, kind: Type, importance: np.ndarray | None
) -> np.ndarray:
    """Packed rows, uint8 `[rows, bytes]`, of a float32 `weight [rows, in]`; `importance [in]`."""
    rows, columns = weight.shape
    block, size = GGML_QUANT_SIZES[kind]
    packed = np.empty((rows, columns // block * size), np.uint8)
    written = shared.ggml_quantize_chunk(
        ctypes.c_int(kind), weight.ctypes.data_as(ctypes.c_void_p), packed.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(columns),
        None if importance is None else importance.ctypes.data_as(ctypes.c_void_p),
    )  # fmt: skip
    assert written == packed.nbytes
    return packed


def more_bits(block: int, blocks: int) -> bool:
    """Whether llama.cpp spends more on a block: the first and last eighth, and every third between."""
    return block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2


def type_of(method: str, name: str, columns: int, blocks: int) -> Type:
    """The type of one matrix of Q4_K_M, or the one type of the others."""
    if not method.startswith("Q4_K_M"):
        return Type[method]
    block = int(re.search(r"\.layers\.(\d+)\.", name)[1])  # type: ignore[index]
    precious = ("v_proj" in name or "down_proj" in name) and more_bits(block, blocks)
    kind = Type.Q6_K if precious else Type.Q4_K
    return kind if columns % GGML_QUANT_SIZES[kind][0] == 0 else FALLBACK[kind]


@torch.inference_mode()
def importances(model_folder: Path, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Mean square of every linear layer's input, float32 `[in]`, by the name of its weight."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto").eval()
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str, module: torch.nn.Linear) -> None:
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            rows = inputs[0].detach().reshape(-1, module.in_features).float()
            sums[name] = sums.get(name, 0) + rows.square().sum(0)

        module.register_forward_pre_hook(add)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            watch(f"{name}.weight", module)
    for row in tokens:
        model.model(row[None], use_cache=False)
    return {name: (total / tokens.numel()).numpy() for name, total in sums.items()}


def main() -> None:
    options = dense.arguments("Q4_0", "Q4_1", "Q4_K_M", "Q4_K_M-imatrix")
    shared, cost = library(), dense.Cost()
    known = {}
    if options.method.endswith("imatrix"):
        known = importances(options.model, dense.load_tokens(options.tokens))
    source = {n: w for n, w in dense.load_source(options.model).items() if dense.is_linear(n, w)}
    blocks = 1 + max(int(block) for block in re.findall(r"\.layers\.(\d+)\.", " ".join(source)))
    packed, kinds = {}, {}
    for name, weight in source.items():
        kinds[name] = type_of(options.method, name, weight.shape[1], blocks)
        packed[name] = quantize(shared, weight.float().numpy(), kinds[name], known.get(name))
    spent = cost.stop()
    dense.save(
        options, "xllamacpp", spent,
        {name: torch.from_numpy(dequantize(rows, kinds[name])) for name, rows in packed.items()},
        bits_per_weight=8 * sum(map(np.size, packed.values())) / sum(w.numel() for w in source.values()),
        grids={name: GRIDS[kind] for name, kind in kinds.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
