"""A limit on memory is planned for, or refused with the value that would do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit.budget import SLACK, USUAL, find_budget
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.plan import make_plan
from lowbit.results import Report
from lowbit.scheme import QuantScheme
from lowbit.source import Source

Folders = Callable[..., Path]


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "qronos"])
def test_the_smallest_value_that_is_named_is_accepted_and_no_smaller_one(
    tiny_model: Folders, method: str
) -> None:
    source = Source(tiny_model("llama"), torch.bfloat16)
    plan = make_plan(source.model, QuantScheme(4, 32), FORMATS["gptq"])
    with pytest.raises(LowbitError, match="or more") as caught:
        find_budget(source, plan, method, 64, 48, 1, 0)
    found = re.search(r"use ([0-9.]+)GB", str(caught.value))
    assert found
    smallest = int(float(found[1]) * 1e9)
    find_budget(source, plan, method, 64, 48, smallest, 0)
    with pytest.raises(LowbitError):
        find_budget(source, plan, method, 64, 48, smallest - 20_000_000, 0)
    roomy = find_budget(source, plan, method, 64, 48, 10**12, 0)
    assert roomy.rows is None
    assert roomy.carried is not None
    assert roomy.carried > 10**11
    assert smallest > SLACK


def test_tighter_limits_give_smaller_steps(tiny_model: Folders) -> None:
    source = Source(tiny_model("llama"), torch.bfloat16)
    plan = make_plan(source.model, QuantScheme(4, 32), FORMATS["gptq"])
    found = [
        find_budget(source, plan, "gptq", 512, 48, SLACK + USUAL + extra, 0) for extra in (10**9, 8 * 10**6)
    ]
    assert found[0].tokens == 4096
    assert found[1].tokens is not None
    assert found[1].tokens < 4096
    assert found[1].carried is not None
    assert found[1].carried < 512 * 48 * 64 * 2


@pytest.mark.parametrize("method", ["rtn", "gptq", "qronos"])
def test_a_limit_changes_where_activations_lie_and_no_byte(
    quantize: Callable[..., Report],
    tiny_model: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    plain = quantize(tiny_model("llama"), output=tmp_path / "a", method=method, samples=8)
    monkeypatch.setattr("lowbit.budget.find_budget", lambda *a: find_budget(*a[:-2], 10**12, 0))
    roomy = quantize(tiny_model("llama"), output=tmp_path / "b", method=method, samples=8, max_memory="1GB")
    one, other = (load_file(report.output / "model.safetensors") for report in (plain, roomy))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory": "1MB"}, "too little"),
        ({"max_memory": "lots"}, "not a size"),
        ({"max_memory": "8GB", "dataset": "self"}, "give --dataset"),
        ({"max_memory": "8GB", "method": None, "effort": "high"}, "use --effort balanced"),
    ],
)
def test_what_can_not_be_kept_is_refused(
    quantize: Callable[..., Report],
    tiny_model: Folders,
    tmp_path: Path,
    options: dict[str, str],
    message: str,
) -> None:
    with pytest.raises(LowbitError, match=message):
        quantize(tiny_model("llama"), **({"method": "gptq"} | options))
    assert list(tmp_path.iterdir()) == []
