"""How the coordinator gets onto a scheduler: sent by a client, or loaded by the scheduler itself.

``dask scheduler --preload h2mv_dist.jobs.preload`` suits schedulers that take no plugins from clients
(``distributed.scheduler.blocked-handlers``), and those whose operators want to know what runs on them.
"""

import asyncio
from typing import Final

from distributed import Scheduler, Security

from h2mv_dist.jobs.gang import Coordinator

READY_HANDLER: Final = "h2mv_ready"


class InstalledCoordinator(Coordinator):
    """The coordinator, started beside its scheduler.

    A scheduler that is still starting answers nobody, the coordinator's own client included: waiting for
    it there would never end.
    """

    async def start(self, scheduler: Scheduler) -> None:
        """Called once, on the scheduler; ``h2mv_ready`` tells when the coordinator takes jobs."""
        lend_certificate(scheduler.security)
        self.started = asyncio.ensure_future(super().start(scheduler))
        scheduler.handlers[READY_HANDLER] = self.ready

    async def ready(self) -> bool:
        """True once jobs can be submitted; raises what kept the coordinator from starting."""
        await asyncio.shield(self.started)
        return True

    async def close(self) -> None:
        """Called when the scheduler stops."""
        if self.started.done():
            await super().close()
        self.started.cancel()


def dask_setup(scheduler: Scheduler) -> None:
    """Install the coordinator on a scheduler that is about to start (Dask's hook for ``--preload``)."""
    scheduler.add_plugin(InstalledCoordinator(), idempotent=True)


def lend_certificate(security: Security) -> None:
    """Let a scheduler talk to itself: ``dask scheduler --tls-cert`` leaves the client's certificate out."""
    own = security.get_tls_config_for_role("scheduler")
    if security.get_tls_config_for_role("client")["cert"] is None:
        for part in ("cert", "key"):
            setattr(security, f"tls_client_{part}", own[part])
