"""Making a world: what is refused before anything is simulated."""

from pathlib import Path

import pytest

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import ConfigError, H2mvError, StoreError
from h2mv_dist.io import world
from h2mv_dist.jobs.worlds import make_world, truth_url
from tests.conftest import storage_options

NO_OPTIONS = StorageOptions()


@pytest.fixture(autouse=True)
def no_weather(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused here is refused before the long part."""

    def fail(*_: object) -> None:
        raise AssertionError("weather was made")

    monkeypatch.setattr(world, "make_weather", fail)


def refused(url: str, error: type[H2mvError], message: str, resolution: float = 15.0) -> None:
    options = storage_options("http://127.0.0.1:9") if url.startswith("s3://") else NO_OPTIONS
    with pytest.raises(error, match=message):
        make_world(url, resolution=resolution, years=1, seed=0, options=options)


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "world.zarr").mkdir()
    (tmp_path / "world.zarr" / "notes.txt").write_text("mine")
    refused(str(tmp_path / "world.zarr"), StoreError, r"will not write over(.|\n)*notes\.txt")


def test_a_truth_without_its_world(tmp_path: Path) -> None:
    url = str(tmp_path / "world.zarr")
    Path(truth_url(url)).write_bytes(b"of another world")
    refused(url, StoreError, r"will not write over(.|\n)*truth\.safetensors")


def test_a_store_that_cannot_be_reached() -> None:
    refused("s3://bucket/world.zarr", StoreError, "cannot be reached")


def test_a_grid_with_one_land_cell(tmp_path: Path) -> None:
    refused(str(tmp_path / "w"), ConfigError, r"too little land(.|\n)*1 land cells", resolution=90.0)
    assert not any(tmp_path.iterdir())


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="weather was made"):
        make_world(str(tmp_path), resolution=15.0, years=1, seed=0, options=NO_OPTIONS)
