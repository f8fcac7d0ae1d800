"""One step of the training of scales and norms, and the state between two of them.

`distill.py` makes the gradients; here they become new gains, and the gains new weights in the model. The
state is whole: gains, the optimizer's moments, what lies behind codes that are trained, steps done. What
follows from it is the same to the bit whether or not another process went on from it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit import topology
from lowbit.latent import LatentLinear
from lowbit.trainable import TrainableLinear, within_steps

KEEP_SECONDS = 60.0  # between two states to go on from
_ADAM = ("step", "exp_avg", "exp_avg_sq")  # what torch's Adam remembers of a parameter


class Norms:
    """Float32 gains on the weights of all norms, whose parameters in the model follow them.

    A norm that is made of bfloat16 numbers stays so, and its gains begin as those of scales do
    (`trainable.within_steps`). Where numbers are finer, or the norm adds 1 to them, gains begin at 1.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._parameters: dict[str, nn.Parameter] = {}
        self._initial: dict[str, Tensor] = {}
        self._offsets: dict[str, float] = {}
        self._coarse: set[str] = set()
        self.gains: dict[str, nn.Parameter] = {}
        for path, module in model.named_modules():
            if topology.is_norm(module):
                name, weight = f"{path}.weight", module.weight
                self._offsets[name] = topology.norm_offset(module)
                self._initial[name] = weight.detach().float() + self._offsets[name]
                self._parameters[name] = weight.requires_grad_(True)
                start = torch.ones_like(self._initial[name])
                coarse = torch.equal(self._initial[name], self._initial[name].to(torch.bfloat16).float())
                if coarse and not self._offsets[name]:
                    self._coarse.add(name)
                    start = within_steps(self._initial[name], torch.bfloat16)
                self.gains[name] = nn.Parameter(start)

    def take_gradients(self) -> None:
        """Hand the gradients of the model's parameters on to the gains."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self.gains[name].grad = parameter.grad.float() * self._initial[name]
                parameter.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow the gains after a step of the optimizer, rounded as most files will hold them."""
        for name, weight in self.weights().items():
            self._parameters[name].copy_(weight.to(torch.bfloat16))

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """New weights by parameter name, float32."""
        found = {name: self._initial[name] * gain - self._offsets[name] for name, gain in self.gains.items()}
        return {
            name: w.to(torch.bfloat16).float() if name in self._coarse else w for name, w in found.items()
        }


class Training:
    """The optimizer of the gains, and what it takes to go on after an interruption."""

    def __init__(self, layers: Mapping[str, TrainableLinear], norms: Norms) -> None:
        self._layers, self._norms = layers, norms
        self._gains = {name: layer.gains for name, layer in layers.items()} | norms.gains
        self._optimizer = torch.optim.Adam(list(self._gains.values()), betas=(0.9, 0.95))
        self._kept = time.monotonic()

    def step(self, learning_rate: float) -> None:
        """Use up the gradients; the model follows."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._norms.take_gradients()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._refresh()

    def _refresh(self) -> None:
        self._norms.refresh()
        for layer in self._layers.values():
            layer.refresh()

    def is_due(self) -> bool:
        """Was nothing kept for `KEEP_SECONDS`?"""
        return time.monotonic() - self._kept >= KEEP_SECONDS

    def state(self, steps: int, before: float) -> dict[str, Tensor]:
        """Gains, moments, latents, the number of steps done, and the KL before the first."""
        self._kept = time.monotonic()
        state = {"steps": torch.tensor(steps), "before": torch.tensor(before, dtype=torch.float64)}
        for name, gain in self._gains.items():
            state[f"gain {name}"] = gain.detach()
            if self._optimizer.state[gain]:  # none where no gradient ever came
                state |= {f"{part} {name}": self._optimizer.state[gain][part] for part in _ADAM}
        for name, layer in self._layers.items():
            if isinstance(layer, LatentLinear):
                state |= {f"{part} {name}": getattr(layer, part) for part in LatentLinear.LEARNED}
        return state

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> tuple[int, float]:
        """Take `state` in; returns the steps done and the KL before them."""
        for name, gain in self._gains.items():
            gain.copy_(state[f"gain {name}"])
            if f"step {name}" not in state:
                continue
            self._optimizer.state[gain] = {
                part: state[f"{part} {name}"].to("cpu" if part == "step" else gain.device) for part in _ADAM
            }
        for name, layer in self._layers.items():
            if isinstance(layer, LatentLinear):
                for part in LatentLinear.LEARNED:
                    getattr(layer, part).copy_(state[f"{part} {name}"])
        self._refresh()
        return int(state["steps"]), float(state["before"])
