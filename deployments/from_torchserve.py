"""`python -m deployments.from_torchserve model-config.yaml`: a serve_config.yaml from TorchServe's file for a model.

The `pt2` section stays as it is; workers, batches, time-outs and devices are translated. What has no counterpart is
written above the result as a comment, with what to do about it: nothing is dropped without a word.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
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
    "continuousBatching": "token by token generation is not served",
    "sequenceBatching": "requests that belong together in a sequence are not served",
    "dali": "decoding is your servable's preprocess, on threads of its own",
}


def convert(given: Mapping[str, Any], model: str, name: str) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration for a model's TorchServe settings, and a remark for every key that is not in it.

    ConfigError names a `pt2` section that cannot be used here, or a number that is none.
    """
    remarks: list[str] = []
    rest = dict(given)
    args: dict[str, Any] = {"model": model, "name": name}
    deployment: dict[str, Any] = {"name": name, "ray_actor_options": {"num_cpus": 1}, "max_surge_percent": 100}
    least, most = _take(rest, "minWorkers"), _take(rest, "maxWorkers")
    least = least or most or 1
    deployment["autoscaling_config"] = {"min_replicas": least, "max_replicas": max(least, most or least)}
    size = _take(rest, "batchSize")
    if size is not None:
        args["batching"] = {"batch_sizes": sorted({size, *(2**i for i in range(int(math.log2(size)) + 1))})}
    queue = _take(rest, "jobQueueSize")
    if queue is not None:
        args.setdefault("batching", {})["max_queue"] = max(queue, size or 8)
    elif size is not None and size > BatchingArgs.max_queue:
        args["batching"]["max_queue"] = size
    timeout = _take(rest, "responseTimeout")
    if timeout is not None:
        args["limits"] = {"timeout_s": float(timeout)}
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
    return {"http_options": {"host": "127.0.0.1", "port": 8000}, "applications": [application]}, remarks


def _take(settings: dict[str, Any], key: str) -> int | None:
    """Take a whole number from 1 out of the settings; None where it is missing."""
    value = settings.pop(key, None)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(key, value, "use a whole number from 1")
    return value


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
        config, remarks = convert(given, options.model, options.name)
    except (OSError, yaml.YAMLError, ConfigError) as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 1
    for remark in [f"From TorchServe's {options.file.name}.", *(f"Not taken over: {remark}" for remark in remarks)]:
        print("# " + " ".join(remark.split()))
    print(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
