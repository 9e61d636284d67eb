from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments import driver, run
from deployments.priority import SERVING
from deployments.run import main, make_environment

CONFIG = str(Path(__file__).parents[2] / "serve_config.yaml")
SCRIPT = Path(__file__).parents[2] / "deployments" / "haproxy.sh"


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    short = Path("/tmp") / f"pt2-{os.getpid()}"  # pytest's own folder is too long for the path of a socket
    short.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(short))
    monkeypatch.setenv("HOME", str(short))
    yield short
    shutil.rmtree(short)


def test_haproxys_files_are_this_users_alone(temporary: Path) -> None:
    found = make_environment(8123, {"HOME": "/somewhere"})
    folder = temporary / f"pt2-serve-{os.getuid()}" / "8123"
    assert found["HOME"] == "/somewhere"
    assert found["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert found["RAY_USAGE_STATS_ENABLED"] == "0"
    assert make_environment(8123, {"RAY_USAGE_STATS_ENABLED": "1"})["RAY_USAGE_STATS_ENABLED"] == "1"
    assert found["RAY_SERVE_HAPROXY_BINARY_PATH"] == str(SCRIPT)
    assert os.access(found["PT2_SERVE_HAPROXY"], os.X_OK)
    files = [Path(value) for key, value in found.items() if key.endswith(("_PATH", "_LOC", "_BASE", "_FILE"))]
    assert {f if f.suffix == ".sh" else folder for f in files} == {SCRIPT, folder}
    for path in (folder, folder.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    (folder / "left-over").touch()
    make_environment(8123, {})
    assert not (folder / "left-over").exists()
    folder.parent.chmod(0o755)
    with pytest.raises(PermissionError, match="is not a folder that only this user"):
        make_environment(8123, {})


def test_what_the_caller_has_set_stays(temporary: Path) -> None:
    plain = {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    assert "RAY_SERVE_HAPROXY_BINARY_PATH" not in make_environment(8123, plain)
    own = {"RAY_SERVE_HAPROXY_STATS_PORT": "5", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "1"}
    assert own.items() <= make_environment(8123, own).items()
    assert list(temporary.iterdir()) == [temporary / f"pt2-serve-{os.getuid()}"]


def test_ray_gives_way_to_what_serves_only_where_that_can_come_forward(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make_environment(8123, {"RAY_worker_niceness": "7"})
    assert (own["RAY_worker_niceness"], SERVING in own) == ("7", False)
    for may_come_back in (True, False):
        monkeypatch.setattr(run, "may_come_back", lambda usual, may=may_come_back: may)
        found = make_environment(8123, {})
        assert found["RAY_worker_niceness"] == "0"
        assert found.get(SERVING) == (str(os.getpriority(os.PRIO_PROCESS, 0)) if may_come_back else None)


def test_tls_takes_the_way_that_has_it(temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_environment(8123, {}, tls=True)["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert "ssl_certfile: serving through Ray's Python proxy" in capsys.readouterr().err
    assert make_environment(8123, {}, host="10.0.0.5")["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert make_environment(8123, {}, host="0.0.0.0")["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    own = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
    assert make_environment(8123, own, tls=True)["RAY_SERVE_ENABLE_HA_PROXY"] == "1"


def test_ray_looks_less_often_whether_there_is_something_to_do_unless_told_otherwise(temporary: Path) -> None:
    assert make_environment(8123, {})["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"] == "0.5"
    module, _, name = make_environment(8123, {})["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))
    own = make_environment(8123, {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.1"})
    assert own["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"] == "0.1"


def run_script(config: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PT2_SERVE_HAPROXY": "/bin/cat"}
    return subprocess.run([SCRIPT, "-f", str(config)], env=env, capture_output=True, text=True, check=False)


def test_the_script_closes_what_ray_serve_leaves_open(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    template = (
        "global\n    stats socket /tmp/x.sock mode {mode} level admin expose-fd listeners\nfrontend prometheus\n"
        "    bind {here}:9101\nfrontend http_frontend\n    bind *:8000\nfrontend grpc_frontend\n"
        "    bind *:9000 proto h2\nlisten stats\n  bind {any}:8404\n"
    )
    config.write_text(template.format(mode=666, here="", any="*"))
    # `-f` is an option of neither cat nor this test: what matters is the file that the program is handed.
    done = run_script(config)
    assert "not started" not in done.stderr
    # HTTP and gRPC listen where `http_options.host` says: `*` is how Ray Serve writes 0.0.0.0.
    assert config.read_text() == template.format(mode=600, here="127.0.0.1", any="127.0.0.1")
    config.write_text("defaults\n    mode http\nfrontend http\n")
    run_script(config)
    assert config.read_text() == "defaults\n    timeout http-request 30s\n    mode http\nfrontend http\n"
    config.write_text("defaults\n    timeout http-request 7s\n")  # a later Ray Serve may have a setting for it
    run_script(config)
    assert config.read_text() == "defaults\n    timeout http-request 7s\n"


@pytest.mark.parametrize(
    "text",
    [
        "frontend prometheus\n  bind [::]:9101\n",
        "frontend prometheus\n  bind :9101 v4v6\n",
        "frontend metrics\n    bind 0.0.0.0:9101\n",
        "listen stats\n  bind ipv4@*:8404\n",
        "global\n    stats socket /tmp/x.sock level admin mode 666\n",
        "global\n    stats socket /tmp/x.sock level admin\n",
        "frontend grpc_frontend\n    bind *:9000 proto h2\n",
        "frontend grpc\n    bind *:9000 proto h2\n",
        "frontend grpc_frontend\n    bind 127.0.0.1:9000 proto h2\npeers all\n    bind *:9001\n",
        "frontend http_frontend\n    bind 127.0.0.1:9999\n",
        "listen stats\n  bind 127.0.0.1:1,*:2\n",
        "log-forward all\n    dgram-bind *:514\n",
        "peers all\n    peer me 0.0.0.0:1024\n",
        "frontend grpc_frontend\n    bind :9000 proto h2\n",
        "frontend grpc_frontend\n    bind  *:9000 proto h2\n",
        "listen more\n    bind\t*:8404\n",
        'listen more\n    "bind" *:8404\n',
        "listen more\n    bind\n",
        "global\n    stats\tsocket ipv4@*:9 level admin\n",
        "global\n    stats  socket /x mode 600 level admin mode 666\n",
        "global\n    stats socket ipv4@*:9999 mode 600 level admin\n",
        "global\n    stats socket /tmp/x.sock mode 600 level admin\nlisten stats\n  bind 0.0.0.0:1",
    ],
)
def test_what_a_later_ray_serve_may_open_is_not_let_through(tmp_path: Path, text: str) -> None:
    config = tmp_path / "haproxy.cfg"
    http = "frontend http_frontend\n    bind 127.0.0.1:8000\n"
    config.write_text(http + text)
    done = run_script(config)
    assert done.returncode == 1
    assert "still opens something to everybody; not started" in done.stderr


def test_what_ray_serve_writes_is_let_through(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    http = "frontend http_frontend\n    bind 127.0.0.1:8000\n"
    config.write_text(
        "global\n    stats socket /tmp/x.sock mode 600 level admin\n" + http + "    # bind :1, says a comment\n"
        "frontend grpc_frontend\n\n    bind 127.0.0.1:9000 proto h2\n    use_backend http-my-bind if is_my-bind\n"
        "listen stats\n  bind 127.0.0.1:8404\n  stats enable\n"
    )
    done = run_script(config)
    assert "not started" not in done.stderr
    assert "cat: " in done.stderr, "the program was started"


BACKENDS = """backend http-a
    option httpchk GET /-/healthz
    server A1 127.0.0.1:30001 check observe layer4
    server A2 127.0.0.1:30002 check
    # Fallback to head node's Serve proxy
    server proxy 127.0.0.1:8500 check backup
backend http-b
    server B1 127.0.0.1:30003 check
    server proxy 127.0.0.1:8500 check backup
"""


def test_a_backend_that_has_lost_its_servers_keeps_those_it_had(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"

    def write(text: str) -> str:
        config.write_text(text)
        run_script(config)
        return config.read_text()

    lines = BACKENDS.splitlines(keepends=True)
    building = "".join(line for line in lines if "server A" not in line)
    assert write(building) == building, "nothing was there before"
    assert write(BACKENDS) == BACKENDS
    for _ in range(2):  # Ray Serve writes it more than once in a build
        kept = write(building)
        assert sorted(kept.splitlines()) == sorted(BACKENDS.splitlines())
        assert kept.index("server A2") < kept.index("server proxy") < kept.index("backend http-b")
    next_version = BACKENDS.replace("A1 127.0.0.1:30001", "A3 127.0.0.1:30004").replace(lines[3], "")
    assert write(next_version) == next_version
    taken = building.replace("B1 127.0.0.1:30003", "B2 127.0.0.1:30004")
    assert write(taken) == taken, "the address is another application's now"
    gone = "".join(lines[6:])
    assert write(BACKENDS) == BACKENDS and write(gone) == gone
    assert write(building) == building, "an application that was removed has nothing to keep"


@pytest.mark.parametrize(("asked", "expected"), [(None, "local"), ("10.0.0.7:6379", "10.0.0.7:6379")])
def test_ray_is_its_own_unless_told_otherwise(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, expected: str
) -> None:
    """A Ray that runs on the machine has none of the settings; one that was killed leaves its address."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if asked is not None:
        monkeypatch.setenv("RAY_ADDRESS", asked)
    monkeypatch.setattr(run, "check", lambda paths: 0)
    ((arguments, _),) = _start(monkeypatch, "--non-blocking")
    assert arguments == ["run", "--address", expected, CONFIG, "--non-blocking"]


def test_a_folder_that_checking_was_given_is_not_handed_on(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with the process that has checked: replicas find out by themselves, and say so."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere/else")

    def check(paths: list[str]) -> int:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = "/of/this/process"
        return 0

    monkeypatch.setattr(run, "check", check)
    ((_, environment),) = _start(monkeypatch)
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere/else"


@pytest.mark.parametrize("mode", [None, "token", "disabled"])
@pytest.mark.parametrize("has_token", [False, True])
def test_where_ray_cannot_keep_a_token_it_is_given_one(
    temporary: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    has_token: bool,
    mode: str | None,
) -> None:
    """A container's user may have no home that it can write to, where Ray ends at once without."""
    monkeypatch.setattr(run, "check", lambda paths: 0)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    if has_token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    monkeypatch.setenv("HOME", os.devnull)
    ((_, environment),) = _start(monkeypatch)
    is_given = not has_token and mode != "disabled"
    assert (environment.get("RAY_AUTH_TOKEN") not in (None, "mine")) == is_given
    assert environment.get("RAY_AUTH_MODE") == ("token" if is_given else mode)
    assert ("~/.ray cannot be written" in capsys.readouterr().err) == is_given
    monkeypatch.setenv("HOME", str(tmp_path))
    ((_, environment),) = _start(monkeypatch)
    assert environment.get("RAY_AUTH_TOKEN") == ("mine" if has_token else None)


def test_where_scripts_do_not_lie_beside_the_interpreter_ray_serve_is_run_as_a_module(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "check", lambda paths: 0)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    ((arguments, _),) = _start(monkeypatch)
    assert arguments[:3] == ["-m", "ray.serve.scripts", "run"]
    assert importlib.util.find_spec("ray.serve.scripts") is not None
    # Which process `serve run` is, is also known then: it is ended where the configuration is wrong.
    monkeypatch.setattr(driver, "parent", lambda pid: 7)
    for command in ([str(tmp_path / "python3"), *arguments], ["/usr/bin/python3", "/usr/local/bin/serve", "run"]):
        monkeypatch.setattr(driver, "arguments", lambda pid, found=command: found)
        assert driver._serve_run_above(8) == 7
    monkeypatch.setattr(driver, "arguments", lambda pid: ["/usr/bin/python3", "-m", "something.else", "run"])
    assert driver._serve_run_above(8) is None


def _start(monkeypatch: pytest.MonkeyPatch, *more: str) -> list[tuple[list[str], dict[str, str]]]:
    """Return what would be executed: arguments and environment."""
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr("os.execve", lambda program, arguments, env: started.append((arguments[1:], env)))
    monkeypatch.setattr("os.setpriority", lambda which, who, priority: None)
    main([CONFIG, *more])
    return started


def test_a_mistake_ends_it_before_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("applications: []\nhttp_option: {}\n")
    assert main([str(path)]) == 1
    assert "http_option: there is no such key" in capsys.readouterr().err
