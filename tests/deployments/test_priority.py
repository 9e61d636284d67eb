"""A replica that starts gives way to others, and comes back."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from deployments.priority import last_in_line, thread_last_in_line

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")


def niceness() -> dict[int, int]:
    """Return the niceness of every thread that Python knows; the system lists one that has ended a little longer."""
    known = [thread.native_id for thread in threading.enumerate() if thread.native_id]
    return {thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in known}


def test_all_threads_step_back_and_return() -> None:
    stop = threading.Event()
    before = threading.Thread(target=stop.wait)
    before.start()
    meanwhile = threading.Thread(target=stop.wait)
    usual = niceness()
    try:
        with last_in_line() as steps_back:
            meanwhile.start()
            if not steps_back:
                pytest.skip("this process may not raise its priority again")
            found = niceness()
            assert {found[before.native_id or 0], found[meanwhile.native_id or 0]} == {usual[os.getpid()] + 10}
        assert set(niceness().values()) == {usual[os.getpid()]}
    finally:
        stop.set()
        before.join()
        if meanwhile.ident:
            meanwhile.join()


def test_one_thread_steps_back_and_what_it_starts_returns_with_it() -> None:
    stop = threading.Event()
    before, meanwhile = threading.Thread(target=stop.wait), threading.Thread(target=stop.wait)
    before.start()
    usual = niceness()[os.getpid()]

    def work() -> None:
        with thread_last_in_line() as steps_back:
            if steps_back:
                meanwhile.start()
                found.update(niceness())
                found[0] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    found: dict[int, int] = {}
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    try:
        if not found:
            pytest.skip("this process may not raise its priority again")
        assert found[os.getpid()] == found[before.native_id or 0] == usual
        assert found[meanwhile.native_id or 0] == found[0] == usual + 10
        assert niceness()[meanwhile.native_id or 0] == usual
    finally:
        stop.set()
        before.join()
        if meanwhile.ident:
            meanwhile.join()


def test_a_failed_start_returns_too() -> None:
    usual = niceness()[os.getpid()]
    with pytest.raises(RuntimeError), last_in_line():
        raise RuntimeError
    assert set(niceness().values()) == {usual}


def test_where_there_is_no_way_back_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, real = niceness()[os.getpid()], os.setpriority

    def setpriority(which: int, who: int, priority: int) -> None:
        if priority < os.getpriority(which, who):
            raise PermissionError
        real(which, who, priority)

    monkeypatch.setattr(os, "setpriority", setpriority)
    with last_in_line() as steps_back:
        assert not steps_back
        assert set(niceness().values()) == {usual}
