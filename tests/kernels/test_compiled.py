"""The kernels as compiled for sm_80, in an emulator, against float64; and that the emulator would notice."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from kernel_compile import Case, compile_case
from torch import Tensor

from lowbit_kernels import reference, to_layout
from lowbit_kernels.layout import Layout
from lowbit_kernels.matmul import grid_constants
from tests.kernels.ptx_emulator import OutOfBounds, launch
from tests.kernels.weights import make_weight

OUT, COLUMNS = 128, 1024
EACH = [(bits, dtype) for bits in (4, 8) for dtype in (torch.float16, torch.bfloat16)]
IDS = [f"w{bits}-{str(dtype)[6:]}" for bits, dtype in EACH]


class Run:
    """A compiled kernel and its inputs; `ptx` and `layout` may be spoiled before `multiply`."""

    def __init__(self, kernel: str, bits: int, dtype: torch.dtype, rows: int) -> None:
        torch.manual_seed(0)
        self.case, self.rows = Case(kernel, bits, dtype, rows), rows
        self.tile = self.case.tile("sm_80")
        self.compiled = compile_case(self.case, "sm_80")
        self.ptx: str = self.compiled.asm["ptx"]
        self.weight = make_weight(OUT, COLUMNS, bits=bits, group_size=128, scale_dtype=dtype)
        self.layout = to_layout(*self.weight, bits=bits, group_size=128, in_features=COLUMNS)
        self.x = torch.randn(rows, COLUMNS).to(dtype)

    def multiply(self) -> tuple[Tensor, Counter[str]]:
        """y in float64, parts summed, and the emulator's counts."""
        codes, scale_zero = self.layout
        feature_tiles, row_tiles = OUT // self.tile.features, -(-self.rows // self.tile.rows)
        sizes = [self.rows, OUT, COLUMNS, COLUMNS]
        if self.case.kernel == "prefill":
            out = torch.full((1, self.rows, OUT), torch.nan, dtype=self.case.dtype)
            grid, integers = (
                (feature_tiles * row_tiles, 1, 1),
                [*sizes, scale_zero.shape[-2], codes.shape[-3]],
            )
        else:
            out = torch.full((2, self.rows, OUT), torch.nan)
            blocks = COLUMNS // grid_constants(self.case.bits, 128, COLUMNS, self.case.dtype)["BK"]
            grid = (feature_tiles, row_tiles, 2)
            integers = [*sizes, *scale_zero.shape[-3:-1], blocks // 2]
        counts = launch(
            self.ptx, grid, [self.x, codes, scale_zero, out, *integers], self.compiled.metadata.shared
        )
        return out.double().sum(0), counts

    def error(self, y: Tensor) -> float:
        """Largest error over the largest value."""
        expected = reference.dequant_matmul(self.x, *self.weight, bits=self.case.bits, group_size=128)
        return ((y - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "dtype"), EACH, ids=IDS)
@pytest.mark.parametrize(("kernel", "rows"), [("decode", 1), ("decode", 13), ("decode", 32), ("prefill", 70)])
def test_against_float64(kernel: str, rows: int, bits: int, dtype: torch.dtype) -> None:
    run = Run(kernel, bits, dtype, rows)
    y, counts = run.multiply()
    rounding = {"decode": 1e-6, "prefill": {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]}[kernel]
    assert run.error(y) < rounding
    traffic = {name: counts[name] / counts[f"{name}, ideal"] for name in counts if not name.endswith("ideal")}
    loads = {name: ratio for name, ratio in traffic.items() if "store" not in name and name != "shared load"}
    assert loads == pytest.approx(dict.fromkeys(loads, 1.0), abs=0.05)


def test_it_would_notice() -> None:
    """A good run, and the same with one thing wrong each."""
    run = Run("decode", 4, torch.float16, 13)
    good = run.ptx
    assert run.error(run.multiply()[0]) < 1e-6

    run.ptx = re.sub(r"wait_group\s+(\d+)", lambda match: f"wait_group {int(match[1]) + 7}", good)
    assert run.multiply()[0].isnan().any(), "a wait too few leaves shared memory unwritten"

    run.ptx = good.replace("0x00f000f0", "0x00e000e0")
    assert run.error(run.multiply()[0]) > 1e-3, "a bit less in a mask"

    run.ptx, whole = good, run.layout
    run.layout = Layout(whole.codes[:, :2].contiguous(), whole.scale_zero)
    with pytest.raises(OutOfBounds):
        run.multiply()
