"""One self-contained HTML page about a training and the cube made from it: no script, nothing to download."""

import base64
import io
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple

import jinja2
import xarray as xr
from matplotlib.figure import Figure

from h2mv_dist.analysis.figures import FoldCurve, draw_map, loss_curves, pretty_units, seasonal_cycle
from h2mv_dist.analysis.means import MapMean, span, time_mean
from h2mv_dist.errors import StoreError, describe

_SEASONAL: Final = ("actual_precipitation", "evapotranspiration", "runoff", "snowmelt")
"""Fluxes whose seasonal cycle is shown, where the cube has them."""

_NONE: Final = "not known"


class FoldFacts(NamedTuple):
    """One row of the headline table, as text."""

    fold: str
    epochs: str
    best_epoch: str
    best_loss: str
    floor: str
    ratio: str


class _Picture(NamedTuple):
    """A figure as a data URL, and a sentence about it."""

    source: str
    caption: str


def write_report(
    path: Path,
    *,
    title: str,
    curves: Sequence[FoldCurve],
    cube: xr.Dataset,
    maps: tuple[str, ...],
    places: Mapping[str, str],
    facts: Mapping[str, str],
) -> Path:
    """Write the page; a page that is there already is replaced at once or not at all.

    Args:
        path: the .html file.
        title: heading of the page.
        curves: training of each fold.
        cube: opened output cube.
        maps: its variables to map.
        places: what lies where.
        facts: headline facts, in order.

    Raises:
        DataError: the cube lacks a variable of ``maps``, or it cannot be mapped.
        StoreError: the file cannot be written.
    """
    page = _template().render(
        title=title,
        facts=facts,
        folds=[fold_facts(curve) for curve in curves],
        has_floor=_any_floor(curves),
        losses=_picture(loss_curves(curves), _loss_caption(curves)) if curves else None,
        maps=list(_map_pictures(cube, maps)),
        seasons=_seasons(cube),
        places=places,
        attributes={str(name): str(value) for name, value in cube.attrs.items()},
    )
    _replace(path, page)
    return path


def fold_facts(curve: FoldCurve) -> FoldFacts:
    """Numbers of one fold for the headline table."""
    return FoldFacts(
        fold=str(curve.fold),
        epochs=str(len(curve.epochs)),
        best_epoch=str(curve.best_epoch or _NONE),
        best_loss=_number(curve.best_loss),
        floor=_number(curve.floor),
        ratio=_NONE if curve.ratio is None else f"{curve.ratio:.2f}",
    )


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:#.4g}"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files(__package__).joinpath("report.html.j2").read_text("utf-8")
    return environment.from_string(source)


def _picture(figure: Figure, caption: str) -> _Picture:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    return _Picture("data:image/png;base64," + base64.b64encode(png.getvalue()).decode("ascii"), caption)


def _loss_caption(curves: Sequence[FoldCurve]) -> str:
    text = "Validation loss (solid) and training loss (thin) of each fold; the dot marks its best epoch"
    return f"{text}, the dashed line the loss of the truth itself." if _any_floor(curves) else f"{text}."


def _any_floor(curves: Sequence[FoldCurve]) -> bool:
    return any(curve.floor is not None for curve in curves)


def _map_pictures(cube: xr.Dataset, names: tuple[str, ...]) -> Iterator[_Picture]:
    """One map after the other, so that one at a time is in memory."""
    for name in names:
        mean = time_mean(cube, name)
        yield _picture(draw_map(mean), _map_caption(mean))


def _map_caption(mean: MapMean) -> str:
    """One sentence: what is shown, over what it is averaged, and the land mean."""
    what = mean.long_name[:1].upper() + mean.long_name[1:]
    scope = f", {mean.scope}" if mean.scope else ""
    return f"{what}{scope}; land mean {mean.land_mean:.3g} {pretty_units(mean.units)}".rstrip() + "."


def _seasons(cube: xr.Dataset) -> _Picture | None:
    names = [name for name in _SEASONAL if name in cube.data_vars]
    if not names:
        return None
    caption = f"Area-weighted land means of each calendar month over {span(cube)}."
    return _picture(seasonal_cycle(cube, names), caption)


def _replace(path: Path, text: str) -> None:
    # Beside its target, because a rename is atomic within one file system only.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, "utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            describe(
                "cannot write the report",
                where=str(path),
                expected="a place for a file",
                actual=str(error),
                fix="choose another place, or make room or give permission there",
            )
        ) from error
