"""Pages of memory-mapped tensors, given back to the system when they have been read.

A checkpoint is mapped, not read: its tensors take memory only where they are touched. Once a kernel's
layout is made from a packed weight, nothing reads the original again until it is saved, but the system
keeps its pages as long as nobody else asks for memory. `release` says that they can go. What they held
is in the file; touching them again reads it back. `trim` returns the memory of temporaries.

Only mappings of safetensors files are released to which nobody has written, as the kernel's own account
of them says. Everything else, and every system but Linux, is left alone.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/smaps")
_SHOWS_FILE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) .*\.safetensors$", re.MULTILINE)
_COPIED = re.compile(r"^Anonymous: +(\d+) kB$", re.MULTILINE)  # a line of every mapping
_DONT_NEED = 4
_MMAP_THRESHOLD = -3


def release(tensors: Iterable[Tensor]) -> int:
    """Let the whole pages under `tensors` go; returns their bytes."""
    mapped = _untouched_files()
    if not mapped:
        return 0
    library = ctypes.CDLL(None, use_errno=True)
    released = 0
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            continue
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if not any(start <= first and last <= stop for start, stop in mapped):
            continue
        first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONT_NEED)
            released += last - first
    return released


def forget(tensor: Tensor) -> None:
    """Let the pages go of a tensor that begins a shared mapping of a file of its own."""
    library = ctypes.CDLL(None)
    if hasattr(library, "madvise") and tensor.nbytes:
        library.madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), _DONT_NEED)


def trim() -> None:
    """Give back what the C library keeps of freed memory, where it is glibc.

    Every block that is quantized leaves holes in the heap that the next one does not quite fit into:
    a third of a gigabyte over the 24 blocks of a 0.5 B model, more on a deeper one.
    """
    try:
        library = ctypes.CDLL(None)
    except TypeError:  # on Windows, which has no handle for what is loaded already
        return
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def return_large() -> None:
    """From now on, memory of a megabyte and more goes back to the system when it is freed, where it is glibc.

    Without this it is kept for the next tensor, in holes that may not fit; the price is that new pages are
    cleared each time.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, 2**20)


def _untouched_files() -> list[tuple[int, int]]:
    """Address ranges of this process that show a safetensors file, every page as it is on disk."""
    try:
        maps = _MAPS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    ranges: list[tuple[int, int]] = []
    for found in _SHOWS_FILE.finditer(maps):
        copied = _COPIED.search(maps, found.end())
        if copied and int(copied[1]) == 0:  # no page was copied on write
            ranges.append((int(found[1], 16), int(found[2], 16)))
    return ranges
