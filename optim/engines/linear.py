"""Linear layers, for the variants of Inductor that multiply in another way: modules with them replaced."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection

import torch
from torch import nn

from optim.engines.base import EngineJob, Unavailable

#: Of a module's parameters, without tables that are only looked up in, the share that must be linear layers' weights
#: for it to be worth an engine of its own.
_LEAST_SHARE = 0.5


def require_linear(job: EngineJob, dtypes: Collection[torch.dtype], what: str) -> None:
    """Raise Unavailable where most parameters are not linear layers' weights, which `what`."""
    if job.info.device.type != "cpu":
        raise Unavailable("its linear layers are made for a CPU only")
    weights = {id(linear.weight): linear.weight.numel() for linear in _layers(job.module, dtypes).values()}
    tables = {id(found.weight) for found in job.module.modules() if isinstance(found, nn.Embedding)} - {*weights}
    total = sum(parameter.numel() for parameter in job.module.parameters() if id(parameter) not in tables)
    if sum(weights.values()) < _LEAST_SHARE * max(total, 1):
        raise Unavailable(f"most of its parameters are not the weights of linear layers that {what}")


def replace_linear(
    module: nn.Module, dtypes: Collection[torch.dtype], make: Callable[[nn.Linear], nn.Module]
) -> nn.Module:
    """Return a copy of the module whose linear layers are replaced; parameters and buffers are the module's own."""
    own = itertools.chain(module.parameters(), module.buffers())
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in own})
    for name, linear in _layers(copied, dtypes).items():
        parent, _, child = name.rpartition(".")
        if not child:
            return make(linear)
        setattr(copied.get_submodule(parent), child, make(linear))
    return copied


def _layers(module: nn.Module, dtypes: Collection[torch.dtype]) -> dict[str, nn.Linear]:
    """Return the layers to replace, by name: nothing but linear layers, of these dtypes."""
    return {
        name: found
        for name, found in module.named_modules(remove_duplicate=False)
        if type(found) is nn.Linear and found.weight.dtype in dtypes and not _is_changed(found)
    }


def _is_changed(linear: nn.Linear) -> bool:
    """Return whether a layer may compute something else than its class does."""
    return bool("forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks)
