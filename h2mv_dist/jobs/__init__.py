"""Jobs on a Dask cluster: the only place that imports dask.

The package can also be called: ``h2mv_dist.jobs()`` lists jobs, see :func:`h2mv_dist.notebook.jobs`. Users
expect that name, and a function of this name would be hidden as soon as anything of the package is imported.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from h2mv_dist.notebook import Jobs


class _CallableModule(ModuleType):
    def __call__(self, folder: str | None = None, **options: Any) -> "Jobs":
        from h2mv_dist.notebook import jobs

        return jobs(folder, **options)


sys.modules[__name__].__class__ = _CallableModule
