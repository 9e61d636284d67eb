"""A process's memory in huge pages: what reads every weight for each step is faster with them on a CPU.

With pages of 4 KiB a core waits for address translations: two threads read 400 MB of float32 weights at 23 to 25
GB/s, and at 31 in pages of 2 MiB (Intel Xeon with AMX, Linux 6.18). Where the kernel gives them only to who asks
(`madvise`, the default of most distributions), libraries do not ask for what they allocate; so it is moved afterwards.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_SYSFS = Path("/sys/kernel/mm/transparent_hugepage")
#: Linux 6.1: move what lies in a range into huge pages now (madvise(2)). Python's mmap has no name for it.
_MADV_COLLAPSE = 25
#: Of a huge page's small ones those that have to be there already: the rest would be memory that nobody asked for.
_LEAST_FILLED = 0.9


@cache
def why_not() -> str | None:
    """Return why memory cannot be moved into huge pages here, or None where it can."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} is not asked for huge pages"
    try:
        said = (_SYSFS / "enabled").read_text(encoding="ascii")
        size = _huge_size()
    except (OSError, ValueError):
        return "this kernel has no transparent huge pages"
    if "[never]" in said:
        return f"transparent huge pages are switched off ({_SYSFS / 'enabled'} says never)"
    try:
        with mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            for place in range(0, 2 * size, mmap.PAGESIZE):
                memory[place] = 1
            memory.madvise(_MADV_COLLAPSE)
        next(_filled_ranges(size), None)
    except OSError as error:  # an older kernel; a sandbox's
        return f"memory cannot be moved into huge pages here (Linux 6.1 can): {error}"
    return None


def are_for(phase: str) -> bool:
    """Return whether a model's memory on a CPU shall lie in huge pages: calls do little but read the weights.

    Models of other kinds gain too little for the time it takes (at batch sizes from 2 EfficientNet-Lite0 3 to 5 % by
    OpenVINO, MiniLM nothing).
    """
    return phase != "forward" and why_not() is None


def collapse() -> None:
    """Move all of this process's memory that fills huge pages into such; nothing else changes.

    Takes about 2.5 s a GB that is not there yet, and milliseconds where all of it is. What cannot be moved, because
    memory is too fragmented or a device holds it, stays where it is. RuntimeError where `why_not` has a reason.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, size in _filled_ranges(_huge_size()):
        # Another thread may have given the range back since: then there is nothing to move, or something else of it.
        if madvise(start, size, _MADV_COLLAPSE):
            why = os.strerror(ctypes.get_errno())
            logger.debug("of %d MB not all could be moved into huge pages: %s", size >> 20, why)


def huge_bytes() -> int:
    """Return how much of this process's memory lies in huge pages."""
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return int(rollup.partition("AnonHugePages:")[2].split()[0]) * 1024


def _huge_size() -> int:
    return int((_SYSFS / "hpage_pmd_size").read_text(encoding="ascii"))


def _filled_ranges(huge: int) -> Iterator[tuple[int, int]]:
    """Return address and size of what is aligned to huge pages and almost all there, of memory that is ours alone."""
    page = mmap.PAGESIZE
    most = os.sysconf("SC_PHYS_PAGES") * page  # a mapping beyond it is address space that was set aside
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for line in maps:
            where, access, _, _, inode, *name = line.split(None, 5)
            if access != "rw-p" or inode != "0" or "".join(name).startswith("[stack"):
                continue
            low, high = (int(end, 16) for end in where.split("-"))
            first, last = -(-low // huge), high // huge
            if first >= last or (last - first) * huge > most:
                continue
            pagemap.seek(first * huge // page * 8)
            # Eight bytes a page, the highest bit of which says that it is there: the sign (proc_pid_pagemap(5)).
            entries = bytearray(pagemap.read((last - first) * huge // page * 8))
            there = (torch.frombuffer(entries, dtype=torch.int64) < 0).view(-1, huge // page)
            filled = there.float().mean(1) >= _LEAST_FILLED
            yield from (((first + at) * huge, count * huge) for at, count in _runs(filled.tolist()))


def _runs(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """Return where each unbroken run of True begins, and its length."""
    start = 0
    for at, flag in enumerate([*flags, False]):
        if not flag:
            if at > start:
                yield start, at - start
            start = at + 1
