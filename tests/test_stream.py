"""Blocks run one at a time give what the plain model gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowbit import topology
from lowbit.blocks import BlockQuantizer
from lowbit.formats import FORMATS
from lowbit.plan import make_plan
from lowbit.scheme import QuantScheme
from lowbit.source import Source, free
from lowbit.stream import Stream
from tests.tiny import FAMILIES, VOCAB

CPU = torch.device("cpu")
Folders = Callable[..., Path]


def token_batches() -> list[Tensor]:
    """Longer than Gemma's and Mistral's sliding windows."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, shape, generator=generator) for shape in [(2, 48), (1, 64)]]


def plain_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_block_and_the_logits_equal_the_plain_models(
    tiny_model: Folders, family: str, dtype: torch.dtype
) -> None:
    folder, batches = tiny_model(family), token_batches()
    model = plain_model(folder, dtype)
    _, plain_blocks = topology.decoder_blocks(model)
    outputs: list[Tensor] = []
    for block in plain_blocks:
        block.register_forward_hook(
            lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        expected = [model(input_ids=batch).logits for batch in batches]
    per_batch = [outputs[: len(plain_blocks)], outputs[len(plain_blocks) :]]

    source = Source(folder, dtype)
    path, blocks = topology.decoder_blocks(source.model)
    source.load(source.keys_outside([path]), CPU)
    stream = Stream(source.model, blocks, batches)
    for number, block in enumerate(blocks):
        source.load(source.keys_under([f"{path}.{number}"]), CPU)
        for batch in stream.advance(number):
            assert torch.equal(stream.hidden[batch], per_batch[batch][number]), (number, batch)
        free(block)  # what was carried stands on its own
    for batch, logits in enumerate(expected):
        assert torch.equal(stream.logits(batch), logits)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
def test_a_block_reads_what_the_quantized_blocks_before_it_give(tiny_model: Folders, family: str) -> None:
    """The oracle is a plain model whose first blocks have got the quantized weights."""
    folder, batches = tiny_model(family), token_batches()
    source = Source(folder, torch.float32)
    fmt = FORMATS["gptq"]
    plan = make_plan(source.model, QuantScheme(4, 32), fmt)
    source.load(source.keys_outside([plan.path]), CPU)
    stream = Stream(source.model, plan.blocks, batches)
    model = plain_model(folder)
    _, plain_blocks = topology.decoder_blocks(model)
    inputs: list[Tensor] = []
    with torch.no_grad():
        original = model(input_ids=batches[0]).logits
    road = BlockQuantizer(source, plan, stream, "gptq", fmt.SCALE_DTYPE, CPU, lambda *_: None)
    for number, _ in enumerate(road):
        # Not freed yet: the generator waits.
        plain_blocks[number].load_state_dict(plan.blocks[number].state_dict())
        following = plain_blocks[number + 1] if number + 1 < len(plain_blocks) else None
        if following is None:
            break
        inputs.clear()
        handle = following.register_forward_pre_hook(lambda _m, args, kwargs: inputs.append(
            args[0] if args else kwargs["hidden_states"]), with_kwargs=True)  # fmt: skip
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch)
        handle.remove()
        for carried, expected in zip(stream.hidden, inputs, strict=True):
            assert carried is not None
            torch.testing.assert_close(carried, expected)
    with torch.no_grad():
        quantized = model(input_ids=batches[0]).logits
    torch.testing.assert_close(stream.logits(0), quantized)
    assert (quantized - original).norm() > 0.01 * original.norm()  # and that is not the original


def test_running_leaves_the_model_as_it_was(tiny_model: Folders) -> None:
    source = Source(tiny_model("llama"), torch.float32)
    path, blocks = topology.decoder_blocks(source.model)
    source.load(source.keys_outside([path]) + source.keys_under([path]), CPU)
    stream = Stream(source.model, blocks, token_batches())
    first = stream.run(0, 0)
    assert list(stream.hidden) == [None, None]
    assert torch.equal(stream.run(0, 0), first)
    assert all("forward" not in vars(block) for block in blocks)


def test_a_block_that_fails_leaves_the_model_as_it_was(tiny_model: Folders) -> None:
    source = Source(tiny_model("llama"), torch.float32)
    path, blocks = topology.decoder_blocks(source.model)
    source.load(source.keys_outside([path]), CPU)
    stream = Stream(source.model, blocks, token_batches())
    with pytest.raises((RuntimeError, NotImplementedError)):
        stream.run(0, 0)  # its weights are not loaded
    assert all("forward" not in vars(block) for block in blocks)
