"""Fixtures of the io tests: where data sets and cubes are put."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from h2mv_dist.config import StorageOptions
from h2mv_dist.io.stores import join
from tests.conftest import Place, S3Server
from tests.io.counting import counting_place
from tests.io.cubes import LAYOUTS, Case, CubePlace

KINDS = ("disk", "memory", "s3")

# Every layout on disk; elsewhere, where requests take their time, the two that differ most.
CASES = [
    (kind, name)
    for kind in KINDS
    for name in LAYOUTS
    if kind == "disk" or name in ("spread", "basin members")
]


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    """An empty folder for a data set."""
    return Place(str(tmp_path / "store"), StorageOptions())


@pytest.fixture
def counting() -> Iterator[Place]:
    """An empty store that counts its reads."""
    with counting_place() as place:
        yield place


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    """One bucket for all tests of a module."""
    return s3_server.new_bucket()


def cube_places(kind: str, request: pytest.FixtureRequest) -> Callable[[], CubePlace]:
    """Makes places of one kind, each empty."""
    if kind == "s3":
        options = request.getfixturevalue("s3_server").options
        root = request.getfixturevalue("bucket")
    else:
        options = StorageOptions()
        root = str(request.getfixturevalue("tmp_path")) if kind == "disk" else "memory://"
    return lambda: CubePlace(join(root, uuid.uuid4().hex, "cube.zarr"), options)


@pytest.fixture(params=KINDS)
def new_cube_place(request: pytest.FixtureRequest) -> Callable[[], CubePlace]:
    """Makes empty places for cubes, of each kind."""
    return cube_places(request.param, request)


@pytest.fixture
def cube_place(new_cube_place: Callable[[], CubePlace]) -> CubePlace:
    """An empty place for a cube, of each kind."""
    return new_cube_place()


@pytest.fixture
def on_disk(tmp_path: Path) -> CubePlace:
    """An empty place for a cube, on disk only."""
    return CubePlace(str(tmp_path / "cube.zarr"), StorageOptions())


@pytest.fixture(params=CASES, ids=": ".join)
def case(request: pytest.FixtureRequest) -> Case:
    """Every layout, and where it is tried."""
    kind, name = request.param
    return Case(cube_places(kind, request), LAYOUTS[name])
