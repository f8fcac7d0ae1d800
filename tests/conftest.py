"""Shared fixtures: tiny checkpoints made once per test process, and a quiet, offline environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

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
