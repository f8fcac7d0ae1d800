"""The output head: rounded some rows at a time, on what it reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowbit import QuantScheme, hf, topology
from lowbit.carried import Carried
from lowbit.head import observe_head, round_head
from lowbit.judge import head_inputs
from lowbit.stream import Stream
from tests.algorithms.examples import correlated_inputs, output_error, random_weight, second_moment

Folders = Callable[..., Path]


def untold(*told: object) -> None:
    """Nobody listens."""


@pytest.mark.parametrize("method", ["rtn", "quick", "awq", "qronos"])
def test_lots_of_rows_make_what_all_at_once_make(method: str) -> None:
    weight, hessian = random_weight(40, 64), second_moment(correlated_inputs(64))
    seen = None if method == "rtn" else hessian
    many, one = (
        round_head(weight, seen, QuantScheme(4, 32), method, torch.bfloat16, untold, rows)
        for rows in (16, 40)
    )
    assert torch.equal(many[0].codes, one[0].codes)
    assert torch.equal(many[0].scales, one[0].scales)
    lost = output_error(one[0].dequantize(), weight, torch.eye(64) if seen is None else hessian)
    whole = output_error(torch.zeros_like(weight), weight, torch.eye(64) if seen is None else hessian)
    assert many[1] == pytest.approx(one[1], rel=1e-5)
    assert one[1] == pytest.approx(float(lost / whole), rel=0.02)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_hessian_is_that_of_what_the_head_reads(family: str, tiny_model: Folders) -> None:
    """Of the batches that are a rank's own, behind the norm; by the model's own forward."""
    model = hf.load_stock(tiny_model(family), torch.float32)
    batches = list(torch.randint(3, 200, (3, 2, 24), generator=torch.Generator().manual_seed(0)))
    blocks = topology.decoder_blocks(model)[1]
    stream = Stream(model, blocks, batches, Carried(len(batches)))
    for block in range(len(blocks)):
        list(stream.advance(block))
    found = observe_head(stream, [0, 2], 96, torch.device("cpu"), untold)
    read = torch.cat([x.flatten(0, 1) for x in head_inputs(model, [batches[0], batches[2]])])
    assert torch.allclose(found, read.T @ read / 96, atol=1e-4)
