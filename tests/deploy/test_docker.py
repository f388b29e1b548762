"""Dockerfiles: linted, careful, and their Python part run in an environment of its own."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.deploy.files import DEPLOY, ROOT
from tests.distribution.declared import declared, link

FILES = sorted((DEPLOY / "docker").glob("Dockerfile*"))
Instruction = tuple[str, str]
VERSION = "SETUPTOOLS_SCM_PRETEND_VERSION_FOR_H2MV_DIST"
"""The argument that tells a build, which sees no .git, what it builds."""


def stages(file: Path) -> list[list[Instruction]]:
    """The instructions of each stage."""
    text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: list[list[Instruction]] = []
    for line in filter(str.strip, text.splitlines()):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            found.append([])
        found[-1].append((word, rest))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_hadolint_is_content(file: Path) -> None:
    hadolint = shutil.which("hadolint") or str(Path(sys.executable).with_name("hadolint"))
    done = subprocess.run([hadolint, "--no-color", str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_an_image_is_pinned_and_runs_without_privileges(file: Path) -> None:
    build, final = stages(file)
    bases = {dict(stage)["FROM"].partition(" ")[0] for stage in (build, final)}
    assert len(bases) == 1, "a virtual environment needs the Python it was made with"
    assert all(re.fullmatch(r"[a-z]+:\d+\.\d+\.\d+-[a-z-]+", base) for base in bases)
    assert [rest for word, rest in final if word == "USER"] == ["10001:10001"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_everything_that_is_copied_is_there(file: Path) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    for word, rest in stages(file)[0]:
        if word == "COPY":
            sources = set(rest.split()[:-1])
            assert sources <= allowed
            assert all((ROOT / source).exists() for source in sources)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_a_build_can_be_told_its_version(file: Path) -> None:
    words = stages(file)[0]
    assert words.index(("ARG", VERSION)) < next(i for i, (word, _) in enumerate(words) if word == "RUN")
    build = f"docker build --build-arg {VERSION} -f deploy/docker/{file.name} "
    assert build in (DEPLOY / "docker" / "README.md").read_text()
    image = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())["x-image"]
    assert image["build"]["args"] == [VERSION]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Path]:
    """A folder for an environment, which is too large to be kept."""
    folder = tmp_path / "environment"
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_the_python_part_installs_and_runs(tmp_path: Path, environment: Path) -> None:
    """The first stage of the image, with folders of this test's for those of the image.

    The declared dependencies are links to those of this environment, so that pip has no gigabytes to unpack.
    """
    source = tmp_path / "src"
    source.mkdir()
    links = link(declared("monitor").values(), tmp_path / "dependencies")
    given = {"PYTHONPATH": str(links)}
    for word, rest in stages(DEPLOY / "docker" / "Dockerfile")[0]:
        if word == "COPY":
            *names, _ = rest.split()
            for name in names:
                _copy(ROOT / name, source / name)
        if (word, rest) == ("ARG", VERSION):
            given[VERSION] = "7.8.9"
        if word == "RUN":
            script = rest.replace("/opt/h2mv-dist", str(environment)).replace(
                "python -m venv", f"{sys.executable} -m venv"
            )
            _run(["sh", "-c", script], source, **given)
    programs = environment / "bin"
    _run([str(programs / "python"), "-m", "pip", "check"], tmp_path, **given)
    code = "import h2mv_dist as h; print(h.__version__, h.__file__)"
    version, where = _run([str(programs / "python"), "-c", code], tmp_path, **given).split()
    assert version == "7.8.9"
    assert Path(where).is_relative_to(environment)
    world = ["world", str(tmp_path / "world.zarr"), "--resolution", "15"]
    _run([str(programs / "h2mv-dist"), *world], tmp_path, **given)
    _run([str(programs / "python"), "-m", "dask", "scheduler", "--help"], tmp_path, **given)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def _run(command: list[str], folder: Path, **given: str) -> str:
    """What a program prints, with these variables, among them a path without this repository."""
    variables = {**os.environ, "PIP_NO_COMPILE": "1", **given}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
