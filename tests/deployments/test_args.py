from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.serve.exceptions import RayServeException

from deployments.app import build
from deployments.args import ModelArgs
from deployments.check import check_file, main
from optim import ConfigError

TINY = "tests.support.servables:Tiny"
ROOT = Path(__file__).parents[2]


def test_the_name_comes_from_the_class() -> None:
    args = ModelArgs.parse({"model": "deployments.vision:ImageClassifier"})
    assert args.name == "image-classifier"
    assert ModelArgs.parse({"model": TINY, "name": "my-model"}).name == "my-model"
    assert args.batching.batch_sizes == [1, 2, 4, 8]
    assert args.pt2.compile.backend == "auto"


def test_a_backend_registered_by_the_servables_module_is_known() -> None:
    args = ModelArgs.parse({"model": TINY, "pt2": "pt2test_raises"})
    assert args.pt2.compile.backend == "pt2test_raises"


MISTAKES: list[tuple[Any, str]] = [
    (None, "args: None is not allowed; use a mapping"),
    ({}, "args.model: None is not allowed; name the model"),
    ({"model": "nope"}, "args.model: 'nope' is not allowed; use package.module:Class"),
    ({"model": "no.such:Thing"}, "args.model: 'no.such:Thing'.*importing no.such ended in ModuleNotFoundError"),
    ({"model": "deployments.vision:Clasifier"}, "deployments.vision has the models ImageClassifier"),
    ({"model": "tests.support.models:Mlp"}, "name a subclass of deployments.servable.Servable"),
    ({"model": TINY, "modle_args": {}}, "args.modle_args: {}.*did you mean 'model_args'"),
    ({"model": TINY, "model_args": {"colour": 1}}, "args.model_args: {'colour': 1}.*unexpected keyword|no arguments"),
    ({"model": TINY, "batching": {"batch_sizes": [1, "2"]}}, r"args.batching.batch_sizes: \[1, '2'\].*a list"),
    ({"model": TINY, "batching": {"batch_sizes": [0]}}, "batch_sizes: 0 is not allowed"),
    ({"model": TINY, "batching": {"batch_size": [1]}}, "args.batching.batch_size: .*did you mean 'batch_sizes'"),
    ({"model": TINY, "batching": {"wait_ms": -1}}, "args.batching.wait_ms: -1.0 is not allowed; use 0 or more"),
    ({"model": TINY, "batching": {"max_queue": 4}}, "args.batching.max_queue: 4 is not allowed; use 8 or more"),
    ({"model": TINY, "limits": {"timeout_s": 0}}, "args.limits.timeout_s: 0.0 is not allowed"),
    ({"model": TINY, "limits": {"bytes_in_flight": 0}}, "args.limits.bytes_in_flight: 0 is not allowed; use 1 or"),
    ({"model": TINY, "batching": {"lengths": [8], "token_budget": 0}}, "token_budget: 0 is not allowed"),
    ({"model": TINY, "threads": 0}, "args.threads: 0 is not allowed; use 1 or more"),
    ({"model": TINY, "version": "a/b"}, "args.version: 'a/b' is not allowed"),
    ({"model": TINY, "name": ""}, "args.name: '' is not allowed"),
    ({"model": TINY, "pt2": {"compile": {"enabel": True}}}, "pt2.compile.enabel: True.*did you mean 'enable'"),
    ({"model": "deployments.vision:ImageClassifier", "model_args": {"weights": "x"}}, "'x' is not one of efficient"),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES)
def test_a_mistake_names_key_value_and_what_is_allowed(args: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelArgs.parse(args)
    # The one kind of error that Ray Serve reports without a traceback, and without trying three times.
    with pytest.raises(RayServeException, match=message):
        build(args)


def test_build_makes_the_deployment_that_the_configuration_names() -> None:
    app = build({"model": TINY, "batching": {"max_queue": 10}})
    deployment = app._bound_deployment
    assert deployment.name == "tiny"
    assert deployment.max_ongoing_requests == 74


def test_lengths_come_from_the_servable_where_none_are_given() -> None:
    encoder = {"model": "deployments.text:SentenceEncoder"}
    assert ModelArgs.parse(encoder).batching.lengths == [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256]
    assert ModelArgs.parse({**encoder, "model_args": {"max_length": 40}}).batching.lengths == [16, 32, 40]
    assert ModelArgs.parse({**encoder, "batching": {"lengths": [64]}}).batching.lengths == [64]
    assert ModelArgs.parse({"model": TINY}).batching.lengths is None


def test_a_user_config_changes_what_it_names() -> None:
    args = ModelArgs.parse({"model": TINY, "limits": {"timeout_s": 9}})
    changed, level = args.with_user_config({"wait_ms": 3, "max_queue": 20, "rows": 5, "log_level": "WARNING"})
    assert (changed.batching.wait_ms, changed.batching.max_queue, changed.limits.rows) == (3, 20, 5)
    assert (changed.limits.timeout_s, level) == (9, "WARNING")
    assert args.with_user_config(None) == (args, None)


@pytest.mark.parametrize(
    ("user_config", "message"),
    [
        ({"batch_sizes": [1]}, "user_config.batch_sizes: .*there is no such key"),
        ({"max_queue": 65}, "user_config.max_queue: 65 is not allowed; use 64 .*or less"),
        ({"max_queue": 2}, "batching.max_queue: 2 is not allowed; use 8 or more"),
        ({"wait_ms": "soon"}, "user_config.wait_ms: 'soon' is not allowed; use a number"),
        ({"log_level": "LOUD"}, "user_config.log_level: 'LOUD' is not allowed; use 'DEBUG' or 'INFO'"),
        ([1], "user_config: .* is not allowed; use a mapping"),
    ],
)
def test_a_user_config_with_a_mistake_is_refused(user_config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelArgs.parse({"model": TINY}).with_user_config(user_config)


def test_the_shipped_configuration_is_right() -> None:
    assert check_file(ROOT / "serve_config.yaml") == []


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("enable: true", "enabel: true", "applications[0]: pt2.compile.enabel: True is not allowed"),
        (
            "num_cpus: 0.5}",
            "num_cpus: 0.5}\n        num_replica: 2",
            "deployments[0].num_replica: there is no such key",
        ),
        (
            "route_prefix: /",
            "route_prefx: /",
            "applications[0].route_prefx: there is no such key; did you mean 'route_",
        ),
        ("http_options:", "http_option:", "http_option: there is no such key; did you mean 'http_options'?"),
        (
            "- name: image-classifier\n        ray",
            "- name: classifier\n        ray",
            "this model's is 'image-classifier'",
        ),
        ("port: 8000", "port: eight", "http_options.port"),
        (
            "num_cpus: 0.5}",
            "num_cpus: 0.5}\n        max_ongoing_requests: 8",
            "deployments[0].max_ongoing_requests: 8 is not allowed; leave it out (128 is derived",
        ),
        (
            "target_ongoing_requests: 16",
            "target_ongoing_requests: 65",
            "deployments[0].autoscaling_config.target_ongoing_requests: 65 is not allowed; use 64 (batching.max_queue)",
        ),
        (
            "num_cpus: 0.5}",
            "num_cpus: 0.5}\n        user_config: {batch_sizes: [1]}",
            "deployments[0].user_config.batch_sizes: [1] is not allowed; there is no such key",
        ),
        ("applications:", "applications: {", "not YAML"),
    ],
)
def test_every_typo_in_the_file_is_found_by_name(
    right: str, wrong: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "serve_config.yaml").read_text()
    assert right in text
    path = tmp_path / "config.yaml"
    path.write_text(text.replace(right, wrong))
    assert main([str(path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert any(message in line for line in lines), lines
    assert "Traceback" not in "\n".join(lines)
    assert main([str(tmp_path / "absent.yaml")]) == 1
