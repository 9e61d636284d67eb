"""Calling from another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def error_in_another_thread(call: Callable[[], Any]) -> BaseException | None:
    """Return what a call raises in a thread of its own, or None."""
    caught: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return caught[0] if caught else None
