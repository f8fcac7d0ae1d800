"""The opt-in C kernels: against float64 and torch's ways, at the edges, and where they can't be had."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit import LowbitError, QuantScheme, cpu, native, ops, speed
from lowbit.nn import DenseLinear
from lowbit.quantized import QuantizedWeight
from tests.formats.samples import random_weight
from tests.packed import assert_same_model

SCHEMES = [
    QuantScheme(2, 32), QuantScheme(3, 64, False), QuantScheme(4, 32), QuantScheme(4, 128, False),
    QuantScheme(4, -1), QuantScheme(8, 64, False), QuantScheme(8, -1),
]  # fmt: skip
SHAPES = [(128, 256), (100, 384), (1, 128), (33, 640)]


@pytest.fixture
def kernels() -> None:
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    if not native.supported() or cpu.block() != cpu.Block(64, False):
        pytest.skip("this CPU lacks AVX-512 VNNI")
    native.enable()


def exact(weight: QuantizedWeight) -> torch.Tensor:
    width = weight.shape[1] // weight.scales.shape[1]
    zeros = weight.zeros.double().repeat_interleave(width, 1)
    return (weight.codes.double() - zeros) * weight.scales.double().repeat_interleave(width, 1)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_few_rows_match_float64(scheme: QuantScheme, threads: int) -> None:
    """The result is rounded to bfloat16, as are the zeros of an asymmetric weight: nothing else is lost."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for seed, shape in enumerate(SHAPES):
            weight = random_weight(scheme, shape, torch.bfloat16, seed)
            operand = ops.prepare(weight, torch.bfloat16)
            assert operand.layout == ops.TILES
            bias = torch.randn(shape[0]).bfloat16()
            for lead in ((1,), (1, 1), (3,), (2, 5)):
                x = torch.randn(*lead, shape[1]).bfloat16() * 10 ** (3 * torch.rand(shape[1])).bfloat16()
                with torch.no_grad():
                    found = ops.matmul(x, operand, bias).double()
                dense = exact(weight)
                expected = x.double() @ dense.T + bias.double()
                mass = x.double().abs() @ dense.abs().T
                rounding = 2**-8 * expected.abs() + 2**-14 * mass
                if not scheme.symmetric:
                    scales = weight.scales.double().abs().amax(1)
                    rounding += 2**-8 * 2**scheme.bits * scales * x.double().abs().sum(-1, keepdim=True)
                assert ((found - expected).abs() <= rounding).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_many_rows_are_those_of_the_tiles_to_the_bit(scheme: QuantScheme) -> None:
    weight = random_weight(scheme, (200, 384), torch.bfloat16)
    tiles, scales = cpu.tile(weight)
    planes = 2 if scheme.bits == 8 else 1
    group = planes * 384 // scales.shape[0]
    expected = cpu.dense(tiles, scales, scheme.bits, torch.bfloat16)
    found = torch.empty_like(expected)
    native.dequantize(tiles, scales, 0, group, planes, found)
    assert torch.equal(found, expected)
    part = torch.empty(384, 128, dtype=torch.bfloat16)
    native.dequantize(tiles, scales, 64, group, planes, part)
    assert torch.equal(part, expected[:, 64:192])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (100, 31), (33, 896), (5, 1000)], ids=str)
def test_a_dense_row_matches_float64(shape: tuple[int, int], threads: int) -> None:
    """Memory behind the matrix and the row is NaN: nothing of it may be read into a sum."""
    if not native.has_dense():
        pytest.skip("this CPU does not multiply bfloat16")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows, columns = shape
        held = torch.full((rows * columns + 64,), float("nan")).bfloat16()
        weight = held[: rows * columns].view(shape).copy_(torch.randn(shape))
        x = torch.full((columns + 64,), float("nan")).bfloat16()[:columns].copy_(torch.randn(columns))
        bias = torch.randn(rows).bfloat16()
        for added in (None, bias):
            expected = weight.double() @ x.double() + (0 if added is None else added.double())
            mass = weight.double().abs() @ x.double().abs()
            found = native.dense(x, weight, added).double()
            assert ((found - expected).abs() <= 2**-8 * expected.abs() + 2**-20 * mass).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("kernels")
@torch.no_grad()
def test_a_dense_head_runs_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.has_dense():
        pytest.skip("this CPU does not multiply bfloat16")
    layer = DenseLinear.of(torch.nn.Linear(96, 40, dtype=torch.bfloat16))
    calls, real = [], native.dense
    monkeypatch.setattr(native, "dense", lambda *args: calls.append(1) or real(*args))
    x = torch.randn(1, 1, 96).bfloat16()
    expected = layer(x.repeat(1, 2, 1))[:, :1]  # two rows take the general product
    assert not calls
    torch.testing.assert_close(layer(x), expected)
    assert calls


@pytest.mark.usefixtures("kernels")
def test_what_is_not_finite_stays_so() -> None:
    weight = random_weight(QuantScheme(4, 32), (64, 128), torch.bfloat16)
    operand = ops.prepare(weight, torch.bfloat16)
    x = torch.ones(3, 128).bfloat16()
    x[0, 5], x[1, 5], x[2] = float("nan"), float("inf"), 0
    with torch.no_grad():
        found = ops.matmul(x, operand)
    assert found[0].isnan().all()
    assert not found[1].isfinite().any()
    assert (found[2] == 0).all()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("declined", [False, True])
def test_a_loaded_model_runs_through_them(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, declined: bool
) -> None:
    """Without being asked for, unless they are declined."""
    monkeypatch.setattr(native, "_library", None)
    if declined:
        native.disable()
    folder = checkpoint("qwen2", QuantScheme(4, 32), head_bits=8, tied=True)
    packed, dense = (lowbit.load(folder, packed=p) for p in (True, False))
    calls = []
    real = native.matvec
    monkeypatch.setattr(native, "matvec", lambda *args: calls.append(1) or real(*args))
    assert_same_model(packed, dense)
    assert bool(calls) != declined
    assert speed.kernels_of(packed) == ("torch" if declined else "native")
    assert native.lacking() == ""


def test_where_they_cannot_be_torch_serves(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native.compiled, "processor", lambda: {"avx2"})
    packed = lowbit.load(checkpoint("llama"))
    assert speed.kernels_of(packed) == "torch"
    assert native.lacking() == "the native kernels need avx512f, which this CPU lacks: run without them"


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native.compiled, "processor", lambda: {"avx2"})
    with pytest.raises(LowbitError, match="need avx512f, which this CPU lacks"):
        native.enable()
    monkeypatch.setattr(native.compiled, "processor", lambda: set(native._NEEDED))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native.compiled.shutil, "which", lambda name: None)
    with pytest.raises(LowbitError, match="install gcc"):
        native.enable()
    monkeypatch.setattr(native.compiled.shutil, "which", lambda name: "/bin/false")
    with pytest.raises(LowbitError, match="can't compile"):
        native.enable()
    assert not native.enabled()
    assert not list((tmp_path / "lowbit").iterdir())
