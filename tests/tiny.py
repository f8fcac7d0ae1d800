"""Tiny random checkpoints of every model family, saved as real Hugging Face folders.

Weights are random but not degenerate: linears have a gain near one, norm weights are moved away
from their neutral value and biases from zero, so that an error in folding, ordering or masking
moves the logits. Logits have a standard deviation of about one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, POSITIONS, VOCAB = 64, 128, 4, 2, 512, 352

TEXT = """The river rises in the hills north of the town and runs for sixty miles to the sea.
In the spring the water is high and the mills along its banks grind from morning to night.
Nobody remembers who built the first of them; the oldest record, dated 1412, names three.
A quantized weight is an integer code, a scale and a zero: w = (codes - zeros) * scales.
def area(width: float, height: float) -> float:
    return width * height
When the children asked the miller what the wheel was for, he laughed and said that it turned
the stones, that the stones ground the corn, and that the corn would be their bread in winter.
"""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "intermediate_size": INTERMEDIATE}
_CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"head_dim": 16}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "gemma3": (
        Gemma3TextConfig,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": (MistralConfig, {"head_dim": 16, "sliding_window": 32}),
    "phi3": (Phi3Config, {"original_max_position_embeddings": POSITIONS}),
    "phi": (PhiConfig, {}),
    "gpt2": (GPT2Config, {"n_embd": HIDDEN, "n_head": HEADS, "n_positions": POSITIONS}),
    "opt": (OPTConfig, {"ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN}),
    "mixtral": (MixtralConfig, {**_MOE, "num_local_experts": 4}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {**_MOE, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True},
    ),
    "deepseek_v3": (
        DeepseekV3Config,
        {
            **_MOE,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
        },
    ),
}
FAMILIES = tuple(family for family in _CONFIGS if family != "deepseek_v3")  # that one is for loading only
BOS_FAMILIES = frozenset({"llama", "gemma3", "mistral", "mixtral", "opt"})
CHAT_FAMILIES = frozenset(_CONFIGS) - {"gpt2", "opt"}


def make_tokenizer(with_bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB` entries; ids 0, 1, 2 are pad, bos, eos.

    Args:
        with_bos: Encoding puts `<s>` first, as Llama and Gemma do; otherwise it adds nothing.
        chat: Give the tokenizer a chat template.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>", "<|endoftext|>"],  # Qwen2Tokenizer wants the last
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=POSITIONS,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def make_config(family: str, *, tied: bool | None = None, blocks: int = 3) -> PretrainedConfig:
    """The config of a tiny `family`; `tied` None keeps the family's default for tied embeddings."""
    config_class, own = _CONFIGS[family]
    common: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        common["n_layer"] = blocks
    else:
        common |= {
            "hidden_size": HIDDEN,
            "num_hidden_layers": blocks,
            "num_attention_heads": HEADS,
            "max_position_embeddings": POSITIONS,
        }
        if family != "opt":
            common |= {"intermediate_size": INTERMEDIATE, "num_key_value_heads": KV_HEADS}
    if tied is not None:
        common["tie_word_embeddings"] = tied
    return config_class(**{**common, **own})


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> None:
    """Fill every parameter of `model` with values at which a mistake shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # tied parameters come once
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:  # norms around their neutral value, biases around zero
            parameter.add_((0.2 * noise).to(parameter.dtype))
        else:
            parameter.copy_(0.15 * noise)


def make_model(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool | None = None,
    blocks: int = 3,
    max_shard_size: str | None = None,
) -> Path:
    """Save a random tiny causal LM of `family` with tokenizer and generation config; return `folder`.

    Gemma 3 has four blocks whatever `blocks` says: its pattern of attention is that long.
    """
    tokenizer = make_tokenizer(family in BOS_FAMILIES, family in CHAT_FAMILIES)
    model = AutoModelForCausalLM.from_config(make_config(family, tied=tied, blocks=blocks), dtype=dtype)
    randomize(model, seed)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # float32 in checkpoints of whatever dtype
            noise = torch.randn(buffer.shape, generator=torch.Generator().manual_seed(seed))
            buffer.data = 0.1 * noise  # moves the choice of experts
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    tokenizer.save_pretrained(folder)
    return folder
