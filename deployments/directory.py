"""`Directory`: which models a gateway can ask, as Ray Serve's controller has it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, DeploymentStatusOverview

from deployments.errors import ModelNotFound, NotReady

logger = logging.getLogger(__name__)
#: How old the list of models may be before it is looked up again, in seconds.
_FRESH_S = 2.0
#: How long the first request may wait for that list, in seconds.
_PATIENCE_S = 10.0
#: Replicas in these states do not answer; others do, or will in a moment. (Ray's own enums of states are text, too.)
_SILENT = ("STARTING", "STOPPING", "STOPPED")
State = Literal["running", "asleep", "waiting"]


@dataclass(frozen=True)
class Sight:
    """What one look at Ray Serve's applications has found."""

    #: Models that can be asked, by name.
    found: dict[str, DeploymentHandle[Any]] = field(default_factory=dict)
    #: Those of them that have a replica; for the others Ray Serve starts one when they are asked.
    running: set[str] = field(default_factory=set)
    #: What keeps models from answering at once, by model; by application where its models are not known.
    waiting: dict[str, str] = field(default_factory=dict)
    #: What is said of applications that may have models whose names are not known yet.
    unnamed: list[str] = field(default_factory=list)


class Directory:
    """Which models there are, by name, with a handle to each; belongs to the event loop.

    It is looked up again beside the requests, which meanwhile go by what was found before: Ray Serve's controller may
    be away, and while it builds a new version of an application it does not know what that one has.
    """

    def __init__(self, applications: list[str] | None, own: str) -> None:
        self._applications = applications
        self._own = own
        self._sight = Sight()
        self._handles: dict[tuple[str, str], DeploymentHandle[Any]] = {}
        #: By application: how each of its models was when Ray Serve last named them.
        self._states: dict[str, dict[str, State]] = {}
        self._looked = -math.inf
        self._looking: asyncio.Task[None] | None = None

    async def running(self) -> list[DeploymentHandle[Any]]:
        """Return the models that answer at once: to ask those that sleep would wake them."""
        sight = await self._see()
        return [handle for model, handle in sight.found.items() if model in sight.running]

    async def find(self, model: str) -> DeploymentHandle[Any]:
        """Return a model's handle; ModelNotFound, or NotReady where it should have a replica, or may come yet."""
        sight = await self._see()
        if model in sight.found:
            return sight.found[model]
        if model in sight.waiting:
            raise NotReady(f"model {model} is not ready: {sight.waiting[model]}")
        if sight.unnamed:
            raise NotReady(f"model {model} is not ready: {'; '.join(sight.unnamed)}")
        raise ModelNotFound(f"Model not found: {model}")

    async def check_ready(self) -> None:
        """Raise NotReady where a model that should have a replica has none, or an application no model."""
        waiting = (await self._see()).waiting
        if waiting:
            raise NotReady(f"not ready: {'; '.join(waiting.values())}")

    async def _see(self) -> Sight:
        """Return what was found last; NotReady where the models could not be looked up yet."""
        if time.monotonic() - self._looked > _FRESH_S and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._look_up())
        if self._looked == -math.inf and self._looking is not None:
            await asyncio.wait([self._looking], timeout=_PATIENCE_S)
            if self._looked == -math.inf:
                raise NotReady("Ray Serve has not yet said which models there are")
        return self._sight

    async def _look_up(self) -> None:
        try:
            self._sight = await asyncio.to_thread(self._look)
        except Exception:  # whatever keeps the controller from answering
            logger.exception("the models could not be looked up; those found before stay")
        else:
            self._looked = time.monotonic()

    def _look(self) -> Sight:
        sight, applications = Sight(), serve.status().applications
        live = {name: found for name, found in applications.items() if found.status != ApplicationStatus.DELETING}
        self._states = {name: states for name, states in self._states.items() if name in live}
        for name in sorted({*(live if self._applications is None else self._applications)} - {self._own}):
            application = live.get(name)
            why = f"application {name} is {application.status.value if application else 'not deployed'}"
            if application and application.deployments:
                before = self._states.get(name, {})
                self._states[name] = {m: _state(found, before.get(m)) for m, found in application.deployments.items()}
            else:  # a version is being built, or could not be: the one before goes on serving
                if application is None or application.status != ApplicationStatus.DEPLOY_FAILED:
                    sight.unnamed.append(why)
            states = self._states.get(name, {})
            if not states:
                sight.waiting[name] = why
            for model, state in states.items():
                if state == "waiting":
                    sight.waiting[model] = f"{why}, and no replica of {model} is running"
                    continue
                if model in sight.found:
                    other = sight.found[model].deployment_id.app_name
                    logger.warning("applications %s and %s both have a model %s: the first answers", other, name, model)
                    continue
                if (name, model) not in self._handles:
                    self._handles[name, model] = serve.get_deployment_handle(model, name)
                sight.found[model] = self._handles[name, model]
                if state == "running":
                    sight.running.add(model)
        return sight


def _state(deployment: DeploymentStatusOverview, before: State | None) -> State:
    """Return whether a deployment has a replica, or gets one when it is asked, or is only waited for."""
    counts: dict[Any, int] = dict(deployment.replica_states)
    status: str = deployment.status
    if any(count for state, count in counts.items() if state not in _SILENT):
        return "running"
    if status in ("HEALTHY", "DOWNSCALING") and not counts.get("STARTING"):
        return "asleep"  # as many as there should be: autoscaling has brought it to zero, or is about to
    waking = before == "asleep" and status == "UPSCALING"
    return "asleep" if waking else "waiting"  # what is deployed, or was lost, comes no sooner when it is asked
