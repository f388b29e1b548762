"""A page of the scheduler's dashboard, ``/h2mv``: all jobs with their folds and tiles, as in notebooks."""

from collections.abc import Mapping
from typing import Any, Final

from distributed import Scheduler
from tornado.web import Application, RequestHandler

from h2mv_dist.jobs.html import jobs_html
from h2mv_dist.jobs.messages import Job

PATH: Final = "/h2mv"
_PAGE: Final = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>h2mv_dist jobs</title><meta http-equiv="refresh" content="2"></head>
<body style="font-family: sans-serif; max-width: 60em; margin: 1em auto; position: relative;">{}</body>
</html>
"""


class _JobsPage(RequestHandler):
    def initialize(self, jobs: Mapping[str, Job]) -> None:
        self.jobs = jobs

    def get(self) -> None:
        newest_first = sorted(self.jobs.values(), key=lambda job: -job.submitted)
        self.write(_PAGE.format(jobs_html(job.status() for job in newest_first)))


def serve(scheduler: Scheduler, jobs: Mapping[str, Job]) -> None:
    """Add the page to a scheduler that has a dashboard."""
    application: Any = getattr(scheduler, "http_application", None)
    if application is not None:
        application.add_application(Application([(PATH, _JobsPage, {"jobs": jobs})]))


def page_of(dashboard: str) -> str:
    """The page's address.

    >>> page_of("http://127.0.0.1:8787/status")
    'http://127.0.0.1:8787/h2mv'
    """
    return dashboard.removesuffix("/status") + PATH
