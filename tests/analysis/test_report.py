import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from h2mv_dist.analysis.report import FoldFacts, fold_facts, write_report
from h2mv_dist.errors import DataError, StoreError
from tests.analysis.builders import Cube
from tests.analysis.test_figures import curve

HOSTILE = "<script>alert('x')</script>\" onload=\"y"
PLACES = {"Training job": "/scratch/a b/job", "Output cube": "s3://bucket/cube.zarr?x=1&y=2"}


@pytest.fixture
def map_cube(cubes: dict[str, Cube]) -> Cube:
    return cubes["map"]


class _Page(HTMLParser):
    """Text, tags and image sources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.words: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}
        self.sources += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page_of(path: Path, cube: Cube, title: str = "A report") -> _Page:
    written = write_report(
        path,
        title=title,
        curves=[curve(0), curve(1, floor=None)],
        cube=cube.opened,
        maps=("runoff", "soil_moisture_capacity"),
        places={**PLACES, HOSTILE: HOSTILE},
        facts={"Model": "H2MV", HOSTILE: HOSTILE},
    )
    assert written == path
    return _Page(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def page(cubes: dict[str, Cube], tmp_path_factory: pytest.TempPathFactory) -> _Page:
    return page_of(tmp_path_factory.mktemp("page") / "report.html", cubes["map"], title=HOSTILE)


class TestPage:
    def test_it_holds_every_place_and_fact(self, page: _Page) -> None:
        for text in (*PLACES, *PLACES.values(), "Model", "H2MV", HOSTILE, "h2mv <b>& more</b>", "f" * 64):
            assert text in page.words

    def test_hostile_text_stays_text(self, page: _Page) -> None:
        assert page.words.count(HOSTILE) == 2 + 4
        assert not {"script", "b", "link", "iframe"} & set(page.tags)
        assert "onload" not in page.names

    def test_it_needs_nothing_else(self, page: _Page) -> None:
        assert len(page.sources) == page.tags.count("img") == 4
        for source in page.sources:
            kind, data = source.split(",")
            assert kind == "data:image/png;base64"
            assert base64.b64decode(data).startswith(b"\x89PNG")
        assert not re.search(r"url\(|@import", page.text)

    def test_captions_say_what_is_shown(self, page: _Page) -> None:
        text = " ".join(page.words)
        assert "Total runoff, mean over 2001-01-01 to 2002-02-04, mean of all folds; land mean" in text

    def test_it_can_do_without_training_and_maps(self, map_cube: Cube, tmp_path: Path) -> None:
        opened = map_cube.opened[["soil_moisture_capacity", "cell_area", "land_mask"]]
        path = write_report(
            tmp_path / "r.html", title="t", curves=[], cube=opened, maps=(), places={}, facts={}
        )
        page = _Page(path.read_text("utf-8"))
        assert "img" not in page.tags
        assert "Loss by epoch" not in page.words

    def test_equal_content_gives_equal_bytes(self, map_cube: Cube, tmp_path: Path) -> None:
        first, again = (page_of(tmp_path / name, map_cube).text for name in ("a", "b"))
        assert first == again


class TestNumbers:
    def test_floor_and_ratio(self) -> None:
        assert fold_facts(curve(2)) == FoldFacts("2", "4", "3", "0.7500", "0.5000", "1.50")

    def test_what_is_not_known_is_said(self, page: _Page) -> None:
        assert fold_facts(curve(floor=None))[-2:] == ("not known", "not known")
        assert {"0.7500", "0.5000", "1.50", "not known"} <= set(page.words)


class TestFile:
    def test_an_old_page_is_replaced_and_nothing_else_left(self, map_cube: Cube, tmp_path: Path) -> None:
        path = tmp_path / "new" / "report.html"
        path.parent.mkdir()
        path.write_text("old")
        assert page_of(path, map_cube).text.startswith("<!doctype html>")
        assert list(path.parent.iterdir()) == [path]

    def test_an_error_leaves_the_old_page(self, map_cube: Cube, tmp_path: Path) -> None:
        path = tmp_path / "report.html"
        path.write_text("old")
        with pytest.raises(DataError, match="did you mean 'runoff'"):
            write_report(
                path,
                title="t",
                curves=[],
                cube=map_cube.opened,
                maps=("runof",),
                places={},
                facts={},
            )
        assert path.read_text() == "old"

    def test_a_place_that_cannot_be_written_is_named(self, map_cube: Cube, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match=r"cannot write the report(.|\n)*file/report\.html"):
            page_of(tmp_path / "file" / "report.html", map_cube)
