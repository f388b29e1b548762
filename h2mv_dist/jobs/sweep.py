"""Sweeps: one job that trains every combination of some settings and seeds, over the same staged cells."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from pydantic import BaseModel

from h2mv_dist.config import ModelSettings, Settings, SweepSettings, TrainingSettings, as_toml, revise
from h2mv_dist.errors import ConfigError, describe
from h2mv_dist.variables import nearest

ALIASES: Final[Mapping[str, str]] = MappingProxyType({"lr": "training.learning_rate"})
FIXED: Final = frozenset(
    {"model.name", *(f"training.{n}" for n in ("folds", "targets", "scaler", "cache", "priority", "ranks"))}
)
"""What all runs of a sweep share."""
MOST_RUNS: Final = 10_000
_WORD: Final = re.compile(r"[\w.+-]*\w", re.ASCII)


@dataclass(frozen=True, slots=True)
class Variant:
    """One run of a sweep.

    Attributes:
        values: what distinguishes it, setting -> value; empty without a sweep.
        settings: complete, without a sweep.
    """

    values: Mapping[str, Any]
    settings: Settings

    @property
    def name(self) -> str:
        """Name of its folder, such as ``learning_rate=0.005,seed=1``; "" without a sweep."""
        return ",".join(f"{key.split('.')[-1]}={value}" for key, value in self.values.items())


def variants(settings: Settings) -> tuple[Variant, ...]:
    """Every combination of the swept values and seeds; the settings themselves if nothing is swept.

    Raises:
        ConfigError: a swept setting is unknown, or must be the same in all runs, or a value is not valid.
    """
    axes = {_full_name(key): _plain(key, values) for key, values in settings.sweep.values.items()}
    if settings.sweep.seeds > 1:
        first = settings.training.seed
        axes["training.seed"] = tuple(range(first, first + settings.sweep.seeds))
    count = math.prod(map(len, axes.values()))
    if count > MOST_RUNS:
        raise ConfigError(f"sweep: expected at most {MOST_RUNS} runs; given {count}; try fewer values")
    plain = settings.model_copy(update={"sweep": SweepSettings()})
    found = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        found.append(Variant(chosen, revise(plain, [f"{k}={_toml(v)}" for k, v in chosen.items()])))
    return tuple(found)


def parse_sweep(arguments: Sequence[str]) -> dict[str, list[str]]:
    """``["lr=0.005,0.01"]`` -> ``{"lr": ["0.005", "0.01"]}``.

    Raises:
        ConfigError: an argument is not ``setting=value,value``.
    """
    axes = {}
    for argument in arguments:
        key, separator, values = argument.partition("=")
        if not separator or not all(values.split(",")):
            raise ConfigError(
                describe(
                    "cannot read a sweep",
                    where=f"--sweep {argument}",
                    expected="setting=value,value, such as lr=0.005,0.01",
                    actual=argument,
                    fix="list the values after =, separated by commas",
                )
            )
        axes[key.strip()] = values.split(",")
    return axes


def _plain(key: str, values: Sequence[Any]) -> tuple[Any, ...]:
    """Values that can be part of a folder's name and are nothing but values: no path, no TOML comment."""
    for value in values:
        if not _WORD.fullmatch(str(value)):
            raise ConfigError(
                describe(
                    "a value cannot be swept",
                    where=f"sweep.values.{key}",
                    expected="numbers, or words of letters and digits",
                    actual=as_toml(value),
                    fix="write the value alone",
                )
            )
    return tuple(values)


def _full_name(key: str) -> str:
    sections: dict[str, type[BaseModel]] = {"training": TrainingSettings, "model": ModelSettings}
    known = [f"{section}.{name}" for section, kind in sections.items() for name in kind.model_fields]
    open_to_sweeps = [name for name in known if name not in FIXED]
    matching = [name for name in open_to_sweeps if key in (name, name.split(".")[1])] or (
        [ALIASES[key]] if key in ALIASES else []
    )
    if len(matching) != 1:
        raise ConfigError(
            describe(
                f"{key!r} cannot be swept",
                where="sweep.values",
                expected=f"one of {', '.join(open_to_sweeps)}",
                actual=key,
                fix=nearest(key, tuple(name.split(".")[1] for name in open_to_sweeps)),
            )
        )
    return matching[0]


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
