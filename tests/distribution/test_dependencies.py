"""What the source imports is declared: an environment of the declared distributions alone has all of it."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Final

import pytest
from packaging.utils import canonicalize_name

from tests.distribution.declared import PYPROJECT, declared, link

SOURCE: Final = PYPROJECT.parent / "h2mv_dist"
OPTIONAL: Final = {
    "dask_cuda": "cuda",
    "pynvml": "cuda",
    "IPython": "notebook",
    "dask_jobqueue": "slurm",
    "prometheus_client": "monitor",
}
"""What is imported only where it is needed -> the extra that brings it."""
_IMPORT_ALL: Final = """
import importlib, pkgutil, sys
sys.path[:0] = sys.argv[1:]
import h2mv_dist
for module in pkgutil.walk_packages(h2mv_dist.__path__, "h2mv_dist."):
    importlib.import_module(module.name)
    print(module.name)
"""


@pytest.fixture(scope="module")
def owners() -> Mapping[str, set[str]]:
    """The distributions that bring a package."""
    return {name: set(map(canonicalize_name, brought)) for name, brought in packages_distributions().items()}


def imported() -> dict[str, set[str]]:
    """The packages that our modules import, at their top or within a function -> by which modules."""
    found: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for name in _names(node):
                found.setdefault(name.partition(".")[0], set()).add(path.name)
    return {name: who for name, who in found.items() if name not in (*sys.stdlib_module_names, "h2mv_dist")}


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.module is not None, "no relative imports"
        yield node.module


def test_every_import_is_of_a_declared_distribution(owners: Mapping[str, set[str]]) -> None:
    own = declared().keys()
    for name, who in imported().items():
        if name not in OPTIONAL:
            assert owners[name] & own, f"{name}, imported by {who}, comes with no declared dependency"


def test_extras_bring_what_is_imported_only_where_it_is_needed(owners: Mapping[str, set[str]]) -> None:
    assert OPTIONAL.keys() <= imported().keys()
    for name in OPTIONAL.keys() & owners.keys():
        assert owners[name] & declared(OPTIONAL[name]).keys(), f"{name} does not come with its extra"
        assert not owners[name] & declared().keys(), f"{name} needs no extra"


def test_every_module_is_imported_with_the_declared_distributions_alone(tmp_path: Path) -> None:
    links = link(declared().values(), tmp_path / "packages")
    command = (sys.executable, "-I", "-S", "-c", _IMPORT_ALL, str(links), str(SOURCE.parent))
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == sum(1 for _ in SOURCE.rglob("*.py")) - 1


def test_who_computes_nothing_imports_no_torch() -> None:
    watching = ("cli_jobs", "notebook", "jobs.recorded")
    supervising = (
        "jobs.preload",
        "jobs.tasks",
        "jobs.supervisor",
        "jobs.summary",
        "jobs.prepare",
        "jobs.compact",
    )
    modules = ", ".join(f"h2mv_dist.{name}" for name in (*watching, *supervising))
    code = f"import sys, {modules}; print('xarray' in sys.modules, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split() == ["True", "False"]
