"""Which start comes first: that of a replica whose model nothing serves any more.

Other starts give way to what serves (`priority`). Beside another model under load, the replacement of the only replica
of a model would then get a tenth of a core: photos were back only when 100 s of texts from eight callers were over.
"""

from __future__ import annotations

import logging
import sys
from concurrent.futures import Future
from threading import Thread

from deployments.priority import come_forward

logger = logging.getLogger(__name__)
_asked: Future[bool] | None = None


def ask_early() -> None:
    """Ask Ray Serve, on a thread, whether this replica's model is down; its process comes forward where it is.

    To be called before anything is imported that takes long: torch alone takes three seconds of CPU time, which is half
    a minute for who gives way. It does nothing in a process that is no replica.
    """
    global _asked
    if _asked is not None or "ray" not in sys.modules or (name := _own_name()) is None:
        return
    answer: Future[bool] = Future()
    _asked = answer

    def ask() -> None:
        down = False
        try:
            down = is_down(*name)
            if down:
                come_forward()
        finally:
            answer.set_result(down)

    Thread(target=ask, name="outage", daemon=True).start()


def comes_first() -> bool:
    """Return whether this replica is to start before other work, since nothing else serves its model; it may wait."""
    ask_early()
    return _asked is not None and _asked.result()


def is_down(application: str, deployment: str) -> bool:
    """Return whether a model that was served has no replica left, or none yet that an autoscaler was asked for.

    A first version is not down, nor a new one: who deploys them knows when. One that does not start is not either any
    more, and does not take what others need each time it is tried again.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve._private.common import DeploymentStatusTrigger, ReplicaState

    try:
        status = serve.status().applications[application].deployments[deployment]
    except (RayError, KeyError) as error:
        logger.warning("whether %s is down could not be asked, its start gives way: %r", deployment, error)
        return False
    lost = status.status_trigger in (DeploymentStatusTrigger.HEALTH_CHECK_FAILED, DeploymentStatusTrigger.AUTOSCALING)
    return lost and not status.replica_states.get(ReplicaState.RUNNING)


def _own_name() -> tuple[str, str] | None:
    import ray
    from ray.serve._private.common import ReplicaID

    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return None
    # Ray Serve tells a replica who it is only after it has imported it.
    name = ray.get_runtime_context().get_actor_name()
    if not name or not ReplicaID.is_full_id_str(name):
        return None
    own = ReplicaID.from_full_id_str(name).deployment_id
    return own.app_name, own.name
