"""A replica that starts gives way to others, and comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from deployments.priority import NICER, SERVING, bring_forward_what_serves, last_in_line, thread_last_in_line
from deployments.processes import children

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


@pytest.fixture
def workers() -> Iterator[dict[str, int]]:
    """Start processes that are called as Ray's are, all of them nicer; this process stands for the raylet."""
    program = "import os; os.setpriority(os.PRIO_PROCESS, 0, {}); os.execv('/bin/sh', ['{}', '-c', '{}'])"
    commands = {
        "ray::ProxyActor.receive": "echo; read line",
        "ray::HAProxyManager": "exec 3<&0; (echo; read line <&3) & echo; read line",
        "ray::IDLE": "echo; read line",
    }
    nice = os.getpriority(os.PRIO_PROCESS, 0) + NICER
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", program.format(nice, name, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for name, command in commands.items()
    }
    for name, process in started.items():
        assert process.stdout is not None
        for _ in range(commands[name].count("echo")):
            process.stdout.readline()
    yield {name: process.pid for name, process in started.items()}
    for process in started.values():
        process.communicate()


def test_what_requests_pass_through_comes_forward(workers: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    monkeypatch.setattr(os, "getppid", os.getpid)
    below = [child for pid in workers.values() for child in children(pid)]
    processes = [*workers.values(), *below]
    assert len(processes) == 4

    def found() -> list[int]:
        return [os.getpriority(os.PRIO_PROCESS, process) - usual for process in processes]

    monkeypatch.delenv(SERVING, raising=False)
    bring_forward_what_serves()
    assert found() == [NICER] * 4
    monkeypatch.setenv(SERVING, str(usual))
    with last_in_line() as may_come_back:
        if not may_come_back:
            pytest.skip("this process may not raise its priority again")
    bring_forward_what_serves()
    assert found() == [0, 0, NICER, 0], "what is idle stays where it is, HAProxy comes forward with its manager"


def run_nicer(program: str, **environment: str) -> int:
    """Return how much nicer than this process a Python program ends that starts nicer by 5."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    program = f"import os; os.nice(5); {program}; print(os.getpriority(os.PRIO_PROCESS, 0))"
    env = {**{name: value for name, value in os.environ.items() if name != SERVING}, **environment}
    return int(subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True).stdout) - usual


def test_a_replica_that_started_nicer_comes_forward_when_it_is_ready() -> None:
    start = "from deployments.priority import last_in_line\nwith last_in_line() as may: pass\nif not may: exit(1)"
    start = f"exec({start!r})"
    try:
        assert run_nicer(start) == 5
    except subprocess.CalledProcessError:
        pytest.skip("this process may not raise its priority again")
    assert run_nicer(start, **{SERVING: str(os.getpriority(os.PRIO_PROCESS, 0))}) == 0


def test_what_serves_at_once_comes_forward_at_once() -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with last_in_line() as may_come_back:
        if not may_come_back:
            pytest.skip("this process may not raise its priority again")
    program = "from deployments.priority import come_forward; come_forward()"
    assert run_nicer(program, **{SERVING: str(usual)}) == 0
    assert run_nicer(program, **{SERVING: str(usual + 6)}) == 5, "it does not step back"
    assert run_nicer(program) == 5, "where Ray did not start nicer, nothing changes"


def test_a_build_gives_way_once() -> None:
    build = "from deployments.priority import last_in_line_for_good; last_in_line_for_good()"
    assert run_nicer(build) == 5 + NICER
    assert run_nicer(build, **{SERVING: "0"}) == 5, "where all of Ray gives way, a build is no slower than the rest"


def test_threads_that_end_meanwhile_have_no_children() -> None:
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            threading.Thread(target=lambda: None).start()

    coming = threading.Thread(target=come_and_go)
    coming.start()
    try:
        for _ in range(300):
            children(os.getpid())
    finally:
        stop.set()
        coming.join()
