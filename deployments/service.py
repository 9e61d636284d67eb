"""`ModelService`: what every protocol asks of a servable, without a word of any of them."""

from __future__ import annotations

import asyncio
import logging
import struct
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np
import torch

from deployments.admission import Admission, Held, size_of
from deployments.args import ModelArgs
from deployments.deadline import Deadline
from deployments.errors import BadRequest, ModelFailed, RequestError
from deployments.servable import Servable, forward_names
from deployments.served import Served
from deployments.tensor_info import misfit, name_tensors, to_numpy
from optim import CompiledModel
from optim.errors import describe
from optim.shapes import Inputs, measure
from optim.tree import Rebuild, flatten

logger = logging.getLogger(__name__)
#: What servables whose host work is light may have done on the event loop: requests (500 tokens take 0.4 ms) and
#: outputs (4,000 floats become Python's in 0.1 ms) of so many bytes.
LIGHT_BYTES, LIGHT_OUTPUT_BYTES = 2048, 16 * 1024
Run = Callable[[Inputs, int, float | None], Awaitable[Any]]
"""Runs inputs of some rows until a deadline on time.monotonic's clock (None: never)."""


class ModelService(Served):
    """Checks tensors and payloads, and runs them."""

    def __init__(
        self,
        args: ModelArgs,
        servable: Servable,
        model: CompiledModel,
        run: Run,
        host_pool: Executor,
        admission: Admission,
        failure: Callable[[], str | None] = lambda: None,
        count: Callable[[str], None] = lambda what: None,
        is_idle: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(args, host_pool, admission, failure, count)
        self.servable = servable
        self._is_idle = is_idle
        self._light_preprocess = servable.is_light("preprocess", "check")
        self._light_postprocess = servable.is_light("postprocess")
        self._model = model
        self._run = run
        self._pins = model.device.type == "cuda"
        names = servable.input_names or forward_names(model.module, len(model.input_specs))
        self.inputs = name_tensors(names, model.input_specs, "input")
        self.outputs = name_tensors(servable.output_names or model.output_names, model.output_specs, "output")

    def report(self) -> dict[str, Any]:
        """Return the compile report of the replica that answers."""
        return self._model.report.to_dict()

    async def predict(self, payload: Any, timeout_s: float | None = None, held: Held | None = None) -> Any:
        """Preprocess one request, run it as one row, and postprocess its output."""
        async with Deadline(self._seconds(timeout_s), self._count) as deadline:
            with self.admission.hold_rows(1), self._held(held) as holding:
                holding.grow_to(size_of(payload))
                inputs = await self._read_on_host(self.servable.preprocess, payload)
                holding.add(size_of(inputs))
                tensors, rebuild = flatten(await self._run(inputs, 1, deadline))
                here = self._light_postprocess and size_of(tuple(tensors)) <= LIGHT_OUTPUT_BYTES
                answer = partial(self._postprocess, rebuild)
                return await self._on_host(answer, tensors, blame_request=False, here=here)

    async def infer(
        self, tensors: Mapping[str, Any], timeout_s: float | None = None, held: Held | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Run tensors as `run_tensors` does; arrays by name, bfloat16 as float32."""
        outputs = await self.run_tensors(tensors, timeout_s, held)
        return {name: to_numpy(tensor) for name, tensor in outputs.items()}

    async def run_tensors(
        self, tensors: Mapping[str, Any], timeout_s: float | None = None, held: Held | None = None
    ) -> dict[str, torch.Tensor]:
        """Run tensors that have the batch dimension; BadRequest where names, dtypes or shapes are not the model's."""
        inputs = self._check_tensors(tensors)
        self._check_values(inputs)
        size = measure(self._model.input_specs, inputs)
        if size is None:
            raise BadRequest("the inputs differ in their number of rows or their length, or have none")
        if size[0] > self.limits.rows:
            raise BadRequest(f"{size[0]} rows in one request; at most {self.limits.rows} are allowed (limits.rows)")
        async with Deadline(self._seconds(timeout_s), self._count) as deadline:
            with self.admission.hold_rows(size[0]), self._held(held) as holding:
                holding.add(size_of(inputs))
                output = await self._run(self._pin(inputs), size[0], deadline)
        return self._name_outputs(flatten(output)[0])

    async def run_payloads(
        self,
        payloads: Sequence[Any],
        timeout_s: float | None = None,
        held: Held | None = None,
        *,
        path: str,
        preprocess: Callable[[Any], Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Preprocess requests that came in one, run each as a row, and return the outputs of all, in their order.

        No more of them wait and run at a time than two of the largest buckets hold, or a quarter of the queue, so that
        a long list leaves room for others. The first that fails ends the others; a BadRequest says which one, below
        `path`.
        """
        if len(payloads) > self.limits.items:
            raise BadRequest(
                f"{path}: {len(payloads)} in one request; at most {self.limits.items} are allowed (limits.items)"
            )
        window = min(len(payloads), 2 * max(self.args.batching.batch_sizes), max(1, self.admission.max_rows // 4))
        gate = asyncio.Semaphore(window)
        async with Deadline(self._seconds(timeout_s), self._count) as deadline:
            with self.admission.hold_rows(window), self._held(held) as holding:

                async def run(index: int) -> Any:
                    async with gate:
                        try:
                            inputs = await self._read_on_host(preprocess or self.servable.preprocess, payloads[index])
                        except BadRequest as error:
                            raise BadRequest(f"{path}[{index}]: {error}") from error
                        with holding.more(size_of(inputs)):
                            found = flatten(await self._run(inputs, 1, deadline))[0]
                        holding.add(size_of(tuple(found)))
                        return found

                rows = await _gather([run(index) for index in range(len(payloads))])
        return self._name_outputs(self._join(rows))

    def _join(self, rows: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """Put the outputs of several runs of one row together."""
        dims = [spec.batch_dim for spec in self._model.output_specs] or [0] * len(rows[0])
        try:
            return [
                columns[0] if dim is None else torch.cat(columns, dim)
                for dim, columns in zip(dims, zip(*rows, strict=True), strict=True)
            ]
        except RuntimeError as error:  # outputs as long as their inputs
            raise BadRequest("the outputs of these differ in shape: send them one by one") from error

    def _name_outputs(self, found: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        names = [info.name for info in self.outputs] or [f"output_{i}" for i in range(len(found))]
        return dict(zip(names, found, strict=True))

    def _read(self, preprocess: Callable[[Any], Any], payload: Any) -> Inputs:
        inputs = self._add_batch_dim(preprocess(payload))
        self._check_values(inputs)
        return self._pin(inputs)

    def _check_values(self, inputs: Inputs) -> None:
        try:
            self.servable.check(inputs)
        except ValueError as error:
            raise BadRequest(str(error)) from error

    def _pin(self, inputs: Inputs) -> Inputs:
        """Put inputs for a GPU into pinned memory, from which the model thread can copy without waiting."""
        if not self._pins:
            return inputs
        try:
            return tuple(t.pin_memory() if t.device.type == "cpu" else t for t in inputs)
        except RuntimeError:
            # Of a device that is gone the model thread has to hear, by which the replica's health goes; a copy from
            # other memory is only slower.
            logger.warning("inputs cannot be put into pinned memory, and are not any more", exc_info=True)
            self._pins = False
            return inputs

    def _check_tensors(self, tensors: Mapping[str, Any]) -> Inputs:
        known = [info.name for info in self.inputs]
        unknown = [name for name in tensors if name not in known]
        missing = [name for name in known if name not in tensors]
        if unknown or missing:
            raise BadRequest(f"the inputs must be {', '.join(known)}; got {', '.join(map(str, tensors)) or 'none'}")
        inputs = []
        for info, spec in zip(self.inputs, self._model.input_specs, strict=True):
            value = tensors[info.name]
            tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.asarray(value, order="C"))
            if not spec.fits(tensor):
                raise misfit(info, info.shape, tensor)
            inputs.append(tensor)
        return tuple(inputs)

    def _add_batch_dim(self, row: Any) -> Inputs:
        """Check what preprocess made of a request, and give it the batch dimension."""
        items = row if isinstance(row, tuple) else (row,)
        specs = self._model.input_specs
        if len(items) != len(specs):
            raise BadRequest(f"the request became {len(items)} tensors, the model takes {len(specs)}")
        inputs = []
        for info, spec, item in zip(self.inputs, specs, items, strict=True):
            tensor = torch.as_tensor(item)
            batched = tensor if spec.batch_dim is None else tensor.unsqueeze(min(spec.batch_dim, tensor.dim()))
            if not spec.fits(batched):
                raise misfit(info, spec.row_shape(), tensor)
            inputs.append(batched)
        return tuple(inputs)

    def _postprocess(self, rebuild: Rebuild, tensors: list[torch.Tensor]) -> Any:
        specs = self._model.output_specs
        if specs:
            tensors = [
                t if spec.batch_dim is None else t.select(spec.batch_dim, 0)
                for t, spec in zip(tensors, specs, strict=True)
            ]
        return self.servable.postprocess(rebuild(tensors))

    async def _read_on_host(self, preprocess: Callable[[Any], Any], payload: Any) -> Inputs:
        """Turn a request into the model's inputs; at once where that is light, and keeps nobody else waiting."""
        light = self._light_preprocess and _is_short(payload)
        # Where requests wait for others the model stays idle meanwhile.
        here = light and not self.args.batching.wait_ms and self._is_idle()
        inputs: Inputs = await self._on_host(partial(self._read, preprocess), payload, blame_request=True, here=here)
        return inputs

    async def _on_host(self, work: Callable[[Any], Any], value: Any, *, blame_request: bool, here: bool) -> Any:
        """Run host work on the pool or `here`; errors are the request's where `blame_request`, else the servable's."""
        try:
            if here:
                return work(value)
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, value)
        except RequestError:
            raise
        except Exception as error:
            kind, message = describe(error)
            if blame_request and _comes_of_payload(error):
                where = "".join(traceback.format_tb(error.__traceback__))
                # Not the whole message, which may repeat megabytes of what the caller sent.
                logger.warning("preprocess failed on a request: %s: %.200s\n%s", kind, message, where)
                raise BadRequest(f"the request cannot be read: {kind}: {message}") from error
            logger.exception("the servable failed")
            raise ModelFailed(f"the servable failed: {kind}") from error


def _is_short(payload: Any) -> bool:
    """Return whether a payload is LIGHT_BYTES of bytes or text at most, by itself or in an object."""
    parts = [*payload, *payload.values()] if isinstance(payload, dict) and len(payload) <= 4 else [payload]
    size = 0
    for part in parts:
        if not isinstance(part, str | bytes | bytearray):
            return False
        size += len(part) * (4 if isinstance(part, str) and not part.isascii() else 1)  # at most, in UTF-8
    return size <= LIGHT_BYTES


def _comes_of_payload(error: Exception) -> bool:
    """Say whether an error of `preprocess` is the kind that unexpected payloads cause, rather than a broken server.

    Pillow's words for what is no image, or a damaged one, are OSErrors; other OSErrors come of a disk, or of a service
    that is away. A RuntimeError is a bug, though torch raises it for values that it cannot take as well: what
    `preprocess` knows to be the payload's fault it says by BadRequest.
    """
    if isinstance(error, OSError):
        return (type(error) is OSError and error.errno is None) or type(error).__module__.partition(".")[0] == "PIL"
    return isinstance(error, ValueError | TypeError | LookupError | ArithmeticError | AttributeError | struct.error)


async def _gather(calls: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Return the results of all calls; the first that raises, and a cancellation, ends the others."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
