from __future__ import annotations

import copy
from typing import Any

import pytest

from optim import ConfigError, Pt2Config

TORCHSERVE_FORMS: list[tuple[Any, str, bool]] = [
    (None, "auto", True),
    ({}, "auto", True),
    ("inductor", "inductor", True),
    ({"backend": "inductor"}, "inductor", True),
    ({"backend": "inductor", "mode": "reduce-overhead"}, "inductor", True),
    ({"compile": None}, "auto", True),
    ({"compile": {}}, "auto", True),  # a KeyError in TorchServe
    ({"compile": {"enable": True}}, "auto", True),
    ({"compile": {"enable": False}}, "auto", False),
    ({"compile": {"enable": True, "backend": "inductor", "mode": "max-autotune"}}, "inductor", True),
    ({"compile": {"enable": True, "backend": "inductor", "dynamic": True, "fullgraph": True}}, "inductor", True),
    ({"compile": {"enable": True, "options": {"triton.cudagraphs": True}}}, "auto", True),
    ({"compile": {"enable": True, "backend": "openvino"}}, "openvino", True),
    ({"disable": True}, "auto", False),
]


@pytest.mark.parametrize(("section", "backend", "enable"), TORCHSERVE_FORMS)
def test_every_form_of_torchserve_is_read_and_left_unchanged(section: Any, backend: str, enable: bool) -> None:
    before = copy.deepcopy(section)
    config = Pt2Config.parse(section)
    assert (config.compile.backend, config.compile.enable) == (backend, enable)
    assert section == before


def test_export_is_read() -> None:
    config = Pt2Config.parse({"export": {"aot_compile": True}})
    assert config.export.aot_compile
    assert Pt2Config.parse({"export": {"aot_compile": True}, "compile": {"enable": False}}).export.aot_compile
    assert Pt2Config.parse("export") == config  # its oldest form


def test_values_arrive() -> None:
    section = {"compile": {"mode": "reduce-overhead", "dynamic": False, "fullgraph": True}, "fallback": "fail"}
    config = Pt2Config.parse(section)
    assert config.compile.mode == "reduce-overhead"
    assert config.compile.dynamic is False
    assert config.compile.fullgraph
    assert config.fallback == "fail"
    assert Pt2Config.parse(config) is config
    assert Pt2Config.parse({"verify": {"tolerance": 0.01}}).to_dict()["verify"]["tolerance"] == 0.01


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (["inductor"], r"pt2: \['inductor'\] is not allowed; use a backend's name or a mapping"),
        (True, "pt2: True is not allowed"),
        ({"compil": {}}, r"pt2.compil: \{\} is not allowed; there is no such key; did you mean 'compile'\?"),
        ({"compile": {"enabel": True}}, "pt2.compile.enabel: True is not allowed.*did you mean 'enable'"),
        ({"compile": {"enable": "yes"}}, "pt2.compile.enable: 'yes' is not allowed; use true or false"),
        ({"compile": {"enable": 1}}, "pt2.compile.enable: 1 is not allowed; use true or false"),
        ({"compile": "inductor"}, "pt2.compile: 'inductor' is not allowed; use a mapping"),
        ({"compile": {"backend": "inductr"}}, "pt2.compile.backend: 'inductr'.*did you mean 'inductor'.*use one of"),
        (
            {"compile": {"mode": "fast"}},
            "pt2.compile.mode: 'fast'.*use one of default, .*reduce-overhead",
        ),
        ({"compile": {"mode": 3}}, "pt2.compile.mode: 3 is not allowed; use text or nothing"),
        ({"compile": {"mode": "default", "options": {}}}, "pt2.compile.mode: 'default'.*mode or options, not both"),
        ({"compile": {"options": {"max_autotun": True}}}, "options.max_autotun: True.*no such option.*max_autotune"),
        ({"compile": {"options": {"max_autotune": "x"}}}, "options.max_autotune: 'x'.*Inductor expects bool"),
        ({"compile": {"options": [1]}}, r"pt2.compile.options: \[1\] is not allowed; use a mapping"),
        (
            {"compile": {"enable": True, "disable": False}},
            "pt2.compile.disable: False.*use enable alone",
        ),
        ({"compile": {}, "mode": "default"}, "pt2.mode: 'default' is not allowed; write it inside pt2.compile"),
        ({"compile": {"enable": True}, "export": {"aot_compile": True}}, "not together with pt2.compile"),
        ({"export": {"aot_compil": True}}, "pt2.export.aot_compil.*did you mean 'aot_compile'"),
        ({"fallback": "never"}, "pt2.fallback: 'never' is not allowed; use 'eager' or 'fail'"),
        ({"autocast": "float8"}, "pt2.autocast: 'float8'.*use true or false"),
        ({"matmul_precision": "tf32"}, "pt2.matmul_precision: 'tf32'.*'highest' or 'high' or 'medium'"),
        ({"attention": {"prefill": "math"}}, "pt2.attention.prefill: 'math'.*'flash' or 'efficient' or 'cudnn'"),
        ({"tune": {"budget_s": 0}}, "pt2.tune.budget_s: 0.0.*seconds above 0"),
        ({"tune": {"engines": ["opnvino"]}}, r"pt2.tune.engines\[0\]: 'opnvino'.*did you mean 'openvino'"),
        ({"tune": {"engines": ["auto"]}}, r"pt2.tune.engines\[0\]: 'auto'"),
        ({"tune": {"engines": ["ipex"]}, "compile": {"backend": "ipex"}}, "pt2.tune.engines.*backend: auto"),
        ({"export": {"path": "a.pt2"}}, "pt2.export.path: 'a.pt2'.*aot_compile: true"),
        ({"verify": {"tolerance": 2}}, "pt2.verify.tolerance: 2.0 is not allowed; use a number between 0 and 1"),
        ({"verify": {"warmup_calls": 1}}, "pt2.verify.warmup_calls: 1 is not allowed; use 3 or more"),
    ],
)
def test_mistakes_are_refused_with_key_value_and_what_is_allowed(section: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pt2Config.parse(section)
