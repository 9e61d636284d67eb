"""Ending `serve run` when the configuration is wrong: Ray Serve would log the mistake and wait for ever."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path

from deployments.processes import arguments, parent

#: What `serve` runs, for a Python whose scripts lie elsewhere.
SERVE_MODULE = "ray.serve.scripts"
#: Long enough for Ray to show the message, which comes through its controller's log.
_DELAY_S = 2
#: How long `serve run` may take to shut down.
_GRACE_S = 20


def stop_serve_run_soon() -> bool:
    """End the `serve run` that started this Ray; return whether there is one.

    Only a Ray that `serve run` started for itself is ended: there, the process above this worker's raylet is
    `serve run`, and no other applications can be running. A cluster of its own is left alone.
    """
    pid = _serve_run_above(os.getppid())
    if pid is None:
        return False
    # Ray ends the worker that builds an application as soon as that has failed, and its children with it: the
    # process that waits has to be nobody's child. The `serve run &` of a script has SIGINT ignored; SIGTERM ends
    # that too, only less quietly.
    wait = f"sleep {_DELAY_S}; kill -INT {pid}; sleep {_GRACE_S}; kill -TERM {pid}"
    subprocess.run(["/bin/sh", "-c", f"({wait}) >/dev/null 2>&1 &"], start_new_session=True, check=False)
    return True


def _serve_run_above(raylet: int) -> int | None:
    """Return the process id of the raylet's parent if that is `serve run`; None elsewhere and off Linux."""
    try:
        above = parent(raylet)
        names = [Path(argument).name for argument in arguments(above) if argument]
    except (OSError, ValueError, IndexError):
        return None
    for first, second in itertools.pairwise(names):
        if first in ("serve", SERVE_MODULE) and second == "run":
            return above
    return None
