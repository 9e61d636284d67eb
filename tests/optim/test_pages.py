"""Memory in huge pages: that a decoder's weights get there, here and in a race's process, and why not where not."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from optim import compile_model, pages
from optim.buckets import make_grid
from optim.child import pack, unpack
from optim.config import Pt2Config
from optim.device import inspect_device
from optim.engines import EngineJob
from optim.reference import Reference

CPU = torch.device("cpu")
WHY_NOT = pages.why_not()
needs_huge_pages = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def make_weight() -> torch.Tensor:
    """Return 64 MB in a mapping of its own, in small pages. [16384, 1024]."""
    memory = mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)  # unlike its neighbours, so that Linux does not make one mapping of them
    return torch.frombuffer(memory, dtype=torch.float32).normal_(std=1 / 32).view(16 * 1024, 1024)


def huge_share(tensor: torch.Tensor) -> float:
    """Return the huge pages of the mapping that a tensor is in, by the tensor's size; a file's mapping has none."""
    address = tensor.data_ptr()
    is_here, huge = False, 0
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        head = line.split(None, 1)[0]
        if "-" in head:
            low, high = (int(end, 16) for end in head.split("-"))
            is_here = low <= address < high
        elif is_here and head == "AnonHugePages:":
            huge = int(line.split()[1]) * 1024
    return huge / tensor.nbytes


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget what was found out about this kernel, before and after."""
    pages.why_not.cache_clear()
    yield
    pages.why_not.cache_clear()


@needs_huge_pages
def test_memory_is_moved_and_stays_what_it_was() -> None:
    weight = make_weight()
    copy, before = weight.clone(), pages.huge_bytes()
    assert huge_share(weight) == 0
    pages.collapse()
    assert huge_share(weight) > 0.8 and huge_share(copy) > 0.8
    assert pages.huge_bytes() - before >= 60 * 2**20
    assert torch.equal(weight, copy)
    there = pages.huge_bytes()
    pages.collapse()  # again: it is all there
    assert pages.huge_bytes() >= there - 2**21


@needs_huge_pages
def test_memory_that_was_only_set_aside_is_not_filled() -> None:
    with mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for place in range(0, len(memory), 2**16):  # one page of sixteen
            memory[place] = 1
        pages.collapse()
        view = torch.frombuffer(memory, dtype=torch.uint8)
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(view.data_ptr() // mmap.PAGESIZE * 8)
            entries = torch.frombuffer(bytearray(pagemap.read(len(memory) // mmap.PAGESIZE * 8)), dtype=torch.int64)
        del view
        assert int((entries < 0).sum()) == len(memory) // 2**16


class Wide(nn.Module):
    """One large product. [B, 1024] -> [B, 16384]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1024, 16 * 1024, bias=False)
        self.linear.weight = nn.Parameter(make_weight())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(x)
        return found


def example(batch_size: int, length: int | None) -> tuple[torch.Tensor, ...]:
    return (torch.randn(batch_size, 1024, generator=torch.Generator().manual_seed(batch_size)),)


@needs_huge_pages
def test_the_weights_of_what_decodes_lie_in_huge_pages() -> None:
    module = Wide().eval()
    model = compile_model(
        module, example, {"compile": {"enable": False}}, batch_sizes=[1], device="cpu", phase="decode"
    )
    assert huge_share(module.linear.weight) > 0.8
    assert "pages" in model.report.seconds
    assert model.report.device["capabilities"]["huge_pages"]["available"]


@needs_huge_pages
def test_other_models_are_left_where_they_are() -> None:
    module = Wide().eval()
    model = compile_model(module, example, {"compile": {"enable": False}}, batch_sizes=[1], device="cpu")
    assert huge_share(module.linear.weight) == 0 and "pages" not in model.report.seconds


@needs_huge_pages
@pytest.mark.parametrize("phase", ["decode", "forward"])
def test_a_race_times_what_decodes_in_huge_pages_too(phase: str, tmp_path: Path) -> None:
    module = Wide().eval()
    with torch.no_grad():
        reference = Reference(module, example, make_grid([1], None, None), CPU)
        pack(tmp_path, EngineJob.of(module, Pt2Config.parse({}), reference, CPU, phase), reference, [])
        carried = unpack(tmp_path).job.module
    weight = carried.get_parameter("linear.weight")
    assert torch.equal(weight, module.linear.weight)
    pages.collapse()
    assert (huge_share(weight) > 0.8) == (phase == "decode")  # else it is the file's


@pytest.mark.parametrize("said", ["always madvise [never]", None])
def test_kernels_that_have_none_are_said_to(
    said: str | None, tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_SYSFS", tmp_path)
    if said is not None:
        (tmp_path / "enabled").write_text(said)
        (tmp_path / "hpage_pmd_size").write_text("2097152")
    expected = "switched off" if said else "has no transparent huge pages"
    assert expected in str(pages.why_not())
    found = inspect_device(CPU).capabilities["huge_pages"]
    assert not found.available and expected in found.detail
    with pytest.raises(RuntimeError, match=expected):
        pages.collapse()
    model = compile_model(
        Wide(), example, {"compile": {"enable": False}}, batch_sizes=[1], device="cpu", phase="decode"
    )
    assert "pages" not in model.report.seconds


def test_a_kernel_that_cannot_move_memory_is_said_to(
    tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "enabled").write_text("[always] madvise never")
    (tmp_path / "hpage_pmd_size").write_text("2097152")
    monkeypatch.setattr(pages, "_SYSFS", tmp_path)
    monkeypatch.setattr(pages, "_MADV_COLLAPSE", 9999)  # which no kernel knows
    assert "Linux 6.1 can" in str(pages.why_not())
    assert f"Errno {errno.EINVAL}" in str(pages.why_not())
