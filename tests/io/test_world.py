from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from numpy.typing import NDArray

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import ConfigError, DataError, StoreError
from h2mv_dist.grid import Period, as_date
from h2mv_dist.io import world
from h2mv_dist.io.library import PUBLISHED_GROUPS
from h2mv_dist.io.stores import open_store, put_object
from h2mv_dist.io.world import CLIMATES, FORCING, TARGETS, Land, ObservedTarget, Weather
from h2mv_dist.io.world.features import COVERS
from h2mv_dist.io.world.weather import year_phase
from h2mv_dist.spec import Float32Array
from h2mv_dist.variables import variable
from tests.conftest import S3Server

PERIOD = Period.parse("2003-01-01..2006-01-01")
"""Three years with the leap year 2004 in the middle."""
NO_OPTIONS = StorageOptions()

Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def land() -> Land:
    return world.load_land(4.0)


@pytest.fixture(scope="module")
def weather(land: Land) -> Weather:
    return world.make_weather(land, PERIOD, seed=1)


@pytest.fixture(scope="module")
def truth(weather: Weather) -> Mapping[str, Float32Array]:
    return simple_truth(weather)


@pytest.fixture(scope="module")
def observed(land: Land, truth: Mapping[str, Float32Array]) -> Mapping[str, ObservedTarget]:
    return world.observe(land, PERIOD, truth, seed=1)


def simple_truth(weather: Weather) -> Mapping[str, Float32Array]:
    """A degree-day snow store and fluxes in proportion to the forcing, each [cell, time]."""
    radiation, rain, kelvin = (weather.forcing[:, :, k].astype(np.float64) for k in range(3))
    celsius = kelvin - 273.15
    snow = np.zeros_like(rain)
    for day in range(1, rain.shape[1]):
        gain = np.where(celsius[:, day] <= 0, rain[:, day], -3.0 * celsius[:, day])
        snow[:, day] = np.maximum(snow[:, day - 1] + gain, 0.0)
    evaporation = 0.5 * np.maximum(radiation, 0.0) * 0.0864 / 2.45
    green = np.broadcast_to(weather.static[:, weather.static_names.index("greenness"), None], rain.shape)
    daily = {
        "terrestrial_water_storage": 500.0 + snow + 20.0 * np.sin(np.arange(rain.shape[1]) / 58.0),
        "evapotranspiration": evaporation,
        "runoff": 0.3 * rain,
        "fapar": 0.2 + 0.6 * green,
        "snow_water_equivalent": snow,
    }
    return {name: values.astype(np.float32) for name, values in daily.items()}


def months_of(period: Period) -> NDArray[np.int64]:
    """Month 1..12 of each day."""
    return np.array([as_date(int(day)).month for day in period.days()])


def monthly_mean(daily: Float32Array, days: NDArray[np.int64]) -> Array:
    """Plain averages over the calendar months that start on ``days``, [cell, month]."""
    calendar = [as_date(int(day)) for day in PERIOD.days()]
    columns = []
    for first in (as_date(int(day)) for day in days):
        inside = [(day.year, day.month) == (first.year, first.month) for day in calendar]
        columns.append(daily[:, inside].astype(np.float64).mean(axis=1))
    return np.stack(columns, axis=1)


def by_class(land: Land, values: Array) -> dict[str, Array]:
    """Values of the cells of each climate."""
    return {name: values[land.cell_climate() == k] for k, name in enumerate(CLIMATES, start=1)}


def annual_rain(weather: Weather) -> Array:
    """mm a-1, [cell]."""
    return np.asarray(weather.forcing[:, :, 1].mean(axis=1, dtype=np.float64) * 365.25)


def distances(land: Land) -> Array:
    """Angles between cells, degrees, [cell, cell]."""
    lat, lon = (np.deg2rad(values) for values in land.grid.cell_coordinates())
    place = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])
    return np.asarray(np.rad2deg(np.arccos(np.clip(place.T @ place, -1.0, 1.0))))


def near_and_far(angle: Array, correlation: Array) -> tuple[float, float]:
    """Mean correlation of neighbours, and of cells more than 60 degrees apart."""
    neighbours = (angle > 0) & (angle < 4.1)
    return float(correlation[neighbours].mean()), float(correlation[angle > 60].mean())


class TestLand:
    @pytest.mark.parametrize(("resolution", "n_land"), [(1, 15408), (2, 4030), (4, 962), (6, 430), (10, 141)])
    def test_counts_of_land_cells(self, resolution: float, n_land: int) -> None:
        assert world.load_land(resolution).grid.n_land == n_land

    def test_equals_the_shared_mask_and_classes(self, shared: Path) -> None:
        with xr.open_dataset(shared / "data" / "landmask_koppen_1deg.nc") as file:
            source = file.load()
        land = world.load_land(1.0)
        north = source.lat.values > -60
        np.testing.assert_array_equal(land.grid.lat, source.lat.values)
        np.testing.assert_array_equal(land.grid.lon, source.lon.values)
        np.testing.assert_array_equal(land.grid.mask, (source.land_mask.values > 0) & north[:, None])
        expected = source.koppen_simplified.values[land.grid.mask]
        np.testing.assert_array_equal(land.cell_climate(), expected)

    def test_the_shipped_file_is_what_pack_land_makes(self, shared: Path, tmp_path: Path) -> None:
        with xr.open_dataset(shared / "data" / "landmask_koppen_1deg.nc") as source:
            mask, classes = source.land_mask.values > 0, source.koppen_simplified.values
        world.pack_land(mask, classes, tmp_path / "packed.npz")
        shipped = Path(world.__file__).with_name("mask.npz")
        assert shipped.stat().st_size < 30_000
        with np.load(shipped) as ours, np.load(tmp_path / "packed.npz") as made:
            assert sorted(ours) == sorted(made)
            for name in ours:
                np.testing.assert_array_equal(ours[name], made[name])

    def test_axes_are_centres_with_lat_descending(self) -> None:
        grid = world.load_land(6.0).grid
        assert grid.lat.tolist() == [87.0 - 6.0 * k for k in range(30)]
        assert grid.lon.tolist() == [-177.0 + 6.0 * k for k in range(60)]

    def test_class_and_mask_follow_the_majority(self) -> None:
        fine, coarse = world.load_land(1.0), world.load_land(5.0)
        for row, column in np.ndindex(coarse.grid.shape):
            box = fine.climate[5 * row : 5 * row + 5, 5 * column : 5 * column + 5]
            counts = np.bincount(box.ravel(), minlength=6)[1:]
            is_land = counts.sum() >= 12.5
            assert coarse.grid.mask[row, column] == is_land
            assert coarse.climate[row, column] == (counts.argmax() + 1 if is_land else 0)

    @pytest.mark.parametrize("resolution", [0.0, 0.5, 1.5, 7.0, 8.0, -1.0, 360.0, np.nan, np.inf])
    def test_refuses_a_grid_that_does_not_fit(self, resolution: float) -> None:
        with pytest.raises(ConfigError, match="divides 180"):
            world.load_land(resolution)

    @pytest.mark.parametrize(("resolution", "n_land"), [(36.0, 9), (90.0, 1), (180.0, 0)])
    def test_refuses_a_grid_with_hardly_any_land(self, resolution: float, n_land: int) -> None:
        with pytest.raises(
            ConfigError, match=rf"at least 10 land cells(.|\n)*{n_land} land cells(.|\n)*finer"
        ):
            world.load_land(resolution)


class TestWeather:
    def test_equal_seeds_give_equal_bytes(self) -> None:
        land, period = world.load_land(15.0), Period.parse("2003-02-01..2003-06-01")
        first, again, other = (world.make_weather(land, period, seed) for seed in (3, 3, 4))
        assert first.forcing.tobytes() == again.forcing.tobytes()
        assert first.static.tobytes() == again.static.tobytes()
        for column in range(len(FORCING)):
            assert not np.array_equal(first.forcing[:, :, column], other.forcing[:, :, column])
        assert not np.array_equal(first.static, other.static)

    def test_refuses_a_negative_seed(self, land: Land) -> None:
        with pytest.raises(ConfigError, match="seed"):
            world.make_weather(land, PERIOD, -1)

    def test_forcing_is_complete_and_within_physical_bounds(self, land: Land, weather: Weather) -> None:
        assert weather.forcing.shape == (land.grid.n_land, 1096, 3)
        assert weather.forcing.dtype == np.float32
        for column, name in enumerate(FORCING):
            values = weather.forcing[:, :, column]
            assert np.isfinite(values).all()
            assert values.min() >= variable(name).lower
            assert values.max() <= variable(name).upper

    @pytest.mark.parametrize(
        ("climate", "rain", "celsius", "radiation"),
        [
            ("tropical", (1400, 2400), (23, 28), (110, 140)),
            ("arid", (70, 200), (17, 25), (75, 100)),
            ("temperate", (600, 1100), (14, 20), (85, 125)),
            ("cold", (400, 650), (-5, 5), (40, 80)),
            ("polar", (180, 350), (-14, -4), (25, 55)),
        ],
    )
    def test_mean_of_each_climate(
        self,
        land: Land,
        weather: Weather,
        climate: str,
        rain: tuple[float, float],
        celsius: tuple[float, float],
        radiation: tuple[float, float],
    ) -> None:
        means = weather.forcing.mean(axis=1, dtype=np.float64)
        members = by_class(land, means)[climate]
        assert radiation[0] < members[:, 0].mean() < radiation[1]
        assert rain[0] < members[:, 1].mean() * 365.25 < rain[1]
        assert celsius[0] < members[:, 2].mean() - 273.15 < celsius[1]

    def test_every_annual_radiation_is_earthly(self, weather: Weather) -> None:
        annual = weather.forcing[:, :, 0].mean(axis=1, dtype=np.float64)
        assert annual.min() > 10.0
        assert annual.max() < 155.0

    def test_seasons_are_opposite_and_the_tropics_flat(self, land: Land, weather: Weather) -> None:
        month = months_of(PERIOD)
        july, january = (weather.forcing[:, month == m, 2].mean(axis=1) for m in (7, 1))
        difference = july - january
        lat = land.grid.cell_coordinates()[0]
        assert difference[lat > 25].min() > 5.0
        assert difference[lat < -25].max() < -5.0
        assert np.abs(difference[np.abs(lat) < 3]).max() < 3.0
        inland = weather.static[:, weather.static_names.index("inland")]
        band = (lat > 45) & (lat < 65)
        assert np.corrcoef(difference[band], inland[band])[0, 1] > 0.8

    def test_each_calendar_year_has_its_own_length(self) -> None:
        phase = year_phase(PERIOD)
        first_days = np.flatnonzero(np.diff(phase, prepend=1.0) < 0)
        assert first_days.tolist() == [0, 365, 731]
        np.testing.assert_allclose(phase[first_days], [0.5 / 365, 0.5 / 366, 0.5 / 365])
        assert phase.max() < 1.0

    def test_high_cells_are_colder_than_their_latitude(self, land: Land, weather: Weather) -> None:
        lat = land.grid.cell_coordinates()[0]
        height = weather.static[:, weather.static_names.index("elevation_m")]
        celsius = weather.forcing[:, :, 2].mean(axis=1) - 273.15
        high = np.flatnonzero(height > 2500)
        assert high.size > 0
        for cell in high:
            low = (lat == lat[cell]) & (height < 500)
            assert celsius[cell] < celsius[low].mean() - 8.0

    def test_temperature_anomalies_last_for_days_and_are_shared_by_neighbours(
        self, land: Land, weather: Weather
    ) -> None:
        year = weather.forcing[:, :365, 2].astype(np.float64)
        next_year = weather.forcing[:, 731:1096, 2]
        anomaly = year - next_year
        lag_one = np.mean([np.corrcoef(series[1:], series[:-1])[0, 1] for series in anomaly[::10]])
        assert 0.7 < lag_one < 0.9
        near, far = near_and_far(distances(land), np.asarray(np.corrcoef(anomaly)))
        assert near > 0.7
        assert abs(far) < 0.1

    def test_rain_is_persistent_and_regional(self, land: Land, weather: Weather) -> None:
        wet = weather.forcing[:, :, 1] > 0
        after_wet = wet[:, 1:][wet[:, :-1]].mean()
        temperate = wet[land.cell_climate() == 3]
        given_wet = temperate[:, 1:][temperate[:, :-1]].mean()
        given_dry = temperate[:, 1:][~temperate[:, :-1]].mean()
        assert given_wet > given_dry + 0.15
        assert after_wet > wet.mean() + 0.15
        rainy = by_class(land, wet.mean(axis=1))
        assert rainy["arid"].mean() < 0.2
        assert 0.45 < rainy["tropical"].mean() < 0.8
        outside_monsoons = np.abs(land.grid.cell_coordinates()[0]) > 30
        correlation = np.asarray(np.corrcoef(weather.forcing[outside_monsoons, :, 1]))
        angle = distances(land)[np.ix_(outside_monsoons, outside_monsoons)]
        near, far = near_and_far(angle, correlation)
        assert near > 0.15
        assert abs(far) < 0.03

    def test_wet_day_amounts_are_exponential(self, land: Land, weather: Weather) -> None:
        """Skewed as a gamma distribution of shape 1: standard deviation near the mean."""
        equator = np.abs(land.grid.cell_coordinates()[0]) < 5
        rain = weather.forcing[equator & (land.cell_climate() == 1), :, 1].astype(np.float64)
        variation = [series[series > 0].std() / series[series > 0].mean() for series in rain]
        assert 0.9 < np.median(variation) < 1.3

    def test_monsoons_come_in_summer(self, land: Land, weather: Weather) -> None:
        lat = land.grid.cell_coordinates()[0]
        month = months_of(PERIOD)
        summer = np.where(lat[:, None] > 0, np.isin(month, (6, 7, 8)), np.isin(month, (12, 1, 2)))
        rain = weather.forcing[:, :, 1].astype(np.float64)
        monsoon = (np.abs(lat) > 12) & (land.cell_climate() == 1)
        share = (rain * summer)[monsoon].sum() / rain[monsoon].sum()
        assert 0.4 < share < 0.8

    def test_years_differ_mildly(self, weather: Weather) -> None:
        rain = weather.forcing[:, :, 1].astype(np.float64)
        years = np.stack([rain[:, a:b].mean(axis=1) for a, b in ((0, 365), (365, 731), (731, 1096))])
        variation = years.std(axis=0) / years.mean(axis=0)
        assert 0.05 < np.median(variation) < 0.3

    def test_snow_falls_where_it_is_cold(self, land: Land, weather: Weather) -> None:
        rain, kelvin = weather.forcing[:, :, 1].astype(np.float64), weather.forcing[:, :, 2]
        share = by_class(land, (rain * (kelvin <= 273.15)).sum(axis=1) / rain.sum(axis=1))
        assert share["tropical"].max() == 0.0
        assert 0.15 < share["cold"].mean() < 0.6
        assert 0.25 < share["polar"].mean() < 0.8

    def test_every_cell_thaws_each_year(self, weather: Weather) -> None:
        warm = weather.forcing[:, :, 2] > 273.15
        for days in (slice(0, 365), slice(365, 731), slice(731, 1096)):
            assert warm[:, days].sum(axis=1).min() > 20

    def test_radiation_falls_with_cloud_and_polar_night(self, land: Land, weather: Weather) -> None:
        lat = land.grid.cell_coordinates()[0]
        radiation, rain = weather.forcing[:, :, 0], weather.forcing[:, :, 1]
        night = radiation[lat > 70][:, months_of(PERIOD) == 12]
        assert -45.0 < night.mean() < -5.0
        tropics = np.abs(lat) < 15
        sunny = radiation[tropics][rain[tropics] == 0].mean()
        assert sunny > radiation[tropics][rain[tropics] > 0].mean() + 10.0

    def test_coarse_and_fine_worlds_have_the_same_weather(self) -> None:
        """15 degree cells share a centre with 5 degree cells, so that only their surroundings differ."""
        period = Period.parse("2003-01-01..2003-03-01")
        coarse, fine = world.load_land(15.0), world.load_land(5.0)
        series = [world.make_weather(land, period, 1).forcing[:, :, 2] for land in (coarse, fine)]
        places = [np.stack(land.grid.cell_coordinates(), axis=1).tolist() for land in (coarse, fine)]
        shared_places = [place for place in places[0] if place in places[1]]
        assert len(shared_places) > 30
        correlations = []
        for place in shared_places:
            one, other = (s[p.index(place)] for s, p in zip(series, places, strict=True))
            correlations.append(np.corrcoef(one, other)[0, 1])
        assert min(correlations) > 0.99


class TestStatic:
    def test_thirty_finite_features_with_spread(self, land: Land, weather: Weather) -> None:
        assert weather.static.shape == (land.grid.n_land, 30)
        assert len(set(weather.static_names)) == 30
        assert np.isfinite(weather.static).all()
        assert (weather.static.std(axis=0) > 0).all()

    def test_climate_flags_are_the_classes(self, land: Land, weather: Weather) -> None:
        columns = [weather.static_names.index(f"climate_{name}") for name in CLIMATES]
        expected = land.cell_climate()[:, None] == np.arange(1, 6)
        np.testing.assert_array_equal(weather.static[:, columns], expected)

    def test_covers_and_textures_fill_the_cell(self, weather: Weather) -> None:
        for names in (COVERS, ("sand", "clay", "silt")):
            parts = weather.static[:, [weather.static_names.index(name) for name in names]]
            assert parts.min() >= 0.0
            np.testing.assert_allclose(parts.sum(axis=1), 1.0, atol=1e-5)

    def test_features_follow_climate_and_vary_smoothly(self, land: Land, weather: Weather) -> None:
        forest = weather.static[:, weather.static_names.index("forest")].astype(np.float64)
        means = {name: values.mean() for name, values in by_class(land, forest).items()}
        assert means["tropical"] > 0.4
        assert means["arid"] < 0.1
        angle = distances(land)
        for name in ("sand", "forest", "organic_carbon"):
            values = weather.static[:, weather.static_names.index(name)].astype(np.float64)
            step = np.abs(values[:, None] - values[None, :])
            assert step[(angle > 0) & (angle < 4.1)].mean() < 0.6 * step[angle > 60].mean()


class TestObserve:
    def test_equal_seeds_give_equal_bytes(self, land: Land, truth: Mapping[str, Float32Array]) -> None:
        first, again, other = (world.observe(land, PERIOD, truth, seed) for seed in (3, 3, 4))
        for name in TARGETS:
            assert first[name].values.tobytes() == again[name].values.tobytes()
            assert first[name].values.tobytes() != other[name].values.tobytes()

    def test_every_target_has_values_gaps_and_bounds(self, observed: Mapping[str, ObservedTarget]) -> None:
        assert tuple(observed) == TARGETS
        for name, series in observed.items():
            assert series.values.dtype == np.float32
            finite = np.isfinite(series.values)
            assert 0.5 < finite.mean() < 1.0, name
            assert series.values[finite].min() >= variable(name).lower
            assert series.values[finite].max() <= variable(name).upper

    def test_months_are_stamped_with_their_first_day(self, observed: Mapping[str, ObservedTarget]) -> None:
        runoff = observed["runoff"]
        stamps = [as_date(int(day)) for day in runoff.days]
        assert [(d.year, d.month, d.day) for d in stamps] == [
            (year, month, 1) for year in (2003, 2004, 2005) for month in range(1, 13)
        ]
        assert observed["snow_water_equivalent"].frequency == "daily"
        np.testing.assert_array_equal(observed["snow_water_equivalent"].days, PERIOD.days())

    def test_broken_months_are_left_out(self, land: Land, truth: Mapping[str, Float32Array]) -> None:
        period = Period.parse("2003-01-15..2003-04-30")
        cut = {name: values[:, 14 : 14 + period.n_days] for name, values in truth.items()}
        runoff = world.observe(land, period, cut, 1)["runoff"]
        assert [as_date(int(day)).isoformat() for day in runoff.days] == ["2003-02-01", "2003-03-01"]
        clean = monthly_mean(truth["runoff"], runoff.days)
        seen = np.isfinite(runoff.values) & (clean > 0)
        assert np.median(np.abs(np.log(runoff.values[seen] / clean[seen]))) < 0.25

    def test_storage_is_a_noisy_anomaly_with_whole_months_missing(
        self, observed: Mapping[str, ObservedTarget], truth: Mapping[str, Float32Array]
    ) -> None:
        series = observed["terrestrial_water_storage_anomaly"]
        every_month = observed["runoff"].days
        assert series.days.size == 33
        assert set(series.days) < set(every_month)
        assert (np.diff(series.days) > 0).all()
        blank = np.isnan(series.values)
        assert blank.all(axis=0).sum() == 2
        assert blank.any(axis=0).sum() == 2
        level = monthly_mean(truth["terrestrial_water_storage"], every_month).mean(axis=1)
        clean = monthly_mean(truth["terrestrial_water_storage"], series.days) - level[:, None]
        error = (series.values - clean)[~blank]
        assert 16.0 < error.std() < 18.0
        assert abs(error.mean()) < 0.5

    def test_evapotranspiration_noise_and_unseen_cells(
        self, land: Land, observed: Mapping[str, ObservedTarget], truth: Mapping[str, Float32Array]
    ) -> None:
        series = observed["evapotranspiration"]
        clean = monthly_mean(truth["evapotranspiration"], series.days)
        error = (series.values - clean) / np.hypot(0.12 * clean, 0.1)
        inner = (clean > 0.5) & np.isfinite(error)
        assert 0.95 < error[inner].std() < 1.05
        unseen = np.asarray(np.isnan(series.values).all(axis=1))
        barren = np.isin(land.cell_climate(), (2, 5))
        assert not unseen[~barren].any()
        assert 0.29 < unseen[barren].mean() <= 0.30

    def test_runoff_noise_is_a_factor_of_mean_one(
        self, observed: Mapping[str, ObservedTarget], truth: Mapping[str, Float32Array]
    ) -> None:
        series = observed["runoff"]
        clean = monthly_mean(truth["runoff"], series.days)
        unseen = np.asarray(np.isnan(series.values).all(axis=1))
        assert unseen.sum() == int(0.1 * unseen.size)
        assert np.isfinite(series.values[~unseen]).all()
        ratio = (series.values / np.where(clean > 0, clean, np.nan))[~unseen]
        assert 0.21 < np.nanstd(np.log(ratio)) < 0.23
        assert 0.99 < np.nanmean(ratio) < 1.01
        assert (series.values[~unseen][clean[~unseen] == 0] == 0).all()

    def test_fapar_noise_and_its_polar_night(
        self, land: Land, observed: Mapping[str, ObservedTarget], truth: Mapping[str, Float32Array]
    ) -> None:
        series = observed["fapar"]
        clean = monthly_mean(truth["fapar"], series.days)
        missing = np.asarray(np.isnan(series.values))
        inner = ~missing & (clean > 0.2) & (clean < 0.8)
        assert 0.038 < (series.values - clean)[inner].std() < 0.042
        lat = land.grid.cell_coordinates()[0]
        assert missing[lat > 62][:, 11].all()
        snow = monthly_mean(truth["snow_water_equivalent"], series.days)
        assert missing[snow > 20].all()
        bright = (np.abs(lat) < 50)[:, None] & (snow <= 20)
        assert not missing[bright].any()

    def test_snow_saturates_and_bare_ground_counts(
        self, land: Land, observed: Mapping[str, ObservedTarget], truth: Mapping[str, Float32Array]
    ) -> None:
        seen, snow = observed["snow_water_equivalent"].values, truth["snow_water_equivalent"]
        missing = np.isnan(seen)
        assert (seen[~missing & (snow == 0)] == 0).all()
        deep = ~missing & (snow > 300)
        assert deep.sum() > 100
        assert seen[deep].min() >= 150.0
        assert seen[~missing].max() <= 200.0
        shallow = ~missing & (snow > 30) & (snow < 80)
        error = ((seen - snow) / np.hypot(0.1 * snow, 3.0))[shallow]
        assert 0.97 < error.std() < 1.03
        tropical = land.cell_climate() == 1
        mountain = (land.cell_climate() == 5) & (np.abs(land.grid.cell_coordinates()[0]) < 55)
        assert mountain.any()
        assert missing[tropical | mountain].all()
        assert 0.09 < missing[~(tropical | mountain)].mean() < 0.11

    def test_refuses_an_incomplete_truth(self, land: Land, truth: Mapping[str, Float32Array]) -> None:
        lacking = {name: values for name, values in truth.items() if name != "runoff"}
        with pytest.raises(DataError, match="lacks 'runoff'"):
            world.observe(land, PERIOD, lacking, 1)
        with pytest.raises(DataError, match=r"fapar(.|\n)*shape \(962, 5\)"):
            world.observe(land, PERIOD, {**truth, "fapar": truth["fapar"][:, :5]}, 1)
        holed = truth["fapar"].copy()
        holed[7, 3] = np.nan
        with pytest.raises(DataError, match=r"fapar(.|\n)*1 NaN"):
            world.observe(land, PERIOD, {**truth, "fapar": holed}, 1)

    def test_refuses_a_period_without_a_whole_month(
        self, land: Land, truth: Mapping[str, Float32Array]
    ) -> None:
        period = Period.parse("2003-01-02..2003-02-28")
        cut = {name: values[:, 1 : 1 + period.n_days] for name, values in truth.items()}
        with pytest.raises(ConfigError, match="no whole month"):
            world.observe(land, period, cut, 1)


SMALL_PERIOD = Period.parse("2003-11-01..2005-03-01")
Written = tuple[Land, Weather, Mapping[str, ObservedTarget]]


@pytest.fixture(scope="module")
def small() -> Written:
    land = world.load_land(10.0)
    weather = world.make_weather(land, SMALL_PERIOD, 2)
    return land, weather, world.observe(land, SMALL_PERIOD, simple_truth(weather), 2)


def write(url: str, small: Written, options: StorageOptions = NO_OPTIONS) -> None:
    land, weather, targets = small
    world.write_world(url, land, SMALL_PERIOD, weather, targets, options)


@pytest.fixture(scope="module")
def written(small: Written, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("world") / "world.zarr")
    write(url, small)
    return url


class TestPublishedLayout:
    def test_metadata_are_those_of_the_published_layout(self, written: str, shared: Path) -> None:
        ours = zarr.open_group(written, mode="r", zarr_format=2, use_consolidated=True)
        published = zarr.open_group(shared / "reference_layout.zarr", mode="r", zarr_format=2)
        assert set(ours) == {*PUBLISHED_GROUPS.values(), "static", "mask"}
        for name in ours:
            group, model = ours[name], published[name]
            assert isinstance(group, zarr.Group)
            assert isinstance(model, zarr.Group)
            assert set(group) == set(model)
            assert set(group.attrs) - {"names"} == set(model.attrs)
            for key in group:
                array, expected = group[key], model[key]
                assert isinstance(array, zarr.Array)
                assert isinstance(expected, zarr.Array)
                assert array.metadata.zarr_format == 2
                assert array.dtype == expected.dtype
                assert array.attrs["_ARRAY_DIMENSIONS"] == expected.attrs["_ARRAY_DIMENSIONS"]
                assert array.compressors == expected.compressors
                assert str(array.fill_value) == str(expected.fill_value)
                assert set(array.attrs) == set(expected.attrs)

    def test_a_chunk_holds_all_days_of_six_by_six_cells(self, written: str) -> None:
        data = zarr.open_array(written, path="rn/data", mode="r")
        assert data.shape == (486, 18, 36)
        assert data.chunks == (486, 6, 6)

    def test_xarray_reads_back_what_was_given(self, written: str, small: Written) -> None:
        land, weather, targets = small
        series = dict(zip(FORCING, np.moveaxis(weather.forcing, 2, 0), strict=True))
        packed = {**series, **{name: target.values for name, target in targets.items()}}
        for name, values in packed.items():
            group = xr.open_zarr(written, group=PUBLISHED_GROUPS[name], chunks=None, consolidated=True)
            maps = group["data"].transpose("time", "lat", "lon").values
            np.testing.assert_array_equal(maps[:, land.grid.mask].T, values)
            assert np.isnan(maps[:, ~land.grid.mask]).all()
            np.testing.assert_array_equal(group.lat, land.grid.lat)
            np.testing.assert_array_equal(group.lon, land.grid.lon)
            days = group.time.values.astype("datetime64[D]").astype(np.int64)
            expected = targets[name].days if name in targets else SMALL_PERIOD.days()
            np.testing.assert_array_equal(days, expected)
            np.testing.assert_allclose(group.attrs["mean"], np.nanmean(values, dtype=np.float64))
            np.testing.assert_allclose(group.attrs["std"], np.nanstd(values, dtype=np.float64))

    def test_mask_and_named_features(self, written: str, small: Written) -> None:
        land, weather, _ = small
        mask = xr.open_zarr(written, group="mask", chunks=None)["data"]
        np.testing.assert_array_equal(mask.values != 0, land.grid.mask)
        static = xr.open_zarr(written, group="static", chunks=None)
        np.testing.assert_array_equal(static["data"].values[land.grid.mask], weather.static)
        assert static.attrs["names"] == list(weather.static_names)
        np.testing.assert_allclose(static.attrs["std"], weather.static.std(axis=0), rtol=1e-3)

    def test_any_kind_of_store_holds_the_same(
        self, small: Written, s3_server: S3Server, written: str
    ) -> None:
        expected = zarr.open_array(written, path="swe/data", mode="r")[:]
        places = {
            "memory://world-test/world.zarr": NO_OPTIONS,
            f"{s3_server.new_bucket()}/world.zarr": s3_server.options,
        }
        for url, options in places.items():
            write(url, small, options)
            store = open_store(url, options, read_only=True)
            np.testing.assert_array_equal(zarr.open_array(store, path="swe/data", mode="r")[:], expected)

    def test_never_writes_over_anything(self, small: Written, tmp_path: Path) -> None:
        url = str(tmp_path / "world.zarr")
        put_object(f"{url}/notes.txt", b"mine", NO_OPTIONS)
        with pytest.raises(StoreError, match=r"notes\.txt"):
            write(url, small)
        assert [p.relative_to(url).as_posix() for p in Path(url).rglob("*")] == ["notes.txt"]
        assert Path(url, "notes.txt").read_bytes() == b"mine"

    def test_refuses_arrays_of_another_world(self, small: Written, tmp_path: Path) -> None:
        land, weather, targets = small
        url = str(tmp_path / "world.zarr")
        other = Period.parse("2003-11-01..2005-03-02")
        with pytest.raises(DataError, match="forcing"):
            world.write_world(url, land, other, weather, targets, NO_OPTIONS)
        wrong = {"runof": targets["runoff"]}
        with pytest.raises(ConfigError, match="did you mean 'runoff'"):
            world.write_world(url, land, SMALL_PERIOD, weather, wrong, NO_OPTIONS)
        runoff = targets["runoff"]
        empty = ObservedTarget(np.full_like(runoff.values, np.nan), runoff.days, "monthly")
        with pytest.raises(DataError, match="no observation"):
            world.write_world(url, land, SMALL_PERIOD, weather, {"runoff": empty}, NO_OPTIONS)
        assert not Path(url).exists()
