"""`QuantExperts`: the experts of a mixture, whose matrices stay as the checkpoint holds them.

transformers keeps the experts of a layer as a few stacked tensors, merged while a checkpoint is loaded.
Here they stay apart: `QuantExperts` takes the place of such a module and holds every matrix of the
checkpoint as a `PackedWeight` under its own name (`0.gate_proj`, `0.up_proj`, ...). So a state dict is the
checkpoint; what is multiplied is a stack of operands derived from them, as in `nn.QuantLinear`.

What happens between the two products (the activation, clamping, a gate) is asked of the module that was
replaced, so that no architecture is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import grouped, ops
from lowbit.nn import PackedWeight
from lowbit.quantized import QuantizedWeight

GATED, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
"""The stacked parameters of transformers' experts: two matrices on top of each other, one, and the last."""


class QuantExperts(nn.Module):
    """Experts with packed weights: `(hidden_states, top_k_index, top_k_weights)` to hidden states.

    Args:
        replaced: The module of transformers whose place this takes. Its dense parameters may be on the meta
            device; they are not used.
        parts: For each of its stacked parameters, the names of the matrices that make up one expert's
            share, in the order of their rows: `{"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}`.
        weights: Every matrix by expert and name, `"0.w1"`.
        dtype: As far as is known, of the activations.
    """

    def __init__(
        self,
        replaced: nn.Module,
        parts: Mapping[str, tuple[str, ...]],
        weights: Mapping[str, PackedWeight],
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.__dict__["replaced"] = replaced  # not a child: what it holds is in no state dict
        self.parts, self.dtype = dict(parts), dtype
        for path, weight in weights.items():
            expert, _, name = path.partition(".")
            if expert not in self._modules:
                self.add_module(expert, nn.Module())
            self.get_submodule(expert).add_module(name, weight)
        self.num_experts = len(self._modules)
        self._prepared: dict[str, tuple[ops.Operand, Tensor | None]] | None = None
        self.register_load_state_dict_post_hook(_prepare_again)  # type: ignore[no-untyped-call]
        self.prepare()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What transformers' experts do.

        Args:
            hidden_states: `[tokens, hidden]`.
            top_k_index: int64 `[tokens, k]`, the experts of each token.
            top_k_weights: `[tokens, k]`, how much each counts.

        Returns:
            `[tokens, hidden]`.
        """
        tokens, top_k = top_k_index.shape
        experts = top_k_index.reshape(-1)
        x = hidden_states.repeat_interleave(top_k, dim=0)
        replaced: Any = self.replaced
        if GATED in self.parts:
            x = replaced._apply_gate(self._multiply(GATED, x, experts))
        else:
            x = replaced.act_fn(self._multiply(UP, x, experts))
        x = self._multiply(DOWN, x, experts) * top_k_weights.reshape(-1, 1)
        return x.view(tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)

    def prepare(self) -> None:
        """Derive what is multiplied from the parameters, if they are here.

        Raises:
            LowbitError: they do not fit the configuration.
        """
        here = all(weight.is_here() for weight in self.weights())
        self._prepared = {name: self._derive(name) for name in self._names()} if here else None

    def weights(self) -> list[PackedWeight]:
        """Every matrix, expert by expert."""
        return [module for module in self.modules() if isinstance(module, PackedWeight)]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the checkpoint by its name below this module."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    @property
    def operands(self) -> list[ops.Operand]:
        """What is multiplied, one stack a matrix; none where they are derived anew at every call."""
        return [] if self._prepared is None else [operand for operand, _ in self._prepared.values()]

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """The module that was replaced, with dense parameters: what transformers would have loaded."""
        replaced: nn.Module = self.__dict__["replaced"]
        for parameter, names in self.parts.items():
            experts = [
                torch.cat([self._weight(expert, name).dense(dtype) for name in names])
                for expert in range(self.num_experts)
            ]
            replaced.register_parameter(parameter, nn.Parameter(torch.stack(experts), requires_grad=False))
        return replaced

    def extra_repr(self) -> str:
        """How many, and what each is made of."""
        return f"{self.num_experts} x {self._names()}"

    def _names(self) -> list[str]:
        return [name for names in self.parts.values() for name in names]

    def _weight(self, expert: int, name: str) -> PackedWeight:
        weight = self.get_submodule(f"{expert}.{name}")
        assert isinstance(weight, PackedWeight)
        return weight

    def _multiply(self, parameter: str, x: Tensor, experts: Tensor) -> Tensor:
        """`x` through the matrices that transformers stacks in `parameter`, side by side."""
        found = []
        for name in self.parts[parameter]:
            operand, orders = self._derive(name) if self._prepared is None else self._prepared[name]
            columns = x if orders is None else x.gather(1, orders[experts])
            found.append(grouped.matmul(columns, experts, operand))
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def _derive(self, name: str) -> tuple[ops.Operand, Tensor | None]:
        """The stack of one matrix, and `[experts, in]`, the order of each one's columns, if any has one."""
        orders: list[Tensor | None] = []

        def weights() -> Iterator[QuantizedWeight]:
            for expert in range(self.num_experts):
                weight, order = self._weight(expert, name)()
                orders.append(order)
                yield weight

        operand = grouped.stack(weights(), self.num_experts, self.dtype)
        if all(order is None for order in orders):
            return operand, None
        plain = torch.arange(operand.in_features, device=operand.packed.device)
        return operand, torch.stack([plain if order is None else order for order in orders])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantExperts:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.prepare()
        return self


def _prepare_again(module: nn.Module, keys: Any) -> None:
    """After `load_state_dict`, when the parameters of the matrices below have been filled too."""
    del keys
    if isinstance(module, QuantExperts):
        module.prepare()
