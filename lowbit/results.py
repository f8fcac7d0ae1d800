"""What is known of a run when it is over, for the terminal, a report or a script."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.hardware import peak_memory


@dataclass(frozen=True)
class Layer:
    """What became of one matrix.

    Attributes:
        name: Module name in the model.
        shape: `(out, in)`.
        scheme: Its grid.
        error: Squared error relative to the squared norm: of the output on the calibration data
            where there is some (its tokens as they count: `reach.py`), else of the weight.
        note: Empty unless something fell back.
        corrected: Of what would make up for the layers before, how much was put into the weight that was
            rounded, 0 ... 1: what held-out tokens confirmed; None where nothing was to be made up for.
    """

    name: str
    shape: tuple[int, int]
    scheme: str
    error: float
    note: str = ""
    corrected: float | None = None


@dataclass(frozen=True)
class Verification:
    """How a written checkpoint was read back.

    Attributes:
        loader: Who read it: "stock transformers", or lowbit's own reader with the reason.
        weights: Matrices compared bit for bit.
        kl: Mean KL divergence of its logits from those of the model in memory, in nats.
    """

    loader: str
    weights: int
    kl: float


@dataclass
class Report:
    """What `quantize` did.

    Attributes:
        output: The checkpoint.
        scheme: Grid of the blocks' matrices, as text (`w4g128`).
        method: Algorithm.
        format: Format on disk.
        calibration: What the algorithm was calibrated on.
        tokens: Digest of the token ids that it was calibrated on; empty where there were none.
        layers: One entry per quantized matrix.
        skipped: Reason, by module name, of everything left in full precision.
        notes: Fallbacks and other things the user should know.
        warnings: Engines that won't load this choice.
        verification: How the checkpoint was verified; None if it was not.
        source_bytes: Size of the original weights.
        output_bytes: Size of the written weights.
        seconds: Wall seconds by stage.
        cpu_seconds: CPU seconds of the process.
        memory: Largest resident size of the process up to the end of a stage, in bytes, by stage.
        plan: What a budget chose, where there was one: `{"budget": text, "achieved": text, "rows":
            [{"name", "scheme", "bits", "sensitivity"}, ...]}`, one row per group of matrices.
        ranks: Of each process, where several shared the work: CPU `seconds` for the blocks, bytes `sent`.
    """

    output: Path
    scheme: str
    method: str
    format: str
    calibration: str
    tokens: str = ""
    layers: list[Layer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    verification: Verification | None = None
    source_bytes: int = 0
    output_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    ranks: list[dict[str, float]] = field(default_factory=list)

    def end_stage(self, name: str, seconds: float) -> None:
        """Note how long a stage took, and the memory needed until now."""
        self.seconds[name] = seconds
        self.memory[name] = max(self.memory.get(name, 0), peak_memory())

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `of_json` makes the report again."""
        return {**dataclasses.asdict(self), "output": str(self.output)}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Report:
        """The report that `to_json` took apart."""
        layers = [Layer(**{**layer, "shape": tuple(layer["shape"])}) for layer in values["layers"]]
        read = values["verification"] and Verification(**values["verification"])
        return cls(**{**values, "output": Path(values["output"]), "layers": layers, "verification": read})

    @property
    def calibration_used(self) -> bool:
        """Is `Layer.error` that of the output (on calibration data) or that of the weight?"""
        return not self.calibration.startswith("none")


@dataclass
class Conversion:
    """What was written.

    Attributes:
        output: Where it is.
        source_format: `quant_method` of the source.
        format: Format of the result.
        layers: Packed layers by scheme in the result (by type, in GGUF).
        requantized: Reason, by module name, of every layer that was rounded again (`lossy`).
        notes: What else the user should know.
        warnings: One line for every engine that will not load the result.
        source_bytes: Size of the source's tensors.
        output_bytes: Size of the result's.
        seconds: All of it, verification included.
    """

    output: Path
    source_format: str
    format: str
    layers: dict[str, int] = field(default_factory=dict)
    requantized: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    source_bytes: int = 0
    output_bytes: int = 0
    seconds: float = 0.0
