"""What is built is what is installed: sdist, wheel, and an environment that is given nothing else.

The environment is made without network. It sees the declared dependencies, and no other distribution, of the
environment the tests run in, as links: torch alone would take minutes to copy.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Final

import pytest

from tests.distribution.declared import declared, link

pytestmark = pytest.mark.slow

REPOSITORY: Final = Path(__file__).parents[2]
DATA: Final = {"py.typed", "h2mv_dist.yaml", "io/world/mask.npz", "model/lstm.cpp", "analysis/report.html.j2"}


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """Its output; without what would let it find this source tree."""
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env={**plain, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def source_tree(target: Path) -> Path:
    """A copy of the files that git would see, without git."""
    listed = subprocess.run(
        ("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"),
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target / name)
    return target


def built(kind: str, tree: Path, target: Path) -> Path:
    """An sdist or wheel, as a build tool asks for it."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    target.mkdir(exist_ok=True)
    return target / run(sys.executable, "-W", "ignore", "-c", code, folder=tree).splitlines()[-1]


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
    run("git", *who, *arguments, folder=folder)


def version_of(tree: Path) -> str:
    return run(sys.executable, "-W", "ignore", "-m", "setuptools_scm", folder=tree).split()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist of a tagged repository, with nothing but the sdist at hand."""
    folder = tmp_path_factory.mktemp("build")
    tagged = folder / "tagged"
    shutil.copytree(tree, tagged)
    git(tagged, "init", "-q")
    git(tagged, "add", "-A")
    git(tagged, "commit", "-qm", "all")
    git(tagged, "tag", "v7.8.9")
    sdist = built("sdist", tagged, folder / "dist")
    assert sdist.name == "h2mv_dist-7.8.9.tar.gz"
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return built("wheel", folder / "unpacked" / "h2mv_dist-7.8.9", folder / "wheelhouse")


def test_the_version_is_known_wherever_the_source_comes_from(tree: Path, tmp_path: Path) -> None:
    assert version_of(tree) == "0.1.0.dev0"
    shutil.copytree(tree, tmp_path / "full")
    git(tmp_path / "full", "init", "-q")
    git(tmp_path / "full", "add", "-A")
    git(tmp_path / "full", "commit", "-qm", "all")
    assert re.match(r"0\.1\.0\.dev1\+g\w+$", version_of(tmp_path / "full"))
    git(tmp_path / "full", "tag", "v0.3.0")
    assert version_of(tmp_path / "full") == "0.3.0"
    git(tmp_path / "full", "commit", "-qm", "later", "--allow-empty")
    assert version_of(tmp_path / "full").startswith("0.3.1.dev1+g")
    shallow = (
        "clone",
        "-q",
        "--depth",
        "1",
        "--no-tags",
        f"file://{tmp_path}/full",
        str(tmp_path / "shallow"),
    )
    git(tmp_path, *shallow)
    assert re.match(r"0\.1\.0\.dev\d+\+g\w+$", version_of(tmp_path / "shallow"))


def test_a_source_tree_on_the_path_has_a_version(tree: Path) -> None:
    code = "import sys; sys.path.insert(0, '.'); import h2mv_dist; print(h2mv_dist.__version__)"
    assert run(sys.executable, "-S", "-c", code, folder=tree).strip() == "0+unknown"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == "h2mv_dist-7.8.9-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"h2mv_dist/{name}" for name in DATA} <= names
    assert {name.split("/")[0] for name in names} == {"h2mv_dist", "h2mv_dist-7.8.9.dist-info"}
    sources = {str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "h2mv_dist").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_it_installs_without_network_and_runs(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    offline = ("--no-index", "--find-links", wheel.parent, "--disable-pip-version-check", "--quiet")
    run(python, "-m", "pip", "install", *offline, "--no-deps", "h2mv-dist", folder=tmp_path)
    links = link(declared().values(), tmp_path / "dependencies")
    given = {"PYTHONPATH": str(links), "DASK_CONFIG": str(tmp_path)}
    run(python, "-m", "pip", "check", folder=tmp_path, **given)
    command = environment / "bin" / "h2mv-dist"
    assert "Usage: h2mv-dist" in run(command, "--help", folder=tmp_path, **given)
    options = ("--resolution", "20", "--years", "1")
    assert "land cells" in run(command, "world", "w.zarr", *options, folder=tmp_path, **given)
    code = "import h2mv_dist as h; print(h.__version__, h.__file__)"
    version, where = run(python, "-c", code, folder=tmp_path, **given).split()
    assert version == "7.8.9"
    assert Path(where).is_relative_to(environment)
