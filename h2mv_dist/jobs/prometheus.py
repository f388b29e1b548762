"""Metrics of the coordinator's jobs, beside Dask's own at the dashboard's ``/metrics``."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from h2mv_dist.jobs.lease import Health
from h2mv_dist.jobs.messages import Job

if TYPE_CHECKING:
    from prometheus_client import Metric

_REPORTED = {"epoch": "last epoch", "valid_loss": "validation loss of it", "seconds": "its duration, seconds"}


def register(jobs: Mapping[str, Job], health: Health) -> Callable[[], None]:
    """Expose jobs, if prometheus_client is installed (Dask then serves it); returns what takes that back."""
    try:
        from prometheus_client import REGISTRY
    except ImportError:
        return lambda: None
    collector = _Collector(jobs, health)
    REGISTRY.register(collector)
    return lambda: REGISTRY.unregister(collector)


class _Collector:
    """Reads the coordinator's state whenever Prometheus asks."""

    def __init__(self, jobs: Mapping[str, Job], health: Health) -> None:
        self.jobs, self.health = jobs, health

    def describe(self) -> "Iterable[Metric]":
        """Nothing ahead of time: names do not depend on the state, but labels do."""
        return ()

    def collect(self) -> "Iterator[Metric]":
        """All metrics, as they are now."""
        from prometheus_client.core import GaugeMetricFamily

        units = GaugeMetricFamily("h2mv_units", "units of a job by state", labels=["job", "state"])
        attempts = GaugeMetricFamily("h2mv_attempts", "attempts a unit took so far", labels=["job", "unit"])
        reported = {
            key: GaugeMetricFamily(f"h2mv_{key}", text, labels=["job", "unit"])
            for key, text in _REPORTED.items()
        }
        for job in self.jobs.values():
            for state, count in Counter(unit.state for unit in job.all_units()).items():
                units.add_metric([job.id, state], count)
            for unit in job.all_units():
                if unit.task != "fold":
                    continue
                attempts.add_metric([job.id, unit.name], unit.attempt)
                for key, family in reported.items():
                    if isinstance(value := unit.latest.get(key), int | float):
                        family.add_metric([job.id, unit.name], value)
        quarantined = GaugeMetricFamily("h2mv_quarantined_slots", "workers not used any more")
        quarantined.add_metric([], len(self.health.quarantined))
        yield from (units, attempts, *reported.values(), quarantined)
