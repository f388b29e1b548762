"""What pages of the documentation take from the code: settings, commands, errors, and the READMEs of deploy/.

A page says ``<!-- settings -->``, ``<!-- commands -->``, ``<!-- errors -->`` or ``<!-- readme FOLDER -->``.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import typer

from h2mv_dist.cli import app
from h2mv_dist.template import settings_template

ROOT = Path(__file__).parents[1]
_MARK = re.compile(r"<!-- (settings|commands|errors|readme) ?(\S*) -->")
_LINK = re.compile(r"\[([^]]+)\]\((?!https?:|#)[^)]+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page; called by mkdocs."""
    return _MARK.sub(lambda mark: _MAKERS[mark[1]](mark[2]), markdown)


def _settings(_: str) -> str:
    return f"```toml\n{settings_template()}```\n"


def _readme(folder: str) -> str:
    """A README without its title; its links to files are shown as names."""
    _, _, text = (ROOT / folder / "README.md").read_text().partition("\n")
    return _LINK.sub(r"\1", text)


def _commands(_: str) -> str:
    return "\n".join(_described(typer.main.get_command(app), "h2mv-dist"))


def _described(command: click.Command, name: str) -> Iterator[str]:
    if isinstance(command, click.Group):
        for part in command.commands.values():
            yield from _described(part, f"{name} {part.name}")
        return
    context = click.Context(command, info_name=name)
    yield f"## `{name}`\n\n```text\n{command.get_help(context)}\n```\n"


class _Error(NamedTuple):
    what: str
    expected: str
    fix: str
    where: str


def _errors(_: str) -> str:
    found = sorted({error.what: error for error in _raised()}.values())
    rows = (f"| {_cell(e.what)} | {_cell(e.expected)} | {_cell(e.fix)} |" for e in found)
    return "\n".join(("| Message | Expected | What to do |", "|---|---|---|", *rows)) + "\n"


def _raised() -> Iterator[_Error]:
    """Every error that is described in the source; what depends on the case stands in angle brackets."""
    for path in sorted((ROOT / "h2mv_dist").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "describe" and node.args:
                given = {word.arg: _text(word.value) for word in node.keywords}
                parts = (_text(node.args[0]), given.get("expected", ""), given.get("fix", ""))
                yield _Error(*parts, path.name)


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) for part in parts)
        case ast.FormattedValue(value=value):
            return f"<{ast.unparse(value).split('(')[0].split('.')[-1]}>"
        case ast.BinOp(left=left, right=right):
            return _text(left) + _text(right)
        case ast.IfExp(body=body, orelse=other):
            return " / ".join(filter(None, (_text(body), _text(other))))
        case _:
            return f"<{ast.unparse(node).split('(')[0].split('.')[-1]}>"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


_MAKERS = {"settings": _settings, "commands": _commands, "errors": _errors, "readme": _readme}
