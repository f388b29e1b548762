"""Cubes that live long: damage, edits, other releases, and the commands of a timer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import zarr
from distributed import Client

from h2mv_dist import cli
from h2mv_dist.errors import StoreError
from h2mv_dist.io.cube_check import verify_cube
from h2mv_dist.io.cube_store import publish, read_cube
from h2mv_dist.io.ledger import Ledger, ledger_url
from h2mv_dist.io.sink import Sink, StoredValues
from h2mv_dist.io.snapshots import snapshots_url
from h2mv_dist.jobs import cube_plan
from h2mv_dist.jobs.cube_plan import plan_inference
from h2mv_dist.jobs.handle import submit
from h2mv_dist.jobs.inference import forget_damage, recorded_job
from h2mv_dist.jobs.messages import Job, Unit, job_id
from h2mv_dist.jobs.tiles import open_context
from tests.jobs.conftest import NO_OPTIONS
from tests.jobs.growth.conftest import DAILY, FIRST, infer, objects, until


def test_damage_is_found_and_repaired(
    client: Client, world_url: str, cache: Path, job: str, cube: Path
) -> None:
    infer(client, until(13, world_url, cache), job, cube, append=True)
    before = objects(cube)
    damaged = next(p for p in (cube / "runoff" / "c" / "3").rglob("*") if p.is_file())
    damaged.write_bytes(damaged.read_bytes()[:-3])
    next(p for p in (cube / "runoff" / "c" / "10").rglob("*") if p.is_file()).unlink()
    values = zarr.open_array(str(cube), path="baseflow_recession", mode="r+")
    values[...] = 0.5
    found = verify_cube(str(cube), NO_OPTIONS)
    assert len(found.damaged) == 2
    assert found.constants
    forget_damage(str(cube), found, NO_OPTIONS)
    infer(client, until(13, world_url, cache), job, cube)
    assert verify_cube(str(cube), NO_OPTIONS).complete
    assert objects(cube) == before


def test_an_edited_cube_is_refused(world_url: str, cache: Path, job: str, cube: Path) -> None:
    layout, progress = read_cube(str(cube), NO_OPTIONS)
    edited = replace(layout, attributes={**layout.attributes, "checkpoints": '{"0":"other"}'})
    publish(str(cube), edited, progress, NO_OPTIONS)
    planned = plan_inference(until(12, world_url, cache), job, NO_OPTIONS, cube=str(cube), append=True)
    with pytest.raises(StoreError, match="checkpoints"):
        open_context(planned, str(cube), NO_OPTIONS)


def test_another_release_goes_on_with_a_cube_unless_its_numbers_are_others(
    world_url: str, cache: Path, job: str, cube: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wordings and versions are another release's; the numbers, once we say so."""
    root = zarr.open_group(cube, use_consolidated=False)
    root.attrs.update({"title": "worded otherwise", "Conventions": "CF-1.12", "versions": '{"torch":"3.0"}'})
    longer = until(12, world_url, cache)
    planned = plan_inference(longer, job, NO_OPTIONS, cube=str(cube), append=True)
    open_context(planned, str(cube), NO_OPTIONS)
    monkeypatch.setattr(cube_plan, "NUMBERS", cube_plan.NUMBERS + 1)
    others = plan_inference(longer, job, NO_OPTIONS, cube=str(cube), append=True)
    with pytest.raises(StoreError, match="numbers"):
        open_context(others, str(cube), NO_OPTIONS)


def test_a_budget_that_does_not_close_fails(
    client: Client, cube: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred mm of runoff that nobody computed, with a receipt that says they were."""
    layout, _ = read_cube(str(cube), NO_OPTIONS)
    (tile, *_), (day, *_) = layout.tiles, list(layout.period.blocks(1))[3:]
    boxes = list(StoredValues.open(str(cube), layout, NO_OPTIONS).read(tile=tile, period=day))
    boxes[layout.daily.index("runoff")] += 100
    written = Sink.open(str(cube), layout, NO_OPTIONS).write_stored(boxes, tile=tile, period=day)
    ledger = Ledger(str(cube), NO_OPTIONS)
    (one,) = ledger.covered()[tile.name]
    (receipt,) = ledger.receipts([one])
    blocks = (*receipt.blocks[:3], written, *receipt.blocks[4:])
    ledger.record(tile.name, one.period, replace(receipt, blocks=blocks))
    address = client.scheduler_info()["address"]
    monkeypatch.setattr("sys.argv", ["h2mv-dist", "verify-cube", str(cube), "--address", address])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "2 receipts agree" in said
    assert f"{tile.name} {one.period}: the water budget does not close" in said


def test_the_command_line_for_a_timer(
    client: Client,
    world_url: str,
    cache: Path,
    job: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Plan, make, append, check, break and repair a cube, each by its command and exit code."""
    file, cube = tmp_path / "settings.toml", tmp_path / "cube.zarr"
    model = "hidden = 8\nencoder = 12\ncondensed = 4\n"
    lists = "".join(f"{name} = {DAILY[name]}\n" for name in ("tile", "shard", "chunk"))
    file.write_text(
        f'[data]\nurl = "{world_url}"\n[model]\n{model}[inference]\n{lists}shard_days = 1\nchunk_days = 1\n'
        'spinup_days = 2\noutputs = ["runoff", "baseflow_recession"]\nkeep_states = 60\n'
    )
    address = client.scheduler_info()["address"]

    def run(*words: str, days: int = 3) -> tuple[int, str]:
        ends = f"data.period={FIRST}..{FIRST.replace(day=days + 1)}"
        command = [*words, "--set", ends, "--address", address]
        monkeypatch.setattr("sys.argv", ["h2mv-dist", *command])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        code = ended.value.code
        return int(code or 0), said.out + said.err

    infer = ("infer", str(file), "--job", job, "--cube", str(cube))
    code, said = run(*infer, "--plan")
    assert (code, cube.exists()) == (0, False)
    # a chunk holds 365 days, of which three are read, and some sea
    for part in ("tiles: 2 of 2", "each byte 162.22 times", "in 12 objects", "memory:", "cell-days"):
        assert part in said
    assert run(*infer)[0] == 0
    code, said = run(*infer)
    assert code == 0
    assert "nothing to do" in said
    code, said = run(*infer, "--append")
    assert code == 75
    assert "complete until 2001-01-04" in said
    code, said = run(*infer, "--append", days=4)
    assert code == 0, said
    code, said = run(*infer, "--from", "2001-01-04", days=5)
    assert code == 0
    assert "computing anew from 2001-01-04" in said
    assert run(*infer, "--from", "2001-01-05", "--plan", days=5)[0] == 0
    code, said = run("verify-cube", str(cube))
    assert code == 0
    assert "4 receipts agree" in said
    next(p for p in (cube / "runoff" / "c" / "4").rglob("*") if p.is_file()).unlink()
    code, said = run("verify-cube", str(cube))
    assert code == 1
    assert "are not those that were written" in said
    receipts, states = objects(Path(ledger_url(str(cube)))), objects(Path(snapshots_url(str(cube))))
    busy = submit(client, Job(job_id("infer", str(cube)), "", {}, (Unit("waits", "tile", {}, ranks=99),)))
    code, said = run("verify-cube", str(cube), "--repair", days=5)
    assert code == 2
    assert "is already running on this scheduler" in said
    assert objects(Path(ledger_url(str(cube)))) == receipts
    busy.cancel()
    code, said = run("verify-cube", str(cube), "--repair", "--json", days=5)
    assert code == 0, said
    assert json.loads(said[said.index("{") : said.rindex("}") + 1])["sound"] == 4
    assert objects(Path(snapshots_url(str(cube)))) == states
    assert recorded_job(str(cube), NO_OPTIONS)[0]["inference"]["keep_states"] == 60, "a repair drops no more"
