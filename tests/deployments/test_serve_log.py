from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.serve_log import ACCESS_LOG, share_serve_log

ANSWERED = ("POST /predictions/{model} 200 4.1ms", "CALL predict OK 0.5ms", "10.0.0.7:123 GET /ping 204 0.1ms")
FAILED = (
    "POST /predictions/{model} 503 4.1ms",
    "POST /predictions/{model} 400 200.0ms",
    "CALL predict ERROR 0.5ms",
    "POST /v1/completions CANCELLED 2.0ms",
    "odd",
)


@pytest.fixture
def handlers(tmp_path: Path) -> Iterator[tuple[io.StringIO, Path]]:
    """A terminal and a file, at Ray Serve's logger as it sets them up in a replica."""
    serve, ours = logging.getLogger("ray.serve"), [logging.getLogger(name) for name in ("optim", "deployments")]
    before = [(log, list(log.handlers), log.level, log.propagate) for log in (serve, *ours)]
    terminal, file = logging.StreamHandler(io.StringIO()), logging.FileHandler(tmp_path / "replica.log")
    serve.handlers, serve.propagate = [terminal, file], False
    serve.setLevel(logging.INFO)
    yield terminal.stream, tmp_path / "replica.log"
    file.close()
    for log, old, level, propagate in before:
        log.handlers, log.propagate = old, propagate
        log.setLevel(level)


@pytest.mark.parametrize("where", ["file", "terminal", None])
def test_answered_requests_are_logged_where_it_is_asked_for_and_all_else_everywhere(
    handlers: tuple[io.StringIO, Path], monkeypatch: pytest.MonkeyPatch, where: str | None
) -> None:
    terminal, file = handlers
    monkeypatch.delenv(ACCESS_LOG, raising=False)
    if where is not None:
        monkeypatch.setenv(ACCESS_LOG, where)
    share_serve_log()
    for line in (*ANSWERED, *FAILED):
        logging.getLogger("ray.serve").info(line, extra={"serve_access_log": True})
    logging.getLogger("deployments.replica").info("engines by bucket: 200 ms")
    everything = [*ANSWERED, *FAILED, "engines by bucket: 200 ms"]
    assert file.read_text().splitlines() == everything
    shown = everything[len(ANSWERED) :] if where == "file" else everything
    assert terminal.getvalue().splitlines() == shown


def test_without_anything_that_ray_serve_logs_to_ours_goes_where_python_sends_it(
    handlers: tuple[io.StringIO, Path], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("ray.serve").handlers = []
    share_serve_log()
    logging.getLogger("optim").warning("heard")
    assert "heard" in caplog.text
