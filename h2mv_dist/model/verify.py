"""Compare a model with a golden file: every output, state, loss term and gradient.

A golden file is an ``.npz`` of inputs, weights and what the published model made of them; nothing in it is
ever unpickled.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from h2mv_dist.errors import ConfigError, DataError, describe
from h2mv_dist.model.base import Batch, ProcessModel, Result, State, Steps, Target, steps_between
from h2mv_dist.model.days import no_compiler_because
from h2mv_dist.model.registry import MODELS, ModelKind
from h2mv_dist.model.rollout import spin_up
from h2mv_dist.spec import Moments, Scaler

Array = NDArray[np.float64]
Golden = Mapping[str, NDArray[np.generic]]

ABSOLUTE: Final = 1e-3
"""Largest absolute error of an output that is near enough."""
RELATIVE: Final = 1e-4
"""Largest relative error of an output, constant, loss term or (of its largest entry) gradient."""

TARGETS: Final = {
    "tws": "terrestrial_water_storage_anomaly",
    "et": "evapotranspiration",
    "q": "runoff",
    "swe": "snow_water_equivalent",
    "fapar": "fapar",
}
DAILY: Final = {
    "alpha_snow_melt_ts": "melt_factor",
    "alpha_Ei_ts": "interception_capacity",
    "alpha_Es_ts": "soil_evaporation_factor",
    "alpha_T_ts": "transpiration_factor",
    "alpha_r_soil_ts": "soil_recharge_factor",
    "alpha_r_gw_ts": "groundwater_recharge_factor",
    "fAPAR_nn_ts": "fapar",
    "snow_acc_ts": "snowfall",
    "snow_melt_ts": "snowmelt",
    "swe_ts": "snow_water_equivalent",
    "Ei_ts": "interception_evaporation",
    "Es_ts": "soil_evaporation",
    "T_ts": "transpiration",
    "ET_ts": "evapotranspiration",
    "EF_ts": "evaporative_fraction",
    "water_input_ts": "water_input",
    "r_soil_t_fractions": "soil_recharge_fraction",
    "r_soil_ts": "soil_recharge",
    "r_gw_fraction_ts": "groundwater_recharge_fraction",
    "r_gw_ts": "groundwater_recharge",
    "SM_ts": "soil_moisture",
    "rel_SM_ts": "relative_soil_moisture",
    "runoff_surface_fraction_ts": "surface_runoff_fraction",
    "runoff_surface_ts": "surface_runoff",
    "baseflow_ts": "baseflow",
    "runoff_total_ts": "runoff",
    "GW_ts": "groundwater_storage",
    "tws_ts": "terrestrial_water_storage",
    "tws_anomaly_ts": "terrestrial_water_storage_anomaly",
    "prec_actual_ts": "actual_precipitation",
}
STATIC: Final = {"sm_max": "soil_moisture_capacity"}
CONSTANTS: Final = {"beta_snow": "snowfall_correction", "beta_baseflow": "baseflow_recession"}
SPINUP: Final = {
    "swe_t": "snow_water_equivalent",
    "SM_t": "soil_moisture",
    "GW_t": "groundwater_storage",
    "fAPAR_nn_t": "fapar",
    "h_t": "hidden",
    "c_t": "cell",
}
"""Published name -> ours, for each group of a golden file."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far one array is from the golden one, as a multiple of what is allowed."""

    group: str
    name: str
    error: float
    """Largest absolute difference."""
    excess: float
    """Largest difference divided by its tolerance; above 1 is a failure."""


@dataclass(frozen=True, slots=True)
class Verification:
    """Every compared array of a golden file."""

    deviations: tuple[Deviation, ...]

    @property
    def passed(self) -> bool:
        """Whether every array is within its tolerance (a NaN never is)."""
        return all(d.excess <= 1.0 for d in self.deviations)

    def worst(self) -> tuple[Deviation, ...]:
        """The array with the largest excess of each group."""
        groups = dict.fromkeys(d.group for d in self.deviations)
        return tuple(max((d for d in self.deviations if d.group == g), key=_sort_key) for g in groups)


def _sort_key(deviation: Deviation) -> float:
    return np.inf if np.isnan(deviation.excess) else deviation.excess


def verify(path: str | Path, *, compiled: bool = False) -> Verification:
    """Compare the package's model, as it is written or compiled, with a golden file.

    Raises:
        DataError: the file is not a golden file of a model this package knows.
        ConfigError: nothing can be compiled here.
    """
    if compiled and (obstacle := no_compiler_because()):
        raise ConfigError(
            describe(
                "days cannot be compiled",
                where="verify --compiled",
                expected="a C++ compiler, Python's headers, and a folder for code",
                actual=obstacle,
                fix="mend that, or leave --compiled out",
            )
        )
    golden = read_golden(path)
    return compare(golden, evaluate(golden, path, compiled=compiled))


def evaluate(golden: Golden, path: str | Path, *, compiled: bool = False) -> dict[str, Array]:
    """What this package's model makes of a golden file's inputs and weights, under the file's names."""
    kind = MODELS["h2mv"]
    model = _model(golden, kind, path)
    model.compiled = compiled
    batch = _batch(golden, model)
    state = spin_up(model, batch, None, model.spec.daily)
    result = model(batch, state)
    loss_sum = kind.loss(model.scaler)
    loss = loss_sum.value(loss_sum.statistics(result, batch))
    torch.autograd.backward(loss.total)
    return {
        **_outputs(result),
        **_spinup(state, kind),
        "loss/loss_sum": _numpy(loss.total),
        **{f"loss/{n}": _numpy(v) for n, v in zip(loss_sum.names, loss.terms, strict=True)},
        **{f"grad/{n}": _numpy(p.grad) for n, p in model.named_parameters() if p.grad is not None},
    }


def compare(golden: Golden, ours: Mapping[str, Array]) -> Verification:
    """Compare every array of the groups that the model fills; an array on one side only is a failure."""
    groups = dict.fromkeys(key.split("/")[0] for key in ours)
    expected = [key for key in golden if key.split("/")[0] in groups and "/" in key]
    return Verification(tuple(_deviation(key, golden, ours) for key in dict.fromkeys([*expected, *ours])))


def read_golden(path: str | Path) -> Golden:
    """The arrays of a golden file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            describe(
                "not a golden file",
                where=str(path),
                expected="an .npz archive of plain arrays",
                actual=str(error) or type(error).__name__,
                fix="give the path of a file such as golden/h2mv.npz",
            )
        ) from error


def _model(golden: Golden, kind: ModelKind, path: str | Path) -> ProcessModel:
    scaler = Scaler(
        _moments(golden, "forcing", path),
        _moments(golden, "static", path),
        {ours: _moments(golden, f"target_{{}}/{theirs}", path) for theirs, ours in TARGETS.items()},
    )
    condensed, encoder = _entry(golden, "param/fc_static.fc2.weight", path).shape
    hidden = _entry(golden, "param/lstm_fc.lstm_cell.weight_hh", path).shape[1]
    model = kind.build(scaler, hidden=hidden, encoder=encoder, condensed=condensed)
    weights = {n: torch.from_numpy(_entry(golden, f"param/{n}", path)) for n in model.state_dict()}
    model.load_state_dict(weights)
    return model


def _moments(golden: Golden, key: str, path: str | Path) -> Moments:
    pattern = key if "{}" in key else f"{key}_{{}}"
    mean, std = (np.atleast_1d(_entry(golden, pattern.format(part), path)) for part in ("mean", "std"))
    return Moments(tuple(map(float, mean)), tuple(map(float, std)))


def _entry(golden: Golden, key: str, path: str | Path) -> NDArray[np.generic]:
    if key not in golden:
        raise DataError(
            describe(
                "a golden array is missing",
                where=str(path),
                expected=f"an array {key!r} (golden file of the model h2mv)",
                actual=f"{len(golden)} other arrays, such as {next(iter(golden), 'none')!r}",
                fix="use a golden file of a model that this version knows",
            )
        )
    return np.asarray(golden[key])


def _batch(golden: Golden, model: ProcessModel) -> Batch:
    time = np.asarray(golden["time"], np.int64)
    targets = {
        ours: Target(
            torch.from_numpy(np.asarray(golden[f"target/{theirs}"], np.float32)),
            _steps(time, np.asarray(golden[f"target_month/{theirs}"], np.int64)),
        )
        for theirs, ours in TARGETS.items()
    }
    forcing = torch.from_numpy(np.asarray(golden["forcing"], np.float32))
    return Batch(forcing, torch.from_numpy(np.asarray(golden["static"], np.float32)), targets)


def _steps(time: NDArray[np.int64], months: NDArray[np.int64]) -> Steps:
    """Steps of a target: one a day where its months repeat, else one a calendar month."""
    if len(months) == len(time):
        position = torch.arange(len(time))
        return steps_between(position, position + 1)
    month_start = months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    month_stop = (months + 1).astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    first, stop = (torch.from_numpy(m - time[0]) for m in (month_start, month_stop))
    return steps_between(first, stop)


def _outputs(result: Result) -> dict[str, Array]:
    storage = result.daily["terrestrial_water_storage"]
    anomaly = storage - storage.mean(dim=1, keepdim=True)
    daily = {**result.daily, "terrestrial_water_storage_anomaly": anomaly}
    return {
        **{f"daily/{theirs}": _numpy(daily[ours]) for theirs, ours in DAILY.items()},
        **{f"static_out/{theirs}": _numpy(result.static[ours]) for theirs, ours in STATIC.items()},
        **{f"constant/{theirs}": _numpy(result.constants[ours]) for theirs, ours in CONSTANTS.items()},
    }


def _spinup(state: State, kind: ModelKind) -> dict[str, Array]:
    named = dict(zip(kind.spec.state, state, strict=True))
    return {f"spinup/{theirs}": _numpy(named[ours]) for theirs, ours in SPINUP.items()}


def _numpy(tensor: torch.Tensor) -> Array:
    return tensor.detach().numpy().astype(np.float64)


def _deviation(key: str, golden: Golden, ours: Mapping[str, Array]) -> Deviation:
    group, name = key.split("/", 1)
    if key not in golden or key not in ours:
        return Deviation(group, f"{name} (only on one side)", np.inf, np.inf)
    theirs = np.asarray(golden[key], np.float64)
    difference = np.abs(ours[key].reshape(theirs.shape) - theirs)
    tolerance = np.maximum(_tolerance(group, theirs), np.finfo(float).tiny)
    return Deviation(group, name, float(difference.max()), float((difference / tolerance).max()))


def _tolerance(group: str, theirs: Array) -> Array:
    if group == "grad":
        return np.full_like(theirs, RELATIVE * np.abs(theirs).max())
    if group in ("constant", "loss"):
        return RELATIVE * np.abs(theirs)
    return np.maximum(ABSOLUTE, RELATIVE * np.abs(theirs))
