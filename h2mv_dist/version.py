"""The version of this package: that of the git tag it was built from, as its installation recorded it."""

from importlib.metadata import PackageNotFoundError, version
from typing import Final


def _installed() -> str:
    try:
        return version("h2mv-dist")
    except PackageNotFoundError:
        return "0+unknown"  # a source tree on the path, never installed


__version__: Final = _installed()
