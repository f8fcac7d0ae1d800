"""Feeds spoiled files to every reader of files, and counts what goes wrong.

    python scripts/fuzz.py                  # 10,000 files
    python scripts/fuzz.py --count 200      # what the tests run

A reader may refuse (`LowbitError`) or succeed. Anything else is counted: another exception or a dead
process (crash), no answer in time (hang), more memory than a small file has a right to (memory), a file
opened for writing, made, moved or removed elsewhere, a process started, a socket, a pickle (outside). The
sources are a tiny model, checkpoints of it in all formats, and a GGUF file; readers run in forked children,
with an audit hook for what they do and a limit on their address space.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(TRANSFORMERS_VERBOSITY="critical")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "triton_kernels")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from lowbit import conversion, gguf_file, hf, native, pipeline  # noqa: E402
from lowbit.errors import LowbitError  # noqa: E402
from lowbit.inspection import inspect  # noqa: E402
from lowbit.packed import Packed  # noqa: E402
from lowbit.quiet import quiet  # noqa: E402
from lowbit.scheme import QuantScheme  # noqa: E402
from lowbit.source import Source, find  # noqa: E402
from tests.tiny import make_model  # noqa: E402

SECONDS = 60.0  # of silence, on a machine that may be busy with other things
MEMORY = 2**30  # more than before, resident
ADDRESSES = 2**33  # more than before, mapped
BATCH = 50  # files per child
NASTY: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 2**31, 2**63, -(2**63), 10**30, 1e308, float("nan"), float("inf"), "",
    "a" * 10_000, "../../../etc/passwd", "/etc/passwd", "..\\..\\x", "model.safetensors\0.bin",
    [], {}, [[]], [{}], {"a": {}}, ["../x"], {"weight_map": "x"}, "torch.float128", "bfloat16",
)  # fmt: skip


def read_source(folder: Path) -> None:
    """As `lowbit quantize` opens a model: configuration, index, headers, and a tensor or two."""
    source = Source(find(str(folder), folder / "scratch"), torch.float32)
    keys = source.keys_under(["model.norm", "model.layers.0.input_layernorm"])
    source.load(keys, torch.device("cpu"))
    for key in keys[:1]:
        source.read(key)


def read_packed(folder: Path) -> None:
    """As `lowbit convert` and `lowbit.load` read a quantized checkpoint, every layer of it."""
    packed = Packed(folder)
    for name, found in hf.layers(folder, packed.fmt):
        if not isinstance(found, Tensor):
            weight, _ = packed.read(name, found)
            weight.dequantize()


def read_gguf(folder: Path) -> None:
    """As `lowbit convert` reads a GGUF file back."""
    list(gguf_file.read(folder / "model.gguf"))


def read_gguf_model(folder: Path) -> None:
    """As `lowbit quantize model.gguf` begins."""
    find(str(folder / "model.gguf"), folder / "scratch")


READERS: dict[str, tuple[Callable[[Path], object], str, int]] = {
    "inspect": (inspect, "packed", 30),
    "convert": (read_packed, "packed", 20),
    "quantize": (read_source, "source", 15),
    "load": (hf.load, "packed", 1),
    "gguf": (read_gguf, "gguf", 32),
    "gguf model": (read_gguf_model, "gguf", 2),
}
"""By name: what reads, what it reads, and its share of the files in percent."""


# --- files, and how they are spoiled


def make_sources(folder: Path) -> dict[str, list[Path]]:
    """Sound folders, by kind."""
    (folder / "model").mkdir(parents=True)
    model = make_model("llama", folder / "model")
    sharded = folder / "sharded"
    with quiet():
        hf.load_stock(model).save_pretrained(sharded, max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, sharded / name)
    packed = []
    for format_name, scheme in (
        ("compressed-tensors", QuantScheme(4, 32)),
        ("gptq", QuantScheme(3, 32)),
        ("awq", QuantScheme(4, 32, symmetric=False)),
    ):
        packed.append(folder / format_name)
        pipeline.quantize(str(model), scheme, output=packed[-1], method="rtn", format=format_name,
                          verify_output=False, max_shard_size="60KB")  # fmt: skip
    (folder / "gguf").mkdir()
    conversion.convert(packed[0], folder / "gguf" / "model.gguf")
    return {"source": [model, sharded], "packed": packed, "gguf": [folder / "gguf"]}


def spoil_bytes(data: bytes, chance: random.Random, header: int) -> bytes:
    """A few bytes changed, cut out, put in or cut off; mostly near the beginning."""
    content = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(min(len(content), header) if chance.random() < 0.8 else len(content))
        kind = chance.randrange(5)
        if kind == 0:
            content[at] = chance.randrange(256)
        elif kind == 1:  # a count of eight bytes
            content[at : at + 8] = chance.choice((2**63, 2**32, 10**12, 0, 2**64 - 1)).to_bytes(8, "little")
        elif kind == 2:
            del content[at : at + chance.randrange(1, 64)]
        elif kind == 3:
            content[at:at] = chance.randbytes(chance.randrange(1, 64))
        else:
            del content[at + 1 :]
        if not content:
            break
    return bytes(content)


def spoil_json(data: bytes, chance: random.Random) -> bytes:
    """One or two values of a JSON file replaced, removed, moved or added; at times its text is spoiled."""
    if chance.random() < 0.2:
        return spoil_bytes(data, chance, len(data))
    if chance.random() < 0.02:
        return b'{"a":' * 10**5 + b"}" * 10**5
    content = json.loads(data)
    for _ in range(chance.choice((1, 1, 2))):
        node = content
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = chance.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and chance.random() < 0.8:
                node = node[key]
                continue
            kind = chance.randrange(6)
            if kind == 0:
                del node[key]
            elif kind == 1 and isinstance(node, dict):
                node[chance.choice(("auto_map", "weight_map", "quant_method", "dtype", "bits"))] = {
                    "AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"
                }  # fmt: skip
            else:
                node[key] = chance.choice(NASTY)
            break
    return json.dumps(content).encode()


def spoil_header(data: bytes, chance: random.Random) -> bytes:
    """The JSON in the header of a safetensors file, under a length that fits."""
    length = int.from_bytes(data[:8], "little")
    text = spoil_json(data[8 : 8 + length], chance)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def spoil(folder: Path, chance: random.Random) -> str:
    """Spoil one file of a folder; returns how."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors", ".gguf")]
    wanted = ("config.json", "index.json", ".safetensors", ".gguf")
    path = chance.choice([path for path in files if path.name.endswith(wanted)])
    data = path.read_bytes()
    if chance.random() < 0.02 and path.suffix == ".safetensors":
        path.unlink()
        if chance.random() < 0.5:
            path.symlink_to("/etc/passwd")
        else:
            os.mkfifo(path)
    elif path.suffix == ".json":
        path.write_bytes(spoil_json(data, chance))
    elif path.suffix == ".safetensors" and chance.random() < 0.6:
        path.write_bytes(spoil_header(data, chance))
    else:
        path.write_bytes(spoil_bytes(data, chance, 4000))
    return path.name


# --- one child reads some, and is watched


WRITES = {
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "shutil.copyfile",
    "os.truncate",
}
RUNS = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class"}


def watch(room: Path, found: list[str]) -> None:
    """Note in `found` what this process does outside of `room`."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in RUNS:
            found.append(f"{event} {arguments[:1]}")
        elif event in WRITES or (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        ):
            path = os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else ""
            if path and not os.path.realpath(path).startswith((str(room), "/dev/null")):
                found.append(f"{event} {path}")

    sys.addaudithook(hook)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def read_batch(name: str, sound: list[Path], seeds: range, room: Path, report: int) -> None:
    """In a child: spoil, read, and write one line per file to the pipe `report`."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES, mapped + ADDRESSES))
    found: list[str] = []
    watch(room.resolve(), found)
    read = READERS[name][0]
    for seed in seeds:
        chance = random.Random(f"{name} {seed}")
        folder = room / f"{name}-{seed}"
        shutil.copytree(chance.choice(sound), folder)
        what = spoil(folder, chance)
        os.write(report, f"{seed}\tbegun\t{what}\n".encode())
        before = resident()
        found.clear()  # what spoiling did itself
        try:
            read(folder)
            result = "read"
        except LowbitError as error:
            result = "refused" if "\n" not in str(error) else f"crash\ta refusal of many lines: {error!r}"
        except MemoryError:
            result = "memory\tMemoryError"
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            result = f"crash\t{type(error).__name__} {str(error)[:100]!r} at {last.filename}:{last.lineno}"
        if resident() - before > MEMORY:
            result = f"memory\t{(resident() - before) >> 20} MiB"
        if found:
            result = f"outside\t{found}"
            found.clear()
        os.write(report, f"{seed}\t{result}".replace("\n", " ").encode() + b"\n")
        shutil.rmtree(folder)


def run_batch(
    name: str, sound: list[Path], seeds: range, room: Path, tell: Callable[[str], None]
) -> Counter[str]:
    """Fork a child for these files; go on after the one that it died of or hung at."""
    counts: Counter[str] = Counter()
    while seeds:
        ours, theirs = os.pipe()
        if (child := os.fork()) == 0:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            try:
                read_batch(name, sound, seeds, room, theirs)
            finally:
                os._exit(0)
        os.close(theirs)
        done, ended, text = seeds.start, "crash\tthe process died", b""
        while True:
            if not select.select([ours], [], [], SECONDS)[0]:
                ended = f"hang\tno answer in {SECONDS:.0f} s"
                break
            if not (data := os.read(ours, 2**16)):
                break
            text += data
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ours)
        for line in text.decode(errors="replace").splitlines():
            seed, result, *rest = line.split("\t")
            if result != "begun":
                counts[result] += 1
                done = int(seed) + 1
                if result not in ("read", "refused"):
                    tell(f"{name} {seed}: {result} {' '.join(rest)}")
        if done < seeds.stop:
            result, why = ended.split("\t")
            counts[result] += 1
            tell(f"{name} {done}: {result} {why}")
            done += 1
        seeds = range(done, seeds.stop)
    return counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="spoiled files in all")
    parser.add_argument("--first", type=int, default=0, help="seed of the first file of each reader")
    parser.add_argument("--only", choices=sorted(READERS), help="one reader")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    native.prefer()  # the compiler runs before anything is watched
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="lowbit-fuzz-") as place:
        sources = make_sources(Path(place) / "sound")
        room = Path(place) / "room"
        room.mkdir()
        for name, (_, kind, share) in READERS.items():
            if given.only not in (None, name):
                continue
            counts, started = Counter[str](), time.monotonic()
            stop = given.first + (given.count if given.only else max(1, given.count * share // 100))
            for first in range(given.first, stop, BATCH):
                seeds = range(first, min(first + BATCH, stop))
                counts += run_batch(name, sources[kind], seeds, room, lambda line: print(line, flush=True))
            total += counts
            print(f"{name:>10}: {told(counts)} in {time.monotonic() - started:.0f} s", flush=True)
    print(f"       all: {told(total)}")
    return int(any(total[bad] for bad in ("crash", "hang", "memory", "outside")))


def told(counts: Counter[str]) -> str:
    kinds = ("read", "refused", "crash", "hang", "memory", "outside")
    return f"{sum(counts.values())} files, " + ", ".join(f"{counts[kind]} {kind}" for kind in kinds)


if __name__ == "__main__":
    sys.exit(main())
