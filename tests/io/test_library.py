"""Where arrays are found, and how one that is not there is named."""

import numpy as np
import pytest
import zarr

from h2mv_dist.config import DataSettings, VariableSource
from h2mv_dist.errors import DataError, StoreError
from h2mv_dist.io.source import open_source
from h2mv_dist.io.stores import open_store
from tests.conftest import Place
from tests.io.builders import (
    FORCING,
    N_DAYS,
    Stored,
    axes,
    cf,
    open_cf,
    published,
    read,
    read_of,
    whole,
    write,
)


def test_a_setting_renames_a_published_group(folder: Place) -> None:
    arrays, attributes = published()
    arrays |= {
        path.replace("et/", "et_xbase/"): stored for path, stored in arrays.items() if path[:3] == "et/"
    }
    arrays["et_xbase/data"] = Stored(arrays["et/data"].values + 1, ("time", "lat", "lon"))
    write(folder, arrays, attributes=attributes, zarr_format=2)
    data = DataSettings(url=folder.url, variables={"evapotranspiration": VariableSource(name="et_xbase")})
    source = open_source(data, forcing=FORCING, targets=("evapotranspiration",), options=folder.options)
    values = source.read_targets(whole(source))["evapotranspiration"]
    np.testing.assert_array_equal(values, arrays["et/data"].values[1:] + 1)


def test_variables_may_lie_in_groups_and_other_stores(folder: Place) -> None:
    arrays = cf()
    other = Place(folder.url + "-rain", folder.options)
    write(other, {**axes(np.arange(N_DAYS)), "deep/rain": arrays["precipitation"]})
    arrays["drivers/rad"] = arrays.pop("net_radiation")
    del arrays["precipitation"]
    source = open_cf(
        folder,
        arrays,
        variables={
            "net_radiation": VariableSource(name="rad", group="drivers"),
            "precipitation": VariableSource(name="rain", group="/deep/", url=other.url),
        },
    )
    np.testing.assert_array_equal(read(source), read_of(cf()))


def test_a_missing_variable_is_named_with_the_nearest_one(folder: Place) -> None:
    arrays = cf()
    arrays["precipitaton"] = arrays.pop("precipitation")
    with pytest.raises(
        DataError, match=r"variable precipitation is missing(.|\n)*did you mean 'precipitaton'"
    ):
        open_cf(folder, arrays)


def test_a_missing_published_group_is_named(folder: Place) -> None:
    arrays, _ = published()
    write(folder, {path: a for path, a in arrays.items() if not path.startswith("tair/")})
    with pytest.raises(DataError, match=r"group 'tair' is missing(.|\n)*prec, rn"):
        open_source(DataSettings(url=folder.url), forcing=FORCING, targets=(), options=folder.options)
    with pytest.raises(DataError, match=r"'fapar' is missing"):
        open_source(
            DataSettings(url=folder.url), forcing=FORCING[:2], targets=("fapar",), options=folder.options
        )


@pytest.mark.parametrize("units", [None, "", "  "])
def test_absent_units_say_which_setting_is_needed(folder: Place, units: str | None) -> None:
    arrays = cf()
    arrays["precipitation"].attrs = {} if units is None else {"units": units}
    with pytest.raises(
        DataError, match=r"does not say its units(.|\n)*data\.variables\.precipitation\.units"
    ):
        open_cf(folder, arrays)


def test_a_store_that_is_not_there_is_named(folder: Place) -> None:
    with pytest.raises(StoreError, match="nothing is stored there"):
        open_source(DataSettings(url=folder.url), forcing=FORCING, targets=(), options=folder.options)


def test_a_store_that_is_one_array_is_refused(folder: Place) -> None:
    zarr.create_array(open_store(folder.url, folder.options, read_only=False), data=np.zeros(3))
    with pytest.raises(DataError, match="the store is a single array"):
        open_source(DataSettings(url=folder.url), forcing=FORCING, targets=(), options=folder.options)


def test_arrays_without_dimension_names_are_refused(folder: Place) -> None:
    root = zarr.create_group(open_store(folder.url, folder.options, read_only=False))
    root.create_array("air_temperature", data=np.zeros((2, 2)))
    with pytest.raises(DataError, match=r"no consistent axes(.|\n)*dimension_names"):
        open_source(
            DataSettings(url=folder.url, layout="cf", static=("x",)),
            forcing=("air_temperature",),
            targets=(),
            options=folder.options,
        )
