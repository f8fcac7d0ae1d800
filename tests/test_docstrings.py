"""The examples in the docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from tests.tiny import TEXT

Folders = Callable[..., Path]
MODULES = sorted(
    ["lowbit"]
    + [m.name for m in pkgutil.walk_packages(lowbit.__path__, "lowbit.") if "__main__" not in m.name]
)


@pytest.fixture(scope="module")
def names(tiny_model: Folders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the examples take for granted."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    lowbit.quantize(
        tiny_model("llama"), lowbit.QuantScheme(4, 32), output=folder / "checkpoint", method="rtn"
    )
    return {
        "tiny_model": tiny_model("llama"),
        "folder": folder,
        "checkpoint": folder / "checkpoint",
        "text_file": str(folder / "text.txt"),
        "prompt": torch.tensor([[1, 50, 60]]),
    }


def examples_of(module: str) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module))
    return [test for test in found if test.examples]


@pytest.mark.parametrize("module", [name for name in MODULES if examples_of(name)])
def test_examples_run(module: str, names: dict[str, Any]) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report: list[str] = []
    for test in examples_of(module):
        test.globs |= names
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
    assert runner.tries > 0


@pytest.mark.parametrize("name", [name for name in lowbit.__all__ if name != "LowbitError"])
def test_every_public_name_has_an_example(name: str) -> None:
    documentation = inspect.getdoc(getattr(lowbit, name))
    assert documentation is not None
    assert ">>> " in documentation


def test_examples_are_found() -> None:
    """Or the first test would pass on nothing."""
    found = {test.name for module in MODULES for test in examples_of(module)}
    assert {"lowbit.pipeline.quantize", "lowbit.load", "lowbit.evaluate.perplexity"} <= found


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_docstring(name: str) -> None:
    assert importlib.import_module(name).__doc__


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = lowbit.nonsense
    assert set(lowbit.__all__) == {*lowbit._HOMES, "load"}
