"""What the engines are asked to load: one small model in every format and scheme, and spoiled copies.

The model is random and large enough for the engines' kernels (heads of 64, sizes that are multiples of
32). Its logits have a standard deviation of about two, so that a matrix read wrongly moves log-probabilities
by whole nats.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import lowbit
from lowbit import QuantScheme
from tests.packed import spoil
from tests.tiny import VOCAB, make_tokenizer

SYMMETRIC, ASYMMETRIC = QuantScheme(4, 32), QuantScheme(4, 64, False)
HEAD = "w4g32, head w8"
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")
MIXED, MIXED_BITS = "w4g32 + w4g64", "w4g32 + w8g32"

# (format, scheme): a row of docs/COMPATIBILITY.md.
SCHEMES: dict[tuple[str, str], QuantScheme] = {
    ("compressed-tensors", "w4g32"): SYMMETRIC,
    ("compressed-tensors", "w4"): QuantScheme(4, -1),
    ("compressed-tensors", "w4g64-asym"): ASYMMETRIC,
    ("compressed-tensors", "w8g32"): QuantScheme(8, 32),
    ("compressed-tensors", "w3g32"): QuantScheme(3, 32),
    ("compressed-tensors", "w2g32"): QuantScheme(2, 32),
    ("compressed-tensors", "w8a8"): QuantScheme(8, -1, activation_bits=8),
    ("gptq", "w4g32"): SYMMETRIC,
    ("gptq", "w4g64-asym"): ASYMMETRIC,
    ("gptq", "w8g32"): QuantScheme(8, 32),
    ("gptq", "w3g32"): QuantScheme(3, 32),
    ("gptq", "w2g32"): QuantScheme(2, 32),
    ("gptq-v2", "w4g32"): SYMMETRIC,
    ("awq", "w4g64-asym"): ASYMMETRIC,
}


@torch.no_grad()
def make_source(folder: Path) -> Path:
    """Save the unquantized model, in bfloat16."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model, generator = LlamaForCausalLM(config), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.add_(0.2 * noise)
        else:
            gain = {"model.embed_tokens.weight": 1.0, "lm_head.weight": 2.0}.get(name, 1.2)
            columns = 1 if "embed" in name else parameter.shape[1]
            parameter.copy_(gain * columns**-0.5 * noise)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(with_bos=True, chat=True).save_pretrained(folder)
    return folder


def make_all(folder: Path) -> dict[tuple[str, str], Path]:
    """Every checkpoint, by format and scheme; files of llama.cpp's by the type of their blocks."""
    source, made = make_source(folder / "source"), {}

    def quantize(name: str, scheme: QuantScheme, **options: Any) -> Path:
        output = folder / name.replace(" ", "")
        lowbit.quantize(source, scheme, output=output, method="rtn", verify_output=False, **options)
        return output

    for (form, name), scheme in SCHEMES.items():
        made[form, name] = quantize(f"{form}-{name}", scheme, format=form)
    made["compressed-tensors", HEAD] = quantize("head", SYMMETRIC, head_bits=8)
    for name, down in ((MIXED, QuantScheme(4, 64)), (MIXED_BITS, QuantScheme(8, 32))):
        made["compressed-tensors", name] = quantize(name, SYMMETRIC, schemes={"down_proj": down})
    return made | {("gguf", kind): file for kind, file in make_gguf(made, folder).items()}


def make_gguf(made: dict[tuple[str, str], Path], folder: Path) -> dict[str, Path]:
    """What `lowbit convert` makes of some of them; every type that it writes is there."""
    short = spoil(made["compressed-tensors", "w4g64-asym"], folder / "short", shorten_scales)
    sources = {
        "Q4_0": made["compressed-tensors", "w4g32"],
        "Q4_1": short,
        "Q5_0": made["awq", "w4g64-asym"],
        "Q8_0": made["compressed-tensors", "w8g32"],
    }
    files = {}
    for kind, packed in sources.items():
        files[kind] = packed.with_name(f"{packed.name}.gguf")
        result = lowbit.convert(packed, files[kind])
        assert set(result.layers) == {kind}, f"{packed.name} became {result.layers}"
    return files


def origin(key: tuple[str, str], path: Path) -> Path:
    """The checkpoint that lowbit reads to know what an engine should say of `path`."""
    return path.with_suffix("") if key[0] == "gguf" else path


def shorten_scales(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """One bit less in every scale: times a zero of four bits, it is exact in float16."""
    for name, tensor in tensors.items():
        if name.endswith("weight_scale"):
            tensor.view(torch.int16).bitwise_and_(~1)


def swap_codes(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Every two neighbouring codes change places."""
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            tensor.copy_(tensor.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))
        if name.endswith(("weight_packed", "qweight")):
            words = tensor.view(torch.uint8)
            words.copy_((words << 4) | (words >> 4))


def shift_zeros(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Every zero is off by one."""
    for name, tensor in tensors.items():
        if name.endswith(("weight_zero_point", "qzeros")):
            tensor.bitwise_xor_(0x11111111)


# Spoiled copies which no gate may let pass: a bug of packing, as an engine would see it.
SPOILED: dict[tuple[str, str], Callable[[dict[str, Tensor], dict[str, Any]], None]] = {
    ("compressed-tensors", "w4g32"): swap_codes,
    ("compressed-tensors", "w4g64-asym"): shift_zeros,
    ("compressed-tensors", "w8a8"): swap_codes,
    ("gptq", "w4g32"): swap_codes,
    ("awq", "w4g64-asym"): shift_zeros,
}


def make_spoiled(made: dict[tuple[str, str], Path], folder: Path) -> dict[tuple[str, str], Path]:
    """Spoiled copies by the key of what they are copies of; one of them for llama.cpp."""
    spoiled = {
        key: spoil(made[key], folder / f"spoiled-{'-'.join(key)}", how) for key, how in SPOILED.items()
    }
    file = folder / "spoiled.gguf"
    lowbit.convert(spoiled["compressed-tensors", "w4g32"], file)
    return spoiled | {("gguf", "Q4_0"): file}
