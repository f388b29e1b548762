"""Figures of training and of cubes, as free-standing matplotlib figures.

Nothing here touches pyplot or matplotlib's settings, so figures can be drawn in any thread. Colours are those
of Okabe and Ito (2008) and perceptually ordered maps, which colour-blind readers can tell apart.
"""

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from h2mv_dist.analysis.means import BANDS, TROPIC, MapMean, require, seasonal_means, time_mean
from h2mv_dist.errors import DataError
from h2mv_dist.grid import FloatArray, cell_bounds

_OKABE_ITO: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_INK: Final = "#37424d"
_FAINT: Final = "#6b7785"
_SEA: Final = "#e3e7eb"
_NO_VALUE: Final = "#aab3bc"
_MAP_INCHES: Final = 5.6
_MAP_COLUMNS: Final = 2000
"""Cells along an axis of a map that can still be told apart; larger maps are drawn from means of boxes."""

_BAND_TITLES: Final = {
    "north": f"North of {TROPIC}° N",
    "tropics": f"Tropics, {TROPIC}° S to {TROPIC}° N",
    "south": f"South of {TROPIC}° S",
}


@dataclass(frozen=True, kw_only=True)
class FoldCurve:
    """The course of one fold's training.

    Attributes:
        fold: its number.
        epochs: numbers of the epochs, increasing.
        train_loss: training loss of each epoch; None where it was not finite.
        valid_loss: validation loss of each epoch; None where it was not finite.
        best_epoch: epoch of the lowest validation loss; 0 if there is none yet.
        floor: loss that the truth itself would have, where it is known.
    """

    fold: int
    epochs: tuple[int, ...]
    train_loss: tuple[float | None, ...]
    valid_loss: tuple[float | None, ...]
    best_epoch: int
    floor: float | None

    def __post_init__(self) -> None:
        if not len(self.epochs) == len(self.train_loss) == len(self.valid_loss):
            raise DataError(
                f"fold {self.fold} has {len(self.epochs)} epochs, but {len(self.train_loss)} training "
                f"and {len(self.valid_loss)} validation losses: give one of each an epoch"
            )
        if self.best_epoch and self.best_epoch not in self.epochs:
            raise DataError(f"best epoch {self.best_epoch} of fold {self.fold} is none of its epochs")

    @property
    def best_loss(self) -> float | None:
        """Validation loss of the best epoch."""
        return self.valid_loss[self.epochs.index(self.best_epoch)] if self.best_epoch else None

    @property
    def ratio(self) -> float | None:
        """Best loss compared with the floor; 1 is as good as the truth."""
        return self.best_loss / self.floor if self.best_loss is not None and self.floor else None


# -------------------- training


def loss_curves(curves: Sequence[FoldCurve]) -> Figure:
    """Validation (solid) and training (thin) loss of each fold by epoch, best epoch (dot), floor (dashed)."""
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    colours = _fold_colours(len(curves))
    for curve, colour in zip(curves, colours, strict=True):
        _draw_curve(axes, curve, colour)
    _style(axes)
    _scale_losses(axes, curves)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch", color=_INK)
    folds = [
        Line2D([], [], color=colour, linewidth=2.0, label=f"fold {curve.fold}")
        for curve, colour in zip(curves, colours, strict=True)
    ]
    figure.legend(
        handles=[*folds, *_kinds_of_line(curves)],
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
    )
    return figure


def _draw_curve(axes: Axes, curve: FoldCurve, colour: str) -> None:
    # A line through a single epoch is invisible.
    marker = "o" if len(curve.epochs) < 3 else ""
    train, valid = (_with_gaps(losses) for losses in (curve.train_loss, curve.valid_loss))
    axes.plot(curve.epochs, train, color=colour, linewidth=0.8, alpha=0.65, marker=marker, markersize=2)
    axes.plot(curve.epochs, valid, color=colour, linewidth=1.8, marker=marker, markersize=4)
    if curve.best_loss is not None:
        axes.plot(
            [curve.best_epoch],
            [curve.best_loss],
            color=colour,
            marker="o",
            markersize=7.5,
            markeredgecolor="white",
            markeredgewidth=1.2,
            zorder=4,
        )
    if curve.floor is not None:
        axes.axhline(curve.floor, color=colour, linewidth=1.0, linestyle=(0, (5, 3)), alpha=0.9)


def _with_gaps(losses: tuple[float | None, ...]) -> FloatArray:
    return np.array([math.nan if loss is None else loss for loss in losses], np.float64)


def _scale_losses(axes: Axes, curves: Sequence[FoldCurve]) -> None:
    """A logarithmic axis with plain numbers; a linear one where some loss is not above zero."""
    parts = [_with_gaps((*c.train_loss, *c.valid_loss, c.floor)) for c in curves]
    losses = np.concatenate(parts) if parts else np.empty(0)
    losses = losses[np.isfinite(losses)]
    if not losses.size or losses.min() <= 0:
        axes.set_ylabel("loss", color=_INK)
        return
    axes.set_yscale("log")
    few_decades = losses.max() < 30 * losses.min()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if few_decades else (1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.set_ylabel("loss (logarithmic)", color=_INK)


def _fold_colours(n_folds: int) -> list[str]:
    if n_folds <= len(_OKABE_ITO):
        return list(_OKABE_ITO[:n_folds])
    shades = colormaps["viridis"](np.linspace(0.0, 0.92, n_folds))
    return ["#" + "".join(f"{round(255 * part):02x}" for part in shade[:3]) for shade in shades]


def _kinds_of_line(curves: Sequence[FoldCurve]) -> list[Line2D]:
    kinds = [
        Line2D([], [], color=_FAINT, linewidth=1.8, label="validation"),
        Line2D([], [], color=_FAINT, linewidth=0.8, label="training"),
        Line2D([], [], color=_FAINT, linewidth=0, marker="o", markersize=7, label="best epoch"),
    ]
    if any(curve.floor is not None for curve in curves):
        kinds.append(Line2D([], [], color=_FAINT, linewidth=1.0, linestyle=(0, (5, 3)), label="floor"))
    return kinds


# -------------------- maps


class _Shades(NamedTuple):
    """Colours of a map; ``extend`` says at which ends values lie outside the limits."""

    palette: str
    lowest: float
    highest: float
    extend: str


def map_figure(cube: xr.Dataset, name: str) -> Figure:
    """Map of a variable's mean over time and members, north up.

    Raises:
        DataError: the cube lacks the variable, or it has no spatial axis or no value.
    """
    return draw_map(time_mean(cube, name))


def draw_map(mean: MapMean) -> Figure:
    """Map of a mean, north up; robust limits (2 to 98 %), sea light grey, land without values darker."""
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    shades = _shades(mean)
    draw = _draw_cells if mean.values.ndim == 1 else _draw_grid
    drawn = draw(axes, mean, shades)
    _style_map(axes, mean)
    _frame_land(figure, axes, mean)
    bar = figure.colorbar(
        drawn, ax=axes, orientation="horizontal", extend=shades.extend, shrink=0.75, aspect=35, pad=0.03
    )
    bar.outline.set(color=_NO_VALUE, linewidth=0.6)
    bar.ax.tick_params(colors=_INK, labelsize=8, length=2.5)
    bar.set_label(textwrap.fill(_labelled(mean.long_name, mean.units), 70), color=_INK, fontsize=10)
    return figure


def _draw_grid(axes: Axes, mean: MapMean, shades: _Shades) -> ScalarMappable:
    values = _coarsened(mean.values)
    edges = cell_bounds(values["lon"].to_numpy()), np.clip(cell_bounds(values["lat"].to_numpy()), -90, 90)
    missing = _coarsened(mean.values.copy(data=mean.land & np.isnan(mean.values.to_numpy()))).to_numpy()
    if missing.any():
        blank = np.where(missing > 0, 1.0, np.nan)
        axes.pcolormesh(*edges, blank, cmap=ListedColormap([_NO_VALUE]), rasterized=True)
    return axes.pcolormesh(
        *edges,
        values.to_numpy(),
        cmap=shades.palette,
        vmin=shades.lowest,
        vmax=shades.highest,
        rasterized=True,
    )


def _draw_cells(axes: Axes, mean: MapMean, shades: _Shades) -> ScalarMappable:
    lon, lat, values = (part.to_numpy() for part in (mean.values["lon"], mean.values["lat"], mean.values))
    size = float(np.clip(6000.0 / values.size, 4.0, 60.0))
    blank = mean.land & np.isnan(values)
    axes.scatter(lon[blank], lat[blank], s=size, color=_NO_VALUE, linewidths=0)
    known = np.isfinite(values)
    return axes.scatter(
        lon[known],
        lat[known],
        s=size,
        c=values[known],
        cmap=shades.palette,
        vmin=shades.lowest,
        vmax=shades.highest,
        linewidths=0.4,
        edgecolors=_FAINT,
    )


def _coarsened(values: xr.DataArray) -> xr.DataArray:
    """Means over boxes of cells, as small as a figure needs them."""
    boxes = {str(d): math.ceil(n / _MAP_COLUMNS) for d, n in values.sizes.items()}
    if max(boxes.values()) == 1:
        return values
    return values.coarsen(boxes, boundary="pad").mean()


def _shades(mean: MapMean) -> _Shades:
    values = mean.values.to_numpy()
    values = values[np.isfinite(values)]
    lowest, highest = np.percentile(values, (2.0, 98.0))
    if _is_anomaly(mean.name):
        highest = max(abs(lowest), abs(highest))
        lowest = -highest
    if not lowest < highest:
        margin = 0.05 * abs(lowest) or 0.5
        lowest, highest = lowest - margin, highest + margin
    below, above = bool(values.min() < lowest), bool(values.max() > highest)
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    return _Shades(_palette(mean.name, mean.units), float(lowest), float(highest), extend[below, above])


def _is_anomaly(name: str) -> bool:
    return name.endswith("_anomaly")


def _palette(name: str, units: str) -> str:
    """A colour map that suits the kind of quantity: more water is bluer, more leaves are greener."""
    if _is_anomaly(name):
        return "RdBu"
    if name.endswith("_spread"):
        return "BuPu"
    special = {"fapar": "YlGn", "snow_water_equivalent": "PuBu", "air_temperature": "plasma"}
    by_units = {"mm d-1": "YlGnBu", "mm": "GnBu", "W m-2": "inferno"}
    return special.get(name, by_units.get(units, "viridis"))


def _style_map(axes: Axes, mean: MapMean) -> None:
    axes.set_facecolor(_SEA)
    axes.grid(color="white", linewidth=0.5, alpha=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 1.5, 2, 3, 5, 6, 10], prune="both"))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 1.5, 2, 3, 5, 6, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _degrees(value, "E", "W")))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _degrees(value, "N", "S")))
    axes.tick_params(colors=_FAINT, labelsize=8, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(_note(mean), loc="left", fontsize=8.5, color=_FAINT)


def _frame_land(figure: Figure, axes: Axes, mean: MapMean) -> None:
    """Show the land and a little around it, undistorted at its middle; size the figure accordingly."""
    west, east = _extent(mean, "lon")
    south, north = np.clip(_extent(mean, "lat"), -90.0, 90.0)
    axes.set_xlim(west, east)
    axes.set_ylim(south, north)
    stretch = 1.0 / math.cos(math.radians(min(abs(south + north) / 2, 75.0)))
    axes.set_aspect(stretch, adjustable="box")
    shape = stretch * (north - south) / (east - west)
    figure.set_size_inches(_MAP_INCHES, float(np.clip(_MAP_INCHES * shape, 2.0, 6.0)) + 0.9)


def _extent(mean: MapMean, axis: str) -> tuple[float, float]:
    """Where the land begins and ends along an axis, with a margin that stays on the grid, degrees."""
    places = mean.values[axis]
    across = tuple(n for n, dim in enumerate(mean.values.dims) if dim not in places.dims)
    found = places.to_numpy()[mean.land.any(axis=across)]
    margin = 0.03 * float(np.ptp(found)) + 1.0
    edges = cell_bounds(places.to_numpy()) if across else np.array([-np.inf, np.inf])
    return max(found.min() - margin, edges.min()), min(found.max() + margin, edges.max())


def _note(mean: MapMean) -> str:
    if not mean.n_gaps:
        return mean.scope
    gaps = f"{mean.n_gaps} of {int(mean.land.sum())} land cells have gaps"
    return f"{mean.scope}; {gaps}" if mean.scope else gaps


def _degrees(value: float, positive: str, negative: str) -> str:
    """Label of a meridian or parallel.

    >>> _degrees(-30.0, "N", "S"), _degrees(0.0, "E", "W"), _degrees(190.0, "E", "W")
    ('30° S', '0°', '170° W')
    """
    value = (value + 180.0) % 360.0 - 180.0 if abs(value) > 180.0 else value
    side = "" if value in {0.0, 180.0, -180.0} else f" {positive if value > 0 else negative}"
    return f"{abs(value):g}°{side}"


# -------------------- seasons


def seasonal_cycle(cube: xr.Dataset, names: Sequence[str]) -> Figure:
    """Area-weighted mean of each calendar month in three bands of latitude, one line a variable.

    Raises:
        DataError: no names, or the cube lacks one of them, or they have no time axis or different units.
    """
    units = _common_units(cube, names)
    figure = Figure(figsize=(10.0, 3.5), layout="constrained")
    panels = figure.subplots(1, len(BANDS), sharey=True)
    means = {name: seasonal_means(cube, name) for name in names}
    for number, (axes, band) in enumerate(zip(panels, BANDS, strict=True)):
        for name, colour in zip(names, _fold_colours(len(names)), strict=True):
            axes.plot(
                range(1, 13), means[name][number], color=colour, linewidth=1.8, marker="o", markersize=3
            )
        _style_season(axes, _BAND_TITLES[band])
        if all(np.isnan(mean[number]).all() for mean in means.values()):
            axes.text(0.5, 0.5, "no land", transform=axes.transAxes, ha="center", color=_FAINT)
    panels[0].set_ylabel(pretty_units(units), color=_INK)
    handles = [
        Line2D([], [], color=colour, linewidth=2.0, label=str(cube[name].attrs.get("long_name", name)))
        for name, colour in zip(names, _fold_colours(len(names)), strict=True)
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(4, len(names)),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
    )
    return figure


def _common_units(cube: xr.Dataset, names: Sequence[str]) -> str:
    units = {str(require(cube, name).attrs.get("units", "1")) for name in names}
    if len(units) != 1:
        found = ", ".join(sorted(units)) or "no variable at all"
        raise DataError(f"variables of one seasonal cycle must share their units, found {found}")
    return units.pop()


def _style_season(axes: Axes, title: str) -> None:
    _style(axes)
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.set_xticks(range(1, 13), list("JFMAMJJASOND"))
    axes.set_xlim(0.5, 12.5)


# -------------------- text


def _style(axes: Axes) -> None:
    axes.grid(axis="y", color=_SEA, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_NO_VALUE)


def pretty_units(units: str) -> str:
    """Units as a reader expects them; empty for a plain number.

    >>> pretty_units("mm degC-1 d-1"), pretty_units("1")
    ('mm °C⁻¹ d⁻¹', '')
    """
    if units == "1":
        return ""
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return re.sub(r"-?\d+", lambda m: m.group().translate(raised), units).replace("degC", "°C")


def _labelled(long_name: str, units: str) -> str:
    shown = pretty_units(units)
    return f"{long_name} ({shown})" if shown else long_name
