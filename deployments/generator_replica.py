"""`GeneratorReplica`: a replica of a model that generates text, for many callers at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from ray import serve

from deployments.admission import size_of
from deployments.compile import compile_generator, slots_of
from deployments.completion_replies import ChatReply, CompletionReply, Reply
from deployments.completions import read_chat, read_completion
from deployments.generate import TextGenerator
from deployments.generation_service import GenerationService
from deployments.generator_thread import GeneratorThread
from deployments.replica import Replica
from optim import CompiledModel
from optim.report import CompileReport


@serve.ingress()
class GeneratorReplica(Replica):
    """A replica of a text generator. Over a handle: `predict`, `report`, and the streams `complete` and `chat`."""

    _service: GenerationService
    _models: Mapping[str, CompiledModel]
    _generating: GeneratorThread

    def _make_model(self) -> None:
        model = self._args.make_model()
        assert isinstance(model, TextGenerator)
        self._generator = model

    def _load(self, device: str, threads: int) -> None:
        self._models = compile_generator(self._generator, self._args, device, threads, [self._share])
        slots = slots_of(self._models, self._generator, self._args)
        # The service is made when all is loaded.
        self._generating = GeneratorThread(self._thread, slots, lambda *what: self._service.deliver(*what))

    def _make_service(self) -> GenerationService:
        return GenerationService(
            self._args,
            self._generator,
            self._models,
            self._generating.add,
            self._host_pool,
            self._admission,
            lambda: self._thread.failure,
            self._metrics.count,
            self._metrics.record_step,
            self._metrics.record_first_token,
        )

    def _reports(self) -> Mapping[str, CompileReport]:
        return {name: model.report for name, model in self._models.items()}

    def _seconds_to_drain(self, rows: int) -> int:
        return self._service.seconds_to_drain(rows)

    async def complete(self, request: dict[str, Any], timeout_s: float | None = None) -> AsyncIterator[dict[str, Any]]:
        """Answer what /v1/completions takes, `model` left out, by the events of its stream; call with `stream=True`."""
        with self._service.admission.hold_bytes(size_of(request)):
            async for event in self._stream(CompletionReply(self._service, read_completion(request)), timeout_s):
                yield event

    async def chat(self, request: dict[str, Any], timeout_s: float | None = None) -> AsyncIterator[dict[str, Any]]:
        """Answer what /v1/chat/completions takes; as `complete`."""
        with self._service.admission.hold_bytes(size_of(request)):
            async for event in self._stream(ChatReply(self._service, read_chat(request)), timeout_s):
                yield event

    async def _stream(self, reply: Reply, timeout_s: float | None) -> AsyncIterator[dict[str, Any]]:
        deadline = self._service.deadline(timeout_s)
        with await self._service.start(reply.wanted) as answers:
            async for event in reply.events(answers, deadline):
                yield event
