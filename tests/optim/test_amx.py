"""The engine whose float32 products are made of bfloat16 ones, on CPUs with AMX."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from optim import CompiledModel, compile_model
from optim.config import Pt2Config
from optim.device import inspect_device, set_threads
from optim.engines import EngineJob, amx, choose_engines
from optim.engines.aoti import AotModel
from optim.fingerprint import _own_code
from tests.support.models import Mlp, SmallCnn, features, images

CPU = inspect_device(torch.device("cpu"))
AMX = CPU.capabilities["amx"]
needs_amx = pytest.mark.skipif(not AMX.available, reason=AMX.detail)


class Encoder(nn.Module):
    """Tokens and their mask -> the mean of what two wide layers make of them. [B, T] each -> [B, 64]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(64, 320)
        self.inner, self.outer, self.head = nn.Linear(320, 2048), nn.Linear(2048, 320), nn.Linear(320, 64, bias=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.table(ids)
        hidden = hidden + self.outer(nn.functional.gelu(self.inner(hidden)))
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        found: torch.Tensor = self.head((hidden * weights).sum(1) / weights.sum(1).clamp(min=1))
        return found


def tokens(batch_size: int, length: int | None = None) -> tuple[torch.Tensor, ...]:
    shape = (batch_size, length or 1)
    generator = torch.Generator().manual_seed(batch_size * 100 + shape[1])
    return torch.randint(0, 64, shape, generator=generator), torch.ones(shape, dtype=torch.int64)


def ask(module: nn.Module, cache: Path | None = None, **more: Any) -> CompiledModel:
    compiling = {"backend": "aot-amx", "only_if_faster": False}
    config = {"compile": compiling, "cache": {"enable": False} if cache is None else {"folder": str(cache)}}
    given = {"batch_sizes": [1, 4], "lengths": [8, 24], "device": "cpu", **more}
    return compile_model(module.eval(), tokens, {**config, **given.pop("section", {})}, **given)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    set_threads(2)
    yield
    set_threads(before)


def product(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    amx._define_operator(None)
    with torch.no_grad():
        found: torch.Tensor = amx._SplitLinear(linear)(x)
    return found


@needs_amx
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "depth"),
    [(1, 1, 1), (1, 16, 32), (5, 384, 384), (17, 47, 33), (33, 100, 50), (129, 48, 384), (300, 65, 1000), (0, 4, 4)],
)
def test_products_are_right_to_16_bits_whatever_their_size(rows: int, columns: int, depth: int, bias: bool) -> None:
    torch.manual_seed(rows)
    linear, x = nn.Linear(depth, columns, bias), torch.randn(rows, depth)
    found = product(x, linear)
    with torch.no_grad():
        exact = linear.double()(x.double())
        magnitude = nn.functional.linear(x.double().abs(), linear.weight.abs()) + 1e-30
    assert found.shape == exact.shape and found.dtype == torch.float32
    assert rows == 0 or float(((found - exact).abs() / magnitude).max()) < 2**-15


@needs_amx
def test_a_row_is_the_same_in_any_company() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 80), torch.randn(2, 70, 96)
    together = product(x, linear)
    assert together.shape == (2, 70, 80)
    for batch, row in ((0, 0), (1, 3), (1, 69)):
        assert torch.equal(product(x[batch, row], linear), together[batch, row])


@needs_amx
def test_what_is_not_finite_becomes_nan_and_leaves_other_rows_alone() -> None:
    linear, x = nn.Linear(40, 3), torch.ones(4, 40)
    x[0, 1], x[1, 39], x[2, 0] = float("inf"), -float("inf"), float("nan")
    found = product(x, linear)
    assert found[:3].isnan().all()
    with torch.no_grad():
        torch.testing.assert_close(found[3], linear(x[3]), rtol=1e-4, atol=1e-4)


@needs_amx
def test_what_the_kernel_could_not_read_is_refused() -> None:
    amx._define_operator(None)
    layer = amx._SplitLinear(nn.Linear(8, 8))
    with pytest.raises(RuntimeError, match="x is not contiguous"):
        torch.ops.pt2_optim.split_linear(torch.randn(8, 4).t(), layer.packed, layer.bias, 8, 1)
    with pytest.raises(RuntimeError, match="x is not of float32"):
        torch.ops.pt2_optim.split_linear(torch.randn(4, 8).bfloat16(), layer.packed, layer.bias, 8, 1)
    with pytest.raises(RuntimeError, match="x has 1 to 16 dimensions"):
        torch.ops.pt2_optim.split_linear(torch.tensor(1.0), layer.packed, layer.bias, 8, 1)


@needs_amx
def test_one_library_serves_every_size() -> None:
    module = Encoder()
    model = ask(module)
    assert set(model.report.engines().values()) == {"aot-amx"}, model.report.all_refusals()
    for rows, length in ((1, 8), (1, 1), (4, 24), (3, 5), (2, 23)):
        inputs = tokens(rows, length)
        torch.testing.assert_close(model(*inputs), module(*inputs), rtol=1e-4, atol=1e-5)
    after = model.report.after_ready
    assert (after.compilations, after.failed_runs, after.shapes_without_bucket) == (0, 0, 0)
    assert model._takes_any_size
    assert type(module.inner) is nn.Linear


@needs_amx
def test_modules_without_lengths_and_of_one_row() -> None:
    module = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 8)).eval()
    for batch_sizes in ([1], [1, 4]):
        model = compile_model(
            module,
            lambda rows, length: torch.randn(rows, 512),
            {"compile": {"backend": "aot-amx", "only_if_faster": False}, "cache": {"enable": False}},
            batch_sizes=batch_sizes,
            device="cpu",
        )
        assert set(model.report.engines().values()) == {"aot-amx"}, model.report.all_refusals()
        for rows in (1, max(batch_sizes)):
            x = torch.randn(rows, 512)
            torch.testing.assert_close(model(x), module(x), rtol=1e-4, atol=1e-5)


@needs_amx
@pytest.mark.usefixtures("two_threads")
def test_calls_at_the_same_time_and_a_start_from_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Encoder()
    cold = ask(module, tmp_path, streams=2)
    assert cold.report.cache is not None, cold.report.notes
    kept = {path.name for path in (Path(cold.report.cache) / "aot-amx").iterdir()}
    libraries = {f"threads-{n}.{ending}" for n in (1, 2) for ending in ("so", "json")}
    assert kept == {*libraries, "amx.so", "aoti.so"}

    def compile_again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("nothing is to be compiled")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_again)
    warm = ask(module, tmp_path, streams=2)
    assert warm.report.start == "warm", warm.report.notes
    for model in (cold, warm):
        assert set(model.report.engines().values()) == {"aot-amx"}, model.report.all_refusals()
        streams = model.streams
        assert streams is not None and streams.count == 2, model.report.notes
        asked = [tokens(i % 4 + 1, (3, 8, 24)[i % 3]) for i in range(40)]
        with torch.no_grad(), ThreadPoolExecutor(2, initializer=set_threads, initargs=(1,)) as pool:
            answers = pool.map(streams.model, *zip(*asked, strict=True))
            for inputs, got in zip(asked, answers, strict=True):
                torch.testing.assert_close(got, module(*inputs), rtol=1e-4, atol=1e-5)
        after = model.report.after_ready
        assert (after.calls, after.failed_runs, after.compilations) == (40, 0, 0)


@needs_amx
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("full", [False, True])
def test_what_streams_do_not_use_is_not_kept_and_leaves_the_rest(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, rooms = amx.AmxEngine.save, []

    def save_half(engine: amx.AmxEngine, folder: Path) -> None:
        save(engine, folder)
        if engine.job.streams > 1:
            raise OSError("no space left on device")

    def has_room(size: int) -> bool:
        rooms.append(size)
        return True

    monkeypatch.setattr("optim.streams.is_room_for", has_room)
    monkeypatch.setattr("optim.streams.time_streams", lambda *args: (1.0, 1.0 if full else 2.5))
    if full:
        monkeypatch.setattr(amx.AmxEngine, "save", save_half)
    module = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 8)).eval()
    model = compile_model(
        module,
        lambda rows, length: torch.randn(rows, 512),
        {"compile": {"backend": "aot-amx", "only_if_faster": False}, "cache": {"folder": str(tmp_path)}},
        batch_sizes=[1, 4],
        device="cpu",
        streams=2 if full else None,
    )
    assert set(model.report.engines().values()) == {"aot-amx"}, model.report.all_refusals()
    assert (model.streams is not None) == full
    told = "aot-amx: nothing is kept for the next start: OSError" if full else "one run at a time: 2 runs at a time do"
    assert told in " ".join(model.report.notes)
    assert rooms == [sum(p.nbytes for p in module.parameters())], "one library for both buckets"
    assert model.report.cache is not None
    kept = {path.name for path in (Path(model.report.cache) / "aot-amx").iterdir()}
    assert kept == {"threads-2.so", "threads-2.json", "amx.so", "aoti.so"}


class Shifted(Encoder):
    """As its base, and what it adds is a constant of its code."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(ids, mask) + torch.tensor([0.25 * (i % 7) for i in range(64)])


@needs_amx
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", [Encoder, Shifted])
def test_weights_are_in_memory_once_and_not_in_the_library(kind: type[Encoder], tmp_path: Path) -> None:
    for start in ("cold", "warm"):
        module = kind()
        model = ask(module, tmp_path, streams=2)
        assert model.report.start == start, model.report.notes
        assert set(model.report.engines().values()) == {"aot-amx"}, model.report.all_refusals()
        assert model.streams is not None, model.report.notes
        for rows, length in ((1, 8), (4, 24), (2, 5)):
            inputs = tokens(rows, length)
            for answers in (model, model.streams.model):
                torch.testing.assert_close(answers(*inputs), module(*inputs), rtol=1e-4, atol=1e-5)
        engines = {lane.engine for found in (model, model.streams.model) for lane in found._lanes.values()}
        assert len(engines) == 2
        built = [engine._module for engine in engines if isinstance(engine, amx.AmxEngine)]
        assert len({part.get_buffer("inner.packed").data_ptr() for part in built if part is not None}) == 1
    size = (Path(str(model.report.cache)) / "aot-amx" / "threads-2.so").stat().st_size
    weights = sum(parameter.nbytes for parameter in module.parameters())
    assert (size > weights) == (kind is Shifted), "what the code has of its own nothing else keeps"


@needs_amx
def test_what_was_packed_goes_with_the_engine() -> None:
    linear = nn.Linear(64, 32)
    layer = amx._SplitLinear(linear)
    assert amx._SplitLinear(linear).packed is layer.packed
    with torch.no_grad():
        linear.weight.zero_()
    assert amx._SplitLinear(linear).packed is not layer.packed, "of other values"
    packed = weakref.ref(layer.packed)
    del layer
    assert packed() is None


@needs_amx
def test_what_was_loaded_lets_go_of_weights(tmp_path: Path) -> None:
    ask(Encoder(), tmp_path)  # torch itself holds on to constants of what it has just compiled
    model = ask(Encoder(), tmp_path)
    assert model.report.start == "warm", model.report.notes
    (engine,) = {lane.engine for lane in model._lanes.values()}
    assert isinstance(engine, amx.AmxEngine) and engine._module is not None
    weights = [StorageWeakRef(engine._module.get_buffer("inner.packed").untyped_storage())]
    weights += [StorageWeakRef(parameter.untyped_storage()) for parameter in model.module.parameters()]
    engine.close()
    del model, engine
    gc.collect()
    assert [weight.expired() for weight in weights] == [True] * len(weights)


@needs_amx
def test_a_module_that_casts_by_itself_is_refused_and_served_eager() -> None:
    class Casting(Encoder):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                found: torch.Tensor = self.head(self.outer(self.inner(self.table(ids).bfloat16())))
                return found.float().mean(1)

    module = Casting()
    model = ask(module)
    assert set(model.report.engines().values()) == {"eager"}
    assert model.report.refusals[0].stage == "build"  # torch 2.8 puts a message of its own in the place of ours
    torch.testing.assert_close(model(*tokens(4, 8)), module(*tokens(4, 8)))


@needs_amx
def test_layers_at_whose_weights_others_look() -> None:
    layer = nn.TransformerEncoderLayer(256, 4, 2048, batch_first=True)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.layer = nn.Embedding(64, 256), layer

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.layer(self.table(ids)).mean(1)
            return found

    module = Layer()
    model = ask(module, lengths=[8])
    assert set(model.report.engines().values()) == {"aot-amx"}, model.report.all_refusals()
    torch.testing.assert_close(model(*tokens(4, 8)), module(*tokens(4, 8)), rtol=1e-4, atol=1e-5)


@needs_amx
def test_a_file_that_is_no_library_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_text("not a library")
    with pytest.raises(RuntimeError, match=r"broken\.so"):
        AotModel(tmp_path / "broken.so", 1, {})


@needs_amx
@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"matmul_precision": "highest"}, "matmul_precision is highest"),
        ({"autocast": True}, "autocast asks for bfloat16"),
    ],
)
def test_other_precisions_are_refused(section: dict[str, Any], reason: str) -> None:
    model = ask(Encoder(), section=section)
    assert set(model.report.engines().values()) == {"eager"}
    assert reason in str(model.report.refusals[0])


@needs_amx
def test_modules_that_it_is_not_for_are_refused() -> None:
    config = {"compile": {"backend": "aot-amx"}, "cache": {"enable": False}}
    cnn = compile_model(SmallCnn().eval(), images, config, batch_sizes=[1], device="cpu")
    assert "most of its parameters are not" in str(cnn.report.refusals[0])
    mlp = compile_model(Mlp().eval(), features, config, batch_sizes=[1], device="cpu")
    assert "weights, and below 1000000 little is to be won" in str(mlp.report.refusals[0])


def test_a_cpu_without_amx_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    model = ask(Encoder())
    assert set(model.report.engines().values()) == {"eager"}
    assert "this CPU has no AMX with bfloat16" in str(model.report.refusals[0])


def test_another_kernel_is_another_key_of_the_cache() -> None:
    assert {"optim:engines/amx.cpp", "optim:engines/aoti.cpp"} <= {*_own_code(Mlp())}


@pytest.mark.parametrize("there", [True, False])
def test_it_races_where_the_cpu_has_amx_and_weights_may_be_constants(there: bool) -> None:
    def names(phase: str = "forward", **compiling: Any) -> tuple[str, ...]:
        config = Pt2Config.parse({"compile": compiling} if compiling else {})
        capabilities = {**CPU.capabilities, "amx": dataclasses.replace(AMX, available=there)}
        info = dataclasses.replace(CPU, capabilities=capabilities)
        job = EngineJob(Mlp().eval(), config, info, {}, (), (), lambda flat: flat, phase=phase)
        return choose_engines(job).names

    assert ("aot-amx" in names()) is there
    assert "aot-amx" not in names("decode") and "aot-amx" not in names("prefill")
    assert "aot-amx" not in names(freeze=False)
