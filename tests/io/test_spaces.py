"""Space: one grid for all arrays, maps or basins."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from h2mv_dist.config import VariableSource
from h2mv_dist.errors import DataError
from h2mv_dist.grid import Tile
from tests.conftest import Place
from tests.io.builders import LAND, LAT, LON, Stored, axes, basins, cf, open_basins, open_cf


@pytest.mark.parametrize("flipped", ["lat", "lon"])
def test_an_array_stored_the_other_way_round_is_turned(folder: Place, flipped: str) -> None:
    arrays = cf()
    axis = ("lat", "lon").index(flipped)
    statics = {name: arrays.pop(name) for name in ("elevation", "clay")}
    for name, stored in statics.items():
        arrays[f"static/{name}"] = Stored(np.flip(stored.values, axis), stored.dims)
    for name, stored in axes(None).items():
        arrays[f"static/{name}"] = Stored(stored.values[::-1] if name == flipped else stored.values, (name,))
    group = VariableSource(group="static")
    source = open_cf(folder, arrays, variables={"elevation": group, "clay": group})
    np.testing.assert_array_equal(source.grid.lat, LAT)
    tile = Tile((1, 2), (3, 5))
    expected = np.stack([cf()[name].values for name in ("elevation", "clay")], -1)[tile.slices]
    land = source.grid.mask[tile.slices]
    np.testing.assert_array_equal(source.read_static(tile)[land], expected[land])


@pytest.mark.parametrize("wrong", [LAT + 1e-9, LAT + 360.0, np.append(LAT, 44.5)])
def test_forcing_and_static_on_different_grids_are_both_named(folder: Place, wrong: NDArray[Any]) -> None:
    arrays = cf()
    shape = (wrong.size, LON.size)
    arrays |= {"s/lat": Stored(wrong, ("lat",)), "s/lon": Stored(LON, ("lon",))}
    arrays["s/elevation"] = Stored(np.ones(shape, np.float32), ("lat", "lon"))
    with pytest.raises(DataError, match=r"different grids(.|\n)*elevation(.|\n)*net_radiation"):
        open_cf(folder, arrays, static=("elevation",), variables={"elevation": VariableSource(group="s")})


def test_a_map_of_latitudes_is_refused(folder: Place) -> None:
    arrays = cf()
    for short, name, values in (("lat", "latitude", LAT[:, None]), ("lon", "longitude", LON)):
        del arrays[short]
        grid = np.broadcast_to(values, LAND.shape).copy()
        arrays[name] = Stored(grid, ("lat", "lon"), {"standard_name": name})
    with pytest.raises(DataError, match=r"maps themselves(.|\n)*regrid"):
        open_cf(folder, arrays)


def test_missing_coordinates_are_named(folder: Place) -> None:
    arrays = cf()
    del arrays["lon"]
    with pytest.raises(DataError, match="no longitude coordinate"):
        open_cf(folder, arrays)


def test_basins_have_one_cell_axis(folder: Place) -> None:
    source = open_basins(folder, Stored(np.linspace(1, 2, 7), ("cell",), {"units": "km2"}))
    arrays = basins(None)
    assert source.grid.dims == ("cell",)
    assert source.static == ("slope", "clay")
    np.testing.assert_allclose(source.grid.area, np.linspace(1e6, 2e6, 7))
    np.testing.assert_array_equal(source.grid.lat, arrays["lat"].values)
    tile = Tile((2,), (5,))
    expected = arrays["precipitation"].values[2:5].T.astype(np.float32)
    np.testing.assert_array_equal(source.read_forcing(tile, source.period)[..., 0], expected)


def test_basins_without_area_count_the_same_and_bad_areas_are_refused(folder: Place) -> None:
    np.testing.assert_array_equal(open_basins(folder, None).grid.area, np.ones(7))
    bad = np.where(np.arange(7) == 3, np.nan, 1.0)
    with pytest.raises(DataError, match=r"area.*not positive"):
        open_basins(Place(folder.url + "2", folder.options), Stored(bad, ("cell",)))
