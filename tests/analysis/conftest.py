import pytest

from tests.analysis.builders import Cube, basin_grid, map_grid, write_cube

KINDS = {
    "map": (map_grid(), False),
    "map of members": (map_grid(), True),
    "south first": (map_grid(north_first=False), False),
}


@pytest.fixture(params=KINDS)
def cube(request: pytest.FixtureRequest, cubes: dict[str, Cube]) -> Cube:
    return cubes[request.param]


@pytest.fixture(scope="session")
def cubes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cube]:
    return {
        name: write_cube(tmp_path_factory.mktemp("cube"), grid, member_axis)
        for name, (grid, member_axis) in {**KINDS, "basins": (basin_grid(), True)}.items()
    }
