"""Pages of memory-mapped tensors, given back to the system when they have been read.

A checkpoint is mapped, not read: its tensors take memory only where they are touched. Once a kernel's
layout is made from a packed weight, nothing reads the original again until it is saved, but the system
keeps its pages as long as nobody else asks for memory. `release` says that they can go. What they held
is in the file; touching them again reads it back. `trim` returns the memory of temporaries.

Only pages of safetensors files are released to which nobody has written, as the kernel's own account of
them says (`pagemap`; `smaps` would tell it too, but looks at all the memory of a process for it). Everything
else, and every system but Linux, is left alone.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

_PROCESS = Path("/proc/self")
# Bits of an entry: in memory or swapped; of a file. Linux: Documentation/admin-guide/mm/pagemap.rst
_HERE, _OF_FILE = np.uint64(0xC000_0000_0000_0000), np.uint64(0x2000_0000_0000_0000)
_DONT_NEED = 4
_MMAP_THRESHOLD = -3


def release(tensors: Iterable[Tensor]) -> int:
    """Let the whole pages under `tensors` go; returns their bytes."""
    mapped = _mapped_files()
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
        if last > first and _as_on_disk(first, last):
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


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges of this process that show a safetensors file."""
    try:
        maps = (_PROCESS / "maps").read_bytes()  # a path may hold anything but a line feed
    except OSError:
        return []
    ranges = [line.split(maxsplit=1)[0] for line in maps.split(b"\n") if line.endswith(b".safetensors")]
    return [(int(start, 16), int(stop, 16)) for start, _, stop in (one.partition(b"-") for one in ranges)]


def _as_on_disk(first: int, last: int) -> bool:
    """Are pages of a range of addresses in memory, and does none of them differ from its file?

    One that was written to is a copy. An account that knows of no page at all may be none of this process
    (an emulator's), and is not believed.
    """
    size, count = np.dtype(np.uint64).itemsize, (last - first) // mmap.PAGESIZE
    try:
        with (_PROCESS / "pagemap").open("rb") as file:
            file.seek(first // mmap.PAGESIZE * size)
            entries = np.frombuffer(file.read(count * size), np.uint64)
    except OSError:
        return False
    here, copied = (entries & _HERE) != 0, (entries & _OF_FILE) == 0
    return len(entries) == count and bool(here.any()) and not bool((here & copied).any())
