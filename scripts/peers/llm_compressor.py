"""llm-compressor: round to nearest, the same with its importance-weighted ranges, GPTQ, AWQ.

Everything that is not named here is its default: GPTQ orders the columns (`actorder: static`), AWQ
searches both scalings over 20 points.
"""

from __future__ import annotations

from typing import Any

import dense
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM

BATCH = 4


def recipe(method: str, bits: int, group_size: int, symmetric: bool) -> list[Any]:
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "group", "group_size": group_size}
    if method == "imatrix":
        weights["observer"] = "imatrix_mse"
    layers = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if method == "gptq":
        return [GPTQModifier(**layers)]
    rounding = QuantizationModifier(**layers)
    return [AWQModifier(), rounding] if method == "awq" else [rounding]


def main() -> None:
    options = dense.arguments("gptq", "awq", "rtn", "imatrix")
    if not torch.accelerator.is_available():  # AWQ pins memory for a device without asking for one
        IntermediatesCache.pin_memory = lambda *_, **__: None
    tokens = dense.load_tokens(options.tokens)
    cost = dense.Cost()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    data = {}
    if options.method != "rtn":
        rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
        data = {
            "dataset": Dataset.from_dict(rows), "num_calibration_samples": len(tokens),
            "max_seq_length": tokens.shape[1], "batch_size": BATCH,
        }  # fmt: skip
    oneshot(
        model=model,
        recipe=recipe(options.method, options.bits, options.group_size, options.symmetric),
        **data,
    )
    known = dense.load_source(options.model).keys()
    tensors = {name: t for name, t in model.named_parameters() if name in known}
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            scheme = module.quantization_scheme.weights
            tensors[f"{name}.weight"] = fake_quantize(
                module.weight.float(), module.weight_scale.float(), module.weight_zero_point, scheme
            )
    spent = cost.stop()  # all but GPTQ leave the rounding itself to the moment of saving
    zero_bits = 0 if options.symmetric else options.bits
    size = dense.bits_per_weight(options.bits, options.group_size, zero_bits=zero_bits)
    dense.save(options, "llmcompressor", spent, tensors, bits_per_weight=size)


if __name__ == "__main__":
    main()
