"""Staging: what is in the cache, how often a chunk is read, and what concurrent or failing writers leave."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h2mv_dist.config import DataSettings, StorageOptions
from h2mv_dist.errors import DataError, StoreError
from h2mv_dist.grid import Period, Tile
from h2mv_dist.io import cache
from h2mv_dist.io.cache import StagedCells, default_cache, is_staged, open_staged, stage
from h2mv_dist.io.source import Source, open_source
from tests.conftest import Place
from tests.io.builders import (
    FORCING,
    LAND,
    N_DAYS,
    TARGETS,
    Stored,
    basins,
    cf,
    open_basins,
    open_cf,
    open_published,
    published,
    whole,
    write,
)
from tests.io.counting import chunk_reads, forget_reads


@pytest.fixture
def source(tmp_path: Path) -> Source:
    place = Place(str(tmp_path / "world"), StorageOptions())
    arrays, attributes = published()
    write(place, arrays, attributes=attributes, zarr_format=2)
    return open_published(place)


def check(staged: StagedCells, source: Source) -> None:
    """Everything staged equals what the source reads."""
    tile, mask = whole(source), source.grid.mask
    forcing = source.read_forcing(tile, source.period)
    np.testing.assert_array_equal(staged.forcing, np.swapaxes(forcing[:, mask], 0, 1))
    np.testing.assert_array_equal(staged.static, source.read_static(tile)[mask])
    for name, values in source.read_targets(tile).items():
        np.testing.assert_array_equal(staged.targets[name].values, values[:, mask].T)
        np.testing.assert_array_equal(staged.targets[name].axis.days, source.targets[name].days)
        assert staged.targets[name].axis.frequency == source.targets[name].frequency
    assert (staged.forcing_names, staged.static_names) == (source.forcing, source.static)
    assert tuple(staged.targets) == tuple(source.targets)
    assert staged.period == source.period
    assert staged.n_cells == source.grid.n_land
    assert staged.grid.dims == source.grid.dims
    np.testing.assert_array_equal(staged.grid.lat, source.grid.lat)
    np.testing.assert_array_equal(staged.grid.lon, source.grid.lon)
    np.testing.assert_array_equal(staged.grid.mask, mask)
    np.testing.assert_array_equal(staged.grid.area, source.grid.area)


def test_every_land_cell_is_staged_unscaled(source: Source, tmp_path: Path) -> None:
    staged = stage(source, tmp_path / "cache")
    check(staged, source)
    check(open_staged(staged.path), source)
    assert staged.forcing.shape == (LAND.sum(), N_DAYS, 3)


def test_staged_cells_are_mapped_and_read_only(source: Source, tmp_path: Path) -> None:
    staged = stage(source, tmp_path / "cache")
    assert isinstance(staged.forcing, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        staged.forcing[0, 0, 0] = 1


def test_small_boxes_stage_the_same(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes of one chunk in space and in time, instead of the whole world at once."""
    monkeypatch.setattr(cache, "_BOX_BYTES", 1)
    check(stage(source, tmp_path / "cache"), source)


def test_basins_are_staged_along_their_one_axis(tmp_path: Path) -> None:
    source = open_basins(Place(str(tmp_path / "world"), StorageOptions()), None)
    staged = stage(source, tmp_path / "cache")
    check(staged, source)
    np.testing.assert_array_equal(
        staged.forcing[..., 0], basins(None)["precipitation"].values.astype(np.float32)
    )


def test_each_chunk_is_read_once_however_the_arrays_are_chunked(counting: Place, tmp_path: Path) -> None:
    arrays, _ = published()
    arrays["rn/data"].chunks = (10, 4, 6)  # maps
    arrays["swe/data"].chunks = (N_DAYS, 1, 2)  # series
    arrays["et/data"].chunks = (1, 3, 4)
    write(counting, arrays)
    source = open_published(counting)
    forget_reads()
    stage(source, tmp_path)
    for group, chunks in {"rn": 8, "prec": 8, "swe": 12, "et": 8}.items():
        counts = chunk_reads(group)
        assert set(counts.values()) == {1}, group
        assert len(counts) == chunks, group


def test_a_second_stage_reads_nothing(counting: Place, tmp_path: Path) -> None:
    write(counting, published()[0])
    source = open_published(counting)
    first = stage(source, tmp_path)
    forget_reads()
    assert stage(source, tmp_path).path == first.path
    assert not chunk_reads("rn")


def test_another_period_or_other_names_get_a_folder_of_their_own(source: Source, tmp_path: Path) -> None:
    url = source.arrays.forcing[0].url
    fewer = open_source(DataSettings(url=url), forcing=FORCING[:2], targets=TARGETS, options=StorageOptions())
    paths = {stage(s, tmp_path / "cache").path for s in (source, fewer)}
    assert len(paths) == 2


def staging(source: Source, directory: Path, first: str = "") -> list[str]:
    """A command that stages in a process of its own, and what it does before."""
    program = (
        "import sys; from pathlib import Path; from h2mv_dist.config import DataSettings, StorageOptions\n"
        "from h2mv_dist.io.cache import stage; from h2mv_dist.io.source import open_source\n"
        f"{first}\n"
        f"s = open_source(DataSettings(url=sys.argv[1]), forcing={FORCING}, targets={TARGETS}, "
        "options=StorageOptions())\n"
        "print(stage(s, Path(sys.argv[2])).path)\n"
    )
    return [sys.executable, "-c", program, source.arrays.forcing[0].url, str(directory)]


def test_processes_that_stage_at_once_agree(source: Source, tmp_path: Path) -> None:
    command = staging(source, tmp_path / "cache")
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {run.communicate(timeout=200)[0].strip() for run in runs}
    assert all(run.returncode == 0 for run in runs)
    assert len(printed) == 1
    check(open_staged(Path(printed.pop())), source)


def left_overs(directory: Path) -> list[str]:
    """Unfinished folders."""
    return [name for name in os.listdir(directory) if name.startswith(".") and not name.endswith(".lock")]


def test_what_a_killed_process_left_is_removed(source: Source, tmp_path: Path) -> None:
    """Folders of another key or another host may be in use: the lock is not theirs."""
    directory = tmp_path / "cache"
    killed = "import os; from h2mv_dist.io import cache\ncache._meta = lambda _: os.kill(os.getpid(), 9)"
    run = subprocess.run(staging(source, directory, killed), capture_output=True, timeout=200, check=False)
    assert run.returncode == -signal.SIGKILL
    (unfinished,) = left_overs(directory)
    key = unfinished[1:].split(".")[0]
    others = {f".{key}.elsewhere.0", f".{'0' * len(key)}.{platform.node()}.0"}
    for name in others:
        (directory / name).mkdir()
    check(stage(source, directory), source)
    assert set(left_overs(directory)) == others


def test_without_locks_the_first_folder_stays(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems refuse locks; then all stage and one wins the name."""

    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    staged: list[StagedCells] = []
    threads = [
        threading.Thread(target=lambda: staged.append(stage(source, tmp_path / "cache"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({s.path for s in staged}) == 1
    assert len(staged) == 4
    for s in staged:
        check(s, source)
    assert left_overs(tmp_path / "cache") == []


def test_a_failed_stage_leaves_no_folder(tmp_path: Path) -> None:
    arrays = cf()
    arrays["precipitation"].values[5, LAND] = np.nan
    source = open_cf(Place(str(tmp_path / "world"), StorageOptions()), arrays)
    with pytest.raises(DataError, match="precipitation is not finite"):
        stage(source, tmp_path / "cache")
    assert [n for n in os.listdir(tmp_path / "cache") if not n.endswith(".lock")] == []


def test_a_folder_that_cannot_be_written_is_named(source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="the store failed") as caught:
        stage(source, tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)


def test_opening_what_was_never_staged_or_by_another_version(source: Source, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nothing is stored there"):
        open_staged(tmp_path / "never")
    path = stage(source, tmp_path / "cache").path
    meta: dict[str, Any] = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, "format": 0}))
    with pytest.raises(StoreError, match=r"another version(.|\n)*delete this folder"):
        open_staged(path)


# -------------------- a limit


@pytest.fixture
def sources(source: Source) -> list[Source]:
    """Three that are staged in folders of about the same size."""
    url = source.arrays.forcing[0].url

    def one(month: int, day: int) -> Source:
        period = Period(date(2004, month, day), date(2004, month + 1, day))
        data = DataSettings(url=url, period=period)
        return open_source(data, forcing=FORCING, targets=TARGETS[1:], options=StorageOptions())

    return [one(1, 20), one(2, 1), one(2, 20)]


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def opened_before(path: Path, seconds: float) -> None:
    os.utime(path / "meta.json", (time.time() - seconds,) * 2)


def test_the_folder_opened_longest_ago_makes_room(sources: list[Source], tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    first, second = (stage(s, directory).path for s in sources[:2])
    limit = size(first) + size(second) + 4096
    opened_before(first, 10)
    opened_before(second, 20)
    open_staged(second)  # it is the newer one now, and nobody keeps it open
    (directory / "notes").mkdir()
    (directory / "notes" / "precious.txt").write_text("not ours")
    third = stage(sources[2], directory, limit).path
    assert (first.exists(), second.exists(), third.exists()) == (False, True, True)
    assert size(second) + size(third) <= limit
    assert (directory / "notes" / "precious.txt").exists()
    assert left_overs(directory) == []
    check(open_staged(third), sources[2])


def test_a_folder_that_is_open_is_never_deleted(sources: list[Source], tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    first = stage(sources[0], directory)
    limit = size(first.path) + 1000
    with pytest.raises(
        StoreError, match=r"in use; nothing was deleted(.|\n)*raise training.cache_limit"
    ) as e:
        stage(sources[1], directory, limit)
    enough = re.search(r"\((\d+) bytes\)", str(e.value))
    assert enough is not None
    assert left_overs(directory) == []
    stage(sources[1], directory, int(enough[1]))
    check(first, sources[0])


def test_a_folder_that_another_process_has_open_is_never_deleted(
    sources: list[Source], tmp_path: Path
) -> None:
    directory = tmp_path / "cache"
    first = stage(sources[0], directory).path
    program = (
        "import sys; from pathlib import Path; from h2mv_dist.io.cache import open_staged\n"
        "staged = open_staged(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(first)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(StoreError, match="in use"):
            stage(sources[1], directory, size(first))
        assert is_staged(directory, first.name)
        holder.communicate()
    second = stage(sources[1], directory, size(first) + 1000).path
    assert (first.exists(), second.exists()) == (False, True)


def test_what_is_larger_than_the_limit_deletes_nothing(sources: list[Source], tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    first = stage(sources[0], directory).path
    with pytest.raises(StoreError, match=r"raise training.cache_limit"):
        stage(sources[2], directory, 1000)
    assert first.exists()


def test_what_a_killed_process_left_makes_room(sources: list[Source], tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    key = sources[2].cache_key
    elsewhere, here = (directory / f".{key}.{node}.0" for node in ("elsewhere", platform.node()))
    for folder in (elsewhere, here):
        folder.mkdir(parents=True)
        (folder / "forcing.npy").write_bytes(bytes(50_000))
    staged = stage(sources[0], directory, 80_000)
    assert (elsewhere.exists(), here.exists()) == (True, False)
    check(staged, sources[0])


def test_without_locks_nothing_makes_room(
    sources: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can tell then what is in use."""

    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    first = stage(sources[0], tmp_path / "cache").path
    with pytest.raises(StoreError, match="in use"):
        stage(sources[1], tmp_path / "cache", size(first))
    assert first.exists()


def test_cell_numbers_are_row_major_over_land(tmp_path: Path) -> None:
    arrays = cf()
    extra = Stored(arrays["precipitation"].values + 1, ("time", "lat", "lon"), {"units": "mm d-1"})
    source = open_cf(
        Place(str(tmp_path / "w"), StorageOptions()), {**arrays, "runoff": extra}, targets=("runoff",)
    )
    staged = stage(source, tmp_path / "cache")
    rain = staged.forcing[..., 1]
    np.testing.assert_array_equal(staged.targets["runoff"].values, rain + 1)
    for cell, (row, column) in enumerate(np.argwhere(LAND)):
        one = source.read_forcing(Tile((row, column), (row + 1, column + 1)), source.period)
        np.testing.assert_array_equal(rain[cell], one[:, 0, 0, 1])


def test_the_default_cache_is_the_users() -> None:
    assert default_cache().is_absolute()
    assert default_cache().name == "h2mv-dist"
