"""The distributions that ``pyproject.toml`` asks for, and theirs, out of those that are installed here."""

import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def declared(*extras: str) -> dict[str, Distribution]:
    """By name, what pip would install with the package and these extras of it."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    return _closure(map(Requirement, wanted))


def _closure(wanted: Iterable[Requirement]) -> dict[str, Distribution]:
    waiting, seen = list(wanted), set()
    found: dict[str, Distribution] = {}
    while waiting:
        asked = waiting.pop()
        name = canonicalize_name(asked.name)
        if (name, *asked.extras) in seen:
            continue
        seen.add((name, *asked.extras))
        found[name] = distribution(name)
        inner = map(Requirement, found[name].requires or ())
        waiting += (each for each in inner if _applies(each, asked.extras))
    return found


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Is it one of this Python, this platform, and of no extra or one of these?"""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def link(distributions: Iterable[Distribution], folder: Path) -> Path:
    """Fill a new folder with links to these distributions: an environment of nothing else, in no time."""
    folder.mkdir()
    for each in distributions:
        for entry in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            # packages that share a namespace share its folder
            if not (folder / entry).exists():
                (folder / entry).symlink_to(Path(str(each.locate_file(entry))))
    return folder
