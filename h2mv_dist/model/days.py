"""Days in blocks: the loop every model shares, as it is written or compiled by ``torch.compile``.

Inside the loop the cell is the last axis, so that laws work on contiguous vectors and a product of weights
[gate, feature] and features [feature, cell] needs no transposition. A compiled block is entered once for
``BLOCK_DAYS`` days, and its one-day version for each day that is left over; both are compiled once a process
and found again on disk by the next one.
"""

import ctypes
import errno
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from h2mv_dist.model.code_folder import (
    INSTEAD,
    PRIVATE,
    VARIABLE,
    code_folder,
    keeps_headers,
    no_folder_because,
)

BLOCK_DAYS: Final = 16
"""Days of a compiled block: more take longer to compile, fewer more calls."""
WRITTEN_DAYS: Final = 8
"""The same as written: more are no faster there, and take more memory."""
LANES: Final = 16
"""Compiled blocks get a multiple of so many cells, the float32 numbers of a vector register."""
MOST_CELLS: Final = 2**20
KINDS: Final = 1024
"""Most versions of a block in a process: lengths, outputs, sizes of models, with gradients and without."""
LOCK_SECONDS: Final = 600.0
NOT_WHY: Final = (
    "compiled days tell where they failed, not why: if there was memory left, a new job with "
    'code_path = "eager" runs the same days as written, which say more'
)
LANGUAGE: Final = ("-std=c++20", "-x", "c++")

State = tuple[Tensor, ...]


class Prepared(NamedTuple):
    """What all days share.

    Attributes:
        weights: named tuple of tensors without a cell axis.
        cells: named tuple of tensors whose last axis is the cell.
    """

    weights: tuple[Any, ...]
    cells: tuple[Tensor, ...]


DayBlock = Callable[[Prepared, Tensor, State, tuple[str, ...]], tuple[tuple[Tensor, ...], State]]
"""(what all days share, forcing [day, var, cell], state [..., cell], names) -> (the outputs of these names,
each [day, cell], state after the last day). A pure function; compiled, its loop over days is unrolled."""


def compiler() -> str:
    """The C++ compiler that torch uses, too."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def no_compiler_because() -> str:
    """Why blocks cannot be compiled here, and run; empty if they can, as it was seen once in this process."""
    return no_tools_because() or no_folder_because() or _no_library_because(compiler(), code_folder())


def no_tools_because() -> str:
    """What is not installed that compiling takes, on this machine as on others like it; empty if all is."""
    path = shutil.which(compiler())
    if path is None:
        return f"no C++ compiler: {compiler()} is not in PATH"
    if not _knows_language(path):
        return f"{path} does not know C++20, as g++ does from version 10 on"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.exists() else f"Python's headers are not installed: there is no {header}"


def _no_library_because(path: str, folder: Path) -> str:
    try:
        _prove(path, folder)
    except OSError as error:
        reason = " ".join(str(error).split())[-300:]
        if any(os.strerror(code) in reason for code in (errno.ENOSPC, errno.EDQUOT)):
            return ""  # that may pass, and is waited for where room is needed
        return f"what {path} makes in {folder} cannot be loaded (noexec?): {reason}; {INSTEAD}"
    return ""


@cache
def _prove(path: str, folder: Path) -> None:
    """Compile a library without content, and load it; if it fails, the next call tries again.

    No folder of its own for it: on NFS, which keeps what is still loaded, that could not be removed.

    Raises:
        OSError: it cannot be compiled, or loaded.
    """
    folder.mkdir(PRIVATE, parents=True, exist_ok=True)
    handle, library = tempfile.mkstemp(".so", "trial-", folder)
    os.close(handle)
    try:
        command = [path, *LANGUAGE, "-shared", "-fPIC", os.devnull, "-o", library]
        run = subprocess.run(command, check=False, capture_output=True, text=True)
        if run.returncode:
            raise OSError(run.stderr or f"it failed with status {run.returncode}")
        ctypes.CDLL(library)
    finally:
        Path(library).unlink(missing_ok=True)


@cache
def _knows_language(path: str) -> bool:
    command = [path, *LANGUAGE, "-fsyntax-only", os.devnull]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def run_days(
    block: DayBlock,
    prepared: Prepared,
    forcing: Tensor,
    state: State,
    names: tuple[str, ...],
    *,
    recompute: bool = False,
) -> tuple[dict[str, Tensor], State]:
    """Run days in blocks.

    Args:
        block: runs some of them.
        prepared: what they share.
        forcing: [day, var, cell], contiguous.
        state: before the first day, [..., cell].
        names: outputs to keep.
        recompute: remember only the state between blocks for the way back, and compute each block once more.

    Returns:
        The outputs, each [day, cell], and the state after the last day.
    """
    kept: list[tuple[Tensor, ...]] = []
    at_once = BLOCK_DAYS if isinstance(block, CompiledBlock) else WRITTEN_DAYS
    for days in day_blocks(forcing.shape[0], at_once):
        if recompute and torch.is_grad_enabled():
            outputs, state = checkpoint(
                block, prepared, forcing[days], state, names, use_reentrant=False, preserve_rng_state=False
            )
        else:
            outputs, state = block(prepared, forcing[days], state, names)
        kept.append(outputs)
    none = forcing[:0, 0]
    columns = [torch.cat(parts) for parts in zip(*kept, strict=True)] if kept else [none for _ in names]
    for column in columns:
        if column.requires_grad and isinstance(block, CompiledBlock):
            # else each block would bring its part of the gradient into order
            column.register_hook(Tensor.contiguous)
    return dict(zip(names, columns, strict=True)), state


def day_blocks(n_days: int, at_once: int) -> list[slice]:
    """Whole blocks, then single days, so that blocks of two lengths are all there is to compile.

    >>> day_blocks(18, 16)
    [slice(0, 16, None), slice(16, 17, None), slice(17, 18, None)]
    """
    whole = n_days - n_days % at_once
    edges = [*range(0, whole, at_once), *range(whole, n_days + 1)]
    return [slice(first, stop) for first, stop in pairwise(edges)]


class CompiledBlock:
    """A block of days as compiled code; called like the block it was made of.

    Without gradients the number of cells is left open. With gradients, where that would cost a tenth of the
    speed, it is fixed: whoever trains gives all batches the same width. What a law reads from its module is
    read once a process.
    """

    def __init__(self, block: DayBlock) -> None:
        self.block = block
        self._seen: set[tuple[Any, ...]] = set()

    def __call__(
        self, prepared: Prepared, forcing: Tensor, state: State, names: tuple[str, ...]
    ) -> tuple[tuple[Tensor, ...], State]:
        """Run the days of ``forcing``."""
        forcing, state = _alone(forcing), tuple(map(_alone, state))
        if torch.is_grad_enabled():
            state = tuple(part if part.requires_grad else part.detach().requires_grad_() for part in state)
        elif (kind := (names, len(forcing), *(part.stride() for part in state))) not in self._seen:
            # only whoever compiles looks for the marks, and to make them takes a sixth of a day's time
            self._seen.add(kind)
            for tensor in (*prepared.cells, forcing, *state):
                torch._dynamo.mark_dynamic(tensor, tensor.dim() - 1, min=LANES, max=MOST_CELLS)
        with telling_more():
            return _compiled(self.block, forcing.device.type)(prepared, forcing, state, names)


@contextmanager
def telling_more() -> Iterator[None]:
    """Have an error of compiled days say how to find its cause: their C++ code says where it was only."""
    try:
        yield
    except RuntimeError as error:
        if "API call failed" in str(error) and not hasattr(error, "__notes__"):
            error.add_note(NOT_WHY)
        raise


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, but no part of another one: for parts that begin elsewhere code is compiled anew."""
    return tensor.clone() if tensor.storage_offset() else tensor


@cache
def _compiled(block: DayBlock, device_type: str) -> DayBlock:
    """One compiled function a block, type of device and process."""
    import torch._functorch.config

    from h2mv_dist.model.lstm import no_operator_because

    # torch, too, runs what it finds there
    os.environ[VARIABLE] = str(code_folder().parent)
    # its workers would stay, and take the memory of what they import
    torch._inductor.config.compile_threads = 1
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = KINDS
    # else what has an operator of ours is traced anew by every process
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    # modules do not change while a process runs; to look at them would take a tenth of a block's time
    guards = {"guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe}
    # that operators return what they promise is for tests to say
    checks = {"size_asserts": False, "alignment_asserts": False}
    # what calls one kernel after the other is C++, too, so that Python's other threads go on meanwhile; that
    # takes torch's headers, as the operator does
    calls = {"cpp_wrapper": device_type == "cpu" and not no_operator_because()}
    headers = {"cpp_cache_precompile_headers": keeps_headers()}
    options: dict[str, Any] = {**guards, **checks, **calls, **headers}
    return torch.compile(block, fullgraph=True, dynamic=False, options=options)


def padded(tensor: Tensor, width: int) -> Tensor:
    """A contiguous copy, with the last cell again and again up to ``width`` cells.

    Zeros would not do: where a law divides by them, NaN finds its way into the weights' gradient. Nor would
    memory of NumPy's: it may begin anywhere, and on that depends how products round.
    """
    *others, n_cells = tensor.shape
    if n_cells == width:
        return tensor.clone(memory_format=torch.contiguous_format)
    return torch.cat([tensor, tensor[..., -1:].expand(*others, width - n_cells)], dim=-1)


def compiled_width(n_cells: int, wanted: int | None) -> int:
    """Cells a compiled block gets: ``wanted``, if given and enough, else the next multiple of ``LANES``.

    >>> compiled_width(10, None), compiled_width(10, 64), compiled_width(70, 64)
    (16, 64, 80)
    """
    return -(-max(n_cells, wanted if wanted and n_cells <= wanted else 1) // LANES) * LANES


@contextmanager
def one_compiles(what: str) -> Iterator[None]:
    """Of the processes of a user on a host, one compiles this; the others find its code on disk.

    What was compiled before is loaded by all of them at once. Only to save work: whoever cannot lock, or
    waits too long, compiles for itself.

    Args:
        what: tells apart what is compiled within; who compiles something else does not wait.
    """
    key = hashlib.sha256(what.encode()).hexdigest()[:32]
    made = code_folder() / f"made-{key}"
    name = f"h2mv_dist-{os.getuid()}-{socket.gethostname()}-{key}.lock"
    lock = FileLock(Path(tempfile.gettempdir()) / name)
    # a timeout is one, too
    with suppress(OSError):
        if not made.exists():
            lock.acquire(timeout=LOCK_SECONDS)
    try:
        if made.exists():
            lock.release()
        yield
        with suppress(OSError):
            made.parent.mkdir(PRIVATE, parents=True, exist_ok=True)
            made.touch()
    finally:
        lock.release()
