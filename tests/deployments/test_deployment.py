"""How a request goes from a replica to its model thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from deployments.args import BatchingArgs
from deployments.deployment import ModelReplica
from deployments.errors import NotReady
from deployments.model_thread import ModelThread
from deployments.queue import Work
from optim import compile_model
from tests.support import models


class Asked:
    """Stands for a replica, which Ray alone can make; counts what went through `@serve.batch`."""

    def __init__(self) -> None:
        self.batches = 0
        self.thread = ModelThread("test")
        self.thread.call(self._load).result()
        self._thread = self.thread
        self._service = SimpleNamespace(args=SimpleNamespace(batching=BatchingArgs()))

    async def _enter_batch(self, work: Work) -> None:
        self.batches += 1
        await ModelReplica._run_batch(cast(ModelReplica, self), [work])

    def _load(self) -> None:
        eager = {"compile": {"enable": False}}
        self.thread.serve(compile_model(models.Mlp().eval(), models.features, eager, device="cpu"))

    async def run(self) -> Any:
        return await ModelReplica._run(cast(ModelReplica, self), models.features(1), 1, None)

    def wait_until_idle(self) -> None:
        end = time.monotonic() + 60
        while not self.thread.is_idle:
            assert time.monotonic() < end
            time.sleep(0.001)


@pytest.fixture
def asked() -> Iterator[Asked]:
    asked = Asked()
    yield asked
    asked.thread.close()


def test_who_comes_alone_is_handed_to_the_thread(asked: Asked) -> None:
    for _ in range(3):
        asked.wait_until_idle()
        torch.testing.assert_close(asyncio.run(asked.run()), models.Mlp().eval()(*models.features(1)))
    assert asked.batches == 0


def test_who_finds_the_thread_busy_goes_through_a_batch(asked: Asked) -> None:
    blocked = threading.Event()
    asked.thread.call(blocked.wait)

    async def run_three() -> None:
        running = [asyncio.ensure_future(asked.run()) for _ in range(3)]
        while asked.batches < 3:
            await asyncio.sleep(0.001)
        blocked.set()
        await asyncio.wait_for(asyncio.gather(*running), 60)

    asyncio.run(asyncio.wait_for(run_three(), 60))
    assert asked.batches == 3


def test_who_asks_for_company_goes_through_a_batch(asked: Asked) -> None:
    asked._service.args.batching = BatchingArgs(wait_ms=1.0)
    asked.wait_until_idle()
    asyncio.run(asked.run())
    assert asked.batches == 1


def test_a_thread_that_has_ended_says_so(asked: Asked) -> None:
    asked.wait_until_idle()
    asked.thread.close()
    with pytest.raises(NotReady):
        asyncio.run(asked.run())
