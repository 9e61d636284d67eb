"""Two nodes without shared storage: the second one's replica starts with the plan of the first."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: A cluster of its own, in a process of its own: two nodes with a cache folder each, a replica on either.
SCRIPT = """
import json, sys, time
from pathlib import Path
import ray
from ray import serve
from ray.cluster_utils import Cluster
from deployments.app import build

folder = Path(sys.argv[1])
nodes = ("one", "two")
cluster = Cluster()
for name in nodes:
    cluster.add_node(num_cpus=2, resources={name: 1}, env_vars={"XDG_CACHE_HOME": str(folder / name)})
ray.init(address=cluster.address, log_to_driver=False)
serve.start(proxy_location="Disabled")
found = {}
for name in nodes:
    args = {
        "model": "tests.support.servables:Tiny",
        "name": name,
        "pt2": {"compile": {"backend": "pt2test_faithful", "only_if_faster": False}},
        "batching": {"batch_sizes": [1, 4]},
        "threads": 1,
    }
    app = build(args)
    app = app._bound_deployment.options(ray_actor_options={"num_cpus": 0.5, "resources": {name: 0.5}}).bind(
        *app._bound_deployment.init_args
    )
    handle = serve.run(app, name=name, route_prefix=None)
    report = handle.report.remote().result()
    found[name] = {"start": report["start"], "cache": report["cache"], "notes": report["notes"]}
    found[name]["reply"] = handle.predict.remote([0.5, -1, 2, 0, 1, 3, -2, 0.25]).result()["values"]
    end = time.monotonic() + 60
    while name == "one" and time.monotonic() < end:  # a replica offers its plan at a health check
        try:
            keeper = ray.get_actor("pt2-serve-plans", namespace="pt2-serve")
            if ray.get(keeper.has.remote(Path(report["cache"]).name)):
                break
        except ValueError:
            pass
        time.sleep(0.5)
(folder / "found.json").write_text(json.dumps(found))
serve.shutdown()
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.any_torch
def test_a_replica_on_another_node_starts_warm(tmp_path: Path) -> None:
    ray_folder = tempfile.mkdtemp(prefix="ray-two-")
    env = {**os.environ, "RAY_TMPDIR": ray_folder, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["one"]["start"] == "cold"
    assert found["two"]["start"] == "warm", found
    assert "the plan came from another node of the cluster" in found["two"]["notes"]
    assert found["two"]["cache"].startswith(str(tmp_path / "two"))
    assert found["one"]["reply"] == found["two"]["reply"]
