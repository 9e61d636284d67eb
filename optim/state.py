"""What calls of a module change: buffers that are declared as its state, such as a static cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from optim.errors import ConfigError
from optim.verify import Difference, Mismatch, compare


class State:
    """The declared state of a module.

    A call reads and writes it in place; made again with the same inputs, it must change nothing more. So a start only
    has to be the same for eager and for what is held against it, and its values must be such as no compiler can have
    seen: code that took the state for a constant, or does not write it, is then found to be wrong.
    """

    def __init__(self, module: nn.Module, names: Sequence[str] = ()) -> None:
        buffers = dict(module.named_buffers())
        for name in names:
            if name not in buffers:
                raise ConfigError("state", name, f"name buffers of the module: {', '.join(buffers) or 'it has none'}")
        self.names = tuple(names)
        self._tensors = [buffers[name] for name in names]
        device = self._tensors[0].device if self._tensors else "cpu"
        self._generator = torch.Generator(device).manual_seed(0)

    def __bool__(self) -> bool:
        return bool(self.names)

    def fill(self) -> None:
        """Put values of about 1 everywhere, others at each call."""
        for tensor in self._tensors:
            tensor.normal_(generator=self._generator)

    def clear(self) -> None:
        """Put zeros everywhere."""
        for tensor in self._tensors:
            tensor.zero_()

    def take(self) -> list[torch.Tensor]:
        """Return a copy of it."""
        return [tensor.clone() for tensor in self._tensors]

    def put(self, values: Sequence[torch.Tensor]) -> None:
        """Set it to what `take` returned, in place."""
        for tensor, value in zip(self._tensors, values, strict=True):
            tensor.copy_(value)

    def compare(
        self,
        start: Sequence[torch.Tensor],
        expected: Sequence[torch.Tensor],
        tolerance: float | None,
        exact: Callable[[], Sequence[torch.Tensor] | None] = lambda: None,
    ) -> Difference:
        """Hold it against what `take` returned after eager's call, `start` being what it was before; else Mismatch.

        Only what either call changed is compared: of a large cache that is little, and the rest would hide it in an
        RMS of all. `exact` computes what it should be in a wider dtype, as `verify.compare` asks for it.
        """
        found = Difference()
        values = zip(self.names, self._tensors, start, expected, strict=True)
        for index, (name, tensor, before, value) in enumerate(values):
            changed = (tensor != before) | (value != before)
            truth = partial(_pick, exact, index, changed)
            try:
                found = found.worst(compare(tensor[changed], value[changed], tolerance, truth))
            except Mismatch as error:
                message = f"the state {name} is another than after eager's call: {error}"
                raise Mismatch(message, undecided=error.undecided) from error
        return found


def _pick(exact: Callable[[], Sequence[torch.Tensor] | None], index: int, changed: torch.Tensor) -> torch.Tensor | None:
    found = exact()
    return None if found is None else found[index][changed]
