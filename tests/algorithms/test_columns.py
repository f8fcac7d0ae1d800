"""The C loop over columns: against the plain one, on any processor's registers, and where it can't be had."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit import LowbitError, QuantScheme, compiled
from lowbit.algorithms import columns, gptq
from lowbit.results import Report
from lowbit_kernels import reference

CPU = torch.device("cpu")


@pytest.fixture(params=columns._FEATURES, ids=lambda features: features[0])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> columns.Sweep:
    """The loop in C, compiled for one of the processors that it is written for."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    if not compiled.processor().issuperset(request.param):
        pytest.skip(f"this CPU lacks {request.param}")
    monkeypatch.setattr(compiled, "processor", lambda: set(request.param))
    found = columns.sweep(CPU, 128)
    assert found is not None
    return found


def example(count: int, out: int, descent: bool) -> tuple[torch.Tensor | int | None, ...]:
    groups = torch.arange(count) // 16
    shape = (int(groups.max()) + 1, out)
    scales = (torch.rand(shape) * 0.1 + 0.02) * (torch.randint(0, 2, shape) * 2 - 1)
    zeros = torch.randint(0, 16, shape).float()
    mixing = torch.randn(count, 2 * count)[:, :count] / count**0.5
    start = torch.randint(0, 16, (count, out)) - zeros[groups] if descent else torch.randn(count, out)
    inverse = torch.rand(count) + 0.5 if descent else None
    return torch.randn(count, out), mixing, scales, zeros, groups, 15, start, inverse


@pytest.mark.parametrize("descent", [False, True], ids=["gptq", "descent"])
@pytest.mark.parametrize(("count", "out"), [(128, 70), (41, 32), (2, 64), (1, 5), (300, 130)])
@pytest.mark.parametrize("threads", [1, 2])
def test_columns_are_rounded_alike(
    kernel: columns.Sweep, count: int, out: int, descent: bool, threads: int
) -> None:
    given = example(count, out, descent)
    before = [part.clone() for part in given if isinstance(part, torch.Tensor)]
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        levels, errors = kernel(*given)
    finally:
        torch.set_num_threads(usual)
    expected, expected_errors = reference.round_columns(*given)  # type: ignore[arg-type]
    same = levels == expected
    assert same.float().mean() > 0.999  # a sum in another order may fall to the other of two codes
    torch.testing.assert_close(errors[same], expected_errors[same], rtol=1e-4, atol=1e-4)
    assert all(map(torch.equal, before, (part for part in given if isinstance(part, torch.Tensor))))


def test_mixing_may_lie_either_way(kernel: columns.Sweep) -> None:
    base, mixing, *rest = example(64, 70, True)
    assert isinstance(mixing, torch.Tensor)
    sideways = mixing.T.contiguous().T
    assert sideways.stride(1) != 1
    assert torch.equal(kernel(base, mixing, *rest)[0], kernel(base, sideways, *rest)[0])


def test_what_is_far_from_the_grid_gets_its_last_code(kernel: columns.Sweep) -> None:
    base = torch.tensor([[1e30, -1e30, 7e4, 0.5, 1.5, 2.5]])
    scales, zeros = torch.ones(1, 6), torch.full((1, 6), 8.0)
    levels, _ = kernel(base, torch.zeros(1, 1), scales, zeros, torch.zeros(1).long(), 15, base)
    assert levels.tolist() == [[7, -8, 7, 0, 2, 2]]


@pytest.mark.parametrize("scheme", [QuantScheme(4, 32), QuantScheme(3, 64, False)], ids=str)
def test_gptq_rounds_alike(
    kernel: columns.Sweep, scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole algorithm in C and by torch's operations: the same codes but for ties, the same error."""
    x = torch.randn(400, 192) @ torch.randn(192, 192) / 14
    weight, hessian, found = torch.randn(48, 192), x.T @ x / 400, []
    for way in (kernel, None):
        monkeypatch.setattr(columns, "sweep", lambda device, block_size, way=way: way)
        rounded, note = gptq.quantize_weight(weight, hessian, scheme, torch.bfloat16)
        assert not note
        found.append(rounded)
    assert (found[0].codes != found[1].codes).float().mean() < 0.02
    errors = [float((((weight - one.dequantize()) @ x.T) ** 2).sum()) for one in found]
    assert errors[0] == pytest.approx(errors[1], rel=5e-3)


def test_a_block_that_is_too_wide_is_left_to_the_loop() -> None:
    assert columns.sweep(CPU, columns.MOST_COLUMNS + 1) is None


def test_what_c_could_not_tell_is_refused(kernel: columns.Sweep) -> None:
    base, mixing, scales, zeros, groups, *rest = example(32, 8, True)
    assert isinstance(base, torch.Tensor)
    assert isinstance(scales, torch.Tensor)
    assert isinstance(groups, torch.Tensor)
    with pytest.raises(ValueError, match="contiguous and float32"):
        kernel(base.double(), mixing, scales, zeros, groups, *rest)
    with pytest.raises(ValueError, match="don't go together"):
        kernel(base, mixing, scales[:, :1].contiguous(), zeros, groups, *rest)
    with pytest.raises(ValueError, match=r"groups are torch\.int32"):
        kernel(base, mixing, scales, zeros, groups.int(), *rest)


def small_run(source: Path, target: Path, method: str = "gptq") -> Report:
    return lowbit.quantize(
        source, QuantScheme(4, 32), output=target, method=method, dataset="self", samples=4, seq_len=32
    )


def told(report: Report) -> list[str]:
    return [note for note in report.notes if "columns were rounded by torch's operations" in note]


@pytest.mark.parametrize(
    ("flags", "noted"), [({"avx2", "fma"}, True), ({"sse2"}, False)], ids=["no compiler", "another processor"]
)
def test_the_summary_says_what_can_be_mended(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: set[str],
    noted: bool,
) -> None:
    monkeypatch.setattr(compiled, "processor", lambda: flags)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    report = small_run(tiny_model("llama"), tmp_path / "made")
    assert columns.name(CPU) == "torch"
    assert bool(told(report)) == noted
    assert ("install gcc" in "".join(told(report))) == noted
    assert not told(small_run(tiny_model("llama"), tmp_path / "nearest", "rtn"))


def test_a_run_goes_on_with_the_loop_that_it_began_with(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: columns.Sweep
) -> None:
    """Sums in another order round otherwise, so another loop is refused; nearest codes need none."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for method in ("gptq", "rtn"):
        with monkeypatch.context() as interrupted:
            interrupted.setattr("lowbit.road.Road.verify", stop)
            with pytest.raises(KeyboardInterrupt):
                small_run(tiny_model("llama"), tmp_path / method, method)
    monkeypatch.setattr(compiled, "processor", lambda: {"sse2"})
    columns._on_cpu.cache_clear()
    with pytest.raises(LowbitError, match="columns C -> torch"):
        small_run(tiny_model("llama"), tmp_path / "gptq")
    assert small_run(tiny_model("llama"), tmp_path / "rtn", "rtn").output == tmp_path / "rtn"


def test_refusals_of_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "wrong.c"
    source.write_text("not C")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(LowbitError, match=r"false can't compile wrong\.c \(.*\): set CC to gcc >= 9"):
        compiled.library(source, ())
    with pytest.raises(LowbitError, match=r"none\.c is missing: install lowbit again"):
        compiled.library(tmp_path / "none.c", ())
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(LowbitError, match="install gcc, or set CC"):
        compiled.library(source, ())
    assert not list((tmp_path / "lowbit").iterdir())
    source.with_name("lowbit2").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "lowbit2"))
    with pytest.raises(LowbitError, match=r"wrong\.c can't be compiled \(.*\): set XDG_CACHE_HOME"):
        compiled.library(source, ())


def test_a_block_too_large_for_the_kernel_is_told(kernel: columns.Sweep) -> None:
    with pytest.warns(UserWarning, match="block_size=2048: the C kernel takes 1024 at most"):
        assert columns.sweep(CPU, 2048) is None
    assert columns.sweep(CPU, 1024) is kernel
