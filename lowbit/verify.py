"""A checkpoint is read back before it gets its name.

Three proofs, against the quantized model as it was in memory: no tensor is missing (loaders fill
those with random numbers and say nothing), every dequantized weight is the same to the bit, and the
logits of a short text agree. The last finds what the others can't see: a norm that was not folded,
a head that is not tied.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowbit import hf
from lowbit.blocks import fingerprint
from lowbit.errors import VerificationError
from lowbit.formats import int_quantized
from lowbit.plan import head_name
from lowbit.quiet import quiet
from lowbit.readback import OwnReader, StockReader, Written
from lowbit.results import Verification
from lowbit.source import free
from lowbit.stream import Stream
from lowbit.topology import decoder_blocks

STOCK = "stock transformers"
TOLERANCE = 0.02  # nats; bfloat16 against float32 differs by about 0.001, one wrong matrix by 0.1 and more

ROUNDED_TOLERANCE = 0.3
"""The same where activations are rounded: each loader has its own rule for a token's scale, codes fall
either way, and two such models are as far apart as either is from the original, or twice that."""


def verify(
    folder: Path, format_name: str, ids: Tensor, logits: Tensor, fingerprints: Mapping[str, bytes]
) -> Verification:
    """Load `folder` as a user would and compare it with the model in memory.

    Args:
        folder: The finished checkpoint.
        format_name: Its format; decides whether stock transformers can load it here.
        ids: int64 `[1, length]`.
        logits: float `[1, length, vocabulary]` of the model in memory. Where they are float32, so is what is
            read back: in another precision a router decides otherwise.
        fingerprints: Digest of each weight, by module name.

    Raises:
        VerificationError: a weight or the logits differ.
    """
    dtype = torch.float32 if logits.dtype == torch.float32 else torch.bfloat16
    own = format_name in ("gptq", "gptq-v2", "awq")
    stock = not own or importlib.util.find_spec("gptqmodel") is not None
    loader = STOCK if stock else f"lowbit's own reader (transformers needs gptqmodel for {format_name})"
    try:
        with quiet(stderr=True), torch.no_grad():
            read = _read(OwnReader(folder, dtype) if own else StockReader(folder, dtype), ids, fingerprints)
            if own and stock:  # gptqmodel makes its kernels' layouts of a whole model only
                model = hf.load_stock(folder)
                read = model(input_ids=ids.to(model.device)).logits.float().cpu()
    except VerificationError:
        raise
    except Exception as error:  # each library has its own way to stumble over a bad file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise VerificationError(f"{folder} can't be read back by {loader}: {reason}") from error
    expected = torch.log_softmax(logits.float().cpu(), -1)
    kl = (expected.exp() * (expected - torch.log_softmax(read, -1))).sum(-1).mean().item()
    layout = hf.quantization_of(folder)[0].get("format")
    if not kl <= (ROUNDED_TOLERANCE if layout == int_quantized.LAYOUT else TOLERANCE):
        raise VerificationError(
            f"logits of {folder} read back by {loader} are {kl:.3g} nats away from the quantized model's"
        )
    return Verification(loader, len(fingerprints), kl)


def _read(written: Written, ids: Tensor, fingerprints: Mapping[str, bytes]) -> Tensor:
    """Logits of what was written, block after block, each compared while it is in memory."""
    model, known = written.model, dict(fingerprints)
    path, blocks = decoder_blocks(model)
    head = head_name(model)
    head_keys = written.keys_under([head])
    outside = [key for key in written.keys_outside([path]) if key not in head_keys]
    written.bring(outside, [])
    stream = Stream(model, blocks, [ids])
    for number, block in enumerate(blocks):
        name = f"{path}.{number}"
        written.bring(written.keys_under([name]), [name])
        _compare(model, known, f"{name}.", written.folder)
        for _ in stream.advance(number):
            pass
        free(block)
        written.rest()
    written.bring(head_keys, [head])
    _compare(model, known, "", written.folder)
    return stream.logits(0).float()


def _compare(model: nn.Module, known: dict[str, bytes], prefix: str, folder: Path) -> None:
    """Take out of `known` what begins with `prefix`, each equal to the model's weight of that name."""
    for name in [name for name in known if name.startswith(prefix)]:
        if fingerprint(_weight(model, name)) != known.pop(name):
            raise VerificationError(f"{name} read back from {folder} differs from what was quantized")


def _weight(model: nn.Module, name: str) -> Tensor:
    """Weight `[out, in]` of a module, or of an expert in a stacked parameter (`experts.down_proj.3`)."""
    parent, _, last = name.rpartition(".")
    if last.isdigit():
        return model.get_parameter(parent)[int(last)]
    module = model.get_submodule(name)
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight
