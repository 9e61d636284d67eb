from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.check import check_file
from deployments.from_torchserve import convert, main
from optim.errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "serve_config.yaml"
MODEL = "tests.support.servables:Tiny"


def translate(**given: Any) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return args, deployment and remarks."""
    found = convert(given, MODEL, "tiny")
    (application,) = found.config["applications"]
    (deployment,) = application["deployments"]
    return application["args"], deployment, found.remarks


@pytest.mark.parametrize(
    "section",
    [
        "inductor",
        "export",
        {"backend": "openvino"},
        {"compile": {"enable": True, "mode": "reduce-overhead"}},
        {"export": {"aot_compile": True}},
    ],
)
def test_a_pt2_section_stays_what_it_is(section: Any) -> None:
    args, _, remarks = translate(pt2=section)
    assert (args["pt2"], remarks) == (section, [])


def test_workers_batches_and_devices() -> None:
    args, deployment, remarks = translate(
        minWorkers=2, maxWorkers=4, batchSize=12, jobQueueSize=500, responseTimeout=300, deviceType="gpu"
    )
    assert args["batching"] == {"batch_sizes": [1, 2, 4, 8, 12], "max_queue": 500}
    assert args["limits"] == {"timeout_s": 300.0}
    # Two full batches: by Ray's own two requests, replicas would be started before a batch is full.
    assert deployment["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 4, "target_ongoing_requests": 24}
    assert deployment["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1}
    assert remarks == []
    _, deployment, _ = translate(maxWorkers=3)
    assert deployment["autoscaling_config"] == {"min_replicas": 3, "max_replicas": 3}
    args, _, _ = translate(batchSize=100)
    assert args["batching"] == {"batch_sizes": [1, 2, 4, 8, 16, 32, 64, 100], "max_queue": 100}
    args, deployment, _ = translate(batchSize=1, jobQueueSize=1, maxWorkers=2, minWorkers=1)
    assert args["batching"] == {"batch_sizes": [1], "max_queue": 1}
    assert deployment["autoscaling_config"]["target_ongoing_requests"] == 1


def test_what_torchserve_took_for_nothing_is_nothing() -> None:
    given = {"jobQueueSize": -1, "minWorkers": 0, "maxWorkers": 4, "batchSize": 0, "responseTimeout": -1}
    args, deployment, remarks = translate(**given)
    assert (args["batching"], "limits" in args, remarks) == ({"batch_sizes": [1]}, False, [])
    assert deployment["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 2}
    assert any(change.startswith("a run had 120 s") for change in convert(given, MODEL, "tiny").changes)


def test_a_clients_patience_bounds_a_request() -> None:
    args, _, remarks = translate(responseTimeout=300, clientTimeoutInMills=1500)
    assert args["limits"] == {"timeout_s": 1.5}
    assert remarks == ["responseTimeout: 300: a request ends with clientTimeoutInMills"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, {"no deviceType", "no minWorkers", "workers had", "a run had 120 s", "no batchSize", "no pt2"}),
        (
            {"deviceType": "GPU", "minWorkers": 1, "maxWorkers": 2, "responseTimeout": 9, "pt2": "inductor"},
            {
                "workers shared GPUs",
                "there were minWorkers",
                "workers had",
                "no batchSize",
                "responseTimeout ended a worker",
            },
        ),
        (
            {"deviceType": "cpu", "minWorkers": 2, "clientTimeoutInMills": 9, "pt2": "inductor", "batchSize": 2},
            {"workers had", "responseTimeout ended a worker"},
        ),
    ],
)
def test_what_was_otherwise_by_default_is_told(given: dict[str, Any], told: set[str]) -> None:
    changes = convert(given, MODEL, "tiny").changes
    assert len(changes) == len(told)
    for start in told:
        assert any(change.startswith(start) for change in changes), changes


def test_the_case_of_a_device_does_not_matter() -> None:
    _, deployment, remarks = translate(deviceType="GPU")
    assert (deployment["ray_actor_options"]["num_gpus"], remarks) == (1, [])
    _, deployment, remarks = translate(deviceType="Cpu")
    assert (deployment["ray_actor_options"], remarks) == ({"num_cpus": 1}, [])


def test_what_has_no_counterpart_is_told() -> None:
    _, _, remarks = translate(
        maxBatchDelay=100, handler={"max_length": 150}, parallelType="tp", deviceType="tpu", useVenv=True
    )
    assert len(remarks) == 5
    assert "handler: {'max_length': 150}: these are settings of your handler" in "\n".join(remarks)
    assert "useVenv: True: this server has no such setting" in remarks


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"minWorkers": "a"}, "minWorkers: 'a' is not allowed; use a whole number"),
        ({"batchSize": True}, "batchSize: True"),
        ({"pt2": {"compile": {"enable": True}, "ao": {"enable": True}}}, r"pt2\.ao"),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translate(**given)


def test_what_is_printed_is_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model-config.yaml"
    file.write_text("minWorkers: 1\nmaxWorkers: 2\nbatchSize: 4\nmaxBatchDelay: 50\npt2: {backend: inductor}\n")
    assert main([str(file), "--model", MODEL, "--name", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "# From TorchServe's model-config.yaml. The model's version is a guess, which URLs may have.\n"
        "# Not taken over: maxBatchDelay: 50: nobody waits"
    )
    assert "\n# Other than there: no deviceType was every GPU" in printed
    made = tmp_path / "serve_config.yaml"
    made.write_text(printed)
    assert check_file(made) == []
    found = yaml.safe_load(printed)
    assert found["http_options"]["host"] == "127.0.0.1"
    assert found["grpc_options"] == yaml.safe_load(SHIPPED.read_text())["grpc_options"]
    assert found["applications"][0]["args"]["version"] == "1.0"


@pytest.mark.parametrize("content", [None, "[1]", "a: b: c", "pt2: {compile: {enabel: true}}"])
def test_a_file_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None) -> None:
    file = tmp_path / "model-config.yaml"
    if content is not None:
        file.write_text(content)
    assert main([str(file)]) == 1
    found = capsys.readouterr()
    assert found.out == ""
    assert str(file) in found.err
