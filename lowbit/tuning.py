"""Quantization-aware training: the rounded model learns, on the user's data, to do better.

It is the road of `lowbit quantize` with one thing more to train. The effort's own method rounds the model
first; then gains on the scales, norms and the weights themselves are trained end to end (`distill.py`),
the weights through latents behind their codes (`latent.py`); then the checkpoint is written as after any
training (`refine.py`), in the same formats and in the same bytes per weight. Rows that were not trained
on judge the result, and it is dropped where it does not help. What is learned so far goes to the work
folder now and then, and a run that was stopped goes on from there, to the same bytes.

Memory while training, per weight of a linear layer: 4 bytes of latent, 2 of its moment, 2 of codes (as
rounded, and as learned), and 2 for the weight in bfloat16: 10 in all. Beside that the rest of the model
in bfloat16, of a step one tensor per block and the inside of one block, and of the original the inputs of
its head for every row (`rows x length x hidden`, bfloat16, on the CPU). No gradient of a weight is ever
whole in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lowbit.pipeline import quantize
from lowbit.results import Report
from lowbit.scheme import QuantScheme


def qat(
    model: str | Path | PreTrainedModel,
    scheme: QuantScheme | None = None,
    *,
    output: str | Path,
    dataset: str,
    epochs: int | None = None,
    loss: str = "original",
    **options: Any,
) -> Report:
    """Quantize a model and train it in its quantized form.

    Args:
        model: Hub id (`org/name` or `org/name@revision`, a branch, tag or commit), local folder, `.gguf`
            file, or a loaded transformers model.
        scheme: The grid; None means 4 bits, symmetric, the largest group size that fits.
        output: Folder to create.
        dataset: Text to calibrate and to train on, as in `lowbit.quantize`; `samples` rows of `seq_len`
            tokens for the one, as many others for the other; at `effort="max"` twice as many for both.
        epochs: How often the rows are seen; None means once, or what the effort says.
        loss: `original`: the divergence of the next token's distribution from the original model's;
            keeps what the model can. `data`: the cross-entropy of the text itself, as in fine-tuning;
            the model becomes another one.
        options: Everything else that `lowbit.quantize` takes, but for `method`.

    Returns:
        The report of `lowbit.quantize`; its notes say what training gained on rows it has not seen.

    Raises:
        LowbitError: anything the user can mend, such as an architecture that can't be trained; nothing
            is left behind.
        VerificationError: the written checkpoint is not what was computed; nothing is left behind.

    >>> report = qat(tiny_model, QuantScheme(bits=3, group_size=32), output=folder / "w3", dataset="self",
    ...              samples=16, seq_len=64)
    >>> any("weights, scales and norms" in note for note in report.notes)
    True
    """
    return quantize(
        model, scheme, output=output, dataset=dataset, epochs=epochs, loss=loss, method="qat", **options
    )
