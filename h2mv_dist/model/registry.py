"""Model name -> how it is built and what it is trained on. A new model is one entry here.

Models of other packages are found by the entry points they declare, so that a worker can build them, too:

    [project.entry-points."h2mv_dist.models"]
    my-model = "my_package.my_module:KIND"
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Final

from h2mv_dist.errors import ConfigError, describe
from h2mv_dist.model import h2mv
from h2mv_dist.model.base import ProcessModel
from h2mv_dist.model.loss import AnomalyError, LossSum, LossTerm, SaturatingError, StepError
from h2mv_dist.spec import ModelSpec, Scaler
from h2mv_dist.variables import nearest

GROUP: Final = "h2mv_dist.models"
"""Entry points of packages that bring models."""


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
    """The terms TWS, ET, runoff, SWE and fAPAR, in this order; those whose target the scaler knows."""
    std = {name: moments.std[0] for name, moments in scaler.targets.items()}
    tws = "terrestrial_water_storage_anomaly"
    terms: dict[str, Callable[[float], LossTerm]] = {
        tws: partial(AnomalyError, "tws", tws, "terrestrial_water_storage"),
        "evapotranspiration": partial(StepError, "et", "evapotranspiration"),
        "runoff": partial(StepError, "runoff", "runoff"),
        "snow_water_equivalent": partial(SaturatingError, "swe", "snow_water_equivalent"),
        "fapar": partial(StepError, "fapar", "fapar"),
    }
    return LossSum(tuple(term(std[name]) for name, term in terms.items() if name in std))


MODELS: Final[Mapping[str, ModelKind]] = MappingProxyType(
    {"h2mv": ModelKind(spec=h2mv.SPEC, build=h2mv.H2MV, loss=h2mv_loss)}
)


def model_kind(name: str) -> ModelKind:
    """The model called ``name``, of this package or of an installed one.

    Raises:
        ConfigError: no such model, or its package cannot be used.
    """
    if name in MODELS:
        return MODELS[name]
    installed = entry_points(group=GROUP)
    if name not in installed.names:
        names = (*MODELS, *installed.names)
        raise ConfigError(f"unknown model {name!r} in model.name; {nearest(name, names)}")
    try:
        found = installed[name].load()
    except Exception as error:
        raise ConfigError(
            describe(
                "an installed model cannot be loaded",
                where=f"entry point {installed[name].value} of {GROUP}",
                expected="a ModelKind",
                actual=f"{type(error).__name__}: {error}",
                fix="correct the package, and install it again on every worker",
            )
        ) from error
    if not isinstance(found, ModelKind) or found.spec.name != name:
        raise ConfigError(
            describe(
                "an installed model cannot be used",
                where=f"entry point {installed[name].value} of {GROUP}",
                expected=f"a ModelKind whose spec is called {name!r}",
                actual=f"{found.spec.name!r}" if isinstance(found, ModelKind) else type(found).__name__,
                fix="correct the package, and install it again on every worker",
            )
        )
    return found


def chosen_targets(spec: ModelSpec, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """The targets to train on, in the model's order.

    Raises:
        ConfigError: one that the model has no loss term for, or none at all.
    """
    for name in wanted or ():
        if name not in spec.targets:
            raise ConfigError(f"training.targets: {spec.name} has no {name!r}; {nearest(name, spec.targets)}")
    if wanted == ():
        raise ConfigError(f"training.targets is empty; choose some of {', '.join(spec.targets)}")
    return spec.targets if wanted is None else tuple(n for n in spec.targets if n in wanted)
