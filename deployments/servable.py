"""`Servable`: the small interface a user implements to serve a model; `Model` is what all kinds of them share."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deployments.errors import BadRequest
from optim.shapes import Inputs


class Model(ABC):  # noqa: B024 (its kinds differ in all that they do)
    """What `model` in the configuration may name: a `Servable`, or a `TextGenerator` (`deployments.generate`).

    `model_args` of the configuration are the constructor's keywords. The constructor also runs where the
    configuration is checked, so it should look at its arguments and load nothing; raise ValueError for a bad one.
    """

    #: Lengths of the buckets where the configuration names none; None where the inputs do not vary in length.
    default_lengths: Sequence[int] | None = None

    def check_args(self, args: Any) -> None:  # noqa: B027 (most take all that there is)
        """Raise ConfigError for what this kind of model cannot do of otherwise right `args` (a ModelArgs)."""


class Servable(Model):
    """A model as a service: how it is loaded, what a request becomes, what the reply is.

    `load` and `example` run on the replica's model thread, `preprocess` and `postprocess` on other threads (or, where
    they are light, on the event loop's), several at a time: they must not change the servable.
    """

    #: Whether `preprocess` of up to 2 KiB of bytes or text, and `postprocess` of up to 16 KiB of output, take a part of
    #: a millisecond. To have another thread do it takes 0.2 ms each (MiniLM, one client, EPYC with AVX-512; issue 4):
    #: so such a reply is made on the event loop, and such a request read there while the model is idle. What takes
    #: longer keeps all other requests from being answered. A class that has a method of its own says it for itself.
    light_preprocess = False
    light_postprocess = False

    #: Names of the inputs and outputs for tensor protocols; None takes them from the module.
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None

    def is_light(self, *methods: str) -> bool:
        """Return whether the first of these is said to be light, by who has the last word on any of them, or later."""
        said = f"light_{methods[0]}"
        for kind in (self, *type(self).__mro__):
            if said in vars(kind):
                return bool(getattr(self, said))
            if any(method in vars(kind) for method in methods):
                return False
        return False

    @abstractmethod
    def load(self) -> nn.Module:
        """Return the module with its weights, on the CPU and in eval mode."""

    @abstractmethod
    def example(self, batch_size: int, length: int | None) -> Inputs:
        """Return the module's inputs as a batch of requests would make them; warm-up and verification use them."""

    def preprocess(self, payload: Any) -> Inputs:
        """Turn one request into the module's inputs, without the batch dimension.

        `payload` is bytes, text or decoded JSON over HTTP, and whatever the caller passed over a handle. Raise
        BadRequest (or ValueError) for a payload that cannot be understood. By default tensors and arrays are taken.
        """
        items = payload if isinstance(payload, tuple) else (payload,)
        try:
            return tuple(torch.as_tensor(item) for item in items)
        except RuntimeError as error:  # objects, null, numbers beyond 64 bits
            raise BadRequest(f"not a tensor: {error}") from error

    def check(self, inputs: Inputs) -> None:
        """Raise BadRequest for tensors of the right dtypes and shapes, with the batch dimension, that must not be run.

        Such as token ids beyond the vocabulary: compiled code reads past the table's end, answers something, or ends
        the process. Requests of every kind are checked, those of the tensor protocols and what `preprocess` made.
        """

    def postprocess(self, output: Any) -> Any:
        """Turn the module's output for one request (without the batch dimension) into the reply.

        The reply is JSON-ready data, text or bytes. By default tensors become nested lists.
        """
        from optim.tree import flatten

        tensors, rebuild = flatten(output)
        lists: list[Any] = [t.tolist() for t in tensors]
        return rebuild(lists)


class Encoder(Servable):
    """A servable whose first output is one embedding a request, [D]: what /v1/embeddings asks for."""

    @abstractmethod
    def read_tokens(self, tokens: Sequence[int]) -> Inputs:
        """Turn token ids of the model's own tokenizer into its inputs, as `preprocess` does for a text."""

    def count_tokens(self, inputs: Inputs) -> int:
        """Return how many tokens a request's inputs have; by default the length of the first."""
        return len(inputs[0])


def forward_names(module: nn.Module, count: int) -> list[str]:
    """Return the names of the module's first `count` positional inputs, or none where its signature does not tell."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # TorchScript and other callables without a signature
        return []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    return names if len(names) == count else []
