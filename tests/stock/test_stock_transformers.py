"""The promise: a checkpoint loads where lowbit was never installed, and gives the same model.

A second virtual environment gets torch, transformers and compressed-tensors at the versions of
requirements-dev.lock and nothing of ours. `client.py` runs there in a process of its own, with
`pipeline("text-generation", model=folder)`; what it answers is compared with the quantized model
as this process sees it.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, pipeline

import lowbit
from tests import environment
from tests.tiny import TEXT, make_model

pytestmark = pytest.mark.slow

CLIENT = Path(__file__).with_name("client.py")

PROMPT, NEW_TOKENS = "The river rises in the hills", 16
# Both sides multiply the same bfloat16 weights in the same libraries, and differ by nothing on the
# machines seen. Two bfloat16 steps of a logit around one leave room for another order of additions.
TOLERANCE = 2**-6


@pytest.fixture(scope="session")
def stock_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the stock environment: in `$LOWBIT_STOCK_VENV`, kept, or temporary."""
    return environment.stock(tmp_path_factory)


def ask_stock(python: Path, folders: list[Path], ids: list[int], cwd: Path) -> list[dict[str, Any]]:
    """Run the client, away from the checkout and with none of its environment variables."""
    paths = [str(folder) for folder in folders]
    question = {"folders": paths, "ids": ids, "prompt": PROMPT, "new_tokens": NEW_TOKENS}
    client = environment.start(python, CLIENT, cwd)
    out, errors = client.communicate(json.dumps(question))
    assert client.returncode == 0, errors[-3000:]
    answers: list[dict[str, Any]] = json.loads(out.splitlines()[-1])
    return answers


@torch.no_grad()
def ask_here(folder: Path, ids: list[int]) -> dict[str, Any]:
    """The same questions to the model that this process dequantizes."""
    model = lowbit.load(folder, packed=False)
    generate = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    answer = generate(PROMPT, do_sample=False, max_new_tokens=NEW_TOKENS)
    return {
        "logits": model(torch.tensor([ids])).logits[0].float().tolist(),
        "text": answer[0]["generated_text"],
    }


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference of a logit."""
    return (torch.tensor(one["logits"]) - torch.tensor(other["logits"])).abs().max().item()


@pytest.mark.parametrize(
    ("symmetric", "max_shard_size"),
    [
        pytest.param(True, "5GB", id="default"),
        pytest.param(False, "5GB", id="asymmetric"),
        pytest.param(True, "60KB", id="sharded"),
    ],
)
def test_stock_transformers_gives_the_same_model(
    stock_python: Path, tmp_path: Path, symmetric: bool, max_shard_size: str
) -> None:
    source, folder = make_model("llama", tmp_path / "source"), tmp_path / "quantized"
    calibration = tmp_path / "calibration.txt"
    calibration.write_text(TEXT * 8, encoding="utf-8")
    lowbit.quantize(
        source,
        scheme=lowbit.QuantScheme(bits=4, group_size=32, symmetric=symmetric),
        output=folder,
        method="gptq",
        dataset=str(calibration),
        samples=4,
        seq_len=64,
        max_shard_size=max_shard_size,
        format="compressed-tensors",
    )
    shards = sorted(folder.glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_size == "60KB")
    assert any(name.endswith("weight_packed") for name in tensor_names(shards))

    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"][:48]
    here = ask_here(folder, ids)
    stock, unquantized = ask_stock(stock_python, [folder, source], ids, tmp_path)
    assert distance(here, stock) <= TOLERANCE
    assert here["text"] == stock["text"]
    assert len(here["text"]) > len(PROMPT)
    assert distance(unquantized, stock) > 8 * TOLERANCE, "quantizing moved nothing: the test is blind"


def tensor_names(shards: list[Path]) -> set[str]:
    names: set[str] = set()
    for shard in shards:
        with safe_open(shard, "pt") as file:
            names |= set(file.keys())
    return names


def test_the_stock_environment_has_no_lowbit(stock_python: Path, tmp_path: Path) -> None:
    command = [str(stock_python), "-I", "-c", "import lowbit"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in done.stderr
