"""A mistake in the configuration ends `serve run` with one message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_serve_run_ends_with_the_key_named(tmp_path: Path) -> None:
    text = (ROOT / "serve_config.yaml").read_text().replace("enable: true", "enabel: true")
    text = text.replace("port: 8000", f"port: {free_port()}")
    assert "enabel" in text
    path = tmp_path / "config.yaml"
    path.write_text(text)
    done = subprocess.run(
        [str(Path(sys.executable).parent / "serve"), "run", "--address", "local", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    output = done.stdout + done.stderr
    assert output.count("pt2.compile.enabel: True is not allowed; there is no such key; did you mean 'enable'?") == 1
    assert "Traceback" not in output
