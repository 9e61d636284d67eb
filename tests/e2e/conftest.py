"""One server for all end-to-end tests, started as `make serve` does: the shipped configuration, and small models."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.checkpoints import make_checkpoint

ROOT = Path(__file__).parents[2]


def make_application(name: str, args: dict[str, Any], **deployment: Any) -> dict[str, Any]:
    """Return one application of a configuration file, at /{name}."""
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": "deployments.app:build",
        "args": {"name": name, **args},
        "deployments": [{"name": name, "ray_actor_options": {"num_cpus": 0.05}, **deployment}],
    }


#: A request to the small models.
ROW = json.dumps([0.5, -1, 2, 0, 1, 3, -2, 0.25]).encode()
JSON = {"Content-Type": "application/json"}
#: Where HAProxy's statistics and metrics go.
STATS, METRICS = "RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT"
#: What the model `broken` asks for.
KEY = {"Authorization": "Bearer a-key-for-these-tests"}
EAGER = {"compile": {"enable": False}}
SMALL_MODELS = [
    make_application(
        "tiny",
        {
            "model": "tests.support.servables:Tiny",
            "pt2": {"compile": {"backend": "pt2test_faithful", "only_if_faster": False}},
        },
    ),
    make_application(
        "broken",
        {
            "model": "tests.support.servables:Tiny",
            "pt2": "pt2test_raises_at_call",
            "auth": {"keys_env": "PT2_E2E_KEYS"},
        },
    ),
    make_application("behind", {"model": "tests.support.servables:Tiny", "pt2": EAGER}, max_surge_percent=100),
    make_application("rolling", {"model": "tests.support.servables:Rolling", "pt2": EAGER}, max_surge_percent=100),
    make_application(
        "scaling",
        {"model": "tests.support.servables:Rolling", "model_args": {"delay_s": 0.05}, "pt2": EAGER},
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": 2,
            "target_ongoing_requests": 1,
            "upscale_delay_s": 1,
            "downscale_delay_s": 5,
        },
    ),
    make_application("picky", {"model": "tests.support.servables:PickyServable", "pt2": EAGER}),
    make_application("fragile", {"model": "tests.support.servables:FragileServable", "pt2": EAGER}),
    make_application(
        "slow",
        {
            "model": "tests.support.servables:PickyServable",
            "model_args": {"delay_s": 0.5},
            "pt2": EAGER,
            "batching": {"batch_sizes": [1], "max_queue": 3},
        },
    ),
]


GATEWAY = {
    "name": "gateway",
    "route_prefix": "/all",
    "import_path": "deployments.gateway:build",
    "deployments": [{"name": "gateway", "ray_actor_options": {"num_cpus": 0.05}}],
}

#: Deploys a configuration file with one application changed; a process of its own, since it joins the server's Ray.
CHANGE = """
import json, sys, yaml, ray
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
ray.init(address="auto", namespace="serve", log_to_driver=False)
config = yaml.safe_load(open(sys.argv[1]))
for application in config["applications"]:
    if application["name"] == sys.argv[2]:
        args, deployment = json.loads(sys.argv[3])
        application["args"].update(args)
        application["deployments"][0].update(deployment)
_get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
"""


@dataclass
class Server:
    """A running `serve run`."""

    process: subprocess.Popen[bytes]
    port: int
    grpc_port: int
    config: Path
    log: Path
    env: dict[str, str]
    """With this environment, `ray.init(address="auto")` finds this server's Ray and no other."""
    lived_before_ready: bool = False
    """Whether /v2/health/live of the text model answered before the model was ready."""

    def request(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body; an error status is an answer too."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=body, headers=headers or {}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, {k.lower(): v for k, v in reply.headers.items()}, reply.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()

    def change(
        self, name: str, *, args: dict[str, Any] | None = None, deployment: dict[str, Any] | None = None
    ) -> None:
        """Deploy the configuration file with an application's args, or its deployment's options, changed."""
        changes = json.dumps([args or {}, deployment or {}])
        command = [sys.executable, "-W", "ignore", "-c", CHANGE, str(self.config), name, changes]
        subprocess.run(command, cwd=ROOT, env=self.env, check=True)

    def lives_before_ready(self, prefix: str, deadline_s: float = 600) -> bool:
        """Wait until /v2/health/live of an application says 200; return whether it was not ready by then."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end and self.process.poll() is None:
            try:  # a while after it listens, HAProxy knows of no proxy yet, and says 404
                if self.request(f"{prefix}/v2/health/live")[0] != 200:
                    raise OSError
            except OSError:
                time.sleep(0.5)
                continue
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}{prefix}/v2/health/ready", timeout=1).close()
            except OSError:  # an error status, or no answer: the request waits for the replica
                return True
            return False
        return False

    def wait_until_ready(self, prefix: str, deadline_s: float = 1200) -> None:
        """Wait for an application; fail with the log where the process ends or the deadline passes."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                if self.request(f"{prefix}/v2/health/ready")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.5)
        pytest.fail(f"{prefix or '/'} did not become ready:\n{self.log.read_text()[-5000:]}")


#: Of those that the system gives nobody who asks for any, as Ray's own processes do while a server starts.
PORTS = iter(random.sample(range(20_000, 30_000), 1000))


def free_port() -> int:
    """Return a port that nothing listens on, each time another."""
    for port in PORTS:
        with socket.socket() as found, suppress(OSError):
            found.bind(("", port))
            return port
    raise RuntimeError("no port between 20000 and 30000 is free")


def haproxy_folder(port: int) -> Path:
    """Return where the files of a server's HAProxy are."""
    return Path(tempfile.gettempdir()) / f"pt2-serve-{os.getuid()}" / str(port)


def describe(server: Server, path: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the compile report that a model's description holds."""
    status, _, body = server.request(path, headers=headers)
    assert status == 200
    (description,) = json.loads(body)
    report: dict[str, Any] = description["compileReport"]
    return report


def pid_of(server: Server, name: str) -> int | None:
    """Return the process of the replica that answers, or None while none does."""
    try:
        status, _, body = server.request(f"/{name}/predictions/{name}", ROW, JSON)
    except OSError:
        return None
    return int(json.loads(body)["pid"]) if status == 200 else None


def came_first(server: Server, pid: int | None, deadline_s: float = 60) -> bool:
    """Return whether the start of a replica came before other work; by its log, which Ray prints a little later."""
    said = re.compile(rf" pid={pid}\).* -- the start (comes first|gives way|does not give way)")
    end = time.monotonic() + deadline_s
    while (found := said.search(server.log.read_text())) is None:
        assert time.monotonic() < end, f"process {pid} does not say how it started"
        time.sleep(0.2)
    return found[1] == "comes first"


@dataclass
class Answer:
    """What a request got, and from which replica."""

    status: int
    pid: int | None


@contextmanager
def steady_requests(server: Server, name: str, clients: int = 4, pause_s: float = 0.0) -> Iterator[list[Answer]]:
    """Let clients ask a small model one request after the other for as long as the block takes; yield the answers."""
    stop, answers = threading.Event(), []

    def ask() -> None:
        while not stop.wait(pause_s):
            try:
                status, _, body = server.request(f"/{name}/predictions/{name}", ROW, JSON)
            except OSError:
                answers.append(Answer(0, None))
                continue
            answers.append(Answer(status, json.loads(body)["pid"] if status == 200 else None))

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve the shipped configuration on a free port, with the small models where a test is run that needs them."""
    users = [item for item in request.session.items if "server" in getattr(item, "fixturenames", ())]
    needs_more = any(item.path.name != "test_shipped.py" for item in users)
    folder = tmp_path_factory.mktemp("e2e")
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    # Which engine wins is not what these tests ask, and with the usual budgets it took 270 s until all was ready.
    for application in config["applications"]:
        application["args"].setdefault("pt2", {})["tune"] = {"budget_s": 20}
    port = config["http_options"]["port"] = free_port()
    grpc_port = config["grpc_options"]["port"] = free_port()
    if needs_more:
        make_checkpoint(folder / "checkpoint")
        writer = {
            "model": "deployments.generate:TextGenerator",
            "model_args": {"checkpoint": str(folder / "checkpoint")},
        }
        batching = {"batch_sizes": [1, 4], "max_queue": 12}
        small = make_application("writer", {**writer, "pt2": EAGER, "batching": batching})
        config["applications"] += [*SMALL_MODELS, small, GATEWAY]
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    log = folder / "serve.log"
    # Not under pytest's folder: Ray's sockets lie in it, and their paths may have 107 characters.
    ray_folder = tempfile.mkdtemp(prefix="ray-e2e-")
    env = {**os.environ, "RAY_TMPDIR": ray_folder, STATS: str(free_port()), METRICS: str(free_port())}
    env["PT2_E2E_KEYS"] = KEY["Authorization"].removeprefix("Bearer ")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "deployments.run", str(path)],
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, port, grpc_port, path, log, env)
    try:
        server.lived_before_ready = server.lives_before_ready("/sentence-encoder")
        for application in config["applications"]:
            server.wait_until_ready(application["route_prefix"].rstrip("/"))
        yield server
    finally:
        process.terminate()  # not SIGINT, which a process started in the background ignores
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(ray_folder, ignore_errors=True)
        shutil.rmtree(haproxy_folder(port), ignore_errors=True)
