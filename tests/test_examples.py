"""Every example runs, on tiny models, and does what it says."""

from __future__ import annotations

import ast
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowbit import QuantScheme, inspection
from tests import script
from tests.tiny import TEXT

Folders = Callable[..., Path]
ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def example(name: str, *arguments: object, code: int = 0) -> str:
    """Run an example as its docstring says; its output."""
    done = script.run(EXAMPLES / name, *arguments)
    assert done.code == code, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_own_data(tiny_model: Folders, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"text": TEXT[i:] + TEXT[:i]} for i in range(0, 400, 20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = example("own_data.py", tiny_model("llama"), data, tmp_path / "w4", "--seq-len", 48)
    assert "perplexity on held-out data" in told
    kept = json.loads((tmp_path / "w4" / "lowbit_report.json").read_text(encoding="utf-8"))
    assert kept["quantization"]["calibration"].startswith("calibration.jsonl")


def test_fit_in_memory_counts_what_is_written(tiny_model: Folders, text_file: str, tmp_path: Path) -> None:
    """On a card too small for groups of 32: groups of 64, and the size that was foretold."""
    model = tiny_model("qwen2")
    common = (model, tmp_path / "out", "--effort", "fast", "--context", 16, "--dataset", text_file)
    told = example("fit_in_memory.py", *common, "--memory", 0.000168)
    lines = [line for line in told.splitlines() if "GB of weights" in line]
    found = inspection.inspect(tmp_path / "out")
    assert {part.scheme for part in found.parts if part.quantized} == {lines[-1].partition(":")[0]}
    assert [line.partition(":")[0] for line in lines] == ["w4g32", "w4g64"]
    foretold = float(lines[-1].split()[1]) * 1e9
    assert foretold == pytest.approx(sum(part.bytes for part in found.parts), rel=0.02)
    told = example("fit_in_memory.py", *common, "--memory", 0.00001, code=1)
    assert "it does not fit" in told


def test_lora_trains_on_packed_weights(checkpoint: Folders, text_file: str, tmp_path: Path) -> None:
    from peft import PeftModel

    import lowbit

    folder, adapter = checkpoint("llama"), tmp_path / "adapter"
    told = example("lora.py", folder, text_file, adapter, "--steps", 25, "--seq-len", 48, "--rank", 4,
                   "--learning-rate", 1e-2)  # fmt: skip
    losses = [float(line.split()[-1]) for line in told.splitlines() if line.startswith("step ")]
    assert losses[-1] < losses[0] - 0.2
    base = lowbit.load(folder, packed=False)
    prompt = torch.tensor([[1, 40, 50, 60, 70]])
    before = base(prompt).logits
    after = PeftModel.from_pretrained(base, adapter)(prompt).logits
    assert not torch.allclose(before, after, atol=0.1)


def test_own_algorithm_lies_between_rounding_and_gptq(
    tiny_model: Folders, text_file: str, tmp_path: Path
) -> None:
    import lowbit

    model = tiny_model("llama")
    data = ("--dataset", text_file, "--samples", 4, "--seq-len", 48)
    told = example("own_algorithm.py", model, tmp_path / "own", *data)
    errors = {"own": float(told.split()[-2])}
    for method in ("rtn", "gptq"):
        report = lowbit.quantize(model, QuantScheme(4, 64), output=tmp_path / method, method=method,
                                 dataset=text_file, samples=4, seq_len=48)  # fmt: skip
        errors[method] = 100 * sum(layer.error for layer in report.layers) / len(report.layers)
    assert errors["gptq"] < errors["own"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "own")


def test_own_algorithm_is_30_lines() -> None:
    tree = ast.parse((EXAMPLES / "own_algorithm.py").read_text(encoding="utf-8"))
    algorithm = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    assert (algorithm.end_lineno or 0) - algorithm.lineno < 30


def test_serving(tmp_path: Path) -> None:
    """With stand-ins for vllm and curl that write down what they are asked."""
    log = tmp_path / "log"
    for name, then in (("vllm", "sleep 60"), ("curl", "echo answered")):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {log}\nexec {then}\n')
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PORT": "8123"}
    command = ["bash", str(EXAMPLES / "serve_vllm.sh"), "some/model-w4", 'Why "blue"?']
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=True)
    assert "answered" in done.stdout
    asked = log.read_text().splitlines()
    assert any(line.startswith("vllm serve some/model-w4 --served-model-name model-w4") for line in asked)
    body = json.loads(asked[-1].partition("--data ")[2])
    assert (body["model"], body["messages"][0]["content"]) == ("model-w4", 'Why "blue"?')


def test_the_notebook_runs(
    tiny_model: Folders, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cells, one after another, in one namespace."""
    notebook = json.loads((EXAMPLES / "laptop.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    settings = {"MODEL": tiny_model("llama"), "TEXT": text_file, "OUTPUT": tmp_path, "SEQ_LEN": 64}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        assert cell.get("outputs", []) == [], "it is kept without outputs"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "laptop.ipynb", "exec"), names)
    assert (tmp_path / "w4" / "report.html").is_file()
    assert (tmp_path / "w4.gguf").is_file()


def test_every_example_is_in_the_documents() -> None:
    page = (ROOT / "docs" / "EXAMPLES.md").read_text(encoding="utf-8")
    files = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert {name for name in files if f"examples/{name}" not in page} == set()
