"""What others wrote is data: no object is unpickled, no name leaves its folder, no size is believed."""

import json
import os
import pickle
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h2mv_dist.cli import extract
from h2mv_dist.config import DataSettings, StorageOptions, load, place, validate
from h2mv_dist.errors import H2mvError
from h2mv_dist.io.cube_store import create_cube, read_cube
from h2mv_dist.io.ledger import Ledger, ledger_url
from h2mv_dist.io.snapshots import Snapshots, snapshots_url
from h2mv_dist.io.source import open_source
from h2mv_dist.jobs.records import FoldState, JobFolder
from h2mv_dist.jobs.sweep import variants
from h2mv_dist.model.checkpoint import Checkpoint
from h2mv_dist.model.verify import verify
from tests.io.cubes import map_layout, receipt

NO_OPTIONS = StorageOptions()
FINGERPRINT = "abc"
TILE = "0-2_0-3"
DAY = date(2001, 1, 1)


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(path)))
    assert path.exists(), "the canary does not sing"
    path.rmdir()
    return path


def state_of(folder: Path) -> object:
    return JobFolder(str(folder), NO_OPTIONS).fold(0).state()


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "job": ("job.json", lambda at: JobFolder(str(at), NO_OPTIONS).settings()),
    "token": ("token.json", lambda at: JobFolder(str(at), NO_OPTIONS).token()),
    "state": ("folds/00/state.json", state_of),
    "done": ("folds/00/done.json", lambda at: JobFolder(str(at), NO_OPTIONS).fold(0).done()),
    "decisions": ("folds/00/decisions.json", lambda at: JobFolder(str(at), NO_OPTIONS).fold(0).decisions()),
    "attempt": (
        "folds/00/attempts/001/rank-0.json",
        lambda at: JobFolder(str(at), NO_OPTIONS).fold(0).attempts(),
    ),
    "cube": ("zarr.json", lambda at: read_cube(str(at), NO_OPTIONS)),
    "golden": ("golden.npz", lambda at: verify(at / "golden.npz")),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_pickle_in_place_of_a_record_is_refused(kind: str, canary: Path, tmp_path: Path) -> None:
    name, read = READERS[kind]
    at = tmp_path / "place"
    (at / name).parent.mkdir(parents=True)
    (at / name).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(H2mvError):
        read(at)
    assert not canary.exists()


@pytest.mark.parametrize("kind", [k for k in READERS if k != "golden"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"5", b"[]", b"\xff", b'{"a": ' * 50_000, b""])
def test_json_of_another_shape_is_refused(kind: str, content: bytes, tmp_path: Path) -> None:
    test_name, read = READERS[kind]
    (tmp_path / test_name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / test_name).write_bytes(content)
    with pytest.raises(H2mvError):
        read(tmp_path)


def test_a_pickle_in_place_of_a_checkpoint_is_refused(canary: Path) -> None:
    data = pickle.dumps(Canary(canary))
    for content in (data, len(data).to_bytes(8, "little") + data):
        with pytest.raises(H2mvError, match="not a checkpoint of this package"):
            Checkpoint.from_bytes(content, "here")
    assert not canary.exists()


def test_an_object_array_in_a_golden_file_is_refused(canary: Path, tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    np.savez(path, forcing=np.array([Canary(canary)], object))
    with pytest.raises(H2mvError, match="not a golden file"):
        verify(path)
    assert not canary.exists()


def test_a_pickle_in_place_of_a_receipt_or_snapshot_is_refused(canary: Path, tmp_path: Path) -> None:
    cube, period = str(tmp_path / "c.zarr"), "2001-01-01..2001-02-01"
    data = pickle.dumps(Canary(canary))
    for folder, name in (
        (ledger_url(cube), f"{period}.v0.json"),
        (snapshots_url(cube), f"{DAY}.v0.safetensors"),
    ):
        (Path(folder) / TILE).mkdir(parents=True)
        (Path(folder) / TILE / name).write_bytes(data)
    ledger = Ledger(cube, NO_OPTIONS)
    with pytest.raises(H2mvError, match="a receipt cannot be used"):
        list(ledger.receipts(ledger.covered()[TILE]))
    with pytest.raises(H2mvError, match="a snapshot of states is damaged"):
        Snapshots(cube, NO_OPTIONS, FINGERPRINT).load(TILE, DAY)
    assert not canary.exists()


# -------------------- Zarr arrays of others

PICKLED = [
    {"dtype": "|O", "filters": [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}], "compressor": None},
    {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 5}], "compressor": None},
    {"dtype": "|O", "filters": [{"id": "vlen-utf8"}], "compressor": {"id": "pickle", "protocol": 5}},
    {"dtype": "<f4", "filters": [{"id": "pickle", "protocol": 5}], "compressor": None},
    {"dtype": "<f4", "filters": None, "compressor": {"id": "pickle", "protocol": 5}},
]


def zarr2(folder: Path, name: str, content: bytes = b"", **metadata: Any) -> None:
    """An array of format 2 of which only what matters is true, with one chunk."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / ".zgroup").write_text('{"zarr_format": 2}')
    plain = {"zarr_format": 2, "shape": [2], "chunks": [2], "dtype": "<f4", "fill_value": None, "order": "C"}
    record = {**plain, "filters": None, "compressor": None, **metadata}
    (folder / name / ".zarray").write_text(json.dumps(record))
    dims = [name, "b", "c"][: len(record["shape"])]
    (folder / name / ".zattrs").write_text(json.dumps({"_ARRAY_DIMENSIONS": dims, "units": "K"}))
    if content:
        (folder / name / "0").write_bytes(content)


def opened(url: Path) -> object:
    data = DataSettings(url=str(url), layout="cf", static=("clay",))
    return open_source(data, forcing=("air_temperature",), targets=(), options=NO_OPTIONS)


def extracted(url: Path) -> None:
    extract(str(url), url.parent / "part.nc", variable=None, period=None, box=None)


@pytest.mark.filterwarnings("ignore:Failed to open Zarr store with consolidated metadata")
@pytest.mark.parametrize("metadata", PICKLED)
@pytest.mark.parametrize("read", [opened, extracted])
def test_an_array_of_pickles_is_refused(
    metadata: dict[str, Any], read: Callable[[Path], object], canary: Path, tmp_path: Path
) -> None:
    zarr2(tmp_path / "z", "time", pickle.dumps(Canary(canary)), **metadata)
    with pytest.raises(H2mvError):
        read(tmp_path / "z")
    assert not canary.exists()


@pytest.mark.parametrize(
    "metadata",
    [
        {"shape": [10**12], "chunks": [1000]},
        {"shape": [2], "chunks": [10**12]},
        {"shape": [10**5] * 3, "chunks": [10**4] * 3},
    ],
)
def test_sizes_beyond_all_measure_are_refused(metadata: dict[str, Any], tmp_path: Path) -> None:
    zarr2(tmp_path / "z", "air_temperature", **metadata)
    with pytest.raises(H2mvError, match="beyond all measure"):
        opened(tmp_path / "z")


def test_a_cube_that_claims_a_trillion_cells_is_refused(tmp_path: Path) -> None:
    url = tmp_path / "c.zarr"
    create_cube(str(url), map_layout(), NO_OPTIONS, overwrite=False)
    metadata = json.loads((url / "lat" / "zarr.json").read_text())
    (url / "lat" / "zarr.json").write_text(json.dumps({**metadata, "shape": [10**15]}))
    with pytest.raises(H2mvError, match="does not fit into memory"):
        read_cube(str(url), NO_OPTIONS)


@pytest.mark.parametrize("value", ["{}", "5", '{"dims": 5}', "[" * 100_000, "NaN"])
@pytest.mark.parametrize("name", ["h2mv_dist_layout", "h2mv_dist_rollbacks", "h2mv_dist_period"])
def test_a_cube_with_damaged_attributes_is_refused(name: str, value: str, tmp_path: Path) -> None:
    url = tmp_path / "c.zarr"
    create_cube(str(url), map_layout(), NO_OPTIONS, overwrite=False)
    root = json.loads((url / "zarr.json").read_text())
    root["attributes"][name] = value
    (url / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(H2mvError):
        read_cube(str(url), NO_OPTIONS)


# -------------------- records of wrong types, and names that point elsewhere

ELSEWHERE = ["../../x", "/etc/x", "..", "%2e%2e/x", "a\0b", "..\\x", "a/../../x"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_pointer_names_checkpoints_and_nothing_else(name: str, tmp_path: Path) -> None:
    """What a pointer names is read, and deleted when it is not needed any more."""
    for part in ({"best": name}, {"last": name}, {"kept": [name]}):
        with pytest.raises(H2mvError, match="a record is damaged"):
            FoldState.from_bytes(json.dumps(part).encode(), str(tmp_path))


@pytest.mark.parametrize(
    "wrong",
    [{"attempt": "1"}, {"attempt": -1}, {"epoch": 1e400}, {"epoch": None}, {"kept": "abc"}, {"more": 1}],
)
def test_a_pointer_of_other_types_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(H2mvError, match="a record is damaged"):
        FoldState.from_bytes(json.dumps(wrong).encode(), "here")


@pytest.mark.parametrize(
    "wrong",
    [
        {"blocks": "abc"},
        {"missing": "many"},
        {"residual": [1]},
        {"seconds": None},
        {"more": 1},
        {"static": 5},
    ],
)
def test_a_receipt_of_other_types_is_refused(wrong: dict[str, Any]) -> None:
    record = {**json.loads(receipt().to_json()), **wrong}
    with pytest.raises(H2mvError, match="not a complete receipt"):
        type(receipt()).from_json(json.dumps(record).encode())


@pytest.mark.parametrize("name", ["%2e%2e", "a", "0-2_0-3 ", "0-2_0-3\\..", "٣-٤"])
def test_a_tile_is_named_by_numbers(name: str, tmp_path: Path) -> None:
    cube = str(tmp_path / "c.zarr")
    folder = Path(ledger_url(cube)) / name
    folder.mkdir(parents=True)
    (folder / "2001-01-01..2001-02-01.v0.json").write_bytes(receipt().to_json())
    with pytest.raises(H2mvError, match="a receipt cannot be used"):
        Ledger(cube, NO_OPTIONS).covered()


@pytest.mark.parametrize("value", [*(f"0.1 # {name}" for name in ELSEWHERE), *ELSEWHERE, "0.1\n[x]"])
def test_a_run_of_a_sweep_stays_in_its_folder(value: str) -> None:
    tree = {"data": {"url": "/x"}, "sweep": {"values": {"lr": [value]}}}
    with pytest.raises(H2mvError, match="cannot be swept"):
        variants(validate(tree, where="test"))


def test_a_foreign_folder_is_no_fold(tmp_path: Path) -> None:
    for name in ("..x", "%2e%2e", "abc", "9" * 200):
        (tmp_path / "folds" / name).mkdir(parents=True)
        (tmp_path / "folds" / name / "state.json").write_bytes(FoldState().to_bytes())
    assert JobFolder(str(tmp_path), NO_OPTIONS).begun_folds() == ()


@pytest.mark.parametrize("name", ["../../etc", "/etc", "..", "a/../../b"])
def test_a_variable_is_sought_inside_its_store(name: str, tmp_path: Path) -> None:
    zarr2(tmp_path / "z", "air_temperature", np.ones(2, "<f4").tobytes())
    for source in ({"group": name}, {"name": name}):
        variables = {"air_temperature": source}
        data = DataSettings.model_validate(
            {"url": str(tmp_path / "z"), "layout": "cf", "variables": variables}
        )
        with pytest.raises(H2mvError):
            open_source(data, forcing=("air_temperature",), targets=(), options=NO_OPTIONS)


@pytest.mark.parametrize("url", ["/a\0b", "s3://b/a\nb", "file:///a\x1b[31m"])
def test_control_characters_are_no_part_of_a_place(url: str) -> None:
    with pytest.raises(H2mvError, match="printable"):
        place(url)


# -------------------- settings files


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        "a = " + "9" * 5000,
        f'[data]\nurl = "x"\n[training]\nepochs = "{"x" * 10**6}"',
        '[data]\nurl = "x"\n[training]\nlearning_rate = nan',
        '[data]\nurl = "x"\n[training]\nlearning_rate = inf',
        '[data]\nurl = "x"\n[training]\nbatch_size = -1',
        '[data]\nurl = "x"\n[folds]\nn_folds = 1000000000000',
        '[data]\nurl = "x"\n[sweep]\nseeds = 1000000000000',
        '[data]\nurl = "x"\n[cluster]\nworkers = 1000000000000',
        "[" + ".".join("a" * 5000) + "]",
        "\0",
    ],
)
def test_a_hostile_settings_file_is_an_error_of_few_words(text: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(H2mvError) as refused:
        load(file)
    assert len(str(refused.value)) < 5000


def test_an_endless_settings_file_is_not_read_to_its_end() -> None:
    with pytest.raises(H2mvError, match="more than"):
        load("/dev/zero")


def test_a_sweep_of_too_many_runs_is_refused() -> None:
    values = {name: list(range(1, 101)) for name in ("hidden", "encoder", "condensed")}
    with pytest.raises(H2mvError, match="at most 10000 runs"):
        variants(validate({"data": {"url": "/x"}, "sweep": {"values": values}}, where="test"))
