"""Model name -> how it is built and what it is trained on. A new model is one entry here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from h2mv_dist.errors import ConfigError
from h2mv_dist.model import h2mv
from h2mv_dist.model.base import ProcessModel
from h2mv_dist.model.loss import AnomalyError, LossSum, SaturatingError, StepError
from h2mv_dist.spec import ModelSpec, Scaler
from h2mv_dist.variables import nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelKind:
    """A model the package knows.

    Attributes:
        spec: its columns.
        build: makes it from a scaler and its sizes.
        loss: makes its loss from a scaler.
    """

    spec: ModelSpec
    build: Callable[..., ProcessModel]
    loss: Callable[[Scaler], LossSum]


def h2mv_loss(scaler: Scaler) -> LossSum:
    """The five terms of H2MV, in the order TWS, ET, runoff, SWE, fAPAR."""
    std = {name: moments.std[0] for name, moments in scaler.targets.items()}
    tws = "terrestrial_water_storage_anomaly"
    return LossSum(
        (
            AnomalyError("tws", tws, "terrestrial_water_storage", std[tws]),
            StepError("et", "evapotranspiration", std["evapotranspiration"]),
            StepError("runoff", "runoff", std["runoff"]),
            SaturatingError("swe", "snow_water_equivalent", std["snow_water_equivalent"]),
            StepError("fapar", "fapar", std["fapar"]),
        )
    )


MODELS: Final[Mapping[str, ModelKind]] = MappingProxyType(
    {"h2mv": ModelKind(spec=h2mv.SPEC, build=h2mv.H2MV, loss=h2mv_loss)}
)


def model_kind(name: str) -> ModelKind:
    """The model called ``name``.

    Raises:
        ConfigError: no such model.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r} in model.name; {nearest(name, MODELS)}")
    return MODELS[name]
