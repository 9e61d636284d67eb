"""New versions and numbers of replicas, under load: no request fails."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from deployments.priority import may_come_back
from deployments.processes import children, title
from tests.e2e.conftest import Answer, Server, came_first, describe, haproxy_folder, pid_of, steady_requests

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def wait_for(what: Callable[[], bool], server: Server) -> None:
    deadline = time.monotonic() + 180
    while not what():
        assert time.monotonic() < deadline, server.log.read_text()[-5000:]
        time.sleep(0.5)


def version_of(server: Server, name: str) -> str:
    (found,) = json.loads(server.request(f"/{name}/models/{name}")[2])
    return str(found["modelVersion"])


@contextmanager
def replicas_haproxy_knows(server: Server, name: str) -> Iterator[list[int]]:
    """Yield how many replicas of an application HAProxy is told of for HTTP: a number for each configuration."""
    stop, found = threading.Event(), []
    config = next(haproxy_folder(server.port).rglob("haproxy.cfg.before"))

    def watch() -> None:
        seen = 0.0
        while not stop.wait(0.02):
            changed = config.stat().st_mtime
            if changed == seen:
                continue
            seen = changed
            (section,) = re.findall(rf"^backend http\S*{name}\n((?:[ \n].*\n?)*)", config.read_text(), re.MULTILINE)
            found.append(len(re.findall(r"^ *server (?!.* backup).* check", section, re.MULTILINE)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def replicas_of(answers: list[Answer], last: int) -> set[int | None]:
    """Return the processes that the last answers are from."""
    return {answer.pid for answer in answers[-last:]}


def test_what_serves_is_no_nicer_than_before_ray(server: Server) -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    if not may_come_back(usual):
        pytest.skip("this process may not raise its priority again")
    found = {}
    below = [server.process.pid]
    for process in below:
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            below += children(process)
            found[title(process).partition(".")[0]] = os.getpriority(os.PRIO_PROCESS, process) - usual
    replicas = {name: nicer for name, nicer in found.items() if name.startswith("ray::ServeReplica:")}
    assert len(replicas) >= 10 and "ray::ServeReplica:gateway:gateway" in replicas
    assert set(replicas.values()) == {found["ray::ServeController"]} == {found["ray::HAProxyManager"]} == {0}


def test_a_new_version_takes_over_and_a_broken_one_does_not(server: Server) -> None:
    old = pid_of(server, "rolling")
    with steady_requests(server, "rolling") as answers, replicas_haproxy_knows(server, "rolling") as known:
        server.change("rolling", args={"version": "2"})
        wait_for(lambda: replicas_of(answers, 200).isdisjoint({old}), server)
        assert version_of(server, "rolling") == "2"
        (new,) = replicas_of(answers, 200)
        assert not came_first(server, new), "the old one serves meanwhile"

        server.change("rolling", args={"version": "3", "model_args": {"fails": True}})
        wait_for(lambda: "these weights are broken" in server.log.read_text(), server)
        # Ray gives up after three tries, each with its traceback.
        wait_for(lambda: server.log.read_text().count("these weights are broken") >= 3, server)
        count = len(answers)
        wait_for(lambda: len(answers) > count + 200, server)
        assert replicas_of(answers, 200) == {new}
        assert version_of(server, "rolling") == "2"
    assert {answer.status for answer in answers} == {200}
    assert len(known) > 1 and min(known) > 0, "HAProxy always had a replica to ask, also while Ray Serve built the next"


def test_a_version_that_compiles_behind_its_back_moves_over_without_a_gap(server: Server) -> None:
    compile_ = {"backend": "pt2test_faithful", "only_if_faster": False, "when": "background"}
    # Another tolerance than the other models', whose plans it would find.
    pt2 = {"compile": compile_, "verify": {"tolerance": 0.002}}
    path = "/behind/models/behind"
    with steady_requests(server, "behind") as answers:
        server.change("behind", args={"version": "2", "pt2": pt2})
        wait_for(lambda: version_of(server, "behind") == "2", server)
        assert describe(server, path)["start"] == "eager"
        new = pid_of(server, "behind")
        wait_for(lambda: describe(server, path)["background"] not in ("compiling", "moving"), server)
        count = len(answers)
        wait_for(lambda: len(answers) > count + 100, server)
        assert replicas_of(answers, 50) == {new}, "the replica that answered eager"
    report = describe(server, path)
    assert (report["background"], {row["engine"] for row in report["buckets"]}) == ("done", {"pt2test_faithful"})
    assert {answer.status for answer in answers} == {200}
    assert report["after_ready"]["compilations"] == report["after_ready"]["failed_runs"] == 0


def test_replicas_come_and_go_with_the_load(server: Server) -> None:
    first = pid_of(server, "scaling")
    with steady_requests(server, "scaling", clients=8) as busy:
        wait_for(lambda: len(replicas_of(busy, 50)) == 2, server)
    assert first in replicas_of(busy, len(busy))
    with steady_requests(server, "scaling", clients=1, pause_s=0.3) as quiet:
        wait_for(lambda: len(quiet) > 100 and len(replicas_of(quiet, 50)) == 1, server)
    assert {answer.status for answer in [*busy, *quiet]} == {200}
