"""Which start comes first: that of a replica whose model nothing serves any more.

Other starts give way to what serves (`priority`). Beside another model under load, the replacement of the only replica
of a model would then get a tenth of a core: photos were back only when 100 s of texts from eight callers were over.
"""

from __future__ import annotations

import logging
import sys
from concurrent.futures import Future
from threading import Thread
from typing import Any

from deployments.priority import come_forward

logger = logging.getLogger(__name__)
#: How long a start waits for Ray Serve to say whether its model is down; usually that is known before torch is there.
_PATIENCE_S = 30.0
_asked: Future[bool] | None = None


def ask_early() -> None:
    """Ask Ray Serve, on a thread, whether this replica's model is down; its process comes forward where it is.

    To be called before anything is imported that takes long: torch alone takes three seconds of CPU time, which is half
    a minute for who gives way. It does nothing in a process that is no replica.
    """
    global _asked
    if _asked is not None or "ray" not in sys.modules:
        return
    try:
        name = _own_name()
    except Exception as error:  # Ray's names for these things are its own: another Ray must not end each start here
        logger.warning("which replica this is could not be found out, its start gives way: %r", error)
        return
    if name is None:
        return
    answer: Future[bool] = Future()
    _asked = answer

    def ask() -> None:
        first = False
        try:
            if is_down(*name):
                come_forward()
                first = True
        finally:
            answer.set_result(first)

    Thread(target=ask, name="outage", daemon=True).start()


def comes_first() -> bool:
    """Return whether this replica's start is to come before other work, as `is_down` says; it waits for Ray Serve.

    Not for good: a call to a controller that is being replaced has no end of its own.
    """
    ask_early()
    if _asked is None:
        return False
    try:
        return _asked.result(_PATIENCE_S)
    except TimeoutError:
        logger.warning("whether the model is down was not answered within %.0f s, its start gives way", _PATIENCE_S)
        return False


def is_down(application: str, deployment: str) -> bool:
    """Return whether a deployment has no replica that serves, after one failed or since its autoscaler had none.

    While a first or another version is deployed it is not: who does that knows when, and Ray Serve does not tell which.
    It is not either once Ray has tried to replace it in vain (three times where there is one replica), so that what
    cannot start does not take from others for good.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        status = serve.status().applications[application].deployments[deployment]
    except (RayError, RayServeException, KeyError) as error:
        logger.warning("whether %s is down could not be asked, its start gives way: %r", deployment, error)
        return False
    # Ray's enums of these are text, too; where they are is private.
    lost = status.status_trigger in ("HEALTH_CHECK_FAILED", "AUTOSCALING")
    serving: tuple[Any, ...] = ("RUNNING", "PENDING_MIGRATION")
    return lost and not any(status.replica_states.get(state) for state in serving)


def _own_name() -> tuple[str, str] | None:
    import ray
    from ray.serve._private.common import ReplicaID

    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return None
    # Ray Serve tells a replica who it is only after it has imported it.
    name = ray.get_runtime_context().get_actor_name()
    if not name or not ReplicaID.is_full_id_str(name):
        return None
    try:
        own = ReplicaID.from_full_id_str(name).deployment_id
    except ValueError:  # an application whose name has a '#', at which Ray splits
        return None
    return own.app_name, own.name
