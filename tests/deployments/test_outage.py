"""Whether a model is down, by what Ray Serve says of its deployment; the rest is tested end to end."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger, ReplicaState
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatusOverview, ServeStatus

from deployments import outage
from deployments.outage import comes_first, is_down

STARTING, RUNNING = ReplicaState.STARTING, ReplicaState.RUNNING


@pytest.mark.parametrize(
    ("status", "trigger", "replicas", "down"),
    [
        ("UNHEALTHY", "HEALTH_CHECK_FAILED", {STARTING: 1}, True),
        ("UNHEALTHY", "HEALTH_CHECK_FAILED", {STARTING: 1, RUNNING: 0, ReplicaState.STOPPING: 1}, True),
        ("UNHEALTHY", "HEALTH_CHECK_FAILED", {STARTING: 1, RUNNING: 1}, False),
        ("UNHEALTHY", "HEALTH_CHECK_FAILED", {STARTING: 1, ReplicaState.PENDING_MIGRATION: 1}, False),
        ("UNHEALTHY", "REPLICA_STARTUP_FAILED", {STARTING: 1}, False),
        ("UPSCALING", "AUTOSCALING", {STARTING: 1}, True),
        ("UPSCALING", "AUTOSCALING", {STARTING: 1, RUNNING: 1}, False),
        ("UPDATING", "CONFIG_UPDATE_STARTED", {STARTING: 1}, False),
    ],
)
def test_what_is_down(
    monkeypatch: pytest.MonkeyPatch, status: str, trigger: str, replicas: dict[ReplicaState, int], down: bool
) -> None:
    found = DeploymentStatusOverview(DeploymentStatus(status), DeploymentStatusTrigger(trigger), replicas, "")
    overview = ApplicationStatusOverview(ApplicationStatus.RUNNING, "", 0.0, {"ranker": found})
    monkeypatch.setattr("ray.serve.status", lambda: ServeStatus(applications={"shop": overview}))
    assert is_down("shop", "ranker") is down


def test_what_cannot_be_asked_gives_way(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def status() -> ServeStatus:
        raise RayServeException("no controller")

    monkeypatch.setattr("ray.serve.status", status)
    assert not is_down("shop", "ranker")
    monkeypatch.setattr("ray.serve.status", ServeStatus)
    assert not is_down("shop", "ranker")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def test_another_ray_whose_names_are_not_known_ends_no_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def own_name() -> None:
        raise ImportError("cannot import name 'ReplicaID'")

    monkeypatch.setattr(outage, "_own_name", own_name)
    assert not comes_first()
    assert "its start gives way: ImportError" in caplog.text


def test_a_process_that_is_no_replica_does_not_ask() -> None:
    assert not comes_first()
    assert outage._asked is None


def test_an_answer_that_does_not_come_gives_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: Future[bool] = Future()
    monkeypatch.setattr(outage, "_asked", asked)
    monkeypatch.setattr(outage, "_PATIENCE_S", 0.01)
    assert not comes_first()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    asked.set_result(True)
    assert comes_first()
