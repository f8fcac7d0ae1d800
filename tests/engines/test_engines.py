"""Checkpoints in the engines that people serve them with: vLLM on a CPU, llama.cpp, stock transformers.

One model is written in every format and scheme and put to every engine, in environments without lowbit. An
engine must give the log-probabilities of the dequantized model and write its greedy text, or refuse with the
message that docs/COMPATIBILITY.md quotes. Spoiled copies (codes swapped, zeros off by one) show that the
gates would see a packing bug.
"""

from __future__ import annotations

import os
import platform

import pytest

from lowbit import compiled
from tests.engines import page
from tests.engines.checkpoints import HEAD, KINDS, MIXED, MIXED_BITS, SCHEMES, SPOILED
from tests.engines.measure import READS, Answer, Key, measure

pytestmark = pytest.mark.engines

Answers = dict[str, dict[Key, Answer]]  # by engine and checkpoint

# Mean difference of a log-probability, in nats. transformers multiplies in float32 here and
# rounds asymmetric weights to bfloat16, vLLM multiplies in float16, llama.cpp rounds all inputs to 8 bits.
GATES = {"transformers": 0.01, "vLLM": 0.01, "llama.cpp": 0.06}
LAGS = {"transformers": 0.05, "vLLM": 0.05, "llama.cpp": 0.15}
# Where inputs are rounded by the scheme, one in the middle of two steps falls to either side.
ROUNDED_GATE, ROUNDED_LAG = 0.1, 0.3
CAUGHT = 0.5  # what a packing bug moves, at least

OLD_CPU = platform.machine() == "x86_64" and "avx512f" not in compiled.processor()
"""vLLM has no kernel for packed weights there; the page says what it says instead."""
NO_KERNEL = "object has no attribute 'cpu_gemm_wna16'"

CPU_KERNEL = "not supported by CPUWNA16, supported types are: (ScalarType.uint4, ScalarType.uint4b8)"
OPTIMUM = "Loading a GPTQ quantized model requires optimum"
REFUSED: dict[tuple[str, Key], str] = {
    ("vLLM", ("compressed-tensors", "w8g32")): f"Quant type (uint8b128) {CPU_KERNEL}",
    ("vLLM", ("compressed-tensors", "w3g32")): f"Quant type (uint3b4) {CPU_KERNEL}",
    ("vLLM", ("compressed-tensors", "w2g32")): f"Quant type (uint2b2) {CPU_KERNEL}",
    ("vLLM", ("compressed-tensors", HEAD)): f"Quant type (uint8b128) {CPU_KERNEL}",
    ("vLLM", ("compressed-tensors", MIXED_BITS)): f"Quant type (uint8b128) {CPU_KERNEL}",
    ("vLLM", ("gptq", "w4g64-asym")): "Unsupported quantization config: bits=4, sym=False",
    ("vLLM", ("gptq", "w8g32")): "Marlin does not support weight_bits = uint8b128.",
    ("vLLM", ("gptq", "w3g32")): "Unsupported quantization config: bits=3, sym=True",
    ("vLLM", ("gptq", "w2g32")): "Unsupported quantization config: bits=2, sym=True",
    **{("transformers", key): OPTIMUM for key in SCHEMES if key[0].startswith("gptq")},
    ("transformers", ("awq", "w4g64-asym")): "Loading an AWQ quantized model requires gptqmodel.",
}
ROWS = [
    *((form, scheme) for form, scheme in SCHEMES),
    *(("compressed-tensors", scheme) for scheme in (HEAD, MIXED, MIXED_BITS)),
    *(("gguf", kind) for kind in KINDS),
]
ASKED = [(engine, key) for engine, reads in READS.items() for key in ROWS if key[0] in reads]
CONTROLS = [
    (engine, key)
    for engine, reads in READS.items()
    for key in (*SPOILED, ("gguf", "Q4_0"))
    if key[0] in reads and (engine, key) not in REFUSED
]


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, Answers]:
    """Of the checkpoints, and of their spoiled copies."""
    return measure(tmp_path_factory.mktemp("engines"), tmp_path_factory)


def test_every_answer_is_looked_at(answers: tuple[Answers, Answers]) -> None:
    given = [[(engine, key) for engine, found in which.items() for key in found] for which in answers]
    assert sorted(given[0]) == sorted(ASKED)
    assert set(given[1]) >= set(CONTROLS)


@pytest.mark.parametrize(("engine", "key"), [row for row in ASKED if row not in REFUSED])
def test_it_is_the_same_model(answers: tuple[Answers, Answers], engine: str, key: Key) -> None:
    answer = answers[0][engine][key]
    rounded = key[1] == "w8a8"
    if OLD_CPU and engine == "vLLM":
        if rounded:
            pytest.skip("vLLM's int8 products overflow on this CPU: it has no VNNI")
        assert NO_KERNEL in (answer.refused or "it loads")
        return
    assert answer.refused is None
    assert answer.mean < (ROUNDED_GATE if rounded else GATES[engine])
    assert answer.lag < (ROUNDED_LAG if rounded else LAGS[engine])


@pytest.mark.parametrize(("engine", "key"), REFUSED)
def test_it_is_refused_as_the_page_says(answers: tuple[Answers, Answers], engine: str, key: Key) -> None:
    assert REFUSED[engine, key] in (answers[0][engine][key].refused or "it loads")


@pytest.mark.parametrize(("engine", "key"), CONTROLS)
def test_a_packing_bug_would_be_caught(answers: tuple[Answers, Answers], engine: str, key: Key) -> None:
    if OLD_CPU and engine == "vLLM":
        pytest.skip("vLLM loads none of them on this CPU: it has no AVX-512")
    answer = answers[1][engine][key]
    assert answer.refused is None
    assert answer.mean > CAUGHT
    assert answer.lag > CAUGHT


def test_the_page_says_what_was_measured(answers: tuple[Answers, Answers]) -> None:
    """`LOWBIT_WRITE_PAGE=1 make test-engines` writes it."""
    if OLD_CPU:
        pytest.skip("the page is of a CPU with AVX-512, and says what vLLM says on one without")
    text = page.render(answers[0], REFUSED)
    if os.environ.get("LOWBIT_WRITE_PAGE"):
        page.write(text)
    written = page.measured(page.PAGE.read_text(encoding="utf-8"))
    assert page.without_figures(written) == page.without_figures(text)
