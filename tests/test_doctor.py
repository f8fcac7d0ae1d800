"""`lowbit doctor`: it tries what it claims, says why something does not work, and its exit code."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lowbit import cli, doctor, ops


def run(*options: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["doctor", *options], env={"COLUMNS": "200"})
    return done.exit_code, done.output


def test_it_is_healthy_here() -> None:
    code, out = run()
    assert code == 0
    for word in (torch.__version__, "compressed-tensors", "cpu 4 bits", "kernel", "cuda", "gguf"):
        assert word in out
    code, text = run("--json")
    found = json.loads(text)
    assert code == 0
    assert found["healthy"] is True
    assert found["versions"]["torch"] == torch.__version__
    assert found["libraries"] == []
    (cpu, *_) = found["devices"]
    assert cpu["name"] == "cpu"
    assert 0 < cpu["free"] <= cpu["memory"]
    assert {f"cpu {bits} bits" for bits in (2, 3, 4, 8)} <= {one["name"] for one in found["kernels"]}
    assert all(one["usable"] for one in found["kernels"] if one["name"].startswith("cpu"))


def test_a_kernel_that_computes_nonsense_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.matmul
    monkeypatch.setattr(ops, "matmul", lambda x, weight: 1.2 * right(x, weight))
    code, out = run()
    assert code == 1
    assert "wrong results" in out
    assert "not usable" in out


def test_a_kernel_that_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such instruction\nand a long trace")

    monkeypatch.setattr(ops, "matmul", fail)
    found = [one for one in doctor.check_kernels() if one.name == "cpu 4 bits"]
    assert found == [doctor.Finding("cpu 4 bits", False, "fails (RuntimeError: no such instruction)", True)]


def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for CPUs" in doctor.check_kernels()[-1].detail
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "nvidia-smi" in doctor.check_kernels()[-1].detail
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    (found,) = [one for one in doctor.check_kernels() if not one.usable]
    assert "Triton is not installed" in found.detail
    assert not found.needed


def test_a_missing_extra_names_its_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    found = {one.name: one for one in (*doctor.check_formats(), *doctor.check_extras())}
    assert found["gguf"].detail == "gguf and sentencepiece not installed: pip install 'lowbit[gguf]'"
    assert "lowbit[tasks]" in found["eval --tasks"].detail
    assert not any(one.needed for one in found.values())


def test_a_broken_torch_is_a_finding_and_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what an import of it finds
    found = doctor.diagnose()
    assert not found.healthy
    assert [one.name for one in found.libraries] == ["torch"]
    assert found.devices == found.kernels == []


def test_versions_are_held_against_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["torch>=99", "rich>=1", "no-such-thing>=2", "gguf>=99; extra == 'gguf'"]
    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    found = {one.name: one.detail for one in doctor.check_versions()}
    assert found == {
        "torch": f"is {metadata.version('torch')}: pip install 'torch>=99'",
        "no-such-thing": "is not installed: pip install 'no-such-thing>=2'",
    }
