"""Servers under test, each a process tree of its own: started, waited for, and stopped with all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.load import closed_loop

ROOT = Path(__file__).parents[1]
PORT = 8311


class Server:
    """A running server."""

    #: What it was told to serve, where that is a configuration file of Ray Serve.
    config: Mapping[str, Any] | None = None

    def __init__(self, process: subprocess.Popen[bytes], log: Path, environment: Mapping[str, str]) -> None:
        self.process, self.log, self.environment = process, log, environment

    def cpu_s(self) -> float:
        """Return the CPU seconds of the whole process tree so far."""
        total = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def memory_mb(self) -> float:
        """Return the memory of the whole process tree, MB; what processes share is counted once (PSS)."""
        total = 0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total / 1e6

    def total(self, metric: str, *labels: str) -> int:
        """Return the sum over a metric of Ray's, of those lines that have these labels."""
        folder = self.log.parent / "ray"
        groups = json.loads((folder / "prom_metrics_service_discovery.json").read_text())
        targets = [target for group in groups for target in group["targets"]]
        text = "".join(urllib.request.urlopen(f"http://{t}/metrics", timeout=10).read().decode() for t in targets)
        found = re.findall(rf"^ray_{metric}({{.*}})? (\S+)$", text, re.MULTILINE)
        return int(sum(float(value) for line, value in found if all(label in line for label in labels)))

    def wait(self, path: str, payload: bytes, deadline_s: float = 600) -> None:
        """Wait until a request is answered; RuntimeError with the log where the server ends before."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end and self.process.poll() is None:
            if closed_loop(PORT, path, [payload], lambda i, body: True, 1, 0.001).taken:
                return
            time.sleep(0.5)
        raise RuntimeError(f"the server does not answer:\n{self.log.read_text()[-3000:]}")


@contextmanager
def start(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run a command from the repository's root until the end of the block."""
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    log = folder / "log"
    env = {
        **os.environ,
        "RAY_TMPDIR": str(folder),
        "XDG_CACHE_HOME": str(folder),
        "PYTHONWARNINGS": "ignore",
        **(environment or {}),
    }
    with log.open("wb") as out:
        # No setsid: it makes an autogroup, and Linux shares the cores between those (sched(7)). The clients, here,
        # would wait for a starting replica, there, however nice that is (issue 5).
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    try:
        yield Server(process, log, env)
    finally:
        tree = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended by itself
            tree = psutil.Process(process.pid).children(recursive=True)
        process.terminate()  # not SIGINT, which a process started in the background ignores
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for left in tree:
            with contextlib.suppress(psutil.Error):
                left.kill()
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def serve_run(
    application: Mapping[str, Any], environment: Mapping[str, str] | None = None, *, plain: bool = False
) -> Iterator[Server]:
    """Serve one application as `make serve` does; with `plain` as `serve run` by itself does."""
    config = {
        "http_options": {"host": "127.0.0.1", "port": PORT},
        "applications": [{"name": "bench", "route_prefix": "/", **application}],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = ["-m", "ray.serve.scripts", "run", str(path)] if plain else ["-m", "deployments.run", str(path)]
        with start(command, environment) as server:
            server.config = config
            yield server
