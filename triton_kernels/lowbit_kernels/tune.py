"""Time some tiles on the GPU at hand, and keep the ones that are faster than those that ship.

The shipped tile is the first candidate; the others differ from it in one thing each: width, stages, or how
far K is split. A candidate must fit the GPU and give what the shipped one gives, else it is dropped. All of
them run in turn, several times over, so that a clock that drifts drifts for all; one that wins by less than
three percent has not won. Weights are used in rotation, so that they come from memory and not from the L2
cache.

How time is taken is an argument: a test puts a clock of its own in its place.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit_kernels.layout import WHOLE_ROW, Layout, to_layout
from lowbit_kernels.matmul import decode, grid_constants, prefill, prefill_rows, target
from lowbit_kernels.tiles import Tiles, choose
from lowbit_kernels.tuned import HEIGHTS, shape_key

MARGIN = 0.03
ROUNDS = 3
MILLISECONDS = 6.0  # of replays, in a round
CANDIDATES = 4
L2_BYTES = 256 * 2**20  # more than any GPU's, so that a rotation evicts
TOLERANCE = {torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Of the largest value: two roundings of the result, and sums in another order."""

Timer = Callable[[Sequence[Callable[[], Any]]], float]
"""Microseconds of one call, given several that do the same on different memory."""


class Weight(NamedTuple):
    """What the kernels ask about a weight."""

    bits: int
    group_size: int
    out_features: int
    in_features: int
    dtype: torch.dtype


class Outcome(NamedTuple):
    """What was found for one weight and one number of rows.

    Attributes:
        name: Key of the entry.
        rows: Of x, in the measurement.
        tile: The best one.
        shipped: Microseconds with the shipped tile.
        best: Microseconds with `tile`.
        times: Microseconds of every tile that could be used.
        dropped: Tiles that could not be used, and why.
    """

    name: str
    rows: int
    tile: Tiles
    shipped: float
    best: float
    times: dict[Tiles, float]
    dropped: dict[Tiles, str]


def random_weight(weight: Weight, device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor], Layout]:
    """Random codes, scales of both signs, and zeros; canonical, and in the kernels' layout."""
    words = -(-weight.in_features * weight.bits // 32)
    groups = 1 if weight.group_size < 0 else -(-weight.in_features // weight.group_size)
    shape = (weight.out_features, groups)
    packed = torch.randint(-(2**31), 2**31, (weight.out_features, words), dtype=torch.int32, device=device)
    scales = ((torch.rand(shape, device=device) - 0.5) * 0.02).to(weight.dtype)
    zeros = torch.randint(0, 2**weight.bits, shape, dtype=torch.uint8, device=device)
    sizes = {"bits": weight.bits, "group_size": weight.group_size, "in_features": weight.in_features}
    return (packed, scales, zeros), to_layout(packed, scales, zeros, **sizes)


def copies_of(layout: Layout) -> list[Layout]:
    """So many copies that one in turn is not in the L2 cache any more; eight at most."""
    size = sum(tensor.nbytes for tensor in layout)
    return [Layout(*(tensor.clone() for tensor in layout)) for _ in range(min(8, L2_BYTES // size + 2))]


def graphed(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """`calls` one after the other as a CUDA graph: what serving engines replay."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def on_gpu(calls: Sequence[Callable[[], Any]]) -> float:
    """The usual timer: the median over replays of a graph of all `calls`, divided by their number.

    A graph of one call is no measurement of a short kernel: starting a graph takes several microseconds.
    """
    replay = graphed(calls)
    replay()
    times: list[float] = []
    while len(times) < 5 or (len(times) < 50 and sum(times) < MILLISECONDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) * 1000 / len(calls)


def candidates(shipped: Tiles) -> list[Tiles]:
    """The shipped tile, and others that differ from it in one thing each."""
    other = 64 if shipped.features == 128 else 128
    found = [
        shipped,
        shipped._replace(stages=shipped.stages + 1),
        shipped._replace(programs=2 * shipped.programs),
        shipped._replace(features=other, warps=max(2, shipped.warps * other // shipped.features)),
        shipped._replace(stages=shipped.stages - 1),
        shipped._replace(programs=shipped.programs // 2),
    ]
    usable = [tile for tile in found if tile.stages >= 2 and tile.programs >= 1]
    return list(dict.fromkeys(usable))[:CANDIDATES]


def entries(device: torch.device) -> list[tuple[str, int]]:
    """Kernels and numbers of rows that have an entry and are run on this GPU."""
    most = {"prefill": prefill_rows(device)}
    return [(kernel, height) for kernel, heights in HEIGHTS.items() for height in heights
            if height <= most.get(kernel, height)]  # fmt: skip


def tune(weights: Sequence[Weight], device: torch.device, timer: Timer = on_gpu) -> Iterator[Outcome]:
    """Time the candidates for each weight and each number of rows that has an entry."""
    for weight in weights:
        layouts = copies_of(random_weight(weight, device)[1])
        for kernel, height in entries(device):
            shipped = choose(kernel, target(device).arch, weight.bits, weight.dtype, height)
            yield time_one(weight, kernel, height, layouts, candidates(shipped), timer)


def time_one(
    weight: Weight,
    kernel: str,
    height: int,
    layouts: Sequence[Layout],
    tiles: Sequence[Tiles],
    timer: Timer = on_gpu,
) -> Outcome:
    """Time `tiles`, the shipped one first, for a weight (a copy in each of `layouts`) and an entry's rows."""
    rows = 1 if height == HEIGHTS["decode"][0] else height  # few rows are one row, most of the time
    device = layouts[0].codes.device
    x = torch.randn(rows, weight.in_features, device=device).to(weight.dtype)
    shipped = tiles[0]
    expected, calls, dropped = run(weight, kernel, x, layouts[0], shipped), {}, {}
    for tile in tiles:
        reason = _fault(weight, kernel, x, layouts[0], tile, expected)
        if reason is None:
            calls[tile] = [partial(run, weight, kernel, x, layout, tile) for layout in layouts]
        else:
            dropped[tile] = reason
    times: dict[Tiles, list[float]] = {tile: [] for tile in calls}
    for _ in range(ROUNDS):
        for tile, same in calls.items():
            times[tile].append(timer(same))
    medians = {tile: statistics.median(found) for tile, found in times.items()}
    best = min(medians, key=lambda tile: medians[tile])
    if medians[best] > (1 - MARGIN) * medians[shipped]:
        best = shipped
    group_size = WHOLE_ROW if weight.group_size == weight.in_features else weight.group_size
    name = shape_key(
        kernel, weight.bits, weight.dtype, height, group_size, weight.out_features, weight.in_features
    )
    return Outcome(name, rows, best, medians[shipped], medians[best], medians, dropped)


def run(weight: Weight, kernel: str, x: Tensor, layout: Layout, tile: Tiles) -> Tensor:
    """`x @ w.T` by a kernel and a tile."""
    constants = grid_constants(weight.bits, weight.group_size, weight.in_features, weight.dtype)
    y = x.new_empty(len(x), weight.out_features)
    launch = decode if kernel == "decode" else prefill
    with torch.cuda.device_of(x):
        launch(x, *layout, None, y, constants, tile=tile)
    return y


def _fault(
    weight: Weight, kernel: str, x: Tensor, layout: Layout, tile: Tiles, expected: Tensor
) -> str | None:
    """Why a tile can't be used; None where it can."""
    try:
        found = run(weight, kernel, x, layout, tile)
    except Exception as error:  # more shared memory than there is, a compiler that gives up
        return f"does not run: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    if not float(error) <= TOLERANCE[weight.dtype]:
        return f"differs from the shipped tile by {float(error):.1e}"
    return None
