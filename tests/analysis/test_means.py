from collections.abc import Mapping

import numpy as np
import pytest
import xarray as xr

from h2mv_dist.analysis import means
from h2mv_dist.errors import DataError
from tests.analysis.builders import Cube


class TestTimeMean:
    def test_it_is_the_mean_over_days_and_members(self, cube: Cube) -> None:
        mean = means.time_mean(cube.opened, "evapotranspiration")
        expected = cube.values["evapotranspiration"].astype(np.float64).mean(axis=(0, 1))
        np.testing.assert_allclose(mean.values.to_numpy()[cube.land], expected, rtol=1e-6)
        assert np.isnan(mean.values.to_numpy()[~cube.land]).all()
        assert mean.n_gaps == 0

    def test_blocks_do_not_change_it(self, cube: Cube, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = means.time_mean(cube.opened, "runoff").values
        monkeypatch.setattr(means, "_BLOCK_VALUES", 100)
        np.testing.assert_allclose(means.time_mean(cube.opened, "runoff").values, whole, rtol=1e-12)

    def test_the_land_mean_is_weighted_by_area(self, cube: Cube) -> None:
        area = cube.opened["cell_area"].to_numpy()[cube.land]
        values = cube.values["runoff"].mean(axis=(0, 1), dtype=np.float64)
        found = means.time_mean(cube.opened, "runoff").land_mean
        assert found == pytest.approx(np.average(values, weights=area), rel=1e-5)

    def test_static_maps_have_no_period(self, cube: Cube) -> None:
        assert "to" not in means.time_mean(cube.opened, "soil_moisture_capacity").scope
        assert "2001-01-01 to 2002-02-04" in means.time_mean(cube.opened, "runoff").scope

    def test_cells_with_gaps_are_counted_and_use_what_there_is(self, cube: Cube) -> None:
        opened = cube.opened.load()
        first, second = np.argwhere(cube.land)[:2]
        opened["runoff"][{"time": 0, **_at(opened, first)}] = np.nan
        opened["runoff"][_at(opened, second)] = np.inf
        mean = means.time_mean(opened, "runoff")
        assert mean.n_gaps == 2
        rest = cube.values["runoff"][:, 1:, 0].mean(dtype=np.float64)
        assert mean.values.to_numpy()[tuple(first)] == pytest.approx(rest, rel=1e-5)
        assert np.isnan(mean.values.to_numpy()[tuple(second)])

    def test_an_unknown_variable_names_the_nearest(self, cube: Cube) -> None:
        with pytest.raises(DataError, match="'runof'; did you mean 'runoff'"):
            means.time_mean(cube.opened, "runof")

    def test_a_constant_cannot_be_mapped(self, cube: Cube) -> None:
        with pytest.raises(DataError, match="nothing to map"):
            means.time_mean(cube.opened, "baseflow_recession")

    def test_an_unwritten_variable_is_refused(self, cube: Cube) -> None:
        with pytest.raises(DataError, match="no value anywhere"):
            means.time_mean(cube.opened, "snowmelt")


class TestSeasonalMeans:
    def test_months_and_bands_are_area_weighted(self, cube: Cube) -> None:
        found = means.seasonal_means(cube.opened, "runoff")
        np.testing.assert_allclose(found, _seasonal(cube, "runoff"), rtol=1e-5)

    def test_blocks_do_not_change_it(self, cube: Cube, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(means, "_BLOCK_VALUES", 100)
        np.testing.assert_allclose(
            means.seasonal_means(cube.opened, "runoff"), _seasonal(cube, "runoff"), rtol=1e-5
        )

    def test_gaps_take_no_weight(self, cube: Cube) -> None:
        opened = cube.opened.load()
        opened["runoff"] = opened["runoff"].where(opened["time"].dt.month != 3)
        found = means.seasonal_means(opened, "runoff")
        expected = _seasonal(cube, "runoff")
        assert np.isnan(found[:, 2]).all()
        np.testing.assert_allclose(np.delete(found, 2, 1), np.delete(expected, 2, 1), rtol=1e-5)

    def test_a_static_variable_has_none(self, cube: Cube) -> None:
        with pytest.raises(DataError, match="without time"):
            means.seasonal_means(cube.opened, "soil_moisture_capacity")


@pytest.mark.parametrize(
    ("shape", "chunks", "expected"),
    [
        ((10, 6, 6), None, (10, 6, 6)),
        ((5, 40_000, 720, 1440), (1, 32, 60, 60), (1, 32, 180, 1440)),
        ((3, 4), (100, 100), (3, 4)),
    ],
)
def test_blocks_hold_whole_chunks(
    shape: tuple[int, ...], chunks: tuple[int, ...] | None, expected: tuple[int, ...]
) -> None:
    assert means._block_shape(shape, chunks) == expected


def _at(opened: xr.Dataset, place: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Mapping[str, int]:
    space = (str(d) for d in opened["cell_area"].dims)
    return dict(zip(space, place.tolist(), strict=True))


def _seasonal(cube: Cube, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The plain way, all at once."""
    values = cube.values[name].mean(axis=0, dtype=np.float64)
    month = cube.opened["time"].dt.month.to_numpy()
    lat = cube.opened["lat"].broadcast_like(cube.opened["cell_area"]).to_numpy()[cube.land]
    area = cube.opened["cell_area"].to_numpy()[cube.land]
    bands = (lat > 23.5, abs(lat) <= 23.5, lat < -23.5)
    return np.array(
        [
            [np.average(values[month == m][:, b], axis=1, weights=area[b]).mean() for m in range(1, 13)]
            for b in bands
        ]
    )
