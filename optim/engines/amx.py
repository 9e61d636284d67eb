"""AOTInductor with float32 products of linear layers made of bfloat16 ones, which AMX has tiles for.

A float32 number is the sum of two bfloat16 numbers but for 2^-17 of it; three products of such parts are the product
but for about 2^-16 (what torch's `high` precision allows as much: torch.set_float32_matmul_precision). The RMS error of
a product of 384 or 1536 terms was 3e-6 to 4e-6 of its RMS; by MKL it was 3e-7. What is not finite becomes NaN. Every
row is summed by itself in one order, so an answer depends on none of the others. On one thread of an Intel Xeon with
AMX such products took 0.35 to 0.5 of MKL's time (16 to 1024 rows; issue 4), which is why the kernel (`amx.cpp`) is our
own: oneDNN, and so torch, rounds what bfloat16 products yield to bfloat16.
"""

from __future__ import annotations

import ctypes
import shutil
import threading
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from optim.engines import native
from optim.engines.aot import AotEngine
from optim.engines.aoti import WITH_CONSTANTS, AotModel, unpack
from optim.engines.base import EngineJob, FlatModule, Unavailable, require
from optim.engines.linear import replace_linear, require_linear

_NAME, _FILE = "amx", "amx.so"
_DTYPES = (torch.float32,)
#: What the kernel calls of torch's C interface, in the order of its `Torch`.
_FUNCTIONS = (
    "get_data_ptr",
    "get_dim",
    "get_sizes",
    "get_strides",
    "get_dtype",
    "empty_strided",
    "delete_tensor_object",
)
#: Fewer are multiplied in less time than it takes to look for something better (a row in some 20 us).
_LEAST_WEIGHTS = 1_000_000


class AmxEngine(AotEngine):
    """One library for all buckets, whose linear layers are split products; its weights are constants.

    They are the module's own, but for those of linear layers, which are packed: so the module may not be changed.
    """

    name = "aot-amx"
    guards_sizes = False
    takes_calls_at_once = True
    keeps_by_threads = True
    holds_weights_once = True

    def __init__(self, job: EngineJob) -> None:
        super().__init__(job)
        self.takes_any_size = job.has_lengths
        self._file = f"threads-{torch.get_num_threads()}.so"
        self._path: Path | None = None
        self._model: AotModel | None = None
        self._module: nn.Module | None = None

    def preflight(self) -> None:
        """Refuse CPUs without the instructions, modules for which it is not worth it, and other precisions."""
        job = self.job
        require(job.info, "amx")
        super().preflight()
        if job.config.matmul_precision == "highest":
            raise Unavailable("its products have 16 bits, and matmul_precision is highest")
        if job.autocast:
            raise Unavailable("its products are of float32, and autocast asks for bfloat16")
        require_linear(job, _DTYPES, "are float32")
        size = sum(layer.weight.numel() for layer in job.module.modules() if isinstance(layer, nn.Linear))
        if size < _LEAST_WEIGHTS:
            raise Unavailable(f"its linear layers have {size} weights, and below {_LEAST_WEIGHTS} little is to be won")

    def build(self) -> None:
        """Load what was kept for as many threads, else export the module with all sizes free that buckets differ in."""
        _define_operator(self.kept)
        # Kept, so that what is built for streams finds the packed weights in use.
        self._module = module = replace_linear(self.job.module, _DTYPES, _SplitLinear)
        values = _values(module, self.job)
        if self.kept is not None and (self.kept / self._file).is_file():
            self._path = self.kept / self._file
        else:
            self._path = self._make_folder() / self._file
            self._compile(module, values.keys(), self._path)
        self._model = AotModel(self._path, self.job.streams, values, self.kept)
        self._shared = self._runner(self._model)

    def _compile(self, module: nn.Module, own: Set[str], path: Path) -> None:
        import torch._inductor.config as inductor_config

        buckets = self.job.samples
        named = {"rows": {bucket.batch_size for bucket in buckets}, "length": {bucket.length for bucket in buckets}}
        free = {name: torch.export.Dim(name, min=1, max=max(sizes)) for name, sizes in named.items() if len(sizes) > 1}
        dynamic = []
        for spec in self.job.input_specs:
            sizes = {dim: free["length"] for dim in spec.length_dims if "length" in free}
            if spec.batch_dim is not None and "rows" in free:
                sizes[spec.batch_dim] = free["rows"]
            dynamic.append(sizes)
        # Export takes a 1 for a constant, and two sizes that are equal for one.
        example = max(buckets, key=lambda b: (min(b.batch_size, b.length) > 1, b.batch_size != b.length, b.tokens))
        package = path.with_suffix(".pt2")
        exported = self._export(module, buckets[example], tuple(dynamic))
        # Weights that are in the library too are in memory twice more: with its file, and where it copies them to. They
        # have to be where the code has constants besides the module's, whose values nothing else keeps.
        has_more = not exported.constants.keys() <= own
        with inductor_config.patch({"aot_inductor.package_constants_in_so": has_more, "freezing": False}):
            self._package(exported, package)
        unpack(package, path)
        package.unlink()
        if has_more:
            path.with_suffix(WITH_CONSTANTS).touch()

    def save(self, folder: Path) -> None:
        """Leave the library, those that it is called by and calls, and what is there for other threads."""
        assert self._path is not None and self._model is not None, "build() comes first"
        folder.mkdir(exist_ok=True)
        for path in self._path.parent.glob(f"{self._path.stem}.*"):
            shutil.copyfile(path, folder / path.name)
        _kernel(self.kept).keep(folder / _FILE)
        self._model.keep(folder)

    def close(self) -> None:
        """Let go of the library."""
        self._model = self._module = None
        super().close()


class _SplitLinear(nn.Module):
    """A linear layer by split products, for as many threads as torch has when it is made."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", _pack(linear.weight))
        self.register_buffer("bias", torch.empty(0) if linear.bias is None else linear.bias.detach().contiguous())
        self._threads = torch.get_num_threads()
        self._replaced = [linear]  # in a list it is no part of this module

    @property
    def weight(self) -> torch.Tensor:
        """The layer's weight, at which other modules look (torch's TransformerEncoderLayer)."""
        return self._replaced[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.pt2_optim.split_linear(
            x.contiguous(), self.packed, self.bias, self.out_features, self._threads
        )
        return found


def _values(module: nn.Module, job: EngineJob) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers by the names that they have where a module is exported."""
    flat = FlatModule(module, job)
    found = [*flat.named_parameters(remove_duplicate=False), *flat.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in found}


#: By weight, what was packed of it and is in use (and at which version): streams run on the same.
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _pack(weight: torch.Tensor) -> torch.Tensor:
    version = weight.data_ptr(), None if weight.is_inference() else weight._version
    known, found = _packed.get(weight, (version, lambda: None))
    packed: torch.Tensor | None = found()
    if packed is None or known != version:
        functions, plain = _kernel().functions, weight.detach().contiguous()
        packed = torch.zeros(functions.packed_size(*plain.shape), dtype=torch.uint8)
        functions.pack(plain.data_ptr(), *plain.shape, packed.data_ptr())
        _packed[weight] = version, TensorWeakRef(packed)
    return packed


def _kernel(kept: Path | None = None) -> native.Library:
    library = native.load(_NAME, kept and kept / _FILE)
    functions: Any = library.functions
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    functions.packed_size.argtypes, functions.packed_size.restype = (size, size), size
    functions.pack.argtypes, functions.pack.restype = (pointer, size, size, pointer), None
    return library


_lock = threading.Lock()
_defined: list[torch.library.Library] = []


def _define_operator(kept: Path | None) -> None:
    """Tell torch of `split_linear`, once: an operator of C, which AOTInductor's code calls without Python."""
    with _lock:
        if _defined:
            return
        interface = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        needed = [ctypes.cast(getattr(interface, f"aoti_torch_{name}"), ctypes.c_void_p).value for name in _FUNCTIONS]
        functions: Any = _kernel(kept).functions
        functions.use((ctypes.c_void_p * len(needed))(*needed))
        library = torch.library.Library("pt2_optim", "FRAGMENT")
        library.define("split_linear(Tensor x, Tensor packed, Tensor bias, int columns, int threads) -> Tensor")
        torch.library.register_fake("pt2_optim::split_linear", _shape, lib=library)
        handle, where = ctypes.c_void_p(), __file__.encode()
        failed = interface.aoti_torch_library_init_impl(b"pt2_optim", b"CPU", where, 0, ctypes.byref(handle))
        if failed or interface.aoti_torch_library_impl(handle, b"split_linear", functions.split_linear):
            raise RuntimeError("torch's C interface took no operator")
        _defined.append(library)


def _shape(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, columns: int, threads: int) -> torch.Tensor:
    if x.dtype not in _DTYPES:
        raise TypeError(f"split products are of float32, and a layer is given {x.dtype}")
    return x.new_empty(*x.shape[:-1], columns)
