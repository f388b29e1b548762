import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.figure import Figure

from h2mv_dist.analysis import figures, means
from h2mv_dist.analysis.figures import FoldCurve
from h2mv_dist.errors import DataError
from tests.analysis.builders import Cube


def curve(fold: int = 0, floor: float | None = 0.5) -> FoldCurve:
    return FoldCurve(
        fold=fold,
        epochs=(1, 2, 3, 4),
        train_loss=(2.0, 1.0, None, 0.6),
        valid_loss=(2.2, 1.1, 0.75, 0.9),
        best_epoch=3,
        floor=floor,
    )


def rendered(figure: Figure) -> Figure:
    figure.savefig(BytesIO(), format="png", dpi=50)
    return figure


def mesh(figure: Figure) -> QuadMesh:
    return next(
        m for m in figure.axes[0].collections if isinstance(m, QuadMesh) and m.norm.vmin != m.norm.vmax
    )


class TestFoldCurve:
    def test_ratio_compares_the_best_loss_with_the_floor(self) -> None:
        assert curve().best_loss == 0.75
        assert curve().ratio == pytest.approx(1.5)
        assert curve(floor=None).ratio is None

    def test_no_best_epoch_yet(self) -> None:
        started = FoldCurve(
            fold=0, epochs=(1,), train_loss=(None,), valid_loss=(None,), best_epoch=0, floor=0.5
        )
        assert started.best_loss is None
        assert started.ratio is None

    def test_what_does_not_fit_is_refused(self) -> None:
        with pytest.raises(DataError, match="2 epochs, but 1 training"):
            FoldCurve(
                fold=0, epochs=(1, 2), train_loss=(1.0,), valid_loss=(1.0, 2.0), best_epoch=1, floor=None
            )
        with pytest.raises(DataError, match="best epoch 7"):
            FoldCurve(fold=0, epochs=(1,), train_loss=(1.0,), valid_loss=(1.0,), best_epoch=7, floor=None)


class TestLossCurves:
    def test_lines_hold_the_losses_in_one_colour_a_fold(self) -> None:
        axes = rendered(figures.loss_curves([curve(0), curve(1)])).axes[0]
        train, valid, best, floor = axes.lines[:4]
        np.testing.assert_array_equal(train.get_ydata(), [2.0, 1.0, np.nan, 0.6])
        np.testing.assert_array_equal(valid.get_ydata(), curve().valid_loss)
        assert (best.get_xdata(), best.get_ydata()) == ([3], [0.75])
        np.testing.assert_array_equal(floor.get_ydata(), [0.5, 0.5])
        assert len({line.get_color() for line in axes.lines[:4]}) == 1
        assert len({line.get_color() for line in axes.lines}) == 2
        assert axes.get_yscale() == "log"

    def test_no_floor_and_no_line_for_it(self) -> None:
        figure = rendered(figures.loss_curves([curve(floor=None)]))
        assert len(figure.axes[0].lines) == 3
        assert "floor" not in [text.get_text() for text in figure.legends[0].get_texts()]

    def test_a_loss_that_is_not_positive_is_not_hidden_by_the_axis(self) -> None:
        low = FoldCurve(
            fold=0, epochs=(1, 2), train_loss=(1, -1), valid_loss=(1, 0), best_epoch=2, floor=None
        )
        assert rendered(figures.loss_curves([low])).axes[0].get_yscale() == "linear"

    def test_folds_that_have_not_begun_and_many_folds(self) -> None:
        rendered(figures.loss_curves([]))
        empty = FoldCurve(fold=0, epochs=(), train_loss=(), valid_loss=(), best_epoch=0, floor=None)
        rendered(figures.loss_curves([empty]))
        many = rendered(figures.loss_curves([curve(fold) for fold in range(12)]))
        assert len({line.get_color() for line in many.axes[0].lines}) == 12


class TestMap:
    def test_it_shows_the_mean_where_it_lies(self, cube: Cube) -> None:
        figure = rendered(figures.map_figure(cube.opened, "evapotranspiration"))
        drawn = mesh(figure)
        shown = np.ma.masked_invalid(np.asarray(drawn.get_array(), np.float64)).reshape(cube.land.shape)
        np.testing.assert_array_equal(shown.mask, ~cube.land)
        expected = means.time_mean(cube.opened, "evapotranspiration").values.to_numpy()
        np.testing.assert_array_equal(shown.data[cube.land], expected[cube.land])
        corners = np.asarray(drawn.get_coordinates(), np.float64)
        centres = (corners[:-1, :-1] + corners[1:, 1:]) / 2
        np.testing.assert_allclose(centres[:, 0, 1], cube.opened["lat"])
        np.testing.assert_allclose(centres[0, :, 0], cube.opened["lon"])

    def test_north_is_up_and_east_is_right(self, cube: Cube) -> None:
        axes = figures.map_figure(cube.opened, "runoff").axes[0]
        assert axes.get_ylim()[0] < axes.get_ylim()[1]
        assert axes.get_xlim()[0] < axes.get_xlim()[1]

    def test_limits_are_robust_and_the_bar_says_so(self, cube: Cube) -> None:
        drawn = mesh(figures.map_figure(cube.opened, "runoff"))
        values = means.time_mean(cube.opened, "runoff").values.to_numpy()[cube.land]
        assert (drawn.norm.vmin, drawn.norm.vmax) == pytest.approx(tuple(np.percentile(values, (2, 98))))
        assert drawn.colorbar is not None
        assert drawn.colorbar.extend == "both"
        assert drawn.colorbar.ax.get_xlabel() == "total runoff (mm d⁻¹)"

    def test_anomalies_diverge_from_zero(self, cube: Cube) -> None:
        drawn = mesh(figures.map_figure(cube.opened, "terrestrial_water_storage_anomaly"))
        assert drawn.get_clim()[0] == pytest.approx(-np.abs(drawn.get_clim()[1] or 0))
        assert drawn.get_cmap().name == "RdBu"

    def test_a_spread_is_no_anomaly(self, cubes: dict[str, Cube]) -> None:
        drawn = mesh(figures.map_figure(cubes["map"].opened, "terrestrial_water_storage_anomaly_spread"))
        assert drawn.get_cmap().name == "BuPu"

    def test_basins_are_points(self, cubes: dict[str, Cube]) -> None:
        basins = cubes["basins"]
        figure = rendered(figures.map_figure(basins.opened, "runoff"))
        points = figure.axes[0].collections[-1]
        assert isinstance(points, PathCollection)
        expected = np.stack([basins.opened["lon"], basins.opened["lat"]], axis=1)[basins.land]
        np.testing.assert_array_equal(points.get_offsets(), expected)
        means_drawn = basins.values["runoff"].mean(axis=(0, 1), dtype=np.float64)
        np.testing.assert_allclose(np.asarray(points.get_array()), means_drawn, rtol=1e-6)

    def test_land_without_values_is_told_from_the_sea(self, cube: Cube) -> None:
        opened = cube.opened.load()
        opened["runoff"] = opened["runoff"].where(opened["lon"] < 0)
        axes = rendered(figures.map_figure(opened, "runoff")).axes[0]
        n_gaps = int((cube.land & (opened["lon"].to_numpy() > 0)).sum())
        assert len(axes.collections) == 2
        assert f"{n_gaps} of {cube.land.sum()} land cells have gaps" in axes.get_title(loc="left")

    def test_large_maps_are_drawn_from_means(self, cube: Cube, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(figures, "_MAP_COLUMNS", 5)
        drawn = mesh(rendered(figures.map_figure(cube.opened, "runoff")))
        coordinates = np.asarray(drawn.get_coordinates())
        assert coordinates.shape == (4, 5, 2)
        np.testing.assert_allclose(coordinates[0, :, 0], [-180, -90, 0, 90, 180])

    def test_a_map_of_one_value_can_be_drawn(self, cube: Cube) -> None:
        opened = cube.opened.load()
        opened["runoff"] = opened["runoff"] * 0.0
        rendered(figures.map_figure(opened, "runoff"))

    def test_an_unknown_variable_names_the_nearest(self, cube: Cube) -> None:
        with pytest.raises(DataError, match="did you mean 'evapotranspiration'"):
            figures.map_figure(cube.opened, "evapotranspirat")


class TestSeasonalCycle:
    def test_panels_hold_the_bands(self, cube: Cube) -> None:
        names = ("runoff", "evapotranspiration")
        figure = rendered(figures.seasonal_cycle(cube.opened, names))
        for number, axes in enumerate(figure.axes):
            for line, name in zip(axes.lines, names, strict=True):
                expected = means.seasonal_means(cube.opened, name)[number]
                np.testing.assert_array_equal(np.asarray(line.get_ydata()), expected)
        assert figure.axes[0].get_ylabel() == "mm d⁻¹"

    def test_a_band_without_land_says_so(self, cube: Cube) -> None:
        opened = cube.opened.load()
        opened["land_mask"] = opened["land_mask"].where(opened["lat"] > 0, 0)
        figure = rendered(figures.seasonal_cycle(opened, ["runoff"]))
        assert [text.get_text() for text in figure.axes[2].texts] == ["no land"]

    def test_units_must_agree(self, cube: Cube) -> None:
        with pytest.raises(DataError, match="mm, mm d-1"):
            figures.seasonal_cycle(cube.opened, ["runoff", "terrestrial_water_storage_anomaly"])
        with pytest.raises(DataError, match="no variable at all"):
            figures.seasonal_cycle(cube.opened, [])


def test_pyplot_is_never_imported() -> None:
    code = "import sys, h2mv_dist.analysis.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
