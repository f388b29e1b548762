"""A day of an LSTM and of the layer that reads it as one operator, for compiled days on a CPU in float32.

Libraries' products are made for larger matrices than those of a day, and leave all gates to be read again
from memory; ``lstm.cpp`` takes hardly longer for all of it than they for the product. It is compiled
once a machine, by the compiler that ``torch.compile`` needs too, and lies beside what that one keeps.
"""

import hashlib
import logging
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from h2mv_dist.model.code_folder import PRIVATE, code_folder
from h2mv_dist.model.days import compiler

SOURCE: Final = Path(__file__).with_suffix(".cpp")
PANEL: Final = 4
"""Rows of a product that lie side by side in packed weights: the gates of a unit, or so many inputs."""
OPTIONS: Final = ("-std=c++20", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC")
INSTRUCTIONS: Final = {
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""What torch calls the instructions of the processor -> how a compiler is told to use them."""

_log: Final = logging.getLogger(__name__)


class Packed(NamedTuple):
    """Weights of the gates of an LSTM, hidden state first among their inputs, and of a layer that reads it.

    What the operator reads has no gradients; rows come in panels of ``PANEL``, the last filled up with zeros.

    Attributes:
        weights: [4 hidden, input]; gate order i, f, g, o.
        heads: [head, hidden].
        forward: of the gates, [hidden, input, gate].
        backward: of the gates, [panel of inputs, 4 hidden, input of the panel].
        heads_forward: [panel of heads, hidden, head of the panel].
        heads_backward: [panel of units, head, unit of the panel].
    """

    weights: Tensor
    heads: Tensor
    forward: Tensor
    backward: Tensor
    heads_forward: Tensor
    heads_backward: Tensor


def packed(weights: Tensor, heads: Tensor) -> Packed | None:
    """Weights as the operator reads them; None if it is not made for them, or cannot be made here.

    It is made for float32 on a CPU, and hidden sizes that are a multiple of ``PANEL``.

    Args:
        weights: [4 hidden, input].
        heads: [head, hidden].
    """
    n_gates, n_inputs = weights.shape
    made_for = weights.device.type == "cpu" and weights.dtype == torch.float32 and n_gates % (4 * PANEL) == 0
    if not made_for or no_operator_because():
        return None
    by_unit = weights.detach().view(4, n_gates // 4, n_inputs).permute(1, 2, 0).contiguous()
    return Packed(
        weights, heads, by_unit, _in_panels(weights.detach().T), _in_panels(heads), _in_panels(heads.T)
    )


def _in_panels(matrix: Tensor) -> Tensor:
    """[row, column] as [panel, column, row of the panel]."""
    filled = functional.pad(matrix.detach(), (0, 0, 0, -matrix.shape[0] % PANEL))
    return filled.view(-1, PANEL, matrix.shape[1]).transpose(1, 2).contiguous()


def advance(
    packed: Packed, constant: Tensor, hidden: Tensor, others: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance by a day; all arrays float32, on a CPU, their number of cells a multiple of ``days.LANES``.

    Args:
        packed: weights.
        constant: what is added to their product with the inputs, [4 hidden, cell].
        hidden: state, [hidden, cell].
        others: further inputs, [input - hidden, cell].
        cell: state, [hidden, cell].

    Returns:
        Heads without bias, [head, cell]; hidden and cell state, as ``torch.nn.LSTMCell`` would give them.
    """
    if torch.is_grad_enabled():
        return _Advance.apply(*packed, constant, hidden, others, cell)  # type: ignore[no-untyped-call, no-any-return]
    weights = packed.forward, packed.heads_forward
    heads, next_hidden, next_cell, _ = _forward(*weights, constant, hidden, others, cell, False)
    return heads[: len(packed.heads)], next_hidden, next_cell


class _Advance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        heads: Tensor,
        forward: Tensor,
        backward: Tensor,
        heads_forward: Tensor,
        heads_backward: Tensor,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, hidden, others, cell = inputs
        shown, next_hidden, next_cell, gates = _forward(forward, heads_forward, *inputs, True)
        ctx.save_for_backward(backward, heads_backward, gates, cell, hidden, others, next_hidden)
        return shown[: len(heads)], next_hidden, next_cell

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        weights, heads, *inputs = _backward(*ctx.saved_tensors, *slopes)
        return weights, heads.T, None, None, None, None, *inputs


_library: Final = torch.library.Library("h2mv_dist", "DEF")
_library.define(
    "lstm_forward(Tensor weights, Tensor heads_weights, Tensor constant, Tensor hidden, Tensor others,"
    " Tensor cell, bool remember) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "lstm_backward(Tensor weights, Tensor heads_weights, Tensor gates, Tensor cell,"
    " Tensor hidden, Tensor others, Tensor next_hidden, Tensor heads_slope, Tensor next_hidden_slope,"
    " Tensor next_cell_slope) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_forward: Final = torch.ops.h2mv_dist.lstm_forward.default
_backward: Final = torch.ops.h2mv_dist.lstm_backward.default


def _forward_results(
    weights: Tensor,
    heads_weights: Tensor,
    constant: Tensor,
    hidden: Tensor,
    others: Tensor,
    cell: Tensor,
    remember: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # here, too, so that a model's mistake shows when it is compiled
    inputs = hidden.shape[0] + others.shape[0]
    torch._check(weights.shape[1] == inputs, lambda: f"{inputs} inputs, weights of {weights.shape[1]}")
    heads = hidden.new_empty(heads_weights.shape[0] * PANEL, hidden.shape[1])
    gates = constant.new_empty(constant.shape if remember else 0)
    return heads, hidden.new_empty(hidden.shape), cell.new_empty(cell.shape), gates


def _backward_results(
    weights: Tensor,
    heads_weights: Tensor,
    gates: Tensor,
    cell: Tensor,
    hidden: Tensor,
    others: Tensor,
    next_hidden: Tensor,
    heads_slope: Tensor,
    next_hidden_slope: Tensor,
    next_cell_slope: Tensor,
) -> tuple[Tensor, ...]:
    return (
        gates.new_empty(gates.shape[0], hidden.shape[0] + others.shape[0]),
        gates.new_empty(hidden.shape[0], heads_slope.shape[0]),
        *(values.new_empty(values.shape) for values in (gates, hidden, others, cell)),
    )


torch.library.register_fake("h2mv_dist::lstm_forward", _forward_results, lib=_library)
torch.library.register_fake("h2mv_dist::lstm_backward", _backward_results, lib=_library)


@cache
def no_operator_because() -> str:
    """Why there is no code for the operator, which is loaded once; empty if there is."""
    try:
        _load()
    except OSError as error:
        # torch's own does not say why
        reason = str(error.__cause__ or error)
        _log.warning("compiled days take twice as long, without the operator of lstm.cpp: %s", reason)
        return reason
    return ""


def _load() -> None:
    """Have torch know the operator's code for this processor, compiled if it is not there, or of no use.

    Raises:
        OSError: it cannot be compiled, or loaded.
        ConfigError: it might be somebody else's.
    """
    command = _command()
    code = code_folder() / _name(command)
    try:
        torch.ops.load_library(code)
    except OSError:
        _compile(command, code)
        torch.ops.load_library(code)


def _name(command: tuple[str, ...]) -> str:
    content = repr((command, torch.__version__)).encode() + SOURCE.read_bytes()
    return f"lstm-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _command() -> tuple[str, ...]:
    package = Path(torch.__file__).parent
    # Apple's compiler knows no OpenMP: one thread then
    threads = () if sys.platform == "darwin" else ("-fopenmp",)
    return (
        compiler(),
        *OPTIONS,
        *threads,
        *INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ()),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{package}/include", f"-I{package}/include/torch/csrc/api/include"),
        str(SOURCE),
        *(f"-L{package}/lib", "-ltorch_cpu", "-lc10"),
    )


def _compile(command: tuple[str, ...], code: Path) -> None:
    code.parent.mkdir(PRIVATE, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=code.parent, ignore_cleanup_errors=True) as folder:
        made = Path(folder) / code.name
        run = subprocess.run([*command, "-o", str(made)], check=False, capture_output=True, text=True)
        if run.returncode:
            raise OSError(f"{command[0]} failed with status {run.returncode} {run.stderr.strip()[-500:]}")
        made.replace(code)
