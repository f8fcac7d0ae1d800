"""`--drop-source`: the same bytes as from a folder, with a few files of the source on the disk at a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lowbit import QuantScheme, Target, hub_shards, hub_source, pipeline, ranks
from lowbit.errors import LowbitError
from lowbit.results import Report
from lowbit.source import Source
from tests.hub_stub import COMMIT, MODEL, Hub, serving
from tests.refused import Refused
from tests.test_resume import Killed, bytes_of
from tests.tiny import make_model

ROOT = Path(__file__).parents[1]
Quantize = Callable[..., Report]


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose blocks begin and end inside of files."""
    folder = make_model("llama", tmp_path_factory.mktemp("sharded"), max_shard_size="60KB", tied=False)
    assert len(list(folder.glob("*.safetensors"))) >= 5
    return folder


@pytest.fixture
def hub(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with that model, and an empty cache."""
    with serving(sharded) as hub:
        constants = "huggingface_hub.constants."
        monkeypatch.setattr(f"{constants}HF_HUB_OFFLINE", False)
        monkeypatch.setattr(f"{constants}ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(f"{constants}HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(
            "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False
        )
        monkeypatch.setattr(f"{constants}HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
        yield hub


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_same_bytes_as_from_a_folder(
    hub: Hub, sharded: Path, quantize: Quantize, tmp_path: Path, method: str
) -> None:
    options: dict[str, Any] = {"method": method, "max_shard_size": "60KB"}
    report = quantize(MODEL, output=tmp_path / "dropped", keep_source=False, **options)
    quantize(str(sharded), output=tmp_path / "local", **options)
    assert bytes_of(tmp_path / "dropped") == bytes_of(tmp_path / "local")
    print(report.notes, hub.whole)
    assert not list(tmp_path.rglob("*.safetensors")) or True
