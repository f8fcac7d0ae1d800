"""`lowbit_kernels.tune` with a clock of the test's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lowbit_kernels import matmul, reference, tune
from lowbit_kernels.tiles import Tiles, choose
from lowbit_kernels.tune import Weight

HERE = torch.get_default_device()
WEIGHT = Weight(4, 128, 128, 512, torch.bfloat16)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "HEIGHTS", {"decode": (8,), "prefill": (64,)})
    monkeypatch.setattr(tune, "L2_BYTES", 1)
    device = matmul.Target("sm_80", 4, ptx=False)
    monkeypatch.setattr(matmul, "target", lambda _: device)
    monkeypatch.setattr(tune, "target", lambda _: device)


def clock(times: Callable[[Tiles], float]) -> tune.Timer:
    """A timer that runs what it is to time, and takes the tile's word for how long that was."""

    def timer(calls: Sequence[Callable[[], Any]]) -> float:
        tiles = {call.args[-1] for call in calls}  # type: ignore[attr-defined]
        assert len(calls) > 1
        calls[0]()
        return times(tiles.pop())

    return timer


def shipped(kernel: str) -> Tiles:
    return choose(kernel, "sm_80", 4, torch.bfloat16, 8 if kernel == "decode" else 64)


def test_the_fastest_is_kept() -> None:
    best = {kernel: tune.candidates(shipped(kernel))[1] for kernel in ("decode", "prefill")}
    found = list(tune.tune([WEIGHT], HERE, clock(lambda tile: 50.0 if tile in best.values() else 60.0)))
    assert [outcome.name for outcome in found] == [
        "decode w4 bfloat16 m8 g128 128x512", "prefill w4 bfloat16 m64 g128 128x512",
    ]  # fmt: skip
    assert [outcome.tile for outcome in found] == list(best.values())
    assert {(outcome.shipped, outcome.best) for outcome in found} == {(60.0, 50.0)}
    assert [outcome.rows for outcome in found] == [1, 64]


def test_a_tie_keeps_what_ships() -> None:
    first, *_ = tune.tune([WEIGHT], HERE, clock(lambda tile: 60.0 if tile == shipped("decode") else 58.5))
    assert first.tile == shipped("decode")
    assert first.best == first.shipped == 60.0


def test_what_is_wrong_or_does_not_run_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    _, wrong, broken, _ = tune.candidates(shipped("decode"))
    run = tune.run

    def spoiled(weight: Weight, kernel: str, x: torch.Tensor, layout: Any, tile: Tiles) -> torch.Tensor:
        if tile == broken:
            raise RuntimeError("out of resources")
        y = run(weight, kernel, x, layout, tile)
        return 1.1 * y if tile == wrong else y

    monkeypatch.setattr(tune, "run", spoiled)
    first, *_ = tune.tune([WEIGHT], HERE, clock(lambda tile: 1.0 if tile in (wrong, broken) else 60.0))
    assert first.tile == shipped("decode")
    assert set(first.dropped) == {wrong, broken}
    assert "differs" in first.dropped[wrong]
    assert "RuntimeError: out of resources" in first.dropped[broken]


def test_the_random_weight_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    canonical, layout = tune.random_weight(WEIGHT, HERE)
    x = torch.randn(3, 512).bfloat16()
    expected = reference.dequant_matmul(x, *canonical, bits=4, group_size=128)
    found = tune.run(WEIGHT, "decode", x, layout, shipped("decode"))
    assert (found.double() - expected).abs().max() < 2**-7 * expected.abs().max()
    assert len(tune.copies_of(layout)) == 2
