"""Which process is whose child, and what it is: read from Linux's /proc."""

from __future__ import annotations

from pathlib import Path


def parent(process: int) -> int:
    """Return the id of a process's parent; OSError where there is none such, or no /proc."""
    # The process' name, in parentheses, may hold spaces; the parent's id is the second field behind it.
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def children(process: int) -> list[int]:
    """Return the ids of a process's children; OSError where there is none such, or the kernel does not list them."""
    # Not by looking at every process of the machine for its parent: replicas do this every few seconds.
    found: list[int] = []
    listed = False
    for task in Path(f"/proc/{process}/task").iterdir():
        try:
            found += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            continue
        listed = True
    if not listed:
        raise FileNotFoundError(f"/proc/{process}/task/*/children")
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
