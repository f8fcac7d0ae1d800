"""Shared fixtures: tiny checkpoints made once per test process, and a quiet, offline environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
)

import pytest
import torch
from transformers.utils import logging as transformers_logging

import lowbit
from tests.tiny import make_model

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(family, **options)`: the folder of a tiny checkpoint, made once; never write to it."""
    made: dict[str, Path] = {}

    def make(family: str, **options: object) -> Path:
        key = f"{family}-{sorted(options.items())}"
        if key not in made:
            made[key] = make_model(family, tmp_path_factory.mktemp(family), **options)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def checkpoint(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`checkpoint(family, scheme, **options)`: a tiny model quantized by rounding; never write to it."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", scheme: lowbit.QuantScheme | None = None, **options: Any) -> Path:
        scheme = scheme or lowbit.QuantScheme(4, 32)
        key = f"{family} {scheme} {sorted(options.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("quantized") / "checkpoint"
            source = tiny_model(family, tied=options.pop("tied", None))
            lowbit.quantize(str(source), scheme, output=folder, method="rtn", verify_output=False, **options)
            made[key] = folder
        return made[key]

    return make
