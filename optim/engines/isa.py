"""The CPU's instruction sets that Inductor can build for, remembered from one build to the next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

_FILE = "instruction_sets.json"


@contextmanager
def known_from(folder: Path | None) -> Iterator[None]:
    """Spare Inductor the trying of each set, which is a process that imports torch, where a build was saved here.

    Five seconds in every process, on a CPU with AMX and two cores. Code for a set that does not work here after all
    is refused as everything is that does not compile or run.
    """
    from torch._inductor import cpu_vec_isa

    names = None if folder is None or not (folder / _FILE).is_file() else json.loads((folder / _FILE).read_text())
    if not isinstance(names, list) or (any("amx" in name for name in names) and not torch.cpu._init_amx()):
        yield
        return
    known = [isa for isa in cpu_vec_isa.supported_vec_isa_list if str(isa) in names]
    with patch.object(cpu_vec_isa, "valid_vec_isa_list", lambda: known):
        yield


def save(folder: Path) -> None:
    """Leave for the next build which sets worked in this process."""
    from torch._inductor import cpu_vec_isa

    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_text(json.dumps([str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()]))
