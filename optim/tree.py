"""Taking a module's outputs apart into tensors and putting them together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Rebuild = Callable[[Sequence[torch.Tensor]], Any]


def flatten(value: Any) -> tuple[list[torch.Tensor], Rebuild]:
    """Return the tensors of a nested output, and the function that rebuilds it from others in their place.

    Knows tensors, tuples (named or not), lists, mappings and dataclasses; anything else is kept as a constant.
    Raises TypeError for an object that holds tensors in a way it does not know.
    """
    tensors: list[torch.Tensor] = []
    rebuild = _walk(value, tensors, "output")
    return tensors, rebuild


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a nested output."""
    return flatten(value)[0]


def _walk(value: Any, tensors: list[torch.Tensor], path: str) -> Rebuild:
    if isinstance(value, torch.Tensor):
        index = len(tensors)
        tensors.append(value)
        return lambda given: given[index]
    if isinstance(value, Mapping):
        parts = {key: _walk(item, tensors, f"{path}[{key!r}]") for key, item in value.items()}
        return _mapping_rebuild(type(value), parts)
    if isinstance(value, tuple | list):
        kids = [_walk(item, tensors, f"{path}[{i}]") for i, item in enumerate(value)]
        make = type(value)
        if hasattr(make, "_fields"):  # a named tuple takes its fields one by one
            return lambda given: make(*(kid(given) for kid in kids))
        return lambda given: make(kid(given) for kid in kids)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        fields = {name: _walk(getattr(value, name), tensors, f"{path}.{name}") for name in names}
        build = type(value)
        return lambda given: build(**{name: field(given) for name, field in fields.items()})
    if isinstance(value, type(None) | bool | int | float | complex | str | bytes):
        return lambda given: value
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise TypeError(
        f"{path} is a {kind}, which cannot be taken apart; return tensors in tuples, lists, mappings or dataclasses "
        "(transformers: use_cache=False)"
    )


def _mapping_rebuild(kind: type[Any], parts: dict[Any, Rebuild]) -> Rebuild:
    def rebuild(given: Sequence[torch.Tensor]) -> Any:
        items = {key: part(given) for key, part in parts.items()}
        # transformers' ModelOutput is a mapping and a dataclass: only keywords set both sides of it.
        return kind(**items) if dataclasses.is_dataclass(kind) else kind(items)

    return rebuild
