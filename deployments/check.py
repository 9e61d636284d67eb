"""`python -m deployments.check serve_config.yaml`: find every mistake before Ray is started.

Ray Serve drops unknown keys of applications and deployments without a word, and `serve run` goes on waiting when an
application cannot be built; this command names the mistake and ends with status 1.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import DeploymentSchema, HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from deployments.args import ModelArgs
from deployments.gateway import parse_args
from deployments.keys import Keys
from optim.errors import ConfigError

OUR_BUILDER = "deployments.app:build"
OUR_GATEWAY = "deployments.gateway:build"


def check_file(path: Path, *, serving: bool = True) -> list[str]:
    """Return what is wrong with a Ray Serve configuration file, one line a mistake; nothing is started.

    API keys are looked for where it is for `serving`.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    except yaml.YAMLError as error:
        return [f"{path}: not YAML: {error}"]
    if not isinstance(config, Mapping):
        return [f"{path}: a mapping with `applications` is needed"]
    found = _unknown_keys("", config, ServeDeploySchema)
    for i, application in enumerate(_mappings(config.get("applications"))):
        where = f"applications[{i}]"
        found += _unknown_keys(where, application, ServeApplicationSchema)
        for j, deployment in enumerate(_mappings(application.get("deployments"))):
            found += _unknown_keys(f"{where}.deployments[{j}]", deployment, DeploymentSchema)
        if application.get("import_path") == OUR_BUILDER:
            found += _check_application(where, application, _host(config) if serving else None)
        elif application.get("import_path") == OUR_GATEWAY:
            found += _check_gateway(where, application, _host(config) if serving else None)
    if not found:
        try:
            ServeDeploySchema.model_validate(config)
        except ValidationError as error:
            found += [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return found


def _host(config: Mapping[str, Any]) -> str:
    options = config.get("http_options")
    return str((options if isinstance(options, Mapping) else {}).get("host", HTTPOptionsSchema().host))


def _check_application(where: str, application: Mapping[str, Any], host: str | None) -> list[str]:
    try:
        args = ModelArgs.parse(application.get("args"))
        if host is not None:
            Keys(args.auth, host, os.environ)
    except ConfigError as error:
        return [f"{where}: {error}"]
    found = []
    for j, deployment in enumerate(_mappings(application.get("deployments"))):
        here = f"{where}.deployments[{j}]"
        if deployment.get("name") != args.name:
            found.append(f"{here}.name: {deployment.get('name')!r} is not allowed; this model's is {args.name!r}")
        scaling = deployment.get("autoscaling_config")
        target = scaling.get("target_ongoing_requests") if isinstance(scaling, Mapping) else None
        try:
            if isinstance(deployment.get("max_ongoing_requests"), int):
                args.check_max_ongoing_requests(deployment["max_ongoing_requests"])
            if isinstance(target, int | float):
                args.check_target_ongoing_requests(target)
            args.with_user_config(deployment.get("user_config"))
        except ConfigError as error:
            found.append(f"{here}.{error}")
    return found


def _check_gateway(where: str, application: Mapping[str, Any], host: str | None) -> list[str]:
    try:
        args = parse_args(application.get("args"))
        if host is not None:
            Keys(args.auth, host, os.environ)
    except ConfigError as error:
        return [f"{where}: {error}"]
    return []


def _unknown_keys(where: str, section: Mapping[str, Any], schema: type[BaseModel]) -> list[str]:
    known = list(schema.model_fields)
    found = []
    for key in section:
        if key in known:
            continue
        close = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        found.append(f"{where}{'.' if where else ''}{key}: there is no such key; {hint}known here: {', '.join(known)}")
    return found


def _mappings(value: Any) -> Iterable[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def main(arguments: list[str], *, serving: bool = True) -> int:
    """Check the named files; return 0 where all are right."""
    status = 0
    for name in arguments or ["serve_config.yaml"]:
        for line in check_file(Path(name), serving=serving):
            print(f"{name}: {line}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
