"""Where a replica logs: where Ray Serve does, but for a line for each request on the terminal."""

from __future__ import annotations

import logging
import os

_LOGGERS = ("optim", "deployments")
#: The environment variable that says where answered requests are logged: `file`, or anything else for the terminal too.
ACCESS_LOG = "PT2_SERVE_ACCESS_LOG"


def set_log_level(level: str | None) -> None:
    """Set how much we log; None is Ray Serve's own level."""
    for ours in map(logging.getLogger, _LOGGERS):
        ours.setLevel(level or logging.getLogger("ray.serve").level)


def share_serve_log() -> None:
    """Send what `optim` and `deployments` log to where Ray Serve logs."""
    serve_logger = logging.getLogger("ray.serve")
    set_log_level(None)
    if os.environ.get(ACCESS_LOG) == "file":
        for handler in serve_logger.handlers:
            if type(handler) is logging.StreamHandler:  # those of files are of classes of their own
                handler.addFilter(is_worth_showing)
    for ours in map(logging.getLogger, _LOGGERS):
        ours.propagate = not serve_logger.handlers  # with nothing to send it to, it goes where Python sends it
        for handler in serve_logger.handlers:
            if handler not in ours.handlers:
                ours.addHandler(handler)


def is_worth_showing(record: logging.LogRecord) -> bool:
    """Return whether a record is to be seen on the terminal: it is not a request's that was answered well.

    On its way there a line passes through the replica, Ray's log monitor, the GCS and `serve run`: 1.2 ms of CPU time
    of the 12.6 that a text takes in all, on the cores that the model runs on (issue 4).
    """
    if not getattr(record, "serve_access_log", False):
        return True
    words = record.getMessage().split()  # "POST /predictions/{model} 200 4.1ms"
    return len(words) < 2 or not (words[-2].startswith("2") or words[-2] == "OK")
