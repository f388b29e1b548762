"""What ``deploy/`` and the pages tell users to type, and their settings, are what the program takes."""

import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from h2mv_dist.cli import app
from h2mv_dist.config import load, load_cluster
from tests.deploy.files import ROOT, command_lines, texts

TEXTS = texts()
LINES = [(name, argv) for name, text in TEXTS.items() for argv in command_lines(name, text)]
_SECRET = re.compile(r"(?i)(secret|password|token|key)[a-z_]*[=:] *['\"]?[A-Za-z0-9+][A-Za-z0-9/+]{15,}")


@pytest.mark.parametrize(("name", "argv"), LINES, ids=[f"{n}: {' '.join(a)}" for n, a in LINES])
def test_a_command_line_is_understood(name: str, argv: list[str]) -> None:
    program, *arguments = argv
    if arguments == ["--help"]:
        return
    # typer's commands are not click's, but do the same
    command: Any = typer.main.get_command(app) if program == "h2mv-dist" else _dask()
    while (commands := getattr(command, "commands", None)) is not None:
        word, *arguments = arguments
        if word == "cuda":
            pytest.importorskip("dask_cuda")
        assert word in commands
        command = commands[word]
    command.make_context(program, arguments)


def _dask() -> click.Command:
    commands = {point.name: point.load() for point in entry_points(group="dask_cli")}
    return click.Group("dask", commands=commands)


def test_every_folder_has_command_lines() -> None:
    folders = {str(Path(name).parent) for name, _ in LINES}
    places = {"slurm", "kubernetes/base", "docker", "cloud", "systemd"}
    assert {".", "docs", "docs/howto", *(f"deploy/{place}" for place in places)} <= folders


@pytest.mark.parametrize("name", [name for name in TEXTS if name.endswith(".toml")])
def test_settings_are_valid(name: str) -> None:
    tree = tomllib.loads(TEXTS[name])
    assert "storage_options" not in tree, "they belong into the environment"
    if "data" in tree:
        load(ROOT / name)
    assert load_cluster(ROOT / name).kind in ("auto", "address", "slurm")


@pytest.mark.parametrize("name", [name for name in TEXTS if name.endswith(".md")])
def test_settings_in_texts_are_valid(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    for block in re.findall(r"^```toml\n(.*?)^```", TEXTS[name], re.MULTILINE | re.DOTALL):
        tree = tomllib.loads(block)
        # a package's own pyproject.toml
        if "project" not in tree:
            file = tmp_path_factory.mktemp("settings") / "settings.toml"
            file.write_text(block if "data" in tree else f'data.url = "x"\n{block}')
            load(file)


@pytest.mark.parametrize("name", [name for name in TEXTS if name.endswith("README.md")])
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXTS[name]):
        assert "://" in target or (ROOT / name).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("name", TEXTS)
def test_nothing_looks_like_a_credential(name: str) -> None:
    assert _SECRET.search(TEXTS[name]) is None
