"""A checkpoint is read back before it gets its name.

Two proofs, both against the quantized model as it was in memory: every dequantized weight is the
same to the bit, and the logits of a short text agree. The first finds a packing error in one
matrix, the second what the first can't see: a wrong name, a lost norm, a head that is not tied.
Several loaders fill what they can't place with random numbers and say nothing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lowbit import hf
from lowbit.blocks import fingerprint
from lowbit.quiet import quiet
from lowbit.results import Verification

TOLERANCE = 0.02  # nats; bfloat16 against float32 differs by about 0.001, one wrong matrix by 0.1 and more


class VerificationError(RuntimeError):
    """What was written is not what was computed: a bug of lowbit or of a loader, never the user's."""


def verify(
    folder: Path, format_name: str, ids: Tensor, logits: Tensor, fingerprints: Mapping[str, bytes]
) -> Verification:
    """Load `folder` as a user would and compare it with the model in memory.

    Args:
        folder: The finished checkpoint.
        format_name: Its format; decides whether stock transformers can load it here.
        ids: int64 `[1, length]`.
        logits: float `[1, length, vocabulary]` of the model in memory.
        fingerprints: Digest of each weight, by module name.

    Raises:
        VerificationError: a weight or the logits differ.
    """
    loader = "stock transformers"
    if format_name in ("gptq", "awq") and importlib.util.find_spec("gptqmodel") is None:
        loader = f"lowbit's own reader (transformers needs gptqmodel for {format_name})"
    with quiet(stderr=True), torch.no_grad():
        model = hf.load_stock(folder) if loader == "stock transformers" else hf.load(folder, packed=False)
        read = model(input_ids=ids.to(model.device)).logits.float().cpu()
    compared = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name in fingerprints and isinstance(weight, Tensor):
            compared += 1
            weight = weight.T if isinstance(module, Conv1D) else weight
            if fingerprint(weight) != fingerprints[name]:
                raise VerificationError(f"{name} read back from {folder} differs from what was quantized")
    if fingerprints and not compared:
        raise VerificationError(f"{folder} read back holds none of the quantized modules")
    expected = torch.log_softmax(logits.float().cpu(), -1)
    kl = (expected.exp() * (expected - torch.log_softmax(read, -1))).sum(-1).mean().item()
    if not kl <= TOLERANCE:
        raise VerificationError(
            f"logits of {folder} read back by {loader} are {kl:.3g} nats away from the quantized model's"
        )
    return Verification(loader, compared, kl)
