"""Jobs as HTML, for notebooks and for a page of the scheduler's dashboard."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Final

import jinja2

from h2mv_dist.jobs.messages import kind_of
from h2mv_dist.jobs.progress import (
    FOLD_COLUMNS,
    PART_COLUMNS,
    duration,
    fold_cells,
    part_cells,
    parts_under_way,
    progress_of,
    speed,
    summary_of,
)

_TITLE: Final = {
    "train": "Training",
    "infer": "Global inference",
    "prepare": "Prepared forcing",
    "compact": "Copy with longer shards",
}
_COLOURS: Final = {
    "running": "#009E73",
    "done": "#0072B2",
    "failed": "#D55E00",
    "cancelled": "#9D9D9D",
    "unfinished": "#E69F00",
}
_PALE: Final = {
    "running": "#CCECE3",
    "done": "#CCE3F0",
    "failed": "#F7DFCC",
    "cancelled": "#E1E1E1",
    "unfinished": "#FAECCC",
}


def jobs_html(statuses: Iterable[Mapping[str, Any]], link: str | None = None) -> str:
    """Jobs by their status (see ``Job.status``), one below the other, with a link to where there is more."""
    return _template().render(statuses=list(statuses), link=link)


@cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("h2mv_dist.jobs", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals |= {
        "colours": _COLOURS,
        "pale": _PALE,
        "title": _TITLE,
        "columns": FOLD_COLUMNS,
        "part_columns": PART_COLUMNS,
        "part_cells": part_cells,
        "parts_under_way": parts_under_way,
        "fold_cells": fold_cells,
        "progress_of": progress_of,
        "kind_of": kind_of,
        "speed": speed,
        "duration": duration,
        "summary_of": summary_of,
    }
    return environment.get_template("job.html.j2")
