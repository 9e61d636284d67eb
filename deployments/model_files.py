"""What kind of file a model is in, by the names inside: none of it is loaded, since loading it runs its code."""

from __future__ import annotations

import zipfile
from pathlib import Path

#: What the sources of `TensorModel` that are files want.
_WANTED = {"archive": "a file of torch.export.save", "torchscript": "a file of torch.jit.save"}
_ADVICE = {
    "archive": "a torch.export archive: name it as `archive`",
    "torchscript": "a TorchScript file: name it as `torchscript`",
    "aoti": "a package of AOTInductor, compiled for one kind of machine: name as `archive` what torch.export.save "
    "makes of the model, which replicas compile where they run",
    "mar": "a TorchServe archive: unzip it and name the model's file inside, or make its handler a Servable",
    "weights": "weights or a module from torch.save: name a factory that loads them as `module`",
    "safetensors": "weights alone: name a factory that loads them as `module`",
}


def find_mistake(source: str, path: Path) -> str | None:
    """Return what to do instead where a file is another kind than `source` wants; None also for one not recognised.

    The kinds are told by what torch 2.8 to 2.13, torch-model-archiver and older torch.export write.
    """
    try:
        kinds = _kinds(path)
    except OSError as error:
        return f"name a file that can be read: {error}"
    if source in kinds or not kinds:
        return None
    return f"name {_WANTED[source]}; this is {_ADVICE[kinds[0]]}"


def _kinds(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except (UnicodeDecodeError, NotImplementedError):  # no zip of ours, yet one
        return []
    except zipfile.BadZipFile:
        with path.open("rb") as raw:
            start = raw.read(9)
        if start[8:] == b"{":  # the header's length, and the header
            return ["safetensors"]
        return ["weights"] if start[:1] == b"\x80" else []  # a pickle, as torch.save wrote before 1.6
    if "MAR-INF/MANIFEST.json" in names:
        return ["mar"]
    # Below one folder, but for archives from before torch 2.8.
    inside = [name.partition("/")[2] for name in names]
    found = {
        "torchscript": "constants.pkl" in inside,
        "archive": "serialized_exported_program.json" in names or "models/model.json" in inside,
        "aoti": any(name.startswith("data/aotinductor/") for name in inside),
    }
    kinds = [kind for kind, is_one in found.items() if is_one]
    return kinds or (["weights"] if "data.pkl" in inside else [])
