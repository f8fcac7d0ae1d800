"""Block after block: load, observe, rewrite, round, write back, carry on, free.

The inputs of a block are the outputs of the quantized blocks before it, so an error made early is
seen, and made up for, by everything after it. One block is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import topology
from lowbit.algorithms import ALGORITHMS, REWRITES
from lowbit.calibration import Group, exact_products, find_groups, observe
from lowbit.plan import Plan
from lowbit.quantized import QuantizedWeight
from lowbit.results import Layer
from lowbit.source import Source, free
from lowbit.stream import Stream
from lowbit.topology import Matrix

Progress = Callable[[str, int, int, str], None]
"""Called with a stage, steps done, steps in all, and what is going on."""


@dataclass(frozen=True)
class QuantizedBlock:
    """One block on its way to disk.

    Attributes:
        weights: Quantized weights by module name on disk.
        tensors: Everything else of the block, by name on disk; None means "as in the source".
        layers: One report per matrix.
        fingerprints: `fingerprint` of each dequantized weight, by module name in the model.
        notes: What the summary must say.
    """

    weights: dict[str, QuantizedWeight]
    tensors: dict[str, Tensor | None]
    layers: list[Layer]
    fingerprints: dict[str, bytes]
    notes: list[str]


def quantize_blocks(
    source: Source,
    plan: Plan,
    stream: Stream,
    method: str,
    scale_dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> Iterator[QuantizedBlock]:
    """Quantize every block in order.

    Args:
        source: The opened model; everything outside the blocks that a forward needs is loaded.
        plan: What to quantize.
        stream: The batches. The last one is only carried along (it serves to verify what was
            written); the others are the calibration data.
        method: Key of `ALGORITHMS`.
        scale_dtype: dtype in which the format stores scales.
        device: Where blocks are loaded.
        progress: Told about every batch and matrix.
    """
    count = len(plan.blocks)
    probe = len(stream.batches) - 1
    calibration = range(probe)
    per_block = 2 * len(stream.batches) + 1
    for number in range(count):
        step = number * per_block
        source.load(source.keys_under([f"{plan.path}.{number}"]), device)
        everything = plan.matrices(number)
        groups = find_groups(everything, lambda n=number: stream.run(n, probe))  # type: ignore[misc]
        notes = _align_skips(plan, groups)
        if ALGORITHMS[method].NEEDS_HESSIAN:
            with observe(groups):
                for batch in calibration:
                    stream.run(number, batch)
                    step += 1
                    progress("quantize", step, count * per_block, f"block {number + 1}/{count}: observing")
        rewritten = False
        if method in REWRITES:
            rewritten = _rewrite(plan, number, groups, lambda n=number: stream.run(n, probe), method, scale_dtype)  # type: ignore[misc]  # fmt: skip
        quantized, layers = {}, []
        for group in groups:
            members = [m for m in group.matrices if m.module_name not in plan.skipped]
            for matrix, weight, layer in _quantize_group(members, group, plan, method, scale_dtype):
                quantized[matrix] = weight
                layers.append(layer)
                matrix.weight.copy_(weight.dequantize(torch.bfloat16))
                where = layer.name.removeprefix(f"{plan.path}.{number}.")
                progress("quantize", step, count * per_block, f"block {number + 1}/{count}: {where} error {layer.error:.2e}")  # fmt: skip
            group.moment.release()
        unseen = [m for m in everything if m not in quantized and m.module_name not in plan.skipped]
        for matrix in unseen:
            plan.skipped[matrix.module_name] = "the block's forward never multiplies by it"
        step = number * per_block + len(stream.batches)
        for _ in stream.advance(number):
            step += 1
            progress("quantize", step, count * per_block, f"block {number + 1}/{count}: carrying on")
        yield QuantizedBlock(
            weights=_on_disk(source, quantized),
            tensors=_rest_of_block(source, plan, number, quantized, rewritten),
            layers=layers,
            fingerprints={m.module_name: fingerprint(m.weight) for m in quantized if m.kind == "Linear"},
            notes=notes,
        )
        free(plan.blocks[number])


def _align_skips(plan: Plan, groups: Sequence[Group]) -> list[str]:
    """Matrices that share an input are fused by engines (q/k/v, gate/up): skip all of them or none."""
    notes = []
    for group in groups:
        skipped = [m for m in group.matrices if plan.skipped.get(m.module_name, "").startswith("--skip")]
        others = [m for m in group.matrices if m.module_name not in plan.skipped]
        if skipped and others:
            reason = f"shares its input with {skipped[0].module_name}, which is skipped"
            plan.skipped.update({m.module_name: reason for m in others})
            notes += [f"{m.module_name} is skipped too: engines fuse it with {skipped[0].module_name}" for m in others]  # fmt: skip
    return notes


def _rewrite(
    plan: Plan,
    number: int,
    groups: Sequence[Group],
    run: Callable[[], Tensor],
    method: str,
    scale_dtype: torch.dtype,
) -> bool:
    """Fold channel scales into the block where the method asks for it; Hessians follow."""
    wanted = [g for g in groups if any(m.module_name not in plan.skipped for m in g.matrices)]
    folds = topology.find_folds(plan.blocks[number], [(g.matrices, g.others) for g in wanted], run)
    group_of = {group.matrices[0]: group for group in wanted}
    for fold in folds:
        group = group_of[fold.consumers[0]]
        weights = [m.weight for m in fold.consumers if m.module_name not in plan.skipped]
        scales = REWRITES[method](weights, group.moment.mean(), plan.scheme, scale_dtype)
        if scales is not None:
            fold.apply(scales)
            group.moment.rescale(scales)
    return bool(folds)


def _quantize_group(
    members: Sequence[Matrix], group: Group, plan: Plan, method: str, scale_dtype: torch.dtype
) -> Iterator[tuple[Matrix, QuantizedWeight, Layer]]:
    """Round the matrices of one input together: rows are independent, so they are stacked."""
    if not members:
        return
    algorithm = ALGORITHMS[method]
    hessian = group.moment.mean() if algorithm.NEEDS_HESSIAN else None
    stacked = torch.cat([m.weight for m in members]).float()
    weight, note = algorithm.quantize_weight(stacked, hessian, plan.scheme, scale_dtype)
    sizes = [m.shape[0] for m in members]
    errors = _relative_errors(stacked, weight, hessian, sizes)
    for matrix, part, error in zip(members, weight.split_rows(sizes), errors, strict=True):
        yield matrix, part, Layer(matrix.module_name, matrix.shape, str(plan.scheme), error, note)


def _relative_errors(
    original: Tensor, weight: QuantizedWeight, hessian: Tensor | None, sizes: Sequence[int]
) -> list[float]:
    """`tr(D H D^T) / tr(W H W^T)` of each part, D the error of the weight; H = I without data."""
    difference = original - weight.dequantize()
    if hessian is None or not torch.isfinite(hessian).all() or not hessian.any():
        lost, whole = difference.square().sum(1), original.square().sum(1)
    else:
        with exact_products(torch.bfloat16):  # a report needs three digits, not seven
            lost = (difference @ hessian).mul_(difference).sum(1)
            whole = (original @ hessian).mul_(original).sum(1)
    pairs = zip(lost.split(list(sizes)), whole.split(list(sizes)), strict=True)
    return [float(a.sum() / b.sum().clamp(min=1e-30)) for a, b in pairs]


def _on_disk(source: Source, quantized: Mapping[Matrix, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    """Quantized weights under the names of the source's files; stacked experts are taken apart there."""
    by_parameter: dict[str, list[QuantizedWeight]] = {}
    for matrix, weight in quantized.items():
        by_parameter.setdefault(matrix.name, []).append(weight)

    def renamed(field: str) -> dict[str, Tensor]:
        tensors = {}
        for name, weights in by_parameter.items():
            parts = [getattr(weight, field) for weight in weights]
            tensors[name] = parts[0] if len(parts) == 1 else torch.stack(parts)
        return source.names_on_disk(tensors)

    if not quantized:
        return {}
    scheme = next(iter(quantized.values())).scheme
    codes, scales, zeros = renamed("codes"), renamed("scales"), renamed("zeros")
    return {
        key.removesuffix(".weight"): QuantizedWeight(codes[key], scales[key], zeros[key], scheme)
        for key in codes
    }


def _rest_of_block(
    source: Source, plan: Plan, number: int, quantized: Mapping[Matrix, QuantizedWeight], rewritten: bool
) -> dict[str, Tensor | None]:
    """Norms, biases, routers, skipped weights: as in the source, unless a rewrite touched the block."""
    path = f"{plan.path}.{number}"
    done = {matrix.name for matrix in quantized}
    if not rewritten:
        return {k: None for k in source.keys_under([path]) if source.parameter_of(k) not in done}
    rest = {n: p.data for n, p in plan.blocks[number].named_parameters(prefix=path) if n not in done}
    return dict(source.names_on_disk(rest))


def fingerprint(weight: Tensor) -> bytes:
    """Digest of a weight's bfloat16 bits, to prove that what was read is what was written."""
    import hashlib

    bits = weight.to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy()
    return hashlib.blake2b(bits, digest_size=16).digest()
