"""The job tests' world, cache and worker processes."""

from tests.jobs.conftest import cache, client, one_thread, world_url

__all__ = ["cache", "client", "one_thread", "world_url"]
