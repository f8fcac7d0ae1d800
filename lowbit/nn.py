"""`QuantLinear`: a linear layer whose weight stays as the checkpoint holds it. `DenseLinear`: one row, fast.

Its parameters are the checkpoint's own tensors, under their own names and in their own dtypes. So the
state dict is the checkpoint, saving writes back what was read, to the bit, and everything that moves
parameters (accelerate, `.to`) moves these. `PackedWeight` is that much; `QuantLinear` multiplies too.

What is multiplied is an `ops.Operand`, derived from them: made when the model is loaded or moved, held
beside the parameters, in no state dict. Where the parameters come and go (offloading), it is made
for every call and not kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import formats, int8, native, ops
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme


class PackedWeight(nn.Module):
    """One packed matrix, as the tensors that the checkpoint has for it; called, it is read.

    Args:
        name: Name of the matrix in the checkpoint, for messages.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        tensors: The packed weight's tensors by suffix; they may be on the meta device.
        scheme: Its grid.
        format_name: Key of `FORMATS`.
        config: The checkpoint's `quantization_config`.
    """

    def __init__(
        self,
        name: str,
        out_features: int,
        in_features: int,
        tensors: Mapping[str, Tensor],
        scheme: QuantScheme,
        format_name: str,
        config: Mapping[str, Any],
    ) -> None:
        nn.Module.__init__(self)  # not `super()`: a linear layer's would make a dense weight
        self.name, self.out_features, self.in_features = name, out_features, in_features
        self.scheme, self.format_name, self.config = scheme, format_name, config
        self.suffixes = tuple(tensors)
        for suffix, tensor in tensors.items():  # not by `register_parameter`, which a property would stop
            self._parameters[suffix] = nn.Parameter(tensor, requires_grad=False)

    def forward(self) -> tuple[QuantizedWeight, Tensor | None]:
        """As `read`. A call, so that offloaded tensors are fetched for it."""
        return self.read()

    def tensors(self) -> dict[str, Tensor]:
        """The packed weight's tensors by suffix, as the checkpoint holds them."""
        return {suffix: getattr(self, suffix).data for suffix in self.suffixes}

    def is_here(self) -> bool:
        """Are the tensors in memory? Not before they are loaded, nor while they are offloaded."""
        return all(tensor.device.type != "meta" for tensor in self.tensors().values())

    def read(self) -> tuple[QuantizedWeight, Tensor | None]:
        """The weight, and the order of its columns where groups are scattered: see `formats.read`.

        Raises:
            LowbitError: the tensors do not fit the configuration or the layer.
        """
        try:
            found = formats.read(FORMATS[self.format_name], self.tensors(), self.scheme, self.config)
        except (LowbitError, ValueError, RuntimeError) as error:
            raise LowbitError(f"{self.name}: {str(error).splitlines()[0]}") from error
        shape = (self.out_features, self.in_features)
        if found[0].shape != shape:
            raise LowbitError(f"{self.name}: holds a weight of {found[0].shape}, the model needs {shape}")
        return found

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight that the tensors stand for, `[out, in]`."""
        weight, order = self.read()
        dense = weight.dequantize(dtype)
        return dense if order is None else dense[:, torch.argsort(order)]

    def extra_repr(self) -> str:
        """Sizes, scheme and format."""
        return f"{self.in_features}, {self.out_features}, {self.scheme}, {self.format_name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Move parameters, but never change the dtype of the checkpoint's tensors."""
        packed = [getattr(self, suffix) for suffix in self.suffixes]

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and any(tensor is own for own in packed):
                return tensor.to(moved.device)
            return moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


class QuantLinear(PackedWeight, nn.Linear):
    """`x @ weight.T + bias` with a packed weight.

    It is an `nn.Linear` so that what is put on linear layers (adapters) takes it for one.

    Args:
        name: As for `PackedWeight`, and so all up to `config`.
        bias: Is there a bias?
        dtype: dtype of the bias and, as far as is known, of the activations.
    """

    def __init__(
        self,
        name: str,
        out_features: int,
        in_features: int,
        tensors: Mapping[str, Tensor],
        scheme: QuantScheme,
        format_name: str,
        config: Mapping[str, Any],
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        PackedWeight.__init__(self, name, out_features, in_features, tensors, scheme, format_name, config)
        device = next(iter(tensors.values())).device
        empty = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)  # type: ignore[assignment]
        self.dtype = dtype
        self._prepared: tuple[ops.Operand | int8.Operand, Tensor | None] | None = None
        self.prepare()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """`[..., in]` to `[..., out]`, in the dtype of `x`."""
        operand, order = self._prepared or self._derive()
        bias = self.bias if self.bias is None or self.bias.dtype == x.dtype else self.bias.to(x.dtype)
        if isinstance(operand, int8.Operand):
            return int8.matmul(x, operand, bias)
        return ops.matmul(x if order is None else x[..., order], operand, bias)

    def prepare(self) -> None:
        """Derive what is multiplied from the parameters, if they are here.

        Raises:
            LowbitError: they do not fit the configuration.
        """
        self._prepared = self._derive() if self.is_here() else None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The parameter of that name; else empty, of the layer's device and dtype: models ask for them.

        It says that it is initialized, because models fill weights that they don't find in a file.
        """
        own = self._parameters.get("weight")
        if own is not None:
            return own
        device = getattr(self, self.suffixes[0]).device
        weight = torch.empty(0, dtype=self.dtype, device=device)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    @property
    def operand(self) -> ops.Operand | int8.Operand | None:
        """What is multiplied; None where it is derived anew at every call."""
        return None if self._prepared is None else self._prepared[0]

    @property
    def operands(self) -> list[ops.Operand | int8.Operand]:
        """`operand`, if there is one."""
        return [] if self.operand is None else [self.operand]

    def extra_repr(self) -> str:
        """Sizes, scheme, format and layout."""
        layout = "unprepared" if self.operand is None else self.operand.layout
        return f"{PackedWeight.extra_repr(self)}, {layout}"

    def _derive(self) -> tuple[ops.Operand | int8.Operand, Tensor | None]:
        weight, order = self.read()
        if self.scheme.activation_bits is not None:
            own = self.tensors()
            return int8.prepare(own["weight"], own["weight_scale"], self.dtype), None
        operand = ops.prepare(weight, self.dtype)
        if operand.layout == ops.STREAM and order is None and "weight_packed" in self.suffixes:
            operand = ops.stream(weight, self.tensors()["weight_packed"])  # the same stream: no copy
        return operand, order

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        super()._apply(fn, recurse)
        self.prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.prepare()


class DenseLinear(nn.Linear):
    """A dense linear layer that multiplies a single row of bfloat16 on a CPU in the fastest way.

    Where weights are packed, the dense output head takes half the time of a token. The ways: the native
    kernel where it is enabled, else `torch.mv` or the general product, whichever this machine does faster.
    """

    MIN_WEIGHTS = 2**22
    """Smaller layers stay in the cache and gain nothing."""

    @classmethod
    def of(cls, linear: nn.Linear) -> DenseLinear:
        """A layer with the parameters of `linear`."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        one_row = x.numel() == self.in_features and x.dtype == self.weight.dtype == torch.bfloat16
        if not one_row or x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        own = self.bias is None or (self.bias.dtype == x.dtype and self.bias.is_contiguous())
        if native.has_dense() and own and self.weight.is_contiguous():
            return native.dense(x.reshape(-1), self.weight, self.bias).view(*x.shape[:-1], -1)
        if not _mv_is_faster():
            return super().forward(x)
        product = torch.mv(self.weight, x.view(-1))
        return (product if self.bias is None else product + self.bias).view(*x.shape[:-1], -1)


@cache
@torch.no_grad()
def _mv_is_faster() -> bool:
    """By a third on Intel with AMX; on Zen 4 it takes half as long again as the general product."""
    weight, x = torch.ones(2**13, 2**10).bfloat16(), torch.ones(1, 2**10).bfloat16()
    ways: list[Callable[[], Tensor]] = [
        lambda: torch.mv(weight, x[0]),
        lambda: nn.functional.linear(x, weight),
    ]
    seconds = []
    for run in ways:
        times = []
        for _ in range(4):
            begin = time.process_time()
            run()
            times.append(time.process_time() - begin)
        seconds.append(min(times))
    return seconds[0] < seconds[1]
