from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from optim import Pt2Config, compile_model
from optim.device import inspect_device
from tests.support import models

OPENVINO = inspect_device(torch.device("cpu")).capabilities["openvino"]
needs_openvino = pytest.mark.skipif(not OPENVINO.available, reason=OPENVINO.detail)
SECTION = {"compile": {"backend": "openvino", "only_if_faster": False}}


@needs_openvino
def test_nobody_is_told_what_is_served() -> None:
    script = f"""
import sys
from optim import compile_model
from tests.support import models
model = compile_model(models.Mlp(), models.features, {SECTION}, batch_sizes=(1,), device="cpu")
assert model.report.engines() == {{"1": "openvino"}}, model.report
assert not [name for name in sys.modules if name.startswith("openvino_telemetry.")]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


@needs_openvino
def test_nor_by_way_of_torchs_compile() -> None:
    script = """
import sys
from optim import compile_model
from tests.support import models
section = {"compile": {"backend": "openvino", "options": {"device": "CPU"}, "only_if_faster": False}}
model = compile_model(models.Mlp(), models.features, section, batch_sizes=(1,), device="cpu")
assert "openvino" in sys.modules, model.report
assert not [name for name in sys.modules if name.startswith("openvino_telemetry.")]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


@needs_openvino
def test_a_race_loads_no_compiler_here_that_is_not_in_it() -> None:
    """To list torch's backends imports them all, ONNX Runtime with them."""
    script = """
import sys
from optim import compile_model
from tests.support import models
section = {"tune": {"engines": ["openvino"], "budget_s": 60}, "compile": {"only_if_faster": False}}
model = compile_model(models.Mlp(), models.features, section, batch_sizes=(1,), device="cpu")
assert model.report.engines() == {"1": "openvino"}, model.report
assert model.report.buckets[0].race, model.report
assert not {"onnxruntime", "onnxscript", "torch._dynamo.backends.onnxrt"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


@needs_openvino
def test_what_a_trace_would_bake_in_is_refused() -> None:
    model = compile_model(models.Branchy(), models.features, SECTION, batch_sizes=(1,), device="cpu")
    assert model.report.engines() == {"1": "eager"}
    assert "reads tensor values in Python" in model.report.refusals[0].message


@pytest.mark.skipif(OPENVINO.available, reason="OpenVINO is here")
def test_without_the_package_it_is_a_fallback() -> None:
    model = compile_model(models.Mlp(), models.features, SECTION, batch_sizes=(1,), device="cpu")
    assert model.report.engines() == {"1": "eager"}
    assert model.report.refusals[0].message == "the package openvino is not installed"


def test_its_options_are_those_of_its_torch_compile_backend() -> None:
    section = {"compile": {"backend": "openvino", "options": {"device": "CPU"}}}
    assert Pt2Config.parse(section).compile.options == {"device": "CPU"}
