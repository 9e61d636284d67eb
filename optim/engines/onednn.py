"""Inductor with the products of linear layers by oneDNN, whose packed weights all buckets and functions share.

Frozen Inductor packs float32 weights for MKL, which on CPUs that are not Intel's is slow for few rows (on an AMD EPYC
with AVX2 and 2 threads, an 88M decoder's products took 51 ms for 8 rows against oneDNN's 17); it holds a packed copy
for each bucket, and torch's caches do not keep its code. oneDNN's packing depends on neither rows nor bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from weakref import WeakValueDictionary

import torch
from torch import nn

from optim.engines.base import EngineJob, Unavailable
from optim.engines.inductor import TorchCompileEngine
from optim.engines.linear import replace_linear, require_linear

_Place = tuple[int, torch.Size, tuple[int, ...]]


@dataclass(eq=False)
class _Packed:
    """oneDNN's copy of a weight, as it was at some version of it.

    Layers of one place have one of these, so that what is packed anew is so for all of them. Changes that torch does
    not count (of `weight.data`, or of what was made in inference mode) go unseen, as with frozen weights.
    """

    weight: torch.Tensor
    version: int
    tensor: torch.Tensor

    def is_of(self, place: _Place) -> bool:
        """Return whether it is what lies at a place now: the weight may have been changed, or moved since."""
        return _place(self.weight) == place and _version(self.weight) == self.version


#: By the weight's place in memory, which is what a graph is called with; they live as long as a layer that uses them.
_packed: WeakValueDictionary[_Place, _Packed] = WeakValueDictionary()


class OneDnnEngine(TorchCompileEngine):
    """Compiles with Inductor what is between linear layers, which are oneDNN's; nothing is frozen."""

    def __init__(self, job: EngineJob) -> None:
        super().__init__(job, name="inductor-onednn", freeze=False, prepare=_pack)

    def preflight(self) -> None:
        """Refuse modules for which it is not worth it, and precisions that oneDNN's packed products do not have."""
        super().preflight()
        if not torch.backends.mkldnn.is_available():
            raise Unavailable("this torch has no oneDNN")
        if self.job.autocast:
            raise Unavailable("under autocast `inductor` has oneDNN multiply anyway")
        require_linear(self.job, _dtypes(), "oneDNN packs")
        _define_operator()


class _PackedLinear(nn.Module):
    """A linear layer by way of the packed copy of its weight, which a graph sees as the weight itself."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packed = _pack_weight(linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.pt2_optim.packed_linear(x, self.weight, self.bias)
        return found


def _dtypes() -> set[torch.dtype]:
    """Return what oneDNN multiplies here."""
    bfloat16 = {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    return {torch.float32, *bfloat16}


def _pack(job: EngineJob) -> nn.Module:
    return replace_linear(job.module, _dtypes(), _PackedLinear)


def _pack_weight(weight: torch.Tensor) -> _Packed:
    """Return the packed copy of a weight: another engine's, where there is one of what it is now."""
    place = _place(weight)
    found = _packed.get(place)
    if found is not None and found.weight is weight and found.is_of(place):
        return found
    tensor = _reorder(weight)
    if found is None:
        found = _packed[place] = _Packed(weight, _version(weight), tensor)
    else:
        found.weight, found.version, found.tensor = weight, _version(weight), tensor
    return found


def _reorder(weight: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return found


def _place(weight: torch.Tensor) -> _Place:
    return weight.data_ptr(), weight.shape, weight.stride()


def _version(weight: torch.Tensor) -> int:
    """Return how often a weight was changed in place; those made in inference mode do not count it."""
    return -1 if weight.is_inference() else weight._version


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    place = _place(weight)
    packed = _packed.get(place)
    if packed is None or not packed.is_of(place):
        raise RuntimeError("the weight of a linear layer was changed or moved after it was packed")
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed.tensor, bias, "none", [], "")
    return found


def _shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@cache
def _define_operator() -> torch.library.Library:
    """Tell torch of `packed_linear`, once; its implementation lives as long as the library that is returned."""
    library = torch.library.Library("pt2_optim", "DEF")
    library.define("packed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    library.impl("packed_linear", _multiply, "CPU")
    torch.library.register_fake("pt2_optim::packed_linear", _shape, lib=library)
    return library
