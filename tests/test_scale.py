"""Memory does not grow with the number of blocks, and keeps within what it is given."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import VOCAB, make_tokenizer

SCRIPT = Path(__file__).parents[1] / "scripts" / "scale_report.py"


@pytest.mark.slow
def test_sixteen_blocks_take_the_memory_of_four() -> None:
    command = [sys.executable, str(SCRIPT), "--blocks", "4", "16", "--samples", "4", "--seq-len", "128"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"16 blocks take ([+-][0-9.]+)% of the memory of 4", done.stdout)
    assert found, done.stdout
    assert abs(float(found[1])) <= 10


WITHIN = """
import re, sys
from lowbit import LowbitError, QuantScheme, hardware, quantize
folder, output, method, text = sys.argv[1:]
options = {"output": output, "method": method, "dataset": text, "samples": 24, "seq_len": 256}
try:
    quantize(folder, QuantScheme(4, 32), max_memory="10MB", **options)
except LowbitError as error:
    smallest = re.search(r"use ([0-9.]+)GB", str(error))[1]
quantize(folder, QuantScheme(4, 32), max_memory=f"{smallest}GB", **options)
print(smallest, hardware.peak_memory())
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "qronos"])
def test_a_limit_is_kept(method: str, tmp_path: Path, text_file: str) -> None:
    """With the least that is accepted, by what the system counts of a process; one matrix is large here."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=8
    )
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    command = [
        sys.executable,
        "-c",
        WITHIN,
        str(tmp_path / "model"),
        str(tmp_path / "out"),
        method,
        text_file,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    limit, peak = map(float, done.stdout.split())
    assert 0.5 * limit < peak / 1e9 <= limit
