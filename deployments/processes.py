"""Which process is whose child, and what it is: read from Linux's /proc."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path


def parent(process: int) -> int:
    """Return the id of a process's parent; OSError where there is none such, or no /proc."""
    # The process' name, in parentheses, may hold spaces; the parent's id is the second field behind it.
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def children() -> Mapping[int, list[int]]:
    """Return every process's children, by id; none for what has none."""
    found: dict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                found[parent(int(folder.name))].append(int(folder.name))
            except (OSError, IndexError):  # it has ended
                continue
    return found


def arguments(process: int) -> list[str]:
    """Return what a process was started with; OSError where there is none such."""
    return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")


def title(process: int) -> str:
    """Return what a process calls itself, as `ray::ServeController`; empty where it has ended."""
    try:
        return arguments(process)[0]
    except OSError:
        return ""
