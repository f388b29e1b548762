"""What pages of the documentation take from the code is there, whole."""

import importlib.util
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, Final

import pytest

from h2mv_dist.config import validate
from h2mv_dist.errors import H2mvError
from h2mv_dist.grid import Period
from h2mv_dist.model.registry import model_kind
from h2mv_dist.variables import variable

DOCS: Final = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def errors() -> str:
    """The page of errors, as mkdocs gets it."""
    found = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert found is not None
    assert found.loader is not None
    hooks: Any = importlib.util.module_from_spec(found)
    found.loader.exec_module(hooks)
    page: str = hooks.on_page_markdown((DOCS / "reference" / "errors.md").read_text())
    return page.replace("&lt;", "<")


def says(page: str, message: str) -> bool:
    """Is it a line of the list, with anything where that has angle brackets?"""
    lines = re.findall(r"^- (.*)$", page, re.MULTILINE)
    holes = (re.sub(r"<[^>]*>", ".+", re.escape(line)) for line in lines)
    return any(re.fullmatch(hole, message) for hole in holes)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: model_kind("h2mw"),
        lambda: variable("runof"),
        lambda: Period(date(2001, 1, 1), date(2001, 1, 1)),
    ],
)
def test_the_page_of_errors_has_messages_of_one_line(errors: str, wrong: Callable[[], object]) -> None:
    with pytest.raises(H2mvError) as raised:
        wrong()
    assert says(errors, str(raised.value))
    assert not says(errors, "no such message")


@pytest.mark.parametrize(
    "text",
    [
        "- the cube is not finished yet; run h2mv-dist infer without --append or --from first",
        "- nothing to append: the cube is complete until <end> (that day excluded), the forcing ends <stop>",
        "- job <id> was cancelled",
        "job <id> is already running on this scheduler; wait for it, or cancel it first",
        "| days cannot be compiled | a C++ compiler, Python's headers, and a folder for code |",
        "| days cannot be compiled | a C++ compiler, and a folder for code, on every host that computes |",
        "| a day is missing / a day is there twice / days are out of order |",
        "| two ranks share a device |",
        "| an installed model cannot be used | a ModelKind whose spec is called <name> |",
    ],
)
def test_the_page_of_errors_has_them_all(errors: str, text: str) -> None:
    assert text in errors


def test_the_page_of_errors_shows_how_wrong_settings_are_named(errors: str) -> None:
    wrong = {"data": {"url": "x"}, "training": {"epoch": 3, "ranks": 0}}
    with pytest.raises(H2mvError) as raised:
        validate(wrong, where="settings.toml")
    assert f"```text\n{raised.value}\n```" in errors
