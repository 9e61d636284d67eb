"""`torch.compile`: Inductor in all its modes (CUDA graphs, frozen weights), and any other backend torch lists."""

from __future__ import annotations

import importlib
import itertools
import logging
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optim.attention import kernel_of
from optim.buckets import Bucket
from optim.config import OPTIONAL_BACKENDS
from optim.deadline import stuck_calls
from optim.engines import inductor_files
from optim.engines.base import Engine, EngineJob, FlatModule, Runner, Unavailable, require, require_precision
from optim.errors import describe, is_device_error
from optim.monitor import count_compilations, graph_break_reasons, prepare_thread

logger = logging.getLogger(__name__)

#: How torch words a compilation refused by the stance (it raises a plain RuntimeError).
RECOMPILE_TEXT = "Detected recompile when torch.compile stance is 'fail_on_recompile'"

_code_names = itertools.count()


class TorchCompileEngine(Engine):
    """Compiles with `torch.compile`; every bucket is a specialisation of one compiled function.

    `mode` and `freeze` replace the configuration's, for the variants that a race tries. `prepare` returns the module to
    compile in the place of the job's own, with its parameters and buffers.
    """

    needs_dynamo = True

    def __init__(
        self,
        job: EngineJob,
        backend: str = "inductor",
        *,
        name: str | None = None,
        mode: str | None = None,
        freeze: bool | None = None,
        prepare: Callable[[EngineJob], nn.Module] | None = None,
    ) -> None:
        super().__init__(job)
        self.backend = backend
        self.name = name or backend
        self._mode, self._freeze, self._prepare = mode, freeze, prepare
        self._dynamic = bool(job.config.compile.dynamic)
        self.takes_any_size = self._dynamic
        self._on_cuda = job.info.device.type == "cuda"
        self._options = self._inductor_options() if backend == "inductor" else {}
        self.reuses_outputs = self._on_cuda and (
            bool(self._options.get("triton.cudagraphs")) or backend == "cudagraphs"
        )
        self.keeps_state = backend == "inductor"
        self._function: Runner | None = None
        self._run: Runner | None = None
        self._before = count_compilations()
        self._notes: list[str] = []

    @property
    def frozen(self) -> bool:
        """Whether weights are frozen into the code: on CPU, where it pays and costs no second copy on a GPU."""
        return bool(self._options.get("freezing"))

    def _inductor_options(self) -> dict[str, Any]:
        """Return mode and options as one dictionary: torch takes only one of them, and modes are options."""
        import torch._inductor as inductor

        asked = self.job.config.compile
        mode = self._mode or asked.mode
        if mode is None and asked.options is None and asked.backend == "auto" and self._on_cuda:
            mode = "reduce-overhead"
        options = dict(inductor.list_mode_options(mode)) if mode else {}
        options.update({k.replace("-", "_"): v for k, v in (asked.options or {}).items()})
        if not self._on_cuda:
            options.setdefault("freezing", asked.freeze if self._freeze is None else self._freeze)
        elif self.job.phase == "decode" and self._mode is None and asked.mode is None:
            # As gpt-fast has it: matrix products of one row become products and sums (torch/_inductor/decomposition.py
            # does it under this option alone), into which adding is fused. Llama 3.2 1B, H100, torch 2.11: a step's
            # kernels took 1.37 ms, with cuBLAS 1.42 (issue 7).
            options.setdefault("coordinate_descent_tuning", True)
        return options

    def preflight(self) -> None:
        """Look for the backend, and for what Inductor's code generation needs."""
        if self.backend != "inductor" and self.backend not in torch.compiler.list_backends(exclude_tags=()):
            self._register()
        require_precision(self.job)
        if isinstance(self.job.module, torch.jit.ScriptModule):
            raise Unavailable("the module is TorchScript, which Dynamo cannot trace into")
        if self.backend == "inductor":
            if self._on_cuda:
                require(self.job.info, "triton")
            require(self.job.info, "cxx", "python_headers")

    def _register(self) -> None:
        """Import the package that registers the backend; Unavailable with the reason where that does not help."""
        package, module = OPTIONAL_BACKENDS[self.backend]
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:  # such packages leave in all sorts of ways
            missing = isinstance(error, ModuleNotFoundError)
            why = "which is not installed" if missing else "whose import ended in {}: {}".format(*describe(error))
            raise Unavailable(f"backend {self.backend!r} comes with {package}, {why}") from error
        if self.backend not in torch.compiler.list_backends(exclude_tags=()):
            raise Unavailable(f"{package} is installed, but registers no backend {self.backend!r} with torch")

    def build(self) -> None:
        """Wrap the module; nothing is compiled before the first call."""
        asked = self.job.config.compile
        # Not torch's default, which turns a dimension symbolic at its second size (all buckets would share slower
        # code), nor its True, which does so with every dimension: what varies is marked.
        kwargs: dict[str, Any] = {"backend": self.backend, "fullgraph": asked.fullgraph, "dynamic": False}
        if self.backend == "inductor":
            kwargs["options"] = self._options
        else:
            if asked.mode is not None:
                kwargs["mode"] = asked.mode
            if asked.options is not None:
                kwargs["options"] = dict(asked.options)
        if self.reuses_outputs:
            prepare_thread()
        module = self._prepare(self.job) if self._prepare else self.job.module
        if self.job.autocast:
            module = FlatModule(module, self.job)
        if self.backend == "inductor":
            self._prepare_files()
        self._function = _fresh_function(module)
        self._run = torch.compile(self._function, **kwargs)
        self._before = count_compilations()

    def _prepare_files(self) -> None:
        steps: list[Callable[[], None]] = [inductor_files.teach_inductor]
        if self.kept is not None:
            steps.append(partial(inductor_files.restore, self.kept))
        for step in steps:
            try:
                step()
            except Exception as error:  # a full disk, a torch that does it otherwise: it takes longer then
                if is_device_error(error):
                    raise
                why = "{}: {}".format(*describe(error, 300))
                self._notes.append(f"{self.name}: not all that is kept can be used: {why}")
                logger.warning(self._notes[-1])

    def compile(self, bucket: Bucket) -> Runner:
        """Return the compiled function; the first call with this bucket's shape compiles it."""
        run = self._run
        assert run is not None, "build() comes first"
        rebuild = self.job.rebuild
        flat, graphs = self.job.autocast, self.reuses_outputs

        def call(*inputs: torch.Tensor) -> Any:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            output = run(*inputs)
            return rebuild(output) if flat else output

        return call if flat or graphs else run

    def mark(self, inputs: tuple[torch.Tensor, ...]) -> None:
        """Mark what varies in warm-up inputs, and nothing else: a size of 1 is always compiled for itself."""
        if not self._dynamic:
            return
        for spec, tensor in zip(self.job.input_specs, inputs, strict=True):
            for dim in (*spec.length_dims, *(() if spec.batch_dim is None else (spec.batch_dim,))):
                if tensor.shape[dim] > 1:
                    torch._dynamo.mark_dynamic(tensor, dim)

    def save(self, folder: Path) -> None:
        """Leave what Inductor made, for a machine or a container that has not its cache folder."""
        if self.backend == "inductor":
            inductor_files.save(folder, for_cpu=not self._on_cuda)

    def close(self) -> None:
        """Let go of the compiled code, which Dynamo would keep: what it made of a function's code keeps that code.

        CUDA graphs give back their memory once no engine of the thread has any. Code behind a graph break stays, since
        other modules may run it; so does all while a call hangs, which may be in it.
        """
        function, self._function, self._run = self._function, None, None
        if function is None or stuck_calls():
            return
        remove = getattr(torch._dynamo.eval_frame, "remove_from_cache", None)
        if remove is None:  # it is private
            logger.warning("%s: this torch cannot let go of compiled code, which stays in memory", self.name)
        else:
            remove(function)

    @contextmanager
    def building(self) -> Iterator[None]:
        """Set Dynamo and Inductor up for this thread: from torch 2.12 on their config is context-local."""
        import torch._dynamo.config as dynamo_config
        import torch._inductor.config as inductor_config
        import torch.compiler.config as compiler_config

        buckets = len(self.job.samples) * (4 if self._dynamic else 1)  # sizes of 1 are compiled for themselves
        dynamo: dict[str, Any] = {
            # Past the limit (8) further buckets would run eager without a word; each needs one entry.
            "recompile_limit": max(8, 2 * buckets + 2),
            "accumulated_recompile_limit": max(256, 16 * buckets),
            "suppress_errors": False,
        }
        # freezing is read at tracing time from the config, not from `options`, so it has to be set here too.
        inductor: dict[str, Any] = {"freezing": self.frozen, "compile_threads": torch.get_num_threads()}
        with ExitStack() as stack:
            stack.enter_context(dynamo_config.patch(**dynamo))
            stack.enter_context(inductor_config.patch(**inductor))
            tag = compiler_config.patch(cache_key_tag=self._cache_key_tag())  # type: ignore[attr-defined]
            stack.enter_context(tag)
            if self.kept is not None:
                stack.enter_context(inductor_files.libraries_at_hand())
            yield

    def _cache_key_tag(self) -> str:
        """Return what decides the code and is not in torch's own cache keys: ISA, threads, attention, precision."""
        import torch.compiler.config as compiler_config

        job = self.job
        capability = torch.backends.cpu.get_cpu_capability()
        kernel = kernel_of(job.config, job.phase)
        parts = (compiler_config.cache_key_tag, capability, job.info.threads, kernel, job.config.matmul_precision)
        return "/".join(map(str, parts))

    def serving(self) -> AbstractContextManager[Any]:
        """Refuse compilations: a call that needs one raises, and is run eager and counted by the caller."""
        return torch.compiler.set_stance("fail_on_recompile")  # type: ignore[no-any-return]

    def check_warm(self, bucket: Bucket) -> None:
        """Raise where Dynamo compiled nothing."""
        seen = count_compilations() - self._before
        if seen.graphs == 0:
            raise Unavailable(
                f"torch.compile compiled nothing: {'; '.join(graph_break_reasons()) or 'no graph was found'}"
            )

    def notes(self) -> list[str]:
        """Return what is worth knowing about the compiled code: graph breaks, skipped CUDA graphs."""
        seen = count_compilations() - self._before
        found = [*self._notes]
        if seen.graph_breaks:
            found.append(f"{self.name}: {seen.graph_breaks} graph breaks: {'; '.join(graph_break_reasons())}")
        if self._dynamic:
            found.append(f"{self.name}: {seen.graphs} graphs serve every size up to the largest bucket's")
        if self.reuses_outputs and seen.cudagraph_skips:
            found.append(f"{self.name}: {seen.cudagraph_skips} graphs run without CUDA graphs")
        return found


def _fresh_function(module: nn.Module) -> Runner:
    """Return a function around the module whose code object is its own.

    Dynamo keeps compiled code by code object. Two modules of one class share theirs, and so the first one's settings:
    freezing did nothing for a class that had been compiled before without it.
    """

    def forward(*inputs: torch.Tensor) -> Any:
        return module(*inputs)

    code = forward.__code__.replace(co_name=f"forward_{next(_code_names)}")
    return types.FunctionType(code, forward.__globals__, code.co_name, None, forward.__closure__)
