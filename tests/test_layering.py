"""The shape of the code, proved on its syntax trees: imports only go down, and rooms stay small.

Nothing here imports lowbit, so these tests stand when the package itself is broken.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "triton_kernels" / "lowbit_kernels"

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60

# A module imports modules of a lower level only. A new file takes its place here.
LEVELS = {
    "errors": 0,
    "progress": 0,
    "effort": 0,
    "ranks": 1,
    "interruption": 0,
    "scheme": 1,
    "packing": 1,
    "shard": 1,
    "hardware": 1,
    "pages": 1,
    "compiled": 1,
    "native": 2,
    "quiet": 1,
    "durable": 2,
    "untrusted": 1,
    "gguf_header": 1,
    "grid": 2,
    "quantized": 3,
    "activations": 1,
    "int8": 2,
    "cpu": 4,
    "ops": 5,
    "formats.limits": 3,
    "formats.int_quantized": 4,
    "formats.compressed_tensors": 5,
    "formats.gptq": 4,
    "formats.gptq_v2": 5,
    "formats.awq": 5,
    "formats.gguf": 4,
    "formats": 6,
    "algorithms.rtn": 4,
    "algorithms.columns": 3,
    "algorithms.descent": 4,
    "algorithms.gptq": 5,
    "algorithms.awq": 5,
    "algorithms.smooth": 4,
    "algorithms.qronos": 6,
    "algorithms.quick": 6,
    "algorithms": 7,
    "grouped": 6,
    "nn": 7,
    "experts": 8,
    "placement": 9,
    "quantizer": 10,
    "switch": 11,
    "results": 4,
    "record": 5,
    "charts": 1,
    "report": 6,
    "card": 7,
    "origin": 3,
    "source": 4,
    "hub_shards": 4,
    "hub_source": 10,
    "dataset": 4,
    "passages": 5,
    "divergence": 4,
    "carried": 2,
    "stream": 4,
    "budget": 8,
    "topology": 4,
    "sampling": 5,
    "moments": 2,
    "calibration": 6,
    "correction": 7,
    "reach": 8,
    "halves": 8,
    "pair": 9,
    "plan": 7,
    "knapsack": 1,
    "sensitivity": 8,
    "target": 9,
    "planning": 15,
    "checkpoint": 7,
    "gguf_vocab": 6,
    "gguf_file": 7,
    "rounding": 8,
    "head": 9,
    "blocks": 10,
    "trainable": 4,
    "judge": 3,
    "latent": 5,
    "training": 6,
    "distill": 7,
    "refine": 12,
    "hf": 11,
    "evaluate": 12,
    "speed": 12,
    "tiles": 12,
    "tasks": 12,
    "inspection": 12,
    "doctor": 12,
    "packed": 12,
    "batches": 12,
    "readback": 12,
    "verify": 13,
    "identity": 3,
    "places": 1,
    "work": 14,
    "beside": 15,
    "comparison": 15,
    "comparison_page": 16,
    "push": 16,
    "road": 19,
    "terminal": 20,
    "pipeline": 20,
    "tuning": 21,
    "conversion": 20,
    "": 30,  # lowbit/__init__.py, the public names
    "commands": 0,
    "commands.options": 29,
    "commands.bench": 30,
    "commands.compare": 30,
    "commands.convert": 30,
    "commands.doctor": 30,
    "commands.evaluate": 30,
    "commands.generate": 30,
    "commands.inspect": 30,
    "commands.plan": 30,
    "commands.push": 30,
    "commands.quantize": 30,
    "commands.tune": 30,
    "cli": 40,
    "__main__": 50,
}

# What reading a checkpoint must never need.
ONLY_FOR_QUANTIZING = {
    "algorithms",
    "batches",
    "blocks",
    "calibration",
    "correction",
    "reach",
    "dataset",
    "halves",
    "head",
    "pair",
    "passages",
    "pipeline",
    "road",
    "sampling",
}
LOADERS = ("hf", "checkpoint")
HEAVY = ("torch", "transformers", "datasets", "triton", "compressed_tensors", "lowbit_kernels")


def modules() -> dict[str, Path]:
    """Files of lowbit by name below the package; the package itself is ''."""
    found = {}
    for path in sorted((ROOT / "lowbit").rglob("*.py")):
        parts = path.relative_to(ROOT / "lowbit").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
PYTHON_FILES = [
    path
    for folder in ("lowbit", "triton_kernels", "scripts", "examples", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that `tree` imports, lazy imports and `import_module("...")` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import, write lowbit.<module>"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def lowbit_imports(tree: ast.AST) -> set[str]:
    """The modules of lowbit that `tree` imports, as named in `LEVELS`."""
    found = set()
    for name in imported(tree):
        package, _, rest = name.partition(".")
        if package != "lowbit":
            continue
        while rest and rest not in MODULES:  # `lowbit.grid.find_params` -> `grid`
            rest = rest.rpartition(".")[0]
        found.add(rest)
    return found


def top_packages(tree: ast.AST) -> set[str]:
    return {name.partition(".")[0] for name in imported(tree)}


def test_every_module_has_a_level() -> None:
    assert sorted(MODULES.keys() - LEVELS.keys()) == [], "give the new file a level in LEVELS"
    assert sorted(LEVELS.keys() - MODULES.keys()) == [], "LEVELS names files that do not exist"


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_go_down(name: str) -> None:
    level = LEVELS[name]
    up = {other for other in lowbit_imports(parse(MODULES[name])) if LEVELS[other] >= level}
    assert up == set(), f"lowbit.{name} (level {level}) imports {sorted(up)}, not below it"


@pytest.mark.parametrize("loader", LOADERS)
def test_loading_needs_nothing_of_quantizing(loader: str) -> None:
    """Followed through every import, the lazy ones included."""
    reached, ahead = set(), {loader}
    while ahead:
        name = ahead.pop()
        reached.add(name)
        tree = parse(MODULES[name])
        assert "datasets" not in top_packages(tree), f"{loader} reaches the datasets package in {name}"
        ahead |= lowbit_imports(tree) - reached
    assert {name.partition(".")[0] for name in reached} & ONLY_FOR_QUANTIZING == set()


def test_kernels_stand_alone() -> None:
    for path in sorted(KERNELS.rglob("*.py")):
        beyond = top_packages(parse(path)) - {"torch", "triton", "lowbit_kernels"} - sys.stdlib_module_names
        assert beyond == set(), f"{path.name} imports {sorted(beyond)}"
    assert not (KERNELS.parent / "__init__.py").exists(), "triton_kernels is a source root, not a package"


@pytest.mark.parametrize("name", MODULES)
def test_kernels_are_imported_lazily_where_they_run(name: str) -> None:
    tree = parse(MODULES[name])
    if name not in ("ops", "grouped", "int8", "tiles", "algorithms.columns"):
        assert "lowbit_kernels" not in top_packages(tree)
        return
    eager = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in eager:
        assert not {"lowbit_kernels", "triton"} & top_packages(node), f"line {node.lineno}: import it lazily"


def test_import_lowbit_is_light() -> None:
    code = f"import sys, lowbit; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], "import lowbit must not bring these in"


@pytest.mark.parametrize("name", MODULES)
def test_only_packing_shifts_bits(name: str) -> None:
    if name == "packing":
        return
    shifts = [
        node.lineno
        for node in ast.walk(parse(MODULES[name]))
        if (isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.LShift | ast.RShift))
        or (isinstance(node, ast.Attribute) and node.attr.startswith("bitwise_") and "shift" in node.attr)
    ]
    assert shifts == [], f"lowbit.{name} shifts bits on lines {shifts}: packing.py does that"


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def length(function: ast.FunctionDef | ast.AsyncFunctionDef, is_command: bool = False) -> int:
    """Lines from `def` to the end, without the docstring, and of a command without its list of options."""
    nodes = function.body[1:] if ast.get_docstring(function) else function.body
    body = (nodes[-1].end_lineno or 0) - nodes[0].lineno + 1 if nodes else 0
    return body if is_command else body + function.body[0].lineno - function.lineno


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    lengths = {
        node.name: length(node, is_command=path.parent.name == "commands" and node.name == "run")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node)
    }
    long = {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}
    assert long == {}, f"functions of more than {MAX_FUNCTION_LINES} lines: {long}"


def test_no_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc"}
    assert [str(path) for path in PYTHON_FILES if path.stem in drawers or path.parent.name in drawers] == []


def test_the_checks_see_what_they_look_for() -> None:
    tree = ast.parse(
        "import lowbit.grid as g\n"
        "from lowbit import scheme, QuantScheme\n"
        "from lowbit.formats.gptq import pack\n"
        "def f():\n    from lowbit import cli\n    importlib.import_module('lowbit.hf')\n"
    )
    assert lowbit_imports(tree) == {"grid", "scheme", "", "formats.gptq", "cli", "hf"}
    (function,) = ast.parse('def f(\n    a: int,\n) -> int:\n    """One.\n\n    Two."""\n    return a\n').body
    assert isinstance(function, ast.FunctionDef)
    assert length(function) == 4
