from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from deployments.host_pool import make_host_pool


def test_host_work_starts_no_openmp_threads_and_changes_nobody_elses() -> None:
    barrier = threading.Barrier(2)

    def look() -> int:
        barrier.wait()  # each on a thread of its own
        return torch.get_num_threads()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with make_host_pool(2) as pool, ThreadPoolExecutor(1) as other:
            assert list(pool.map(lambda _: look(), range(2))) == [1, 1]
            assert torch.get_num_threads() == 2
            assert other.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)
