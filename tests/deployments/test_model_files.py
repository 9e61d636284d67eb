"""A file of another kind than the one asked for is refused when the configuration is read."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from deployments.args import ModelArgs
from deployments.model_files import find_mistake
from optim.errors import ConfigError


def example() -> tuple[torch.nn.Module, torch.Tensor]:
    return torch.nn.Linear(3, 2).eval(), torch.rand(2, 3)


def save_torchscript(path: Path) -> None:
    model, rows = example()
    torch.jit.save(torch.jit.trace(model, rows), path)


def save_archive(path: Path) -> None:
    model, rows = example()
    torch.export.save(torch.export.export(model, (rows,)), path)


def save_older_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name in ("serialized_exported_program.json", "serialized_state_dict.pt", "version"):
            file.writestr(name, "")


def save_package(path: Path) -> None:
    """Write the names that AOTInductor's packages have, also those without a C++ compiler."""
    with zipfile.ZipFile(path, "w") as file:
        for name in ("a/data/aotinductor/model/c.wrapper.so", "a/archive_format", "a/archive_version", "a/byteorder"):
            file.writestr(name, "")


def save_safetensors(path: Path) -> None:
    safetensors.torch.save_file(dict(example()[0].state_dict()), path)


def save_weights(path: Path) -> None:
    torch.save(example()[0].state_dict(), path)


def save_old_weights(path: Path) -> None:
    torch.save(example()[0].state_dict(), path, _use_new_zipfile_serialization=False)


def save_mar(path: Path) -> None:
    weights = path.with_name("weights.pth")
    save_weights(weights)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", "{}")
        file.write(weights, "weights.pth")


def save_something(path: Path) -> None:
    path.write_bytes(b"what nobody knows")


def configure(path: Path) -> None:
    """Read a configuration that names the file as TorchScript."""
    model_args = {"torchscript": str(path), "inputs": [{"shape": [3]}]}
    ModelArgs.parse({"model": "deployments.tensor:TensorModel", "model_args": model_args}).make_servable()


@pytest.mark.parametrize(
    ("save", "right", "words"),
    [
        (save_torchscript, {"torchscript"}, "name it as `torchscript`"),
        (save_archive, {"archive"}, "name it as `archive`"),
        (save_older_archive, {"archive"}, "name it as `archive`"),
        (save_package, set(), "AOTInductor"),
        (save_weights, set(), "torch.save"),
        (save_old_weights, set(), "torch.save"),
        (save_safetensors, set(), "weights alone"),
        (save_mar, set(), "unzip"),
        (save_something, {"archive", "torchscript"}, ""),
    ],
)
def test_what_is_recognised_as_something_else_is_refused(
    save: Callable[[Path], None], right: set[str], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt2"
    save(path)
    for source in ("archive", "torchscript"):
        mistake = find_mistake(source, path)
        assert (mistake is None) is (source in right), mistake
        assert mistake is None or words in mistake


def test_the_file_is_looked_at_when_the_configuration_is_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    save_weights(path)
    with pytest.raises(ConfigError, match=r"model_args\.torchscript.*weights\.pth.*torch\.jit\.save.*factory"):
        configure(path)


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "model.pt"
    save_torchscript(path)
    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(ConfigError, match=r"model_args\.torchscript.*Permission denied"):
        configure(path)
