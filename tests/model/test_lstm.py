"""The operator for a day of an LSTM: what PyTorch's own products and activations say, with its gradients."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from h2mv_dist.model import lstm
from h2mv_dist.model.days import no_compiler_because

pytestmark = pytest.mark.skipif(
    bool(no_compiler_because()) and not os.environ.get("CI"), reason=no_compiler_because()
)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def arrays(hidden: int, others: int, heads: int, cells: int) -> list[Tensor]:
    """Weights, those of the heads, constant gates, hidden state, other inputs, cell state."""
    generator = torch.Generator().manual_seed(hidden + others + heads + cells)
    shapes = (
        (4 * hidden, hidden + others),
        (heads, hidden),
        *((rows, cells) for rows in (4 * hidden, hidden, others, hidden)),
    )
    weights, heads_weights, *rest = (torch.randn(shape, generator=generator) for shape in shapes)
    return [tensor.requires_grad_() for tensor in (weights / hidden**0.5, heads_weights, *rest)]


def by_operator(given: list[Tensor]) -> tuple[Tensor, ...]:
    weights, heads, constant, hidden, others, cell = given
    packed = lstm.packed(weights, heads)
    assert packed is not None
    return lstm.advance(packed, constant, hidden, others, cell)


def by_torch(given: list[Tensor]) -> tuple[Tensor, ...]:
    weights, heads, constant, hidden, others, cell = given
    write, keep, candidate, read = (weights @ torch.cat([hidden, others]) + constant).chunk(4)
    after = keep.sigmoid() * cell + write.sigmoid() * candidate.tanh()
    shown = read.sigmoid() * after.tanh()
    return heads @ shown, shown, after


def slopes(results: tuple[Tensor, ...], given: list[Tensor]) -> tuple[Tensor, ...]:
    """Of all that was given, for slopes of the results that differ from cell to cell."""
    generator = torch.Generator().manual_seed(1)
    ones = [torch.randn(result.shape, generator=generator).to(result.dtype) for result in results]
    return torch.autograd.grad(results, given, ones)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).detach().abs().max()) <= 3e-6 * float(b.detach().abs().max())


@pytest.mark.parametrize(
    "sizes", [(100, 7, 7, 256), (8, 4, 3, 48), (12, 3, 1, 16), (20, 30, 33, 16)], ids=str
)
def test_a_day_and_its_gradients_are_those_of_double_precision(sizes: tuple[int, int, int, int]) -> None:
    given = arrays(*sizes)
    double = [tensor.detach().double().requires_grad_() for tensor in given]
    found, expected = by_operator(given), by_torch(double)
    assert_same(found, expected)
    assert_same(slopes(found, given), slopes(expected, double))
    with torch.no_grad():
        for without, with_gradients in zip(by_operator(given), found, strict=True):
            assert torch.equal(without, with_gradients)


@pytest.mark.usefixtures("threads")
def test_neither_threads_nor_the_place_of_a_cell_change_a_bit() -> None:
    given = arrays(20, 7, 5, 112)
    results = []
    # more threads than there is work for, too
    for number in (1, 2, 3, 16):
        torch.set_num_threads(number)
        found = by_operator(given)
        results.append((*found, *slopes(found, given)))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
    # the last ones are in a tile that is not as wide
    moved = [*given[:2], *(tensor.roll(1, dims=1) for tensor in given[2:])]
    for here, there in zip(by_operator(moved), results[0], strict=False):
        assert torch.equal(here, there.roll(1, dims=1))


def test_gates_beyond_all_measure_saturate_and_what_is_no_number_stays_none() -> None:
    given = [tensor.detach() for tensor in arrays(4, 1, 1, 16)]
    given[2][:, :4] = torch.tensor([1e30, -1e30, torch.inf, -torch.inf])
    given[2][0, 5] = torch.nan
    found, expected = by_operator(given), by_torch(given)
    for a, b in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert found[2][0, 5].isnan()
    assert found[2].isnan().sum() == 1


def test_the_operator_is_what_it_says_to_compilers() -> None:
    weights, heads, *rest = (tensor.detach() for tensor in arrays(8, 3, 5, 32))
    packed = lstm.packed(weights, heads)
    assert packed is not None
    checks = ("test_schema", "test_faketensor")
    for remember in (False, True):
        torch.library.opcheck(
            torch.ops.h2mv_dist.lstm_forward.default,
            (packed.forward, packed.heads_forward, *rest, remember),
            test_utils=checks,
        )
    constant, hidden, others, cell = rest
    tensors = (constant, cell, hidden, others, hidden, torch.ones(5, 32), hidden, cell)
    torch.library.opcheck(
        torch.ops.h2mv_dist.lstm_backward.default,
        (packed.backward, packed.heads_backward, *tensors),
        test_utils=checks,
    )


def test_what_is_no_number_stays_in_its_cell_on_the_way_back() -> None:
    given = arrays(8, 3, 5, 32)
    found = by_operator(given)
    clean = slopes(found, given)[2:]
    disturbed = [*given[:3], given[3].detach().clone().requires_grad_(), *given[4:]]
    with torch.no_grad():
        disturbed[3][0, 7] = torch.nan
    others = torch.arange(32) != 7
    for a, b in zip(slopes(by_operator(disturbed), disturbed)[2:], clean, strict=True):
        assert torch.equal(a[:, others], b[:, others])
        assert a[:, 7].isnan().any()


def test_inputs_that_do_not_fit_the_weights_are_refused() -> None:
    weights, heads, constant, hidden, others, cell = (tensor.detach() for tensor in arrays(8, 3, 5, 32))
    packed = lstm.packed(weights, heads)
    assert packed is not None
    with pytest.raises(ValueError, match=r"weights have shape \[8, 11, 4\], expected \[8, 12, 4\]"):
        lstm.advance(packed, constant, hidden, torch.cat([others, others[:1]]), cell)
    with pytest.raises(ValueError, match="cell states have shape"):
        lstm.advance(packed, constant, hidden, others, cell[:, :16])


@pytest.mark.slow
def test_code_that_cannot_be_read_is_made_again(tmp_path: Path) -> None:
    load = [sys.executable, "-c", "from h2mv_dist.model import lstm; lstm._load()"]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    subprocess.run(load, env=environment, check=True)
    (code,) = tmp_path.rglob("*.so")
    size = code.stat().st_size
    code.write_bytes(b"no code")
    subprocess.run(load, env=environment, check=True)
    assert code.stat().st_size == size


def test_cells_that_fill_no_vector_are_refused() -> None:
    with pytest.raises(ValueError, match="17 cells, which is no multiple of 16"):
        by_operator(arrays(4, 1, 1, 17))


def test_weights_that_it_is_not_made_for_are_left_alone() -> None:
    weights, heads, *_ = arrays(6, 1, 1, 16)
    assert lstm.packed(weights, heads) is None
    weights, heads, *_ = arrays(8, 1, 1, 16)
    assert lstm.packed(weights.double(), heads.double()) is None
    assert lstm.packed(weights, heads) is not None


def test_without_a_compiler_that_can_there_is_a_warning_and_no_operator(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "false")
    lstm.no_operator_because.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert lstm.packed(*arrays(8, 1, 1, 16)[:2]) is None
    assert "without the operator of lstm.cpp: false failed with status 1" in caplog.text
    lstm.no_operator_because.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_processors(capability: str) -> None:
    """All of this file once more, with instructions that older processors have too."""
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "not other_processors"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
