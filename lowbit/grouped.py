"""`lowbit::grouped_dequant_matmul`: every row of the activations times the packed weight of its own expert.

A stack of weights is an `ops.Operand` whose tensors have a leading dimension of experts. On a GPU one
launch of `lowbit_kernels` multiplies all rows, and nothing waits for the routing. Everywhere else, and for
layouts that no kernel stacks, the rows of each expert are gathered and go through `ops.matmul`, which knows
best for how many rows; experts that no row was sent to cost nothing.

Like the op for one weight it is opaque to `torch.compile` and differentiable in the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit import ops
from lowbit.errors import LowbitError
from lowbit.ops import Operand
from lowbit.quantized import QuantizedWeight

_LIBRARY = torch.library.Library("lowbit", "FRAGMENT")
_LIBRARY.define(f"grouped_dequant_matmul(Tensor x, Tensor experts, {ops.WEIGHT}) -> Tensor")


def stack(weights: Iterable[QuantizedWeight], count: int, dtype: torch.dtype) -> Operand:
    """`count` weights of one shape and scheme as one operand, for activations of `dtype`.

    They are taken one after the other, so that no more than one is unpacked at a time.
    """
    stacked: Operand | None = None
    for number, weight in enumerate(weights):
        operand = ops.prepare(weight, dtype)
        if stacked is None:
            stacked = _changed(operand, lambda tensor: tensor.new_empty(count, *tensor.shape))
        for whole, part in zip(stacked.fields()[0], operand.fields()[0], strict=True):
            if whole is not None and part is not None:
                whole[number] = part
    assert stacked is not None, "a mixture has experts"
    return stacked


def one_of(weight: Operand, expert: int) -> Operand:
    """The operand of one expert: views, no copies."""
    return _changed(weight, lambda tensor: tensor[expert])


def matmul(x: Tensor, experts: Tensor, weight: Operand) -> Tensor:
    """Row `i` of `x [rows, in]` times `weight[experts[i]].T`.

    Args:
        x: Activations, `[rows, in]`; a token that is routed to two experts is two rows.
        experts: int64 `[rows]`, each in `0 ... number of experts - 1`. A number outside is refused, except
            where a GPU multiplies all rows in one launch, which would have to be waited for: there it makes
            garbage.
        weight: From `stack`.

    Returns:
        `[rows, out]` in the dtype of `x`.

    Raises:
        LowbitError: `x` and `experts` don't fit each other or the weight, or a row goes to no expert.
    """
    tensors, rest = weight.fields()
    if weight.layout == ops.TILES and ops.is_plain(x):
        return _each_expert(x, experts, *tensors, **rest)
    product: Tensor = torch.ops.lowbit.grouped_dequant_matmul.default(x, experts, *tensors, **rest)
    return product


def _changed(weight: Operand, change: Callable[[Tensor], Tensor]) -> Operand:
    zeros = None if weight.zeros is None else change(weight.zeros)
    return replace(weight, packed=change(weight.packed), scales=change(weight.scales), zeros=zeros)


def _check(x: Tensor, experts: Tensor, in_features: int) -> None:
    if x.dim() != 2 or experts.shape != x.shape[:1]:
        raise LowbitError(
            f"experts {list(experts.shape)} must name one expert for each row of {list(x.shape)}"
        )
    if x.shape[1] != in_features:
        raise LowbitError(f"x has {x.shape[1]} columns, the weight has in_features={in_features}")


def _rows_by_expert(experts: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert that has rows, and their indices in order."""
    if len(experts):
        least, most = (int(number) for number in experts.aminmax())
        if least < 0 or most >= count:
            wrong = least if least < 0 else most
            raise LowbitError(f"a row goes to expert {wrong}: give numbers from 0 to {count - 1}")
    rows_of = torch.bincount(experts, minlength=count).tolist()
    for expert, rows in enumerate(experts.argsort(stable=True).split(rows_of)):
        if len(rows):
            yield expert, rows


@torch.library.impl(_LIBRARY, "grouped_dequant_matmul", "CompositeExplicitAutograd")
def _each_expert(
    x: Tensor, experts: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, **rest: Any
) -> Tensor:
    _check(x, experts, rest["in_features"])
    weight = Operand(packed, scales, zeros, **rest)
    product = x.new_empty(len(x), rest["out_features"])
    for expert, rows in _rows_by_expert(experts, len(packed)):
        product[rows] = ops.matmul(x[rows], one_of(weight, expert))
    return product


@torch.library.impl(_LIBRARY, "grouped_dequant_matmul", "CUDA")
def _in_one_launch(
    x: Tensor, experts: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, **rest: Any
) -> Tensor:
    if rest["layout"] != ops.TRITON:
        return _each_expert(x, experts, packed, scales, zeros, **rest)
    import lowbit_kernels

    _check(x, experts, rest["in_features"])
    sizes = {name: rest[name] for name in ("bits", "group_size", "out_features", "scale_dtype")}
    product: Tensor = lowbit_kernels.grouped_dequant_matmul(x, experts, packed, scales, **sizes)
    return product


def _shape(x: Tensor, experts: Tensor, *tensors: Tensor, **rest: Any) -> Tensor:
    del experts, tensors
    return x.new_empty(len(x), rest["out_features"])


def _remember(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[1:])
    ctx.rest = keyword_only_inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the activations; the weights are frozen."""
    experts, packed, scales, zeros = ctx.saved_tensors
    weight = Operand(packed, scales, zeros, **ctx.rest)
    found = gradient.new_empty(len(gradient), weight.in_features)
    for expert, rows in _rows_by_expert(experts, len(packed)):
        found[rows] = gradient[rows] @ ops.dequantize(one_of(weight, expert), gradient.dtype)
    return found, None, None, None, None


torch.library.register_fake("lowbit::grouped_dequant_matmul", _shape, lib=_LIBRARY)
torch.library.register_autograd(
    "lowbit::grouped_dequant_matmul", _backward, setup_context=_remember, lib=_LIBRARY
)
