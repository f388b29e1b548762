"""Blocks of days: compiled they are entered, never compiled again, and say what the written ones say."""

import operator
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

from h2mv_dist.model import days
from h2mv_dist.model.base import Batch, Result
from h2mv_dist.model.code_folder import code_folder
from h2mv_dist.model.days import CompiledBlock, Prepared, State, day_blocks, no_compiler_because
from h2mv_dist.model.h2mv import H2MV
from h2mv_dist.model.networks import multiply_in
from h2mv_dist.model.registry import h2mv_loss
from h2mv_dist.model.rollout import spin_up, warm_up
from tests.model import builders

pytestmark = pytest.mark.skipif(
    bool(no_compiler_because()) and not os.environ.get("CI"), reason=no_compiler_because()
)

KEPT = h2mv_loss(builders.scaler()).reads
CELLS = 40
PRODUCTS = (torch.addmm, torch.mm, torch.matmul, torch.bmm, operator.matmul, functional.linear)


@pytest.fixture(scope="module")
def short_blocks() -> Iterator[None]:
    """Blocks of two days, which take a sixth of the time to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(days, "BLOCK_DAYS", 2)
        yield


@pytest.fixture(scope="module")
def warm(short_blocks: None) -> Iterator[None]:
    """Everything compiled that the tests need, once."""
    torch._dynamo.reset()
    model = compiled_model()
    warm_up(model, KEPT, gradient=True)
    yield
    torch._dynamo.reset()


def compiled_model() -> H2MV:
    model = builders.model()
    model.compiled, model.width = True, CELLS
    return model


def trained(model: H2MV, batch: Batch) -> tuple[Result, dict[str, Tensor]]:
    result = model(batch, spin_up(model, batch, 20, KEPT), KEPT)
    loss = h2mv_loss(builders.scaler())
    torch.autograd.backward(loss.value(loss.statistics(result, batch)).total)
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def regions(seen: torch.profiler.profile) -> int:
    """How often compiled code was entered."""
    return sum(event.name.startswith("Torch-Compiled Region") for event in seen.events() or ())


def assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    scale = expected.detach().abs().max()
    assert float((found - expected).detach().abs().max()) <= 1e-5 * float(scale), name


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("n_cells", [CELLS, 33, 1])
def test_compiled_days_say_what_the_written_ones_say(n_cells: int) -> None:
    batch = builders.batch(n_cells=n_cells, n_days=45)
    written, gradients = trained(builders.model(), batch)
    with torch.compiler.set_stance("fail_on_recompile"), torch.profiler.profile() as seen:
        found, compiled_gradients = trained(compiled_model(), batch)
    assert found.daily.keys() == KEPT
    # 20 days of spin-up and 45 of the run
    assert regions(seen) == len(day_blocks(20, days.BLOCK_DAYS)) + len(day_blocks(45, days.BLOCK_DAYS))
    for name in KEPT:
        assert_close(found.daily[name], written.daily[name], name)
    for part, expected in zip(found.state, written.state, strict=True):
        assert_close(part, expected, "state")
    for name, expected in gradients.items():
        # one cell has many gradients near 0
        scale = max(float(g.abs().max()) for g in gradients.values())
        assert float((compiled_gradients[name] - expected).abs().max()) <= 1e-5 * scale, name


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_nothing_is_compiled_for_other_lengths_and_numbers_of_cells() -> None:
    model = compiled_model()
    with torch.compiler.set_stance("fail_on_recompile"):
        for n_cells, n_days in ((CELLS, 45), (7, 30), (CELLS, 1), (CELLS - 1, days.BLOCK_DAYS), (3, 2)):
            batch = builders.batch(n_cells=n_cells, n_days=n_days)
            result = model(batch, spin_up(model, batch, None, KEPT), KEPT)
            torch.autograd.backward(result.daily["runoff"].sum())
        for n_cells in (1, 50, 999):
            with torch.no_grad():
                batch = builders.batch(n_cells=n_cells, n_days=11)
                model(batch, model.initial_state(n_cells), KEPT)


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_an_error_of_compiled_days_says_how_to_find_its_cause() -> None:
    model, batch = compiled_model(), builders.batch(n_cells=CELLS + 1, n_days=days.BLOCK_DAYS)
    with torch.no_grad():
        prepared = model.prepare(batch.static.T)
        state = tuple(
            part.mT.contiguous() if part.dim() > 1 else part for part in model.initial_state(batch.n_cells)
        )
        forcing = batch.forcing.permute(1, 2, 0).contiguous()
        with pytest.raises(RuntimeError, match="lstm_forward") as failed:
            CompiledBlock(model.day_block)(prepared, forcing, state, tuple(sorted(KEPT)))
    assert failed.value.__notes__ == [days.NOT_WHY]


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_compiled_days_call_kernels_and_operators_without_python() -> None:
    made = [path.read_text() for path in code_folder().parent.rglob("*.cpp")]
    calling = [source for source in made if "h2mv_dist::lstm_" in source]
    assert calling, "compiled blocks call the operator"
    for source in calling:
        assert "gil_scoped_release" in source
        assert "gil_scoped_acquire" not in source.split("inductor_entry_impl", 1)[1]


@pytest.fixture
def nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine of its own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.usefixtures("nothing_compiled")
def test_one_compiles_and_the_others_wait() -> None:
    inside, most = list[str](), list[int]()

    def compiling(what: str) -> None:
        # one that fails leaves nothing behind: so each of them compiles
        with suppress(RuntimeError), days.one_compiles(what):
            inside.append(what)
            most.append(len(inside))
            time.sleep(0.05)
            inside.remove(what)
            raise RuntimeError("no compiler")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(compiling, "aaa"))
    assert most == [1, 1, 1]


@pytest.mark.usefixtures("nothing_compiled")
def test_who_compiles_something_else_does_not_wait() -> None:
    all_inside = threading.Barrier(3, timeout=60)

    def compiling(what: str) -> None:
        with days.one_compiles(what):
            all_inside.wait()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(compiling, "abc"))


@pytest.mark.usefixtures("nothing_compiled")
def test_what_was_compiled_before_is_loaded_by_all_at_once() -> None:
    with pytest.raises(RuntimeError, match="no compiler"), days.one_compiles("a"):
        raise RuntimeError("no compiler")
    assert not code_folder().exists()
    with days.one_compiles("a"):
        pass
    all_inside = threading.Barrier(3, timeout=60)

    def loading(what: str) -> None:
        with days.one_compiles(what):
            all_inside.wait()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(loading, "aaa"))


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_block_is_one_graph_of_two_products_or_one_operator_a_day(compiled: bool) -> None:
    """What does not depend on the clock: graphs, calls of them, and products, so that a hidden loop shows."""
    torch._dynamo.reset()
    counting = CompileCounterWithBackend("eager")
    n_days, entered = 5, 0

    class Entered(CompiledBlock):
        def __call__(
            self, prepared: Prepared, forcing: Tensor, state: State, names: tuple[str, ...]
        ) -> tuple[tuple[Tensor, ...], State]:
            nonlocal entered
            entered += 1
            return self.block(prepared, forcing, state, names)

    block = Entered(torch.compile(H2MV.day_block, backend=counting, fullgraph=True, dynamic=False))

    model, batch = builders.model(), builders.batch(n_cells=32, n_days=n_days)
    model.compiled = compiled
    with torch.no_grad():
        prepared = model.prepare(batch.static.T)
        state = tuple(part.movedim(0, -1).contiguous() for part in model.initial_state(32))
        forcing = batch.forcing.permute(1, 2, 0).contiguous()
        days.run_days(block, prepared, forcing, state, ("runoff",))
    assert entered == len(day_blocks(n_days, days.BLOCK_DAYS)) == 3
    assert counting.frame_count == 2
    for graph, length in zip(counting.graphs, (days.BLOCK_DAYS, 1), strict=True):
        called = [node.target for node in graph.graph.nodes]
        assert sum(target in PRODUCTS for target in called) == (0 if compiled else 2 * length)
        assert called.count(torch.ops.h2mv_dist.lstm_forward.default) == (length if compiled else 0)
        assert not [node for node in graph.graph.nodes if node.op == "call_module"]
    torch._dynamo.reset()


def test_recomputed_blocks_have_the_same_gradient_and_remember_less() -> None:
    batch = builders.batch(n_cells=6, n_days=90)
    remembered: dict[bool, int] = {}
    found = {}
    for recompute in (False, True):
        model = builders.model()
        model.recompute = recompute
        storages: dict[int, int] = {}

        def remember(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            result = model(batch, model.initial_state(6), KEPT)
        remembered[recompute] = sum(storages.values())
        torch.autograd.backward(result.daily["runoff"].sum())
        found[recompute] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, gradient in found[False].items():
        assert_close(found[True][name], gradient, name)
    assert remembered[True] < remembered[False] / 4


def test_only_outputs_that_are_asked_for_come_back() -> None:
    model, batch = builders.model(), builders.batch()
    result = model(batch, model.initial_state(4), ("runoff", "fapar"))
    assert set(result.daily) == {"runoff", "fapar"}
    assert set(result.static) == {"soil_moisture_capacity"}


def test_cells_that_fill_up_are_such_as_there_are() -> None:
    """Else a law that divides by a feature would have NaN in its gradient, times zero or not."""
    weight = torch.ones((), requires_grad=True)
    filled = days.padded(torch.tensor([2.0, 4.0]), 16)
    torch.autograd.backward((weight / filled).log()[:2].sum())
    assert filled.tolist() == [2.0] + [4.0] * 15
    assert weight.grad is not None
    assert float(weight.grad) == 2.0


def test_a_machine_without_a_compiler_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert no_compiler_because() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler" in no_compiler_because()
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in no_compiler_because()
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "false")
    assert "does not know C++20" in no_compiler_because()
    monkeypatch.undo()
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert "headers are not installed" in no_compiler_because()


@pytest.mark.usefixtures("nothing_compiled")
def test_processes_that_try_the_compiler_at_once_leave_nothing() -> None:
    path, folder = shutil.which(days.compiler()), code_folder()
    assert path is not None
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(days._prove.__wrapped__, [path] * 4, [folder] * 4))
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("nothing_compiled")
def test_code_that_cannot_be_loaded_is_no_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "compiler"
    broken.write_text('#!/bin/sh\nfor last; do :; done\necho "no library" > "$last"\n')
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    reason = no_compiler_because()
    assert f"what {broken} makes in {code_folder()} cannot be loaded" in reason
    assert "set TORCHINDUCTOR_CACHE_DIR to another folder" in reason
    assert list(code_folder().iterdir()) == []
    # what was wrong may be mended while a worker lives
    broken.write_text('#!/bin/sh\nexec g++ "$@"\n')
    assert no_compiler_because() == ""


def test_a_folder_that_nothing_may_be_run_from_is_recognised(tmp_path: Path) -> None:
    mounted = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o noexec none "$0" && exec "$@"', str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*mounted, "true"], check=False).returncode:
        pytest.skip("this user cannot mount anything here, not even for himself")
    asking = "from h2mv_dist.model.days import no_compiler_because; print(no_compiler_because())"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "code")}
    reason = subprocess.check_output([*mounted, sys.executable, "-c", asking], env=environment, text=True)
    assert f"makes in {tmp_path / 'code' / 'h2mv_dist'} cannot be loaded" in reason
    assert "failed to map segment" in reason
    assert "set TORCHINDUCTOR_CACHE_DIR to another folder" in reason


@pytest.mark.slow
@pytest.mark.usefixtures("short_blocks")
def test_recomputed_and_lowered_days_can_be_compiled() -> None:
    torch._dynamo.reset()
    batch, gradients = builders.batch(n_cells=CELLS, n_days=25), []
    for recompute, precision in ((False, "float32"), (True, "float32"), (True, "bfloat16")):
        model = compiled_model()
        model.recompute = recompute
        multiply_in(model, precision)
        gradients.append(trained(model, batch)[1])
    whole, recomputed, lowered = gradients
    recurrent = "lstm_fc.lstm_cell.weight_hh"
    assert not torch.equal(lowered[recurrent], whole[recurrent])
    for name, expected in whole.items():
        assert torch.equal(recomputed[name], expected), name
        assert float((lowered[name] - expected).norm()) <= 0.05 * float(expected.norm()), name
    torch._dynamo.reset()
