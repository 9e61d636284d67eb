"""Eager as the reference: examples, expected outputs, and what can be known of the module before compiling it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from optim.buckets import Bucket, pick_between, pick_probes, pick_typical
from optim.device import total_bytes
from optim.errors import ConfigError, ModelError, describe, is_device_error, is_out_of_memory
from optim.shapes import Example, Inputs, TensorSpec, cut, make_specs, measure, normalize, pad, take_rows
from optim.state import State
from optim.tree import Rebuild, flatten, tensors_of
from optim.values import reads_values
from optim.verify import Difference, Mismatch, compare, other_data

#: As many of eager's outputs for the buckets' examples are kept during a start as have no more bytes than this.
_KEPT_BYTES = 1 << 26


class Reference:
    """Runs the module in eager mode and finds out what compiled code has to keep to.

    `obstacle` is the reason why nothing compiled may replace the module, if there is one: it is not deterministic,
    it changes its own state, or its outputs cannot be taken apart. Raises ModelError where the module fails.
    """

    def __init__(
        self,
        module: nn.Module,
        example: Example,
        grid: tuple[Bucket, ...],
        device: torch.device,
        state: Sequence[str] = (),
    ) -> None:
        self._module = module
        #: What calls may change.
        self.state = State(module, state)
        self._example = example
        self._device = device
        self._exact_module: nn.Module | None = None
        self._start: list[torch.Tensor] = []
        self._end: list[torch.Tensor] = []
        self._exact_failed = False
        #: Whether a wider reference failed for want of memory that may be there another time.
        self.is_short_of_memory = False
        self.notes: list[str] = []
        self.obstacle: str | None = None
        #: Every example seen so far, those of other sizes than the buckets' included.
        self._seen: dict[Bucket, Inputs] = {}
        self._probed: dict[Bucket, Inputs | None] = {}
        self._outputs: dict[Bucket, Any] = {}
        self._kept_bytes = 0
        self.samples: dict[Bucket, Inputs] = {bucket: self._make_sample(bucket) for bucket in grid}
        self.input_specs: tuple[TensorSpec, ...] = ()
        self.output_specs: tuple[TensorSpec, ...] = ()
        self.output_dtypes: tuple[torch.dtype, ...] = ()
        self.output_names: tuple[str, ...] = ()
        self.rebuild: Rebuild = list
        for bucket in sorted(grid, reverse=True):
            self.check_eager(bucket)
        self.obstacle = self._find_obstacle(min(grid))
        #: The operators by which the module looks at tensor values in Python.
        self.value_reads = () if self.obstacle else tuple(reads_values(module, self.samples[min(grid)]))
        self.rows_are_independent = self._find_specs(min(grid)) and self._padding_is_harmless()
        self.state.clear()

    def of_copy(self, module: nn.Module, *, probes: bool = False) -> Reference:
        """Return the same of a copy of the module, for another thread; it knows the examples that `record` returns."""
        other, seen = copy.copy(self), self.record(probes=probes)
        other._module, other._exact_module, other.notes = module, None, []
        other.state = State(module, self.state.names)
        other._example = lambda rows, length: seen[Bucket(rows, length or 0)]
        other._seen, other._probed, other._outputs = dict(seen), dict(self._probed), dict(self._outputs)
        return other

    def run(self, inputs: Inputs) -> Any:
        """Return the module's eager outputs."""
        return self._module(*inputs)

    def expect(self, inputs: Inputs) -> Any:
        """Return the module's eager outputs, and remember what it did to its state, which is then as it was before.

        Where there is a state, it has other values than ever before. `check_state` holds it against eager's.
        """
        if not self.state:
            return self.run(inputs)
        self.state.fill()
        self._start = self.state.take()
        outputs = self.run(inputs)
        self._end = self.state.take()
        self.state.put(self._start)
        return outputs

    def check_state(self, inputs: Inputs, tolerance: float | None) -> Difference:
        """Hold the state against what eager made of it in the last `expect`, of the same inputs; Mismatch otherwise."""

        @cache  # several buffers may need it
        def exact() -> list[torch.Tensor] | None:
            if self.exact(inputs)() is None or self._exact_module is None:
                return None
            return State(self._exact_module, self.state.names).take()

        return self.state.compare(self._start, self._end, tolerance, exact)

    def check_eager(self, bucket: Bucket) -> None:
        """Raise ModelError where the module fails on the bucket's example in eager mode."""
        try:
            outputs = self.run(self.samples[bucket])
        except Exception as error:
            if is_device_error(error):
                raise
            kind, message = describe(error)
            shapes = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in self.samples[bucket])
            raise ModelError(
                f"the model itself fails in eager mode on the example for bucket {bucket} ({shapes}): {kind}: {message}"
            ) from error
        if not self.state:
            self._keep(bucket, outputs)

    def _keep(self, bucket: Bucket, outputs: Any) -> None:
        """Keep what eager answers for a bucket's example: every engine is held against it, on streams once more."""
        try:
            tensors, rebuild = flatten(outputs)
            size = sum(tensor.nbytes for tensor in tensors)
            if self._kept_bytes + size <= _KEPT_BYTES and bucket not in self._outputs:
                self._outputs[bucket] = rebuild([tensor.clone() for tensor in tensors])
                self._kept_bytes += size
        except Exception as error:  # outputs that are not made so easily are computed each time
            if is_device_error(error):
                raise

    def data(self, bucket: Bucket) -> Iterator[tuple[Inputs, Any]]:
        """Yield inputs of the bucket's shape with eager's outputs: its example, and others where eager takes them.

        The others are the example's values shuffled and, where there are lengths, a shorter example padded.
        """
        sample = self.samples[bucket]
        yield sample, self._outputs[bucket] if bucket in self._outputs else self.expect(sample)
        makers: list[tuple[str, Callable[[], Inputs]]] = [("shuffled data", lambda: other_data(self.samples[bucket]))]
        if bucket.length > 1 and self.rows_are_independent:
            # A mask of ones alone would not show that the compiled code heeds it.
            makers.append(("a shorter example, padded", lambda: self._make_padded(bucket)))
        for what, make in makers:
            try:
                inputs = make()
                outputs = self.expect(inputs)
            except Exception as error:  # neither needs to be a valid request
                if is_device_error(error):
                    raise
                note = f"not verified with {what}: eager raises {type(error).__name__} on it"
                if note not in self.notes:
                    self.notes.append(note)
            else:
                yield inputs, outputs

    def _make_padded(self, bucket: Bucket) -> Inputs:
        short = self._make_sample(Bucket(bucket.batch_size, bucket.length // 2))
        return pad(self.input_specs, short, bucket.batch_size, bucket.length)

    def exact(self, inputs: Inputs, start: Sequence[torch.Tensor] | None = None) -> Callable[[], Any]:
        """Return a function that computes the outputs in a wider dtype, or None where the module has no such form.

        That is float64, and for weights of two bytes float32: their errors are far larger, and a copy in float64 would
        take four times their memory. Where there is a state, it begins as `start`, else as `expect` last did.
        """
        start, wide = self._start if start is None else start, self._wide

        def compute() -> Any:
            if self._exact_failed:
                return None
            try:
                if self._exact_module is None:
                    self._exact_module = copy.deepcopy(self._module).to(wide)
                State(self._exact_module, self.state.names).put(start)
                return self._exact_module(*(t.to(wide) if t.is_floating_point() else t for t in inputs))
            except Exception as error:
                if is_device_error(error) and not is_out_of_memory(error):
                    raise
                self._exact_failed, self._exact_module = True, None
                self.is_short_of_memory = is_out_of_memory(error) and self._may_fit_another_time()
                name = str(wide).removeprefix("torch.")
                self.notes.append(f"no {name} reference: {': '.join(describe(error, 300))}")
                return None

        return compute

    def _may_fit_another_time(self) -> bool:
        """Say whether the module and its copy in a wider dtype would fill less than half of an empty device."""
        tensors = [*self._module.parameters(), *self._module.buffers()]
        wide = sum(t.numel() * (self._wide.itemsize if t.is_floating_point() else t.itemsize) for t in tensors)
        return wide + sum(t.nbytes for t in tensors) < total_bytes(self._device) / 2

    @property
    def _wide(self) -> torch.dtype:
        found = {p.dtype for p in self._module.parameters() if p.is_floating_point()}
        return torch.float32 if found and found <= {torch.float16, torch.bfloat16} else torch.float64

    def _make_sample(self, bucket: Bucket) -> Inputs:
        inputs = self._example(bucket.batch_size, bucket.length or None)
        if isinstance(inputs, torch.Tensor):
            inputs = (inputs,)
        if not isinstance(inputs, tuple | list) or not all(isinstance(t, torch.Tensor) for t in inputs) or not inputs:
            raise ConfigError("example", type(inputs).__name__, "return a tuple of tensors, the module's inputs")
        self._seen[bucket] = tuple(normalize(t, self._device) for t in inputs)
        return self._seen[bucket]

    def probe(self, bucket: Bucket) -> Inputs | None:
        """Return an example of another size than the declared ones, or None where example or module refuse it."""
        if bucket not in self._probed:
            inputs = self.find(bucket)
            try:
                if inputs is not None:
                    self.run(inputs)
            except Exception as error:  # nor does eager have to know every size
                if is_device_error(error):
                    raise
                inputs = None
            self._probed[bucket] = inputs
        return self._probed[bucket]

    def find(self, size: Bucket) -> Inputs | None:
        """Return an example of a size, or None where there is none: it need not know every size."""
        try:
            return self._seen.get(size) or self._make_sample(size)
        except Exception as error:
            if is_device_error(error):
                raise
            return None

    def typical(self, bucket: Bucket) -> Inputs | None:
        """Return an example of what a bucket's requests are before they are padded to it; None where there is none."""
        size = pick_typical(bucket, self.samples) if self.rows_are_independent and not self.state else None
        inputs = None if size is None else self.probe(size)
        fits = size and inputs and measure(self.input_specs, inputs) == (size.batch_size, size.length)
        return inputs if fits else None

    def probes(self, bucket: Bucket) -> tuple[list[Inputs], list[Inputs]]:
        """Return examples of other sizes up to a bucket's: those to warm code for any size with, and those to check it.

        Warm-up needs 1 and 2 rows or places, since 1 is always compiled for itself; the others have a row or a place
        fewer than the bucket, which no warm-up has shown.
        """
        warm = _sizes(bucket, (1, 2, 0)) - {bucket}
        check = _sizes(bucket, (-1, 0)) - warm - {bucket}
        found = [[self.probe(size) for size in sorted(sizes)] for sizes in (warm, check)]
        first, second = ([inputs for inputs in group if inputs is not None] for group in found)
        return first, second

    def record(self, *, probes: bool = False) -> dict[Bucket, Inputs]:
        """Return every example that verification and a race will ask for, by size; `probes` adds those of `probes`."""
        wanted = {Bucket(b.batch_size, b.length // 2) for b in self.samples if b.length > 1}
        if not self.state:
            wanted.update(pick_between(self.samples))
            wanted.update(filter(None, (pick_typical(bucket, self.samples) for bucket in pick_probes(self.samples))))
        if probes:
            for bucket in self.samples:
                wanted |= _sizes(bucket, (1, 2, 0)) | _sizes(bucket, (-1, 0))
        for size in wanted:
            self.find(size)
        return dict(self._seen)

    def _find_obstacle(self, bucket: Bucket) -> str | None:
        inputs = self.samples[bucket]
        versions = [t._version for t in inputs]
        state = {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}
        before = {name: t._version for name, t in state.items() if not t.is_inference()}
        first, second = self.run(inputs), self.run(inputs)
        if [t._version for t in inputs] != versions:
            return "the module changes its inputs"
        changed = [
            name for name, version in before.items() if state[name]._version != version and name not in self.state.names
        ]
        if changed:
            return f"the module changes its own state when called ({', '.join(changed[:3])})"
        try:
            compare(second, first)
        except TypeError as error:
            return str(error)
        except Mismatch as error:
            return f"the module gives different answers to the same input, so nothing can be verified ({error})"
        self.rebuild = flatten(first)[1]
        if isinstance(first, Mapping) and all(isinstance(value, torch.Tensor) for value in first.values()):
            self.output_names = tuple(map(str, first))
        self.output_dtypes = tuple(t.dtype for t in tensors_of(first))
        return None

    def _find_specs(self, smallest: Bucket) -> bool:
        """Find the free dimensions of inputs and outputs; return whether the batch dimension is free."""
        lengths = sorted({bucket.length for bucket in self.samples})
        small = self.samples[smallest]
        try:
            more = self._make_sample(Bucket(smallest.batch_size + 1, smallest.length))
            longer = self._make_sample(Bucket(smallest.batch_size, lengths[1])) if len(lengths) > 1 else None
            if longer is None and smallest.length > 1:
                longer = self._make_sample(Bucket(smallest.batch_size, smallest.length - 1))
            self.input_specs = make_specs(small, more, longer)
            if self.obstacle:
                return False
            out = [None if x is None else tensors_of(self.run(x)) for x in (small, more, longer)]
            assert out[0] is not None
            self.output_specs = make_specs(out[0], out[1], out[2])
        except Exception as error:  # the module or the example may know only the declared sizes
            if is_device_error(error):
                raise
            self.notes.append(f"only exact bucket shapes are compiled: {': '.join(describe(error, 300))}")
            self.input_specs = self.input_specs or make_specs(small, None, None)
            self.output_specs = ()
            return False
        fixed = [i for i, spec in enumerate(self.output_specs) if spec.batch_dim is None]
        if fixed or all(spec.batch_dim is None for spec in self.input_specs):
            self.notes.append(f"only exact bucket shapes are compiled: outputs {fixed} do not follow the batch size")
            return False
        return True

    def _padding_is_harmless(self) -> bool:
        """Find out, in eager mode, whether a request is answered alike alone, among other rows, and padded."""
        if self.value_reads:
            # Which way it goes may depend on the other rows, for data that no example shows.
            why = f"the module reads tensor values in Python ({', '.join(self.value_reads)})"
            self.notes.append(f"only exact bucket shapes are compiled: {why}")
            return False
        for how, got, want, inputs in self._with_and_without_others():

            def exact(inputs: Inputs = inputs) -> Any:
                # From what the call left: made again, it changes nothing.
                return self.exact(inputs, self.state.take())()

            try:
                # Kernels for more rows round otherwise, in two bytes by more than the tolerance allows: a difference
                # that is no error, by the measure that compiled code has.
                compare(got, want, exact_reference=exact)
            except Mismatch as error:
                self.notes.append(
                    f"only exact bucket shapes are compiled: a request answers differently {how} ({error})"
                )
                return False
        return True

    def _with_and_without_others(self) -> Iterator[tuple[str, Any, Any, Inputs]]:
        """Yield outputs of the same rows: among others and alone, then padded to a longer length and not.

        And the inputs by which they come alone, or unpadded.
        """
        small, large = min(self.samples), max(self.samples)
        # A single batch size: fewer rows will be padded into it.
        rows = 1 if small.batch_size == large.batch_size else small.batch_size
        example = self.samples[large]
        # Neighbours far to either side of zero throw a switch that all rows share, if there is one.
        crowds = [example, other_data(example), self._among(example, rows, 10.0), self._among(example, rows, -10.0)]
        for number, crowd in enumerate(crowds):
            try:
                among = cut(self.output_specs, self.run(crowd), rows, large.length)
                inputs = take_rows(self.input_specs, crowd, 0, rows)
                alone = self.run(inputs)
            except Exception as error:  # what was made of the example need not be valid
                if number == 0 or is_device_error(error):
                    raise
                continue
            yield "among other rows", among, alone, inputs
        longest = max(bucket.length for bucket in self.samples)
        if longest > 1:
            short = small if small.length < longest else Bucket(small.batch_size, longest - 1)
            inputs = self.samples.get(short) or self._make_sample(short)
            padded = self.run(pad(self.input_specs, inputs, short.batch_size, longest))
            cut_again = cut(self.output_specs, padded, short.batch_size, short.length)
            yield "when padded with zeros to a longer length", cut_again, self.run(inputs), inputs

    def _among(self, inputs: Inputs, rows: int, factor: float) -> Inputs:
        """Return the inputs with the rows after the first ones scaled: every number to `factor` times its size."""
        crowd = []
        for spec, tensor in zip(self.input_specs, inputs, strict=True):
            if tensor.is_floating_point() and spec.batch_dim is not None:
                tensor = tensor.clone()
                others = tensor.narrow(spec.batch_dim, rows, tensor.shape[spec.batch_dim] - rows)
                others.copy_(others.abs() * factor)
            crowd.append(tensor)
        return tuple(crowd)


def _sizes(bucket: Bucket, steps: tuple[int, ...]) -> set[Bucket]:
    """Return the sizes up to a bucket's: each step is a size of its own where above 0, else below the bucket's."""

    def along(size: int) -> set[int]:
        return {n for step in steps for n in [step if step > 0 else size + step] if 1 <= n <= size} or {size}

    lengths = along(bucket.length) if bucket.length else {0}
    return {Bucket(rows, length) for rows in along(bucket.batch_size) for length in lengths}
