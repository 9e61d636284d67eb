from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from deployments.args import ModelArgs
from deployments.errors import BadRequest
from deployments.http import make_app
from deployments.tensor import TensorModel
from optim import ConfigError
from tests.support import backends, models  # noqa: F401 (registers the backend below)
from tests.support.local import serve_locally

TENSOR_MODEL = "deployments.tensor:TensorModel"
ROW = [0.5, -1, 2, 0, 1, 3, -2, 0.25]
KEEP = {"compile": {"backend": "pt2test_faithful", "only_if_faster": False}}


def answers_like_eager(args: dict[str, Any], module: torch.nn.Module) -> dict[str, Any]:
    """Serve the model and compare both protocols with eager; return the compile report."""
    with serve_locally(args) as service, TestClient(make_app(service)) as client:
        with torch.no_grad():
            want = module(torch.tensor([ROW, ROW]))
        reply = client.post(f"/predictions/{service.name}", json=ROW)
        assert reply.json() == pytest.approx(want[0].tolist(), abs=1e-5), reply.text
        name = service.inputs[0].name
        body = {"inputs": [{"name": name, "shape": [2, 8], "datatype": "FP32", "data": [ROW, ROW]}]}
        reply = client.post(f"/v2/models/{service.name}/infer", json=body)
        assert reply.json()["outputs"][0]["data"] == pytest.approx(want.flatten().tolist(), abs=1e-5), reply.text
        return service.report()


def test_a_module_factory() -> None:
    args = {
        "model": TENSOR_MODEL,
        "name": "mlp",
        "model_args": {
            "module": "tests.support.models:make_mlp",
            "module_args": {"seed": 3},
            "inputs": [{"shape": [8], "low": -1.0, "high": 1.0}],
        },
    }
    # tests.support.backends is imported by the servables of tests only.
    report = answers_like_eager({**args, "pt2": {"compile": {"enable": False}}}, models.Mlp(seed=3).eval())
    assert report["padding"]


def test_an_exported_archive_brings_its_own_inputs(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    module = models.Mlp(seed=4).eval()
    dynamic = {"features": {0: torch.export.Dim("batch", min=1, max=64)}}
    torch.export.save(torch.export.export(module, models.features(2), dynamic_shapes=dynamic), path)
    args = {"model": TENSOR_MODEL, "model_args": {"archive": str(path)}, "pt2": KEEP}
    report = answers_like_eager(args, module)
    assert {b["engine"] for b in report["buckets"]} == {"pt2test_faithful"}, report


def test_a_torchscript_file_is_served_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    module = models.Mlp(seed=5).eval()
    torch.jit.trace(module, models.features(2)).save(str(path))
    inputs = [{"name": "features", "shape": [8]}]
    args = {"model": TENSOR_MODEL, "model_args": {"torchscript": str(path), "inputs": inputs}}
    report = answers_like_eager(args, module)
    assert {b["engine"] for b in report["buckets"]} == {"eager"}
    assert any("TorchScript" in r["message"] for r in report["refusals"])


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({}, {0, 1}),
        ({"low": 1, "high": 2}, {1}),
        ({"high": 1}, {0}),
        ({"vocabulary": 1}, {0}),
        ({"low": 1, "vocabulary": 2}, {1}),
        ({"vocabulary": 3}, {0, 1, 2}),
    ],
)
def test_examples_of_whole_numbers_are_in_their_range(given: dict[str, Any], values: set[int]) -> None:
    inputs = [{"shape": [64], "dtype": "int64", **given}]
    model = TensorModel(module="tests.support.models:make_mlp", inputs=inputs)
    (example,) = model.example(4, None)
    assert set(example.unique().tolist()) == values
    model.check((example,))


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"vocabulary": 0}, r"inputs\[0\]\.vocabulary"),
        ({"vocabulary": 9, "dtype": "float32"}, r"inputs\[0\]\.vocabulary"),
        ({"vocabulary": 200, "dtype": "int8"}, r"inputs\[0\]\.vocabulary: 200 .* use 1 to 128"),
        ({"vocabulary": 9, "high": 10}, r"inputs\[0\]: {'low': 0.0, 'high': 10.0}"),
        ({"vocabulary": 9, "low": 9}, r"inputs\[0\]: {'low': 9"),
        ({"vocabulary": 9, "low": -1}, r"inputs\[0\]: {'low': -1"),
    ],
)
def test_a_vocabulary_that_its_own_examples_leave_is_refused(given: dict[str, Any], key: str) -> None:
    inputs = [{"shape": [2], "dtype": "int64", **given}]
    with pytest.raises(ConfigError, match=key):
        TensorModel(module="tests.support.models:make_mlp", inputs=inputs)


def test_two_inputs_lengths_and_a_mapping_out() -> None:
    args = {
        "model": TENSOR_MODEL,
        "name": "mean",
        "model_args": {
            "module": "tests.support.models:MaskedMean",
            "inputs": [
                {"name": "ids", "shape": [-1], "dtype": "int64", "low": 1, "vocabulary": 50},
                {"name": "mask", "shape": [-1], "dtype": "int64", "low": 1, "high": 2},
            ],
        },
        "batching": {"batch_sizes": [1, 2], "lengths": [4, 8]},
        "pt2": {"compile": {"enable": False}},
    }
    with serve_locally(args) as service, TestClient(make_app(service)) as client:
        ids, mask = [3, 7, 9], [1, 1, 0]
        reply = client.post("/predictions/mean", json={"ids": ids, "mask": mask})
        want = models.MaskedMean().eval()(torch.tensor([ids]), torch.tensor([mask]))
        assert reply.json()["mean"] == pytest.approx(want["mean"][0].tolist(), abs=1e-6)
        assert np.shape(reply.json()["tokens"]) == (3, 6)
        metadata = client.get("/v2/models/mean").json()
        assert [(i["name"], i["shape"]) for i in metadata["inputs"]] == [("ids", [-1, -1]), ("mask", [-1, -1])]
        assert [o["name"] for o in metadata["outputs"]] == ["mean", "tokens"]
        for wrong in (50, -1, 10**9):
            tensors = [
                {"name": name, "shape": [1, 3], "datatype": "INT64", "data": data}
                for name, data in (("ids", [3, wrong, 9]), ("mask", mask))
            ]
            for path, body in (
                ("v2/models/mean/infer", {"inputs": tensors}),
                ("predictions/mean", {"ids": [wrong], "mask": [1]}),
            ):
                reply = client.post(f"/{path}", json=body)
                assert reply.status_code == 400
                assert f"input ids: {wrong} is not allowed; use whole numbers from 0, below 50" in reply.text
        reply = client.post("/predictions/mean", json={"ids": ids})
        assert reply.status_code == 400
        assert "the inputs must be ids, mask; got ids" in reply.json()["message"]


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"raw", "send JSON"),
        (["a"], "not a tensor"),
        ([[1, 2], [3]], "not a tensor"),
        ({"other": 1}, "the inputs must be input_0"),
        (([1], [2]), "takes 1 inputs, the request has 2"),
    ],
)
def test_what_is_no_row_is_a_bad_request(payload: Any, message: str) -> None:
    servable = TensorModel(module="tests.support.models:make_mlp", inputs=[{"shape": [8]}])
    with pytest.raises(BadRequest, match=message):
        servable.preprocess(payload)


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ({}, "name exactly one of module, archive, torchscript"),
        ({"module": "a:b", "archive": "x"}, "name exactly one of"),
        ({"module": "tests.support.models"}, "use package.module:factory"),
        ({"module": "tests.support.models:nope", "inputs": [{"shape": [8]}]}, "it cannot be imported"),
        ({"module": "tests.support.models:make_mlp"}, "describe at least one input"),
        ({"archive": "/no/such/file.pt2"}, "name a file that exists"),
        ({"module": "tests.support.models:make_mlp", "inputs": [{"shap": [8]}]}, r"inputs\[0\].shap: .*'shape'"),
        ({"module": "tests.support.models:make_mlp", "inputs": [{"shape": [8], "dtype": "float"}]}, ""),
        ({"module": "tests.support.models:make_mlp", "inputs": [{"shape": [8], "dtype": "f4"}]}, "use a torch dtype"),
    ],
)
def test_arguments_are_checked_before_anything_is_loaded(model_args: dict[str, Any], message: str) -> None:
    args = {"model": TENSOR_MODEL, "model_args": model_args}
    if not message:
        ModelArgs.parse(args)
        return
    with pytest.raises(ConfigError, match=message):
        ModelArgs.parse(json.loads(json.dumps(args)))
