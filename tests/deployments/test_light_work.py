"""Which thread does a request's host work: light work is not worth handing over, and must keep nobody waiting."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from deployments.batch import BatchRecord
from deployments.deployment import ModelReplica
from deployments.errors import BadRequest, ModelFailed
from deployments.metrics import LateCount
from deployments.servable import Servable
from deployments.service import LIGHT_BYTES, LIGHT_OUTPUT_BYTES, ModelService
from tests.support.local import serve_locally

pytestmark = pytest.mark.any_torch


class Widen(nn.Module):
    """[B, 1] -> [B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(-1, self.width) + 1


class Heavy(Servable):
    """Adds 1 to the length of a text; says on which threads it worked."""

    def __init__(self, width: int = 4) -> None:
        self.width = width
        self.read_on: list[int] = []
        self.replied_on: list[int] = []

    def load(self) -> nn.Module:
        return Widen(self.width).eval()

    def example(self, batch_size: int, length: int | None) -> tuple[torch.Tensor, ...]:
        return (torch.ones(batch_size, 1),)

    def preprocess(self, payload: Any) -> tuple[torch.Tensor, ...]:
        self.read_on.append(threading.get_ident())
        if payload == "unreadable":
            raise ValueError("cannot be read")
        return (torch.tensor([float(len(payload))]),)

    def postprocess(self, output: Any) -> float:
        self.replied_on.append(threading.get_ident())
        if output[0] == 14.0:
            raise RuntimeError("thirteen letters")
        return float(output[0])


class Light(Heavy):
    """The same, and says that it is light."""

    light_preprocess = light_postprocess = True


def serve(name: str, width: int = 4) -> Any:
    args = {
        "model": f"{__name__}:{name}",
        "model_args": {"width": width},
        "pt2": {"compile": {"enable": False}},
    }
    return serve_locally(args)


@pytest.fixture
def service() -> Iterator[ModelService]:
    with serve("Light") as service:
        yield service


def wait_until(done: Any) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.001)


def ask(service: ModelService, payload: Any) -> tuple[bool, bool]:
    """Return whether a request that finds the model idle is read, and its reply made, on the event loop."""
    wait_until(service._is_idle)
    heard: Any = service.servable
    assert asyncio.run(service.predict(payload)) == len(payload) + 1
    return heard.read_on[-1] == threading.get_ident(), heard.replied_on[-1] == threading.get_ident()


def test_light_work_of_one_request_is_done_on_the_event_loop(service: ModelService) -> None:
    assert ask(service, "text") == (True, True)
    assert ask(service, b"x" * LIGHT_BYTES) == (True, True)
    assert ask(service, "x" * (LIGHT_BYTES + 1)) == (False, True), "what is long is not light"


def test_a_list_of_one_text_is_read_on_the_event_loop_too(service: ModelService) -> None:
    wait_until(service._is_idle)
    heard: Any = service.servable
    outputs = asyncio.run(service.run_payloads(["text"], path="input"))
    assert outputs["output_0"].tolist() == [[5.0] * 4]
    assert heard.read_on == [threading.get_ident()]


def test_host_work_that_is_not_said_to_be_light_is_not_done_on_the_event_loop() -> None:
    with serve("Heavy") as service:
        assert ask(service, "text") == (False, False)


def test_large_outputs_are_not_made_replies_on_the_event_loop() -> None:
    most = LIGHT_OUTPUT_BYTES // 4
    for width, here in ((most, True), (most + 1, False)):
        with serve("Light", width) as service:
            assert ask(service, "text") == (True, here)


def test_while_the_model_is_busy_requests_are_read_on_other_threads(service: ModelService) -> None:
    heard: Any = service.servable
    service._is_idle = lambda: False
    assert asyncio.run(service.predict("text")) == 5
    here = threading.get_ident()
    assert [where == here for where in (*heard.read_on, *heard.replied_on)] == [False, True]


def test_while_requests_wait_for_others_they_are_read_on_other_threads(service: ModelService) -> None:
    heard: Any = service.servable
    wait_until(service._is_idle)
    service.change(replace(service.args, batching=replace(service.args.batching, wait_ms=1.0)))
    assert asyncio.run(service.predict("text")) == 5
    assert heard.read_on != [threading.get_ident()]


def test_of_lists_and_other_objects_it_is_not_known_how_long_they_take(service: ModelService) -> None:
    assert ask(service, ["text"])[0] is False
    assert ask(service, {"a": ["text"]})[0] is False
    assert ask(service, {"a": "text"})[0] is True
    assert ask(service, {"a": "x" * LIGHT_BYTES, "b": "x"})[0] is False
    assert ask(service, {"x" * LIGHT_BYTES: "x"})[0] is False
    assert ask(service, "語" * (LIGHT_BYTES // 4 + 1))[0] is False


class Own(Light):
    def postprocess(self, output: Any) -> float:
        return super().postprocess(output)


class Says(Own):
    light_postprocess = True


class Checks(Light):
    def check(self, inputs: tuple[torch.Tensor, ...]) -> None:
        pass


def test_a_class_with_a_method_of_its_own_says_for_itself_whether_that_is_light() -> None:
    kinds = (Heavy, Light, Own, Says)
    assert [kind().is_light("preprocess") for kind in kinds] == [False, True, True, True]
    assert [kind().is_light("postprocess") for kind in kinds] == [False, True, False, True]
    assert not Servable.is_light(Heavy(), "nothing")
    # What is checked is read as well.
    assert [kind().is_light("preprocess", "check") for kind in (Light, Checks)] == [True, False]
    heavy = Heavy()
    heavy.light_preprocess = True
    assert heavy.is_light("preprocess", "check")


def test_a_replica_asks_its_model_thread_whether_it_is_idle(service: ModelService) -> None:
    thread = SimpleNamespace(is_idle=False, failure=None)
    replica = SimpleNamespace(
        _args=service.args,
        _servable=service.servable,
        _model=service._model,
        _run=None,
        _host_pool=None,
        _admission=service.admission,
        _thread=thread,
        _metrics=SimpleNamespace(count=None),
    )
    made = ModelReplica._make_service(cast(ModelReplica, replica))
    assert not made._is_idle()
    thread.is_idle = True
    assert made._is_idle()


def test_errors_of_light_work_are_blamed_as_elsewhere(service: ModelService) -> None:
    wait_until(service._is_idle)
    with pytest.raises(BadRequest, match="cannot be read"):
        asyncio.run(service.predict("unreadable"))
    with pytest.raises(ModelFailed, match="RuntimeError"):
        asyncio.run(service.predict("x" * 13))
    assert ask(service, "text") == (True, True)


def record(rows: int) -> BatchRecord:
    return BatchRecord(rows, rows, rows, (0.0,) * rows, 0.001)


def test_runs_are_counted_once_each_whichever_threads_they_came_from() -> None:
    counted: list[int] = []
    threads: set[int] = set()

    def note(batch: BatchRecord) -> None:
        threads.add(threading.get_ident())
        if batch.rows == 13:
            raise RuntimeError("no metrics today")
        counted.append(batch.rows)

    async def run() -> None:
        late = LateCount(note, pool)

        def add() -> None:
            for rows in range(1, 51):
                late.add(record(rows))

        await asyncio.gather(*(asyncio.to_thread(add) for _ in range(4)))
        while len(counted) < 4 * 49:
            await asyncio.sleep(0.001)
        late.add(record(60))
        late.close()
        assert counted[-1] == 60, "what is left at the end"
        await asyncio.sleep(0.2)  # a count that was due finds nothing to do

    with ThreadPoolExecutor(2) as pool:
        asyncio.run(asyncio.wait_for(run(), 60))
    assert sorted(counted) == sorted([*(4 * [*range(1, 13), *range(14, 51)]), 60])
    assert len(threads - {threading.get_ident()}) >= 1
