"""`ModelService`: what every protocol asks of a model, without a word of any of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deployments.args import ModelArgs
from deployments.errors import BadRequest, ModelFailed, ModelNotFound, NotReady, RequestError, VersionNotFound
from deployments.servable import Servable, forward_names
from optim import CompiledModel
from optim.errors import describe
from optim.shapes import Inputs, TensorSpec, measure
from optim.tree import flatten

logger = logging.getLogger(__name__)
Run = Callable[[Inputs, int], Awaitable[Any]]


@dataclass(frozen=True)
class TensorInfo:
    """A named input or output: dtype and shape, -1 for free dimensions."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class ModelService:
    """Looks up, checks, and runs; all methods belong to the event loop, host work goes to a pool."""

    def __init__(
        self,
        args: ModelArgs,
        servable: Servable,
        model: CompiledModel,
        run: Run,
        host_pool: Executor,
        failure: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.args = args
        self.name = args.name or ""
        self.version = args.version
        self._servable = servable
        self._model = model
        self._run = run
        self._pool = host_pool
        #: Says why the model cannot answer any more, or None.
        self.failure = failure
        names = servable.input_names or forward_names(model.module, len(model.input_specs))
        self.inputs = _infos(names, model.input_specs, "input")
        self.outputs = _infos(servable.output_names or model.output_names, model.output_specs, "output")

    def check_model(self, name: str, version: str | None = None) -> None:
        """Raise ModelNotFound or VersionNotFound where this is not the model asked for."""
        if name != self.name:
            raise ModelNotFound(f"Model not found: {name}")
        if version is not None and version != self.version:
            raise VersionNotFound(f"Model version: {version} does not exist for model: {name}")

    def check_ready(self) -> None:
        """Raise NotReady where the model cannot answer any more."""
        failure = self.failure()
        if failure is not None:
            raise NotReady(failure)

    def report(self) -> dict[str, Any]:
        """Return the compile report of the replica that answers."""
        return self._model.report.to_dict()

    async def predict(self, payload: Any) -> Any:
        """Preprocess one request, run it as one row, and postprocess its output."""
        row = await self._on_host(self._servable.preprocess, payload, blame_request=True)
        inputs = self._add_batch_dim(row)
        output = await self._run(inputs, 1)
        return await self._on_host(self._postprocess, output, blame_request=False)

    async def infer(self, tensors: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Run tensors that have the batch dimension; BadRequest where names, dtypes or shapes are not the model's."""
        inputs = self._check_tensors(tensors)
        size = measure(self._model.input_specs, inputs)
        if size is None:
            raise BadRequest("the inputs differ in their number of rows or their length, or have none")
        if size[0] > self.args.limits.rows:
            raise BadRequest(f"{size[0]} rows in one request; at most {self.args.limits.rows} are allowed")
        output = await self._run(inputs, size[0])
        found, _ = flatten(output)
        names = [info.name for info in self.outputs] or [f"output_{i}" for i in range(len(found))]
        return {name: _to_numpy(tensor) for name, tensor in zip(names, found, strict=True)}

    def _check_tensors(self, tensors: Mapping[str, Any]) -> Inputs:
        known = [info.name for info in self.inputs]
        unknown = [name for name in tensors if name not in known]
        missing = [name for name in known if name not in tensors]
        if unknown or missing:
            raise BadRequest(f"the inputs must be {', '.join(known)}; got {', '.join(map(str, tensors)) or 'none'}")
        inputs = []
        for info, spec in zip(self.inputs, self._model.input_specs, strict=True):
            value = tensors[info.name]
            tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
            if not spec.fits(tensor):
                raise _misfit(info, info.shape, tensor)
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
                raise _misfit(info, spec.row_shape(), tensor)
            inputs.append(batched)
        return tuple(inputs)

    def _postprocess(self, output: Any) -> Any:
        tensors, rebuild = flatten(output)
        specs = self._model.output_specs
        if specs:
            tensors = [
                t if spec.batch_dim is None else t.select(spec.batch_dim, 0)
                for t, spec in zip(tensors, specs, strict=True)
            ]
        return self._servable.postprocess(rebuild(tensors))

    async def _on_host(self, work: Callable[[Any], Any], value: Any, *, blame_request: bool) -> Any:
        """Run host work on the pool; an error is the request's where `blame_request`, else the servable's."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, value)
        except RequestError:
            raise
        except Exception as error:
            kind, message = describe(error)
            if blame_request and isinstance(error, ValueError | TypeError | KeyError):
                raise BadRequest(f"the request cannot be read: {kind}: {message}") from error
            logger.exception("the servable failed")
            raise ModelFailed(f"the servable failed: {kind}") from error


def _misfit(info: TensorInfo, shape: tuple[int, ...], tensor: torch.Tensor) -> BadRequest:
    expected = f"{_short(info.dtype)} {list(shape)}"
    return BadRequest(f"input {info.name}: expected {expected}, got {_short(tensor.dtype)} {list(tensor.shape)}")


def _infos(names: Any, specs: tuple[TensorSpec, ...], kind: str) -> tuple[TensorInfo, ...]:
    given = list(names or [])
    if len(given) != len(specs):
        given = [f"{kind}_{i}" for i in range(len(specs))]
    return tuple(TensorInfo(name, spec.dtype, spec.shape) for name, spec in zip(given, specs, strict=True))


def _to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
