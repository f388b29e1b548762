"""Whether a model's days run as compiled code, or as they are written."""

import logging
from functools import cache
from typing import Final, NamedTuple

from h2mv_dist.config import CodePath
from h2mv_dist.errors import ConfigError, describe
from h2mv_dist.model.days import no_compiler_because

COMPILED: Final = "compiled"
EAGER: Final = "eager"
WORTH_CELL_DAYS: Final = 3e7
"""From so many simulated cell-days of a rank, or of a cube with spin-up and baseline, on, compiling pays."""

_log: Final = logging.getLogger(__name__)


class Way(NamedTuple):
    """How a rank runs its model.

    Attributes:
        compiled: as compiled code.
        recompute: blocks of days once more when going backward.
    """

    compiled: bool
    recompute: bool


def chosen_path(wanted: CodePath, device: str, cell_days: float, obstacle: str, where: str) -> str:
    """``compiled`` or ``eager``.

    Args:
        wanted: the setting.
        device: type of the device, ``cpu`` or ``cuda``.
        cell_days: that a rank, or a cube, will simulate about; going backward counts twice.
        obstacle: why something cannot be compiled; empty if it can.
        where: name of the setting.

    Raises:
        ConfigError: what was asked for is not possible.

    >>> chosen_path("auto", "cpu", 1e9, "", "training.code_path")
    'compiled'
    >>> chosen_path("auto", "cpu", 1e3, "", "training.code_path")
    'eager'
    """
    if wanted == COMPILED and obstacle:
        raise ConfigError(
            describe(
                "days cannot be compiled",
                where=f"{where} = compiled",
                expected="a C++ compiler, and a folder for code, on every host that computes",
                actual=obstacle,
                fix=f"mend that (g++ will do as compiler), or set {where} to auto",
            )
        )
    if wanted == EAGER or (wanted == "auto" and (device != "cpu" or cell_days < WORTH_CELL_DAYS)):
        return EAGER
    if obstacle:
        _warn(obstacle)
        return EAGER
    return COMPILED


def compiles_here(path: str) -> bool:
    """Whether days are compiled, and can be here; else they run as written, which only rounds differently."""
    if path != COMPILED:
        return False
    if obstacle := no_compiler_because():
        _warn(obstacle)
    return not obstacle


@cache
def _warn(obstacle: str) -> None:
    """Once a process."""
    _log.warning("days run as written, which takes three to four times as long: %s", obstacle)
