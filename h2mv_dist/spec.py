"""What a model needs and gives (ModelSpec), and how its inputs are z-scored (Scaler)."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]


CLOSES_MM: Final = 1e-3
"""Gap of the water budget, mm a day, that float32 fluxes explain."""
CLOSES_ULP: Final = 4
"""Gap that a float32 store explains, in units of its last place: its parts change several times a day."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a model conserves: the change of a store over a day equals gains minus losses.

    Attributes:
        store: daily output that holds all that is stored, mm.
        gains: daily outputs that add to it, mm d-1.
        losses: daily outputs that take from it, mm d-1.
        states: the parts of the store in the model's state.
    """

    store: str
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    states: tuple[str, ...]

    @property
    def terms(self) -> tuple[str, ...]:
        """All daily outputs in it."""
        return (self.store, *self.gains, *self.losses)

    def residual(
        self, daily: Mapping[str, NDArray[np.float64]], before: NDArray[np.float64] | None = None
    ) -> float:
        """Largest of :meth:`gaps`, see :func:`largest_gap`."""
        return largest_gap(self.gaps(daily, before))

    def gaps(
        self, daily: Mapping[str, NDArray[np.float64]], before: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Absolute gap of each day, mm, [..., time, cell].

        Args:
            daily: term -> [..., time, cell].
            before: the store when the first day begins, [..., cell]; None leaves that day out.
        """
        store = daily[self.store]
        net = sum((daily[n] for n in self.gains), np.zeros_like(store)) - sum(daily[n] for n in self.losses)
        if before is not None:
            store = np.concatenate([before[..., None, :], store], axis=-2)
        change = np.diff(store, axis=-2)
        gaps: NDArray[np.float64] = np.abs(change - net[..., net.shape[-2] - change.shape[-2] :, :])
        return gaps

    def tolerance(
        self, daily: Mapping[str, NDArray[np.float64]], rounded: Mapping[str, float]
    ) -> NDArray[np.float64]:
        """Gaps that follow from storing float32, mm, [..., time - 1, cell]: the first day is left out.

        They are :data:`CLOSES_MM` and :data:`CLOSES_ULP` of the store, and what rounding adds.

        Args:
            daily: term -> [..., time, cell], as stored.
            rounded: term -> largest relative error of its values, for those that were rounded.
        """
        steps = np.spacing(np.abs(daily[self.store]).astype(np.float32)).astype(np.float64)
        errors = {name: relative * np.abs(daily[name]) for name, relative in rounded.items()}
        errors[self.store] = errors.get(self.store, 0.0) + CLOSES_ULP / 2 * steps
        both_days = errors[self.store][..., 1:, :] + errors[self.store][..., :-1, :]
        fluxes = (e[..., 1:, :] for n, e in errors.items() if n != self.store)
        return sum(fluxes, CLOSES_MM + both_days)


def largest_gap(gaps: NDArray[np.float64]) -> float:
    """The largest of those that are finite, mm; 0 where there is none.

    >>> largest_gap(np.array([0.25, np.nan, 0.5, np.inf]))
    0.5
    """
    return float(np.max(gaps, initial=0.0, where=np.isfinite(gaps)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Names of a model's columns; the order of names is the order of columns.

    Attributes:
        name: registry name.
        forcing: daily inputs.
        targets: observed variables its loss needs.
        state: what is carried from one day to the next.
        daily: outputs [cell, time].
        static: outputs [cell].
        constants: outputs without axes.
        anomalies: output -> the daily output whose deviation from its baseline mean it is.
        budget: what it conserves, if anything.
    """

    name: str
    forcing: tuple[str, ...]
    targets: tuple[str, ...]
    state: tuple[str, ...]
    daily: tuple[str, ...]
    static: tuple[str, ...]
    constants: tuple[str, ...]
    anomalies: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    budget: Budget | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Every output a cube can hold."""
        return (*self.daily, *self.anomalies, *self.static, *self.constants)


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and standard deviation, each [column]; float32."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def arrays(self) -> tuple[Float32Array, Float32Array]:
        """Mean and std as arrays, each [column]."""
        return np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)


@dataclass(frozen=True, slots=True)
class Scaler:
    """Statistics that z-score inputs and targets; fitted on training data only, kept in checkpoints."""

    forcing: Moments
    static: Moments
    targets: Mapping[str, Moments]

    def as_dict(self) -> dict[str, object]:
        """JSON-able form."""
        return {
            "forcing": _as_dict(self.forcing),
            "static": _as_dict(self.static),
            "targets": {name: _as_dict(m) for name, m in self.targets.items()},
        }

    @staticmethod
    def from_dict(record: Mapping[str, Mapping[str, object]]) -> "Scaler":
        """Inverse of :meth:`as_dict`."""
        targets = {name: _from_dict(m) for name, m in record["targets"].items()}
        return Scaler(_from_dict(record["forcing"]), _from_dict(record["static"]), targets)


def moments(mean: NDArray[np.float64], std: NDArray[np.float64], names: tuple[str, ...]) -> Moments:
    """Moments with zero spread scaled by 1, so that a constant feature does no harm.

    >>> moments(np.zeros(1), np.ones(1), ("slope",))
    Moments(mean=(0.0,), std=(1.0,))
    """
    constant = ~(std > 0)
    if constant.any():
        listed = ", ".join(name for name, c in zip(names, constant, strict=True) if c)
        warnings.warn(f"no spread in {listed}: scaled by 1 instead", UserWarning, stacklevel=2)
    safe = np.where(constant, 1.0, std).astype(np.float32)
    centre = np.asarray(mean, np.float32)
    return Moments(tuple(map(float, centre)), tuple(map(float, safe)))


def _as_dict(m: Moments) -> dict[str, list[float]]:
    return {"mean": list(m.mean), "std": list(m.std)}


def _from_dict(record: object) -> Moments:
    if not isinstance(record, Mapping):
        raise TypeError(f"expected a mapping with mean and std, found {type(record).__name__}")
    return Moments(tuple(record["mean"]), tuple(record["std"]))
