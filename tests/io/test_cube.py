"""What a cube is: its axes and attributes as a reader finds them, its sizes, and layouts that cannot work."""

import json
from collections.abc import Mapping
from typing import Any

import cf_xarray  # noqa: F401  (registers the .cf accessor)
import numpy as np
import pytest

from h2mv_dist.errors import ConfigError
from h2mv_dist.io.cube import (
    FINGERPRINT,
    LAYOUT,
    CubeLayout,
    Progress,
    layout_of,
    projected_bytes,
    root_attributes,
)
from h2mv_dist.io.stores import get_object, join
from tests.io.cubes import LAYOUTS, Case, CubePlace, fill, map_layout


def test_a_reader_finds_decoded_axes(case: Case) -> None:
    place, layout = case.new_place(), case.layout
    fill(place, layout)
    with place.open() as cube:
        days = layout.period.days().astype("datetime64[D]")
        np.testing.assert_array_equal(cube.time, days)
        np.testing.assert_array_equal(cube.time_bnds, np.stack([days, days + 1], axis=1))
        np.testing.assert_array_equal(cube.lat, layout.grid.lat)
        np.testing.assert_array_equal(cube.lon, layout.grid.lon)
        np.testing.assert_array_equal(cube.cell_area, layout.grid.area)
        np.testing.assert_array_equal(cube.land_mask, layout.grid.mask)
        assert {"time", "lat", "lon"} <= set(cube.coords)
        assert cube["runoff"].dims == (
            *(("member",) if layout.member_axis else ()),
            "time",
            *layout.grid.dims,
        )
        assert ("member" in cube.coords) == layout.member_axis
        assert ("runoff_spread" in cube) == (layout.members_as != "all" and len(layout.members) > 1)
        assert ("runoff_mean" in cube) == (layout.members_as == "both")


def test_a_map_follows_cf(on_disk: CubePlace) -> None:
    fill(on_disk, LAYOUTS["spread"])
    with on_disk.open() as cube:
        assert cube.attrs["Conventions"] == "CF-1.11"
        assert cube.attrs["h2mv_dist_model"] == "h2mv"
        assert cube.cf["latitude"].name == cube.cf["Y"].name == "lat"
        assert cube.cf["longitude"].name == cube.cf["X"].name == "lon"
        assert cube.cf["T"].name == "time"
        np.testing.assert_allclose(cube.cf.get_bounds("lat")[:2], [[90.0, 89.5], [89.5, 88.5]])
        np.testing.assert_allclose(cube.cf.get_bounds("lon")[-1], [10.0, 11.0])
        assert cube.cf["runoff"].cf["area"].name == "cell_area"
        # The standard name finds the mean alone: a spread is not the quantity itself.
        assert cube.cf["lwe_thickness_of_surface_snow_amount"].name == "snow_water_equivalent"
        assert cube["runoff"].attrs["cell_methods"] == "time: mean realization: mean"
        spread = cube["snow_water_equivalent_spread"].attrs
        assert spread["units"] == "mm"
        assert "over folds" in spread["long_name"]
        assert "not an uncertainty" in spread["long_name"]
        assert spread["cell_methods"].endswith("realization: standard_deviation")


def test_a_single_member_is_not_called_a_mean(on_disk: CubePlace) -> None:
    fill(on_disk, LAYOUTS["one member"])
    with on_disk.open() as cube:
        assert cube["runoff"].attrs["cell_methods"] == "time: mean"
        assert "ancillary_variables" not in cube["runoff"].attrs


def test_members_carry_their_fold_numbers(on_disk: CubePlace) -> None:
    fill(on_disk, LAYOUTS["members"])
    with on_disk.open() as cube:
        np.testing.assert_array_equal(cube.member, [0, 3, 7])
        assert cube.member.attrs["standard_name"] == "realization"


def test_only_core_codecs_are_stored(on_disk: CubePlace) -> None:
    fill(on_disk, LAYOUTS["spread"])
    metadata = json.loads(get_object(join(on_disk.url, "runoff", "zarr.json"), on_disk.options))
    (sharding,) = metadata["codecs"]
    assert sharding["name"] == "sharding_indexed"
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "zstd", "crc32c"]
    assert metadata["fill_value"] == "NaN"
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [4, 4, 4]
    root = json.loads(get_object(join(on_disk.url, "zarr.json"), on_disk.options))
    assert root["consolidated_metadata"]["metadata"]["runoff"] == metadata


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_projected_sizes_are_the_real_ones(on_disk: CubePlace, layout: CubeLayout) -> None:
    fill(on_disk, layout)
    with on_disk.open() as cube:
        assert projected_bytes(layout) == cube.nbytes


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_comes_back_from_the_root(layout: CubeLayout) -> None:
    attributes = root_attributes(layout) | Progress(layout.period).attributes()
    assert layout_of(attributes, layout.grid) == layout


def test_the_usual_rounding_is_recorded_as_it_always_was() -> None:
    def recorded(**rounded: int) -> object:
        return json.loads(root_attributes(map_layout(rounded=rounded))[LAYOUT])["rounded"]

    assert recorded() == []
    assert recorded(runoff=12) == ["runoff"]
    assert recorded(runoff=12, snow_water_equivalent=14) == {"runoff": 12, "snow_water_equivalent": 14}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": (4, 5), "tile": (4, 10)}, r"shard is not a multiple of chunk[^$]*inference\.shard"),
        ({"shard_days": 5}, "shard is not a multiple of chunk"),
        ({"tile": (4, 6)}, r"tile is not a multiple of shard: two writers in one shard lose data"),
        ({"tile": (4,)}, r"tile does not fit the grid[^$]*lat, lon"),
        ({"chunk": (0, 2)}, r"chunk does not fit the grid"),
        ({"chunk_days": 0}, "shard is not a multiple of chunk"),
        ({"daily": ("runof",)}, "did you mean 'runoff'"),
        ({"daily": ("runoff", "runoff")}, "named twice"),
        ({"members": (1, 1)}, "named twice"),
        ({"members": ()}, "at least one"),
        ({"attributes": {}}, FINGERPRINT),
    ],
)
def test_a_layout_that_cannot_work_is_refused(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        map_layout(**changes)
