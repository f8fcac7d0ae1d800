"""How much the whole model suffers from rounding one group of matrices, on every scheme at once.

To second order the divergence of a model whose weight W became W + D is, per token,

    KL = 1/2 E[ (sum_t g_t^T D x_t)^2 ]

with x_t the inputs of the matrix and g_t the gradient, at its output, of the log-likelihood of tokens
*drawn from the model itself* (the Fisher information; Martens 2014, arXiv:1412.1193, section 9). Read as
in K-FAC (Martens and Grosse 2015, arXiv:1503.05671), inputs and gradients are independent and tokens do
not interact:

    KL = 1/2 tr(G D H D^T),  G = E[g g^T],  H = E[x x^T]

Of G the diagonal is kept. So is H's for a method that rounds each weight by itself; for one that lets the
columns to come make up for an error, H = U R U^T and only the residuals R count (`algorithms/gptq.py`):

    KL = 1/2 sum_o G_oo sum_k R_k e_ok^2

with e the plain rounding error. One pass forward and one back over a few thousand tokens, block by
block, thus prices any number of schemes without rounding anything in earnest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lowbit import grid, pages
from lowbit.algorithms import gptq
from lowbit.calibration import Group, find_groups, operands
from lowbit.carried import Carried
from lowbit.plan import Plan, align
from lowbit.progress import Progress
from lowbit.scheme import QuantScheme
from lowbit.source import Source, free
from lowbit.stream import Stream
from lowbit.topology import Matrix

SHRINKS = (1.0, 0.9, 0.8)
"""Factors on a group's range that are tried: the methods search more finely, and price alike."""

SAMPLED_ROWS = 256
"""Rows of a matrix that are rounded to price it; the others are taken to err alike."""


@dataclass(frozen=True)
class Sensitivity:
    """What one group of matrices costs: those that share an input, or all experts of the model.

    Attributes:
        names: Module names.
        shapes: `(out, in)` of each.
        kl: Estimated divergence from the original, nats per token, if only this group is rounded.
    """

    names: list[str]
    shapes: list[tuple[int, int]]
    kl: dict[QuantScheme, float]


def measure(
    source: Source,
    plan: Plan,
    rows: Tensor,
    schemes: Callable[[int], list[QuantScheme]],
    scale_dtype: torch.dtype,
    compensated: bool,
    device: torch.device,
    progress: Progress,
) -> tuple[list[Sensitivity], list[str]]:
    """Price every group of the plan on every scheme. All weights are let go at the end.

    Args:
        source: The opened model; nothing needs to be loaded.
        plan: What to quantize.
        rows: Token ids, int64 `[rows, length]`; rows are seen one by one.
        schemes: Candidates for a matrix of so many input columns.
        scale_dtype: dtype in which scales will be stored.
        compensated: Will the method make up for errors in the columns to come (GPTQ, Qronos)?
        device: Where blocks are loaded.
        progress: Told about every block, twice.

    Returns:
        Groups in order of the model, and notes of `plan.align`.
    """
    stream = Stream(source.model, plan.blocks, [row[None].to(device) for row in rows])
    source.load(source.keys_outside([plan.path]), device)
    source.model.requires_grad_(False)
    steps, inputs, notes = 2 * len(plan.blocks), [], list[str]()
    found: list[tuple[list[Matrix], dict[QuantScheme, float]]] = []
    for number, block in enumerate(plan.blocks):
        source.load(source.keys_under([f"{plan.path}.{number}"]), device)
        inputs.append(list(stream.hidden))
        list(stream.advance(number))
        free(block)
        progress("plan", number + 1, steps, f"block {number + 1}: forward")
    upstream = _upstream(stream, device)
    for number in reversed(range(len(plan.blocks))):
        source.load(source.keys_under([f"{plan.path}.{number}"]), device)
        stream.hidden = _carried(inputs.pop())
        plan.blocks[number].requires_grad_(False)
        matrices = plan.matrices(number)
        groups = find_groups(matrices, partial(stream.run, number, 0))
        notes += align(plan, [[matrix.module_name for matrix in group.matrices] for group in groups])
        with Traffic(groups, compensated) as traffic:
            for batch, gradient in enumerate(upstream):
                upstream[batch] = stream.backward(number, batch, gradient)
        price = partial(
            _price, traffic=traffic, tokens=rows.numel(), schemes=schemes, scale_dtype=scale_dtype
        )
        priced = [(members, price(group, members)) for group, members in _members(plan, groups)]
        found[:0] = priced
        free(plan.blocks[number])
        pages.trim()
        progress("plan", steps - number, steps, f"block {number + 1}: backward")
    source.release()
    return _joined(found), notes


def _carried(tensors: Sequence[Tensor | None]) -> Carried:
    carried = Carried(len(tensors))
    for number, tensor in enumerate(tensors):
        if tensor is not None:
            carried[number] = tensor
    return carried


def _upstream(stream: Stream, device: torch.device) -> list[Tensor]:
    """For each batch the gradient, at the last block's output, of the likelihood of tokens drawn here."""
    random = torch.Generator(device).manual_seed(0)
    gradients = []
    for batch, hidden in enumerate(stream.hidden):
        assert hidden is not None
        leaf = hidden.detach().requires_grad_()
        logits = stream.logits(batch, leaf)
        slope = logits.detach().float().softmax(-1)  # of -log p of what was drawn: p, and p - 1 there
        drawn = torch.multinomial(slope[0], 1, generator=random)
        slope[0].scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=slope.dtype))
        logits.backward(slope.to(logits.dtype))
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    return gradients


def _members(plan: Plan, groups: Sequence[Group]) -> Iterator[tuple[Group, list[Matrix]]]:
    for group in groups:
        members = [matrix for matrix in group.matrices if matrix.module_name not in plan.skipped]
        if members:
            yield group, members


class Traffic(TorchFunctionMode):
    """While active: second moments, over tokens, of what enters a matrix and of the gradient behind it.

    Attributes:
        inputs: By matrix, sums of squares of the inputs, float32 `[in]`.
        gradients: By matrix, those of the gradient, float32 `[out]`.
        tokens: By matrix, how many tokens it saw.
    """

    def __init__(self, groups: Sequence[Group], whole: bool) -> None:
        super().__init__()
        self._matrix_at = {m.stored.data_ptr(): m for group in groups for m in group.matrices}
        # Of inputs the whole moment is taken where asked for, once for each group.
        self._moments = {group.matrices[0]: group.moment for group in groups} if whole else {}
        self.inputs: dict[Matrix, Tensor] = {}
        self.gradients: dict[Matrix, Tensor] = {}
        self.tokens: dict[Matrix, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        product = operands(func, args)
        matrix = product and self._matrix_at.get(product[1].data_ptr())
        if product and matrix and output.requires_grad and output.numel():
            rows = product[0].detach().flatten(0, -2)
            _add(self.inputs, matrix, rows)
            if matrix in self._moments:
                self._moments[matrix].add(rows)
            self.tokens[matrix] = self.tokens.get(matrix, 0) + len(rows)
            output.register_hook(lambda gradient: _add(self.gradients, matrix, gradient.flatten(0, -2)))
        return output


def _add(sums: dict[Matrix, Tensor], matrix: Matrix, rows: Tensor) -> None:
    squares = rows.float().square().sum(0)
    sums[matrix] = sums[matrix] + squares if matrix in sums else squares


def _price(
    group: Group,
    members: Sequence[Matrix],
    traffic: Traffic,
    tokens: int,
    schemes: Callable[[int], list[QuantScheme]],
    scale_dtype: torch.dtype,
) -> dict[QuantScheme, float]:
    """Divergence by scheme; a matrix that no token reached costs nothing."""
    costs = dict.fromkeys(schemes(members[0].shape[1]), 0.0)
    moment = group.moment
    residual = gptq.residuals(moment.mean(), moment.tokens) if moment.tokens else None
    moment.release()
    for matrix in members:
        if matrix not in traffic.gradients:
            continue
        inputs, gradients = traffic.inputs[matrix], traffic.gradients[matrix]
        if residual is not None:
            inputs = residual * traffic.tokens[matrix]
        step = max(1, len(gradients) // SAMPLED_ROWS)
        weight, shares = matrix.weight[::step].float(), gradients[::step] / gradients[::step].sum()
        whole = 0.5 * float(gradients.sum()) / (tokens * traffic.tokens[matrix])
        for scheme in costs:
            by_group = grid.to_groups(inputs[None], scheme)

            def errors(difference: Tensor, by_group: Tensor = by_group) -> Tensor:
                return difference.square_().mul_(by_group).sum(-1)

            scales, zeros = grid.search_params(weight, scheme, scale_dtype, errors, SHRINKS[1:])
            rounded = grid.dequantize(grid.quantize(weight, scales, zeros, scheme), scales, zeros, scheme)
            lost = (rounded - weight).square_() @ inputs
            costs[scheme] += whole * float((lost * shares).nan_to_num_().sum())
    return costs


def _joined(found: Sequence[tuple[list[Matrix], dict[QuantScheme, float]]]) -> list[Sensitivity]:
    """One entry for every group, and one for all experts: loaders know one scheme for those."""
    joined: dict[str, Sensitivity] = {}
    for group, costs in found:
        key = "experts" if group[0].kind == "Expert" else group[0].module_name
        entry = joined.setdefault(key, Sensitivity([], [], dict.fromkeys(costs, 0.0)))
        entry.names.extend(matrix.module_name for matrix in group)
        entry.shapes.extend(matrix.shape for matrix in group)
        for scheme in list(entry.kl):
            if scheme in costs:
                entry.kl[scheme] += costs[scheme]
            else:  # the rows of other experts are not made of its groups
                del entry.kl[scheme]
    return list(joined.values())
