"""What is in ``deploy/``, and what else users read."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROGRAMS = ("h2mv-dist", "dask")


def texts() -> dict[str, str]:
    """The text of every file of ``deploy/`` and of every page for users, by its path."""
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *DEPLOY.rglob("*")]
    return {str(p.relative_to(ROOT)): p.read_text() for p in sorted(files) if p.is_file()}


def documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def command_lines(name: str, text: str) -> Iterator[list[str]]:
    """Command lines of our programs in a file: lists of YAML, and lines that a shell or systemd would run."""
    if name.endswith((".yaml", ".yml")):
        for document in yaml.safe_load_all(text):
            for argv in _lists(document):
                yield from _programs(argv)
    else:
        for line in _shell_lines(name, text.replace("\\\n", " ")):
            yield from _programs(shlex.split(line, comments=True))


def _shell_lines(name: str, text: str) -> Iterator[str]:
    if name.endswith(".md"):
        blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        yield from (line for block in blocks for line in block.splitlines())
    elif name.endswith(".service"):
        yield from (line.partition("=")[2] for line in text.splitlines() if line.startswith("Exec"))


def _lists(node: Any) -> Iterator[list[str]]:
    """Lists of words, and the words of scripts that ``sh -c`` runs."""
    if isinstance(node, dict):
        for value in node.values():
            yield from _lists(value)
    elif isinstance(node, list):
        if all(isinstance(item, str) for item in node):
            yield shlex.split(node[-1]) if node[:2] == ["sh", "-c"] else node
        for item in node:
            yield from _lists(item)


def _programs(words: list[str]) -> Iterator[list[str]]:
    """Each command of ours that begins among these words, up to what ends it in a shell."""
    for start, word in enumerate(words):
        begins = start == 0 or "/bin/" in word or words[start - 1] == "--"
        if begins and word.rpartition("/")[2] in PROGRAMS:
            rest = words[start + 1 :]
            end = next((i for i, w in enumerate(rest) if w in ("||", "&&", "|", ";", ">", "&")), len(rest))
            # what stands alone is an entry point, and gets its arguments elsewhere
            if end:
                yield [word.rpartition("/")[2], *rest[:end]]
            return
