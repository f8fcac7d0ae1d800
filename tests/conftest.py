"""Shared fixtures: tiny checkpoints made once per test process, and a quiet, offline environment."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
)
if "LOWBIT_TEST_GPU" not in os.environ:  # `--device auto` would take a GPU, whose sums are others
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from transformers.utils import logging as transformers_logging

from tests.tiny import TEXT, make_model

if TYPE_CHECKING:  # lowbit itself is imported by the fixtures: some tests stand when it is broken
    from lowbit import QuantScheme
    from lowbit.results import Report
    from tests.hub_stub import Hub
    from tests.refused import Refused

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)
transformers_logging.disable_progress_bar()


LONG = ("ranks", "stock_transformers", "packaging", "tasks", "scale", "resume", "families", "interpreted")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files are dealt to the workers first: the last one to be begun would leave the others idle."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


@pytest.fixture(autouse=True)
def bfloat16_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever CPU runs the tests, it works in bfloat16, as one that multiplies it does.

    What is done on other CPUs has tests of its own (`test_cpu.py`, `test_precision.py`).
    """
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    if "lowbit.cpu" in sys.modules:
        monkeypatch.setattr("lowbit.cpu.has_bfloat16", lambda: True)


@pytest.fixture(autouse=True)
def own_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """C kernels are compiled into the tests' own cache; a test starts without any, as a process does."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    native = sys.modules.get("lowbit.native")
    if native is not None:
        for name, value in {"_library": None, "_lacking": "", "_declined": False}.items():
            monkeypatch.setattr(native, name, value)
    columns = sys.modules.get("lowbit.algorithms.columns")
    if columns is not None:
        columns._on_cpu.cache_clear()


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
    from lowbit import QuantScheme, pipeline

    made: dict[str, Path] = {}

    def make(family: str = "llama", scheme: QuantScheme | None = None, **options: Any) -> Path:
        scheme = scheme or QuantScheme(4, 32)
        key = f"{family} {scheme} {sorted(options.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("quantized") / "checkpoint"
            source = tiny_model(family, tied=options.pop("tied", None))
            fast: dict[str, Any] = {"method": "rtn", "verify_output": False}
            pipeline.quantize(str(source), scheme, output=folder, **(fast | options))
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A calibration text of about twenty rows of 48 tokens."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 4, encoding="utf-8")
    return str(file)


@pytest.fixture
def quantize(text_file: str, tmp_path: Path) -> Callable[..., Report]:
    """`lowbit.quantize` to w4g32 by RTN into `tmp_path / "out"`, where a test says nothing else."""
    from lowbit import QuantScheme, pipeline

    usual: dict[str, Any] = {
        "scheme": QuantScheme(4, 32),
        "output": tmp_path / "out",
        "method": "rtn",
        "dataset": text_file,
        "samples": 4,
        "seq_len": 48,
    }

    def run(model: Any, *scheme: QuantScheme | None, **options: Any) -> Report:
        given = {"scheme": scheme[0]} if scheme else {}
        return pipeline.quantize(model, **(usual | given | options))

    return run


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Refused]:
    """Runs the command line where it must refuse; see `tests.refused`."""
    from tests.refused import Refused

    handler = signal.getsignal(signal.SIGTERM)
    yield Refused(tmp_path, monkeypatch, capfd)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session")
def hub_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`hub_models(kind)`: a folder of `tests.hub_stub.make_hub_model`, made once; never write to it."""
    from tests.hub_stub import make_hub_model

    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_hub_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return make


@pytest.fixture
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder for what the hub gives."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture
def hub(hub_models: Callable[[str], Path], hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine with the model `blocks`, and an empty cache."""
    from tests.hub_stub import serving

    with serving(hub_models("blocks")) as hub:
        constants = "huggingface_hub.constants"
        monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(hub_cache))
        # transformers keeps a client, which would go on asking the hub that it was made for, for minutes.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        yield hub
