"""The threads for host work (decoding, tokenizing, replies), which must leave the model's cores to the model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from threadpoolctl import threadpool_limits


def make_host_pool(workers: int = 2) -> ThreadPoolExecutor:
    """Return a pool whose threads do their work alone: none of them starts OpenMP threads of its own."""
    return ThreadPoolExecutor(max_workers=workers, thread_name_prefix="host-work", initializer=_work_alone)


def _work_alone() -> None:
    """Hold this thread's OpenMP to one thread.

    Else each thread that normalises a photo gets as many as the model has, and they spin on beside the model's own.
    OpenMP's limit belongs to the thread; torch.set_num_threads would change MKL's for the whole process.
    """
    torch.get_num_threads()  # torch sets its own number at the first look, once for each thread
    threadpool_limits(1, user_api="openmp")
