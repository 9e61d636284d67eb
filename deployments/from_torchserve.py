"""`python -m deployments.from_torchserve model-config.yaml`: a serve_config.yaml from TorchServe's file for a model.

The `pt2` section stays as it is; workers, batches, time-outs and devices are translated. What has no counterpart, or
is otherwise here by default, is written above the result as a comment, with what to do about it: nothing is dropped
without a word. TorchServe's side is that of its last version, 0.12.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deployments.args import BatchingArgs
from optim.config import Pt2Config
from optim.errors import ConfigError

#: What TorchServe has and this server has not, or needs not, by key.
_REMARKS = {
    **dict.fromkeys(
        ("parallelType", "torchrun", "pippy", "deepspeed"),
        "a replica is one process with at most one GPU: models that span several are not served",
    ),
    "maxBatchDelay": "nobody waits for a timer here: batches fill while the model is busy",
    "startupTimeout": "Ray Serve gives a replica as long as it needs",
    "handler": "these are settings of your handler: give them to your servable's constructor as model_args",
    "deviceIds": "Ray gives each replica a GPU of its own; CUDA_VISIBLE_DEVICES of `ray start` says which there are",
    "continuousBatching": "deployments.generate:TextGenerator does it, whose requests come and go between tokens",
    "sequenceBatching": "requests that belong together in a sequence are not served",
    "dali": "decoding is your servable's preprocess, on threads of its own",
}


#: The version that torch-model-archiver's documentation gives its models.
_VERSION = "1.0"


@dataclass
class Converted:
    """A configuration made from TorchServe's settings."""

    config: dict[str, Any]
    remarks: list[str]
    """What of the settings is not in it."""
    changes: list[str]
    """What TorchServe did with these settings, or without others, and is otherwise here."""


def convert(given: Mapping[str, Any], model: str, name: str) -> Converted:
    """Return the configuration for a model's TorchServe settings, with a remark for every key that is not in it.

    ConfigError names a `pt2` section that cannot be used here, or a number that is none.
    """
    remarks: list[str] = []
    rest = dict(given)
    args: dict[str, Any] = {"model": model, "name": name, "version": _VERSION}
    deployment: dict[str, Any] = {"name": name, "ray_actor_options": {"num_cpus": 1}, "max_surge_percent": 100}
    least, most = _take(rest, "minWorkers", instead=1), _take(rest, "maxWorkers")
    least = least or most or 1
    most = max(least, most or least)
    deployment["autoscaling_config"] = {"min_replicas": least, "max_replicas": most}
    size = _take(rest, "batchSize", instead=1)
    if size is not None:
        args["batching"] = {"batch_sizes": sorted({size, *(2**i for i in range(int(math.log2(size)) + 1))})}
    queue = _take(rest, "jobQueueSize")
    if queue is not None:
        args.setdefault("batching", {})["max_queue"] = max(queue, size or 8)
    elif size is not None and size > BatchingArgs.max_queue:
        args["batching"]["max_queue"] = size
    if most > least:  # Ray's own default is two requests, which no batch would ever fill
        room = args.get("batching", {}).get("max_queue", BatchingArgs.max_queue)
        deployment["autoscaling_config"]["target_ongoing_requests"] = min(2 * (size or 8), max(room // 2, 1))
    timeout, patience = _take(rest, "responseTimeout"), _take(rest, "clientTimeoutInMills")
    limit = timeout if patience is None else patience / 1000
    if limit is not None:
        args["limits"] = {"timeout_s": float(limit)}
    if timeout is not None and patience is not None:
        remarks.append(f"responseTimeout: {timeout}: a request ends with clientTimeoutInMills")
    device = rest.pop("deviceType", None)
    kind = device.lower() if isinstance(device, str) else device  # TorchServe does not care about case
    if kind == "gpu":
        deployment["ray_actor_options"]["num_gpus"] = 1
    elif kind not in (None, "cpu"):
        remarks.append(f"deviceType: {device!r}: replicas run on CPUs and NVIDIA GPUs")
    if "pt2" in rest:
        args["pt2"] = rest.pop("pt2")
        Pt2Config.parse(args["pt2"])
    for key, value in rest.items():
        remarks.append(f"{key}: {value!r}: {_REMARKS.get(key, 'this server has no such setting')}")
    application = {
        "name": name,
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": args,
        "deployments": [deployment],
    }
    config = {
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "grpc_options": {"port": 9000, "grpc_servicer_functions": ["deployments.grpc:add_inference_service"]},
        "applications": [application],
    }
    return Converted(config, remarks, _find_changes(given, comes_and_goes=most > least))


def _find_changes(given: Mapping[str, Any], *, comes_and_goes: bool) -> list[str]:
    asked = {key for key, value in given.items() if value and not (isinstance(value, int) and value < 0)}
    changes = []
    if "deviceType" not in asked:
        changes.append("no deviceType was every GPU there is; a replica has none without num_gpus in ray_actor_options")
    elif str(given["deviceType"]).lower() == "gpu":
        changes.append("workers shared GPUs; each replica has one of its own, unless num_gpus is 0.5 or less")
    if given.get("minWorkers") is None:
        changes.append("no minWorkers was one for each GPU or core; here it is maxWorkers, else one replica")
    if comes_and_goes:
        changes.append("there were minWorkers until somebody asked for more; replicas come and go with the load")
    changes.append("workers had all cores; a replica has as many threads as num_cpus, or as threads in args, say")
    if asked & {"responseTimeout", "clientTimeoutInMills"}:
        changes.append("responseTimeout ended a worker; limits.timeout_s bounds a request and its wait, and ends none")
    else:
        changes.append("a run had 120 s; nothing is cut off unless args have limits: {timeout_s: 120}")
    if given.get("batchSize") is None:
        changes.append("no batchSize was 1; batches of up to 8 are made of what comes while the model is busy")
    if "pt2" not in asked:
        changes.append("no pt2 was eager; the fastest engine serves, unless args have pt2: {compile: {enable: false}}")
    return changes


def _take(settings: dict[str, Any], key: str, instead: int | None = None) -> int | None:
    """Take a whole number out of the settings; None where it is missing, and `instead` where it is below 1."""
    value = settings.pop(key, None)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ConfigError(key, value, "use a whole number")
    return value if value is None or value > 0 else instead


def main(arguments: list[str]) -> int:
    """Print the configuration; return 1, and say why, where there can be none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="TorchServe's model-config.yaml")
    parser.add_argument("--model", default="my_team.models:MyServable", help="the servable, as package.module:Class")
    parser.add_argument("--name", default="my-model", help="the model's name in URLs")
    options = parser.parse_args(arguments)
    try:
        given = yaml.safe_load(options.file.read_text()) or {}
        if not isinstance(given, Mapping):
            raise ConfigError(str(options.file), given, "a mapping such as {minWorkers: 1, pt2: inductor} is needed")
        found = convert(given, options.model, options.name)
    except (OSError, yaml.YAMLError, ConfigError) as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 1
    remarks = [
        f"From TorchServe's {options.file.name}. The model's version is a guess, which URLs may have.",
        *(f"Not taken over: {remark}" for remark in found.remarks),
        *(f"Other than there: {change}" for change in found.changes),
    ]
    for remark in remarks:
        print("# " + " ".join(remark.split()))
    print(yaml.safe_dump(found.config, sort_keys=False, allow_unicode=True), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
