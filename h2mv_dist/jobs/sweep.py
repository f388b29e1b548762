"""Sweeps: one job that trains every combination of some settings and seeds, over the same staged cells."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from pydantic import BaseModel

from h2mv_dist.config import (
    ModelSettings,
    Settings,
    SweepSettings,
    TrainingSettings,
    as_toml,
    canonical_json,
    revise,
    to_json,
)
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
        ConfigError: a swept setting is unknown, given twice, or must be the same in all runs; or a value is
            not valid, or given twice.
    """
    axes = _axes(settings)
    count = math.prod(map(len, axes.values()))
    if count > MOST_RUNS:
        raise ConfigError(f"sweep: expected at most {MOST_RUNS} runs; given {count}; try fewer values")
    plain = settings.model_copy(update={"sweep": SweepSettings()})
    found = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        found.append(Variant(chosen, revise(plain, [f"{k}={_toml(v)}" for k, v in chosen.items()])))
    _require_different(found)
    return tuple(found)


def parse_sweep(arguments: Sequence[str]) -> dict[str, list[str]]:
    """``["lr=0.005,0.01"]`` -> ``{"lr": ["0.005", "0.01"]}``; values of a setting given again are added.

    Raises:
        ConfigError: an argument is not ``setting=value,value``.
    """
    axes: dict[str, list[str]] = {}
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
        axes.setdefault(key.strip(), []).extend(values.split(","))
    return axes


def _axes(settings: Settings) -> dict[str, tuple[Any, ...]]:
    """Full name of a setting -> the values it takes, seeds last."""
    given = [(key, _full_name(key), _plain(key, values)) for key, values in settings.sweep.values.items()]
    if settings.sweep.seeds > 1:
        first = settings.training.seed
        seeds = tuple(range(first, first + settings.sweep.seeds))
        given.append(("seeds", "training.seed", seeds))
    _require_one_name_each((key, name) for key, name, _ in given)
    return {name: values for _, name, values in given}


def _require_one_name_each(given: Iterable[tuple[str, str]]) -> None:
    """Refuse two names of one setting, of which only one's values would count."""
    known: dict[str, str] = {}
    for key, name in given:
        other = known.setdefault(name, key)
        if other != key:
            raise ConfigError(
                describe(
                    "a setting is swept twice",
                    where="sweep",
                    expected=f"values for {name} in one place",
                    actual=f"{other!r} and {key!r}",
                    fix="give all values under one name, and seeds either as values or as their number",
                )
            )


def _require_different(found: Sequence[Variant]) -> None:
    """Refuse runs that would train the same, perhaps into the same folder; 0.01 and 1e-2 are one value."""
    first: dict[str, Variant] = {}
    for variant in found:
        same = first.setdefault(canonical_json(to_json(variant.settings)), variant)
        if same is not variant:
            raise ConfigError(
                describe(
                    "two runs of a sweep are the same",
                    where="sweep.values",
                    expected="every value once",
                    actual=f"{same.name} and {variant.name}",
                    fix="drop one of them",
                )
            )


def _plain(key: str, values: Sequence[Any]) -> tuple[Any, ...]:
    """Values that can be part of a folder's name and are nothing but values: no path, no TOML comment."""
    if not values:
        raise ConfigError(
            describe(
                "there is nothing to train",
                where=f"sweep.values.{key}",
                expected="a value at least",
                actual="an empty list",
                fix="give values, or leave the setting out",
            )
        )
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
