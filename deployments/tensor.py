"""`TensorModel`: any module served without writing Python, tensors in and tensors out."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deployments.errors import BadRequest
from deployments.model_files import find_mistake
from deployments.servable import Servable, forward_names
from deployments.tensor_info import check_range
from optim.errors import ConfigError
from optim.shapes import Inputs
from optim.strict import read_section

_SOURCES = ("module", "archive", "torchscript")


@dataclass(frozen=True, kw_only=True)
class TensorInput:
    """One input of the module: what a row of it looks like."""

    shape: list[int]
    """Sizes of one row, without the batch dimension; -1 for the length (needs `batching.lengths`)."""
    dtype: str = "float32"
    """Any torch dtype by name. Default float32."""
    name: str | None = None
    """Name in the tensor protocols; default the name that the module's forward gives it."""
    low: float = 0.0
    """Least value of examples. Default 0."""
    high: float | None = None
    """Upper bound of the values of examples. Default 1, whole numbers 2 (or `vocabulary`)."""
    vocabulary: int | None = None
    """How many token ids there are: others than 0 to one below it are refused. Default no limit."""


class TensorModel(Servable):
    """Serves an `nn.Module` from a factory, a torch.export archive (.pt2), or a TorchScript file.

    Exactly one of `module` (`package.module:factory`, called with `module_args`), `archive` and `torchscript` (paths
    of files; both hold code, so name only files you trust). `inputs` describes the rows; an archive may bring its
    own. Over /predictions a request is one row: a nested list, or an object of them by input name.
    """

    light_postprocess = True

    def __init__(
        self,
        module: str | None = None,
        module_args: Mapping[str, Any] | None = None,
        archive: str | None = None,
        torchscript: str | None = None,
        inputs: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        sources = dict(zip(_SOURCES, (module, archive, torchscript), strict=True))
        named = [key for key, value in sources.items() if value is not None]
        if len(named) != 1:
            raise ConfigError("model_args", sources, f"name exactly one of {', '.join(_SOURCES)}")
        self._source = named[0]
        self._module, self._module_args = module, dict(module_args or {})
        self._path = Path(archive or torchscript or "")
        if self._source == "module":
            _find_factory(str(module))
        elif not self._path.is_file():
            raise ConfigError(f"model_args.{self._source}", str(self._path), "name a file that exists on this machine")
        elif (mistake := find_mistake(self._source, self._path)) is not None:
            raise ConfigError(f"model_args.{self._source}", str(self._path), mistake)
        self._inputs = tuple(
            read_section(f"model_args.inputs[{i}]", given, TensorInput) for i, given in enumerate(inputs or ())
        )
        for i, given in enumerate(self._inputs):
            _check_input(f"model_args.inputs[{i}]", given)
        if not self._inputs and self._source != "archive":
            raise ConfigError(
                "model_args.inputs", inputs, "describe at least one input, such as {shape: [3, 224, 224]}"
            )
        names = [given.name for given in self._inputs]
        if names and None not in names:
            self.input_names = [str(name) for name in names]

    def load(self) -> nn.Module:
        """Build the module, or read its file."""
        module = self._build()
        if self.input_names is None:
            self.input_names = forward_names(module, len(self._inputs)) or None
        return module

    def _build(self) -> nn.Module:
        if self._source == "module":
            built = _find_factory(str(self._module))(**self._module_args)
            if not isinstance(built, nn.Module):
                raise TypeError(f"{self._module} returned a {type(built).__name__}, not an nn.Module")
            return built.eval()
        if self._source == "torchscript":
            return torch.jit.load(self._path, map_location="cpu").eval()  # type: ignore[no-any-return]
        exported = torch.export.load(self._path)
        if not self._inputs:
            self._inputs = _inputs_of(exported)
        return exported.module()

    def example(self, batch_size: int, length: int | None) -> Inputs:
        """Return random values in the declared ranges, the same for the same sizes."""
        generator = torch.Generator().manual_seed(batch_size * 100_003 + (length or 0))
        return tuple(self._example_of(given, batch_size, length, generator) for given in self._inputs)

    @staticmethod
    def _example_of(given: TensorInput, rows: int, length: int | None, generator: torch.Generator) -> torch.Tensor:
        if -1 in given.shape and length is None:
            raise ConfigError("batching.lengths", None, f"the input shape {given.shape} has a length: declare lengths")
        shape = (rows, *(length or 0 if size == -1 else size for size in given.shape))
        dtype = _find_dtype("dtype", given.dtype)
        unit = torch.rand(shape, generator=generator)
        high = given.high if given.high is not None else given.vocabulary or 1.0
        if dtype.is_floating_point:
            return (given.low + unit * (high - given.low)).to(dtype)
        if given.vocabulary is None:
            high = max(high, given.low + (2 if given.high is None else 1))
        # The sum may be rounded up to `high`.
        return (given.low + unit * (high - given.low)).floor().clamp(max=high - 1).to(dtype)

    def check(self, inputs: Inputs) -> None:
        """Raise BadRequest for token ids beyond a vocabulary that is declared."""
        for index, (given, tensor) in enumerate(zip(self._inputs, inputs, strict=True)):
            if given.vocabulary is not None:
                name = self.input_names[index] if self.input_names else f"input_{index}"
                check_range(name, tensor, 0, given.vocabulary)

    def preprocess(self, payload: Any) -> Inputs:
        """Turn one row, as a list, an array or an object by input name, into tensors of the declared dtypes."""
        values = self._values(payload)
        if len(values) != len(self._inputs):
            raise BadRequest(f"the model takes {len(self._inputs)} inputs, the request has {len(values)}")
        return tuple(
            _to_tensor(value, _find_dtype("dtype", given.dtype))
            for value, given in zip(values, self._inputs, strict=True)
        )

    def _values(self, payload: Any) -> list[Any]:
        if isinstance(payload, Mapping):
            names = list(self.input_names or [f"input_{i}" for i in range(len(self._inputs))])
            if set(payload) != set(names):
                raise BadRequest(f"the inputs must be {', '.join(names)}; got {', '.join(map(str, payload)) or 'none'}")
            return [payload[name] for name in names]
        if isinstance(payload, tuple):
            return list(payload)
        if isinstance(payload, list | np.ndarray | torch.Tensor | int | float | bool):
            return [payload]
        raise BadRequest("send JSON (Content-Type: application/json): one row as a nested list, or an object by input")


def _to_tensor(value: Any, dtype: torch.dtype) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise BadRequest(f"not a tensor: {error}") from error
    if not torch.can_cast(tensor.dtype, dtype):
        raise BadRequest(f"{str(tensor.dtype).removeprefix('torch.')} values cannot become {dtype}")
    return tensor.to(dtype)


def _check_input(path: str, given: TensorInput) -> None:
    """Raise ConfigError for a dtype that is none, and for examples that would not be within the vocabulary."""
    dtype = _find_dtype(f"{path}.dtype", given.dtype)
    if given.vocabulary is None:
        return
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ConfigError(f"{path}.vocabulary", given.vocabulary, f"{given.dtype} has none; use int64, or another int")
    most = torch.iinfo(dtype).max + 1
    if not 1 <= given.vocabulary <= most:
        raise ConfigError(f"{path}.vocabulary", given.vocabulary, f"use 1 to {most}, as many as {given.dtype} has")
    high = given.vocabulary if given.high is None else given.high
    if not (0 <= given.low <= high - 1 and high <= given.vocabulary):
        allowed = f"use 0 <= low < high <= {given.vocabulary} (vocabulary), or leave both out"
        raise ConfigError(path, {"low": given.low, "high": given.high}, allowed)


def _find_dtype(key: str, name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(key, name, "use a torch dtype such as float32 or int64")
    return dtype


def _find_factory(path: str) -> Any:
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ConfigError("model_args.module", path, "use package.module:factory")
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError("model_args.module", path, f"it cannot be imported: {error}") from error
    if not callable(factory):
        raise ConfigError("model_args.module", path, "name a class or a function that returns an nn.Module")
    return factory


def _inputs_of(exported: torch.export.ExportedProgram) -> tuple[TensorInput, ...]:
    """Return the inputs of an archive, from the example that it was exported with."""
    if exported.example_inputs is None or exported.example_inputs[1]:
        raise ConfigError("model_args.inputs", None, "the archive has no positional example inputs: describe them")
    inputs = []
    for tensor in exported.example_inputs[0]:
        dtype = str(tensor.dtype).removeprefix("torch.")
        high = float(tensor.max()) if tensor.numel() else 1.0
        low = float(tensor.min()) if tensor.numel() else 0.0
        inputs.append(TensorInput(shape=list(tensor.shape[1:]), dtype=dtype, low=low, high=max(high, low + 1.0)))
    return tuple(inputs)
