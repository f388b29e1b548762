"""Every example notebook runs from its first cell to its last, on workers of its own."""

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.distribution.declared import declared

EXAMPLES = Path(__file__).parents[2] / "examples"
SHOWN = {
    "1_first_run.ipynb": ("Training", "Global inference", "image/png", "&lt;xarray.Dataset&gt;"),
    "2_leave_and_come_back.ipynb": (
        "Training",
        "'cancelled'",
        "done: 12 of 12 epochs",
        "cancelled: ",
        "rank 0 on",
    ),
    "3_global_inference_on_s3.ipynb": ("Global inference", "image/png", "&lt;xarray.Dataset&gt;", "residual"),
    "4_a_new_process_law.ipynb": ("mm more", "'rain-on-snow': ", "image/png"),
}
"""Notebook -> what a reader must find among its outputs."""


def imported(name: str) -> set[str]:
    """The packages that a notebook's cells import."""
    book: Any = nbformat.read(EXAMPLES / name, as_version=4)
    code = "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
    return set(re.findall(r"^\s*(?:from|import) (\w+)", code, re.MULTILINE))


@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_needs_no_more_than_its_readers_are_told_to_install(name: str) -> None:
    own = {"h2mv_dist", "rain_on_snow", *(["tests"] if name.startswith("3") else [])}
    others = imported(name) - own - set(sys.stdlib_module_names)
    assert others <= declared("notebook").keys()
    assert {"ipykernel"} <= declared("notebook").keys()


def test_all_notebooks_are_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.ipynb")} == set(SHOWN)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_runs(name: str) -> None:
    book: Any = nbformat.read(EXAMPLES / name, as_version=4)
    NotebookClient(book, timeout=280, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    shown = "\n".join(_texts(book))
    for part in SHOWN[name]:
        assert part in shown


def test_the_notebooks_are_kept_with_their_outputs() -> None:
    for name, parts in SHOWN.items():
        book: Any = nbformat.read(EXAMPLES / name, as_version=4)
        shown = "\n".join(_texts(book))
        assert all(part in shown for part in parts), f"{name}: make notebooks"


def _texts(book: Any) -> list[str]:
    """Everything that cells show: types of what they display, and texts."""
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    streams = [output.text for output in outputs if output.output_type == "stream"]
    data = [output.data for output in outputs if "data" in output]
    texts = [text for each in data for kind, text in each.items() if kind.startswith("text/")]
    return [*streams, *texts, *(kind for each in data for kind in each)]
