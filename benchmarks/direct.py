"""ONNX Runtime and OpenVINO called as their own documentation says, without any of this package."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn

from benchmarks.models import Subject
from optim import compile_model
from optim.timing import time_in_turn

Runner = Callable[..., Any]


def onnxruntime_itself(module: nn.Module, inputs: tuple[torch.Tensor, ...], threads: int) -> Runner:
    """Return a session's own run, exported for exactly these inputs."""
    import onnxruntime

    with redirect_stdout(io.StringIO()):
        program = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [found.name for found in session.get_inputs()]
    return lambda *tensors: session.run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})


def openvino_itself(module: nn.Module, inputs: tuple[torch.Tensor, ...], threads: int) -> Runner:
    """Return a compiled model's own call, converted for exactly these inputs, in float32."""
    from optim.device import import_openvino

    openvino = import_openvino()
    model = openvino.convert_model(module, example_input=inputs)
    model.reshape({port: list(t.shape) for port, t in zip(model.inputs, inputs, strict=True)})
    properties = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(model, "CPU", properties).create_infer_request()
    return lambda *tensors: request.infer([t.numpy() for t in tensors], share_inputs=True)


DIRECT: dict[str, Callable[[nn.Module, tuple[torch.Tensor, ...], int], Runner]] = {
    "ONNX Runtime": onnxruntime_itself,
    "OpenVINO": openvino_itself,
}


def against_direct(subject: Subject, threads: int) -> dict[str, Any]:
    """Time what `auto` chose, through its public call, in turn with both engines called directly."""
    torch.set_num_threads(threads)
    module = subject.load()
    model = compile_model(
        module, subject.example, batch_sizes=subject.batch_sizes, lengths=subject.lengths, device="cpu"
    )
    engines = model.report.engines()
    rows = {}
    with torch.no_grad():
        for bucket in model.buckets:
            inputs = subject.example(bucket.batch_size, bucket.length or None)
            runs: list[Runner] = [model, *(make(module, inputs, threads) for make in DIRECT.values())]
            for run in runs:
                run(*inputs)
            times = time_in_turn(runs, inputs, torch.device("cpu"), min_rounds=15, budget_s=5, pause_s=0.05)
            rows[str(bucket)] = {
                "engine": engines[str(bucket)],
                **dict(zip(["auto", *DIRECT], (round(ms, 3) for ms in times), strict=True)),
            }
    return {"direct": list(DIRECT), "buckets": rows}
