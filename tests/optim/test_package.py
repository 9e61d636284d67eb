"""What importing `optim` does, and what it does not."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import optim

FOLDER = Path(optim.__file__).parent


def test_no_file_of_optim_imports_ray() -> None:
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            assert not [n for n in names if n.split(".")[0] in ("ray", "deployments", "pydantic", "starlette")], path


def test_importing_optim_changes_nothing_global() -> None:
    script = """
import os, sys, torch
before = (dict(os.environ), torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled())
import optim
after = (dict(os.environ), torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled())
assert before == after, "importing optim changed something"
assert not [name for name in sys.modules if name.split(".")[0] in ("ray", "intel_extension_for_pytorch")]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, cwd=FOLDER.parent)
